"""Errors meant for the person who must fix them: printed as one message, never as a traceback.

`UserError` is the base; a subclass exists only where a caller treats it differently (a bad row is never
retried, an unreachable store is). The runner exits with `exit_code`, which the flow reads.
"""

from __future__ import annotations

import errno


class UserError(Exception):
    """A mistake in what the user gave us. The message names file, row, key and remedy."""

    exit_code = 2


class ParamsError(UserError):
    """`params.yaml` (or a profile) holds a value that is not accepted."""


class DataError(UserError):
    """A row, file or table of the data is not what its declaration says."""


class ArtifactError(UserError):
    """An artifact directory or checkpoint is missing, incomplete or does not fit."""


class GateError(UserError):
    """A model did not pass its gate, or the gate itself is misdeclared."""

    exit_code = 3


class StoreUnavailable(UserError):
    """A tracking server, registry or hub did not answer. Worth trying again."""

    exit_code = 75  # EX_TEMPFAIL


def of_machine(error: Exception) -> str | None:
    """What the user must mend when the machine, not the program, is at fault; None for anything else."""
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__  # torch.save tells a fault of its archive, after the disk has told its own
    number = getattr(error, "errno", None)
    place = getattr(error, "filename", None) or "the repository's disk"
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return f"the disk is full ({place}): {error}. Free some space and run again; nothing was published."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write or read {place}: {error}. Nothing was published."
    # torch's own errors of this kind are no MemoryError: on a GPU one by name, on a CPU a RuntimeError
    of_torch = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    if isinstance(error, MemoryError) or of_torch:
        return "not enough memory. Lower batch sizes in params.yaml or free some memory; nothing was published."
    return None
