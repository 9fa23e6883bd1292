"""The command `sluice`. Imports late, so that `sluice --help` answers at once.

Every error meant for a person is printed as one message, never as a traceback, with an exit code: flows/messages.py.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, cast

import typer

from flows.messages import messages

app = typer.Typer(
    help="From plain text to a registered, gated language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # halves the time of --help
)


@app.command()
def run(
    stages: Annotated[list[str] | None, typer.Argument(help="Stages to bring up to date; all if left out.")] = None,
    profile: Annotated[str | None, typer.Option(help="Write profiles/NAME.yaml into params.yaml first.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of a live table.")] = False,
    only: Annotated[bool, typer.Option("--only", help="The named stages alone, over what stands of the rest.")] = False,
) -> None:
    """Run every stage that something changed for, with gates, and say what there is now."""
    with messages() as (root, console):
        from flows.run import run as run_stages

        run_stages(root, stages or [], profile or None, plain, console, only)


@app.command()
def status() -> None:
    """Show which stages are fresh, which are stale and why, the champions, and what waits for delivery."""
    with messages() as (root, console):
        from flows.status import show

        show(root, console)


@app.command()
def report(
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Print where the report is; make it again if that takes no other stage."""
    with messages() as (root, console):
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
    with messages() as (root, console):
        from flows.doctor import examine

        if not examine(root, console):
            raise typer.Exit(1)


@app.command()
def profile(name: Annotated[str, typer.Argument(help="A file in profiles/, without .yaml.")]) -> None:
    """Write a profile's values into params.yaml and say what changed."""
    with messages() as (root, console):
        from flows import profiles, run_locks

        with run_locks.alone(root):  # see `flows.run`
            changes = profiles.apply(root, name)
        for line in changes or [f"params.yaml has the values of {name} already"]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Directory of a model, such as artifacts/ppo/model.")],
    file: Annotated[Path, typer.Argument(help="The GGUF file to write, NAME.gguf.")],
    type_: Annotated[str, typer.Option("--type", help="Of the matrices: f16, q8_0 or q4_0.")] = "q8_0",
) -> None:
    """Write a model as one GGUF file, which llama.cpp and Ollama load."""
    place, target = model.absolute(), file.absolute()  # as seen from here, not from the repository's root
    with messages() as (_, console):
        from pipelines.core import gguf_export

        made = gguf_export.export(place, target, cast("gguf_export.Kind", type_))
        told = f"{file}: {made.parameters / 1e6:.1f} million parameters in {made.bytes / 1e6:.1f} MB, {made.kind}"
        console.print(told, markup=False, highlight=False, soft_wrap=True)
        if made.kept_in_f16:
            kept = f"in f16, since their rows are no multiple of 32: {', '.join(made.kept_in_f16)}"
            console.print(kept, markup=False, highlight=False, soft_wrap=True)


WHY = typer.Option(help="The reason, for whoever reads the journal.")
EXPECTED = typer.Option(help="The champion you saw; refused if it is another one now (none: nobody).")
RELEASE = typer.Option("--release", help="Everything that belongs together, or nothing.")


@app.command()
def promote(
    why: Annotated[str, WHY],
    model: Annotated[str, typer.Argument(help="A registered model; with --release sluice-policy if left out.")] = "",
    version: Annotated[str, typer.Argument(help="The newest if left out.")] = "",
    expected: Annotated[str | None, EXPECTED] = None,
    release: Annotated[bool, RELEASE] = False,
) -> None:
    """Make a version that passes its gate the champion, or all that were made with it."""
    with messages() as (root, console):
        from flows import promote as champions
        from pipelines.core.errors import UserError

        if release:
            champions.promote_release(root, model or None, version or None, why, expected, console)
        elif model:
            champions.promote(root, model, version or None, why, expected, console)
        else:
            raise UserError("name a model, or type --release for all that belongs together")


