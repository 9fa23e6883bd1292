"""The command `sluice`. Imports late, so that `sluice --help` answers at once.

Every error meant for a person is printed as one message, never as a traceback; the exit code tells what it was:
2 a mistake in params or data, 3 a gate, 75 a store that is away, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn, cast

import typer

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    help="From plain text to a registered, gated language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # halves the time of --help
)


class Terminated(BaseException):
    """SIGTERM: ends the flow the way Ctrl-C does, so that it can stop its stages."""


@app.command()
def run(
    stages: Annotated[list[str] | None, typer.Argument(help="Stages to bring up to date; all if left out.")] = None,
    profile: Annotated[str | None, typer.Option(help="Write profiles/NAME.yaml into params.yaml first.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of a live table.")] = False,
) -> None:
    """Run every stage that something changed for, with gates, and say what there is now."""
    with _messages() as (root, console):
        from flows.run import run as run_stages

        run_stages(root, stages or [], profile or None, plain, console)


@app.command()
def status() -> None:
    """Show which stages are fresh, which are stale and why, the champions, and what waits for delivery."""
    with _messages() as (root, console):
        from flows.status import show

        show(root, console)


@app.command()
def report(
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Print where the report is; make it again if that takes no other stage."""
    with _messages() as (root, console):
        from flows.run import run as run_stages
        from flows.status import report_needs, require_report

        needs = report_needs(root)
        if needs == ["report"]:
            run_stages(root, ["report"], None, True, console)
        page = require_report(root, needs)
        if needs not in ([], ["report"]):
            console.print(f"it tells of an earlier state: {', '.join(needs)} must run again (`sluice run`)")
        console.print(page.relative_to(root).as_posix(), soft_wrap=True)
        if open_page:
            typer.launch(str(page))


@app.command()
def doctor() -> None:
    """Check this machine and this installation; say what to do about what is not right."""
    with _messages() as (root, console):
        from flows.doctor import examine

        if not examine(root, console):
            raise typer.Exit(1)


@app.command()
def profile(name: Annotated[str, typer.Argument(help="A file in profiles/, without .yaml.")]) -> None:
    """Write a profile's values into params.yaml and say what changed."""
    with _messages() as (root, console):
        from flows.profiles import apply

        for line in apply(root, name) or [f"params.yaml has the values of {name} already"]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Directory of a model, such as artifacts/ppo/model.")],
    file: Annotated[Path, typer.Argument(help="The GGUF file to write, NAME.gguf.")],
    type_: Annotated[str, typer.Option("--type", help="Of the matrices: f16, q8_0 or q4_0.")] = "q8_0",
) -> None:
    """Write a model as one GGUF file, which llama.cpp and Ollama load."""
    place, target = model.absolute(), file.absolute()  # as seen from here, not from the repository's root
    with _messages() as (_, console):
        from pipelines.core import gguf_export

        made = gguf_export.export(place, target, cast("gguf_export.Kind", type_))
        told = f"{file}: {made.parameters / 1e6:.1f} million parameters in {made.bytes / 1e6:.1f} MB, {made.kind}"
        console.print(told, markup=False, highlight=False, soft_wrap=True)
        if made.kept_in_f16:
            kept = f"in f16, since their rows are no multiple of 32: {', '.join(made.kept_in_f16)}"
            console.print(kept, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _messages() -> Iterator[tuple[Path, Console]]:
    """The repository's root and the console; errors become one message and their exit code."""
    from rich.console import Console

    from pipelines.core import environment
    from pipelines.core.errors import UserError

    console = Console()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        root = find_root(Path.cwd())
        os.chdir(root)  # DVC names files as seen from the current directory
        environment.prepare(root)
        yield root, console
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


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _end(message: str, code: int) -> NoReturn:
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(code)


if __name__ == "__main__":
    app()
