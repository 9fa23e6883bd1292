"""Errors meant for the person who must fix them: printed as one message, never as a traceback.

`UserError` is the base; a subclass exists only where a caller treats it differently (a bad row is never
retried, an unreachable store is). The runner exits with `exit_code`, which the flow reads.
"""


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