@app.command()
def rollback(
    model: Annotated[str, typer.Argument(help="A registered model.")] = "",
    why: Annotated[str, WHY] = "no reason given",
    expected: Annotated[str | None, EXPECTED] = None,
    release: Annotated[bool, RELEASE] = False,
) -> None:
    """Make the previous champion the champion again, or put back what the last release has replaced."""
    with messages() as (root, console):
        from flows import promote as champions
        from pipelines.core.errors import UserError

        if release and not model and expected is None:
            champions.rollback_release(root, why, console)
        elif model and not release:
            champions.rollback(root, model, why, expected, console)
        else:
            raise UserError("name a model, or type --release alone for all that was promoted together")


@app.command()
def history(model: Annotated[str, typer.Argument(help="A registered model; all if left out.")] = "") -> None:
    """Print who promoted and rolled back what, when and why."""
    with messages() as (root, console):
        from flows import promote as champions

        champions.history(root, model or None, console)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="MODEL@ALIAS, MODEL/VERSION or MODEL, its champion.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another version of the same model.")],
) -> None:
    """Show two versions side by side: scores on the same examples with intervals, win rates, samples."""
    with messages() as (root, console):
        from flows import compare as versions

        versions.show(versions.compare(root, first, second), console)


@app.command()
def lineage(version: Annotated[str, typer.Argument(help="MODEL@ALIAS, MODEL/VERSION or MODEL.")]) -> None:
    """Print where a version comes from, who approved it, and the commands that make the same bytes again."""
    with messages() as (root, console):
        from flows.lineage_report import show

        show(root, version, console)


NAMED = typer.Option(help="MODEL@ALIAS, MODEL/VERSION, MODEL (its champion), or a directory.")
ALONE = typer.Option("--no-rag", help="From what the model remembers, without looking anything up.")


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What you want to know.")],
    model: Annotated[str | None, NAMED] = None,
    no_rag: Annotated[bool, ALONE] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="The most tokens of an answer.")] = None,
    temperature: Annotated[float, typer.Option(help="0: the likeliest answer.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Leave out the least likely tokens.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the random numbers, where the temperature is above 0.")] = 0,
) -> None:
    """Answer a question, with numbered sources and the time it took."""
    here = Path.cwd()
    with messages() as (root, console):
        from flows.ask import Options, ask

        options = Options(model, not no_rag, as_json, max_new_tokens, temperature, top_p, seed)
        ask(root, here, question, options, console)


@app.command()
def chat(model: Annotated[str | None, NAMED] = None, no_rag: Annotated[bool, ALONE] = False) -> None:
    """Talk in the terminal; /help says what else can be typed."""
    here = Path.cwd()
    with messages() as (root, console):
        from flows.chat import chat

        chat(root, here, model, not no_rag, console)


@app.command()
def gc(
    yes: Annotated[bool, typer.Option("--yes", help="Remove it.")] = False,
) -> None:
    """Show what takes room and nobody needs: no alias, no tag, no branch, no run that is going on."""
    with messages() as (root, console):
        from flows.gc import collect

        collect(root, yes, console)


class Does(StrEnum):
    """What to do with the servers."""

    start = "start"
    stop = "stop"


PORT = typer.Option(min=1, max=65535, help="On the loopback address.")


@app.command()
def server(
    does: Annotated[Does, typer.Argument(metavar="start|stop")],
    prefect_port: Annotated[int, PORT] = 4200,
    mlflow_port: Annotated[int, PORT] = 5000,
) -> None:
    """Start or stop Prefect's server, MLflow's and a worker, which go on in the background."""
    with messages() as (root, console):
        from flows import servers

        if does == Does.start:
            found = servers.start(root, prefect_port, mlflow_port)
            lines = [f"Prefect  {found['prefect'].removesuffix('/api')}", f"MLflow   {found['mlflow']}"]
        else:
            lines = ["stopped" if servers.stop(root) else "nothing was running"]
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
