"""How a command talks to a person: every error meant for them is one message, never a traceback, with an exit code.

The code tells what it was: 2 a mistake in params or data, 3 a gate, 75 a store that is away, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from flows import proxies

if TYPE_CHECKING:
    from rich.console import Console


class Terminated(BaseException):
    """SIGTERM: ends the flow the way Ctrl-C does, so that it can stop its stages."""


@contextlib.contextmanager
def messages() -> Iterator[tuple[Path, Console]]:
    """The repository's root and the console; errors become one message and their exit code."""
    from rich.console import Console

    from pipelines.core import environment
    from pipelines.core.errors import UserError

    _fill_in_streams()
    _write_anything()
    console = Console(emoji=False)  # `:key:` is what somebody wrote
    signal.signal(signal.SIGTERM, _terminate)
    try:
        root = find_root(Path.cwd())
        _warn_of_other_code(root)
        os.chdir(root)  # DVC names files as seen from the current directory
        environment.prepare(root)
        proxies.leave_out_this_machine()
        yield root, console
        console.file.flush()  # where nobody reads any more (`| head`), this tells typer, which ends without a word
    except UserError as error:
        _end(f"error: {error}", error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        _end(f"error: {error.filename or 'disk'}: {error.strerror}. Type `sluice doctor`.", 1)
    except KeyboardInterrupt:
        _end("stopped by Ctrl-C; no stage is left running, `sluice run` goes on from the last checkpoint", 130)
    except BaseException as error:
        # Prefect, while a flow runs, turns SIGTERM into an exception of its own of this name.
        if isinstance(error, Terminated) or type(error).__name__ == "TerminationSignal":
            _end("stopped by SIGTERM; no stage is left running, `sluice run` goes on from the last checkpoint", 143)
        raise


def find_root(here: Path) -> Path:
    """The repository's root: the nearest folder at or above `here` that holds `dvc.yaml` and `params.yaml`.

    Raises:
        UserError: there is none.
    """
    from pipelines.core.errors import UserError

    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").exists() and (folder / "params.yaml").exists():
            return folder
    raise UserError(f"no dvc.yaml and params.yaml in {here} or above it: change into the repository")


def _warn_of_other_code(root: Path) -> None:
    """Stages run as they are in the current repository; this command, from another one's environment, does not."""
    here, own = root / "flows" / "messages.py", Path(__file__)
    if here.exists() and not here.samefile(own):
        told = (
            f"warning: this command is the one of {own.resolve().parents[1]}, gates and records go by what is there; "
            f"stages run as they are in {root}. `make setup` gives this folder its own."
        )
        print(told, file=sys.stderr, flush=True)


def _fill_in_streams() -> None:
    """A stream that whoever started us has closed (`<&-`, `>&-`) is an empty one: Python has None in its place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _write_anything() -> None:
    """What the encoding of the standard output lacks is spelled out, `\\u2026`: no answer may end in a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _end(message: str, code: int) -> NoReturn:
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(code)
