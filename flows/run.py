"""`sluice run`, from the typed command to the last line: profile, checks, the flow, what there is now."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path

from rich.console import Console

from flows import outcome, profiles, run_locks, sources, stages, view
from flows.board import Board, Row
from pipelines.core import declared, graph, policy
from pipelines.core.errors import GateError, StoreUnavailable, UserError
from pipelines.core.ledger import LedgerHeld
from pipelines.core.params import whole


def run(root: Path, wanted: list[str], profile: str | None, plain: bool, console: Console, only: bool = False) -> None:
    """Bring the wanted stages (all, if none is named) up to date and say what there is now.

    With `only`, what they depend on is taken as it stands.

    Nothing starts Prefect when nothing is stale.

    Raises:
        UserError: something is wrong with what the user gave us, a stage failed or a model did not pass.
    """
    with run_locks.alone(root):  # the stages of another flow would go on with other params
        if profile is not None:
            _say(console, profiles.apply(root, profile) or [f"params.yaml has the values of {profile} already"])
        whole.load(root / "params.yaml")
        _say(console, sources.keep(root))
    declared.check(root)
    known = None if _missing(root, wanted) else stages.look(root)
    if known is not None and known.suspects().isdisjoint(needed := known.needed(wanted, only)):
        _catch_up(root, known, needed, console)
    else:
        from flows.server import prefect_api

        with prefect_api(root, lambda: known or stages.look(root)) as state:
            from flows.train import train

            train(state)(str(root), wanted, plain, only)
        needed = state.needed(wanted, only)
    _say(console, ["", *whats_next(root, needed)])


def _missing(root: Path, wanted: list[str]) -> bool:
    """Whether a wanted output is not there, so that a stage will run; DVC, who knows every reason, takes longer."""
    specs = graph.load(root)
    outputs = [root / specs[name].output for name in wanted or specs if name in specs]
    return specs.keys() >= set(wanted) and not all(output.exists() for output in outputs)


def _catch_up(root: Path, state: stages.State, needed: list[str], console: Console) -> None:
    """Nothing to run: deliver what the spool holds, judge what a bare `dvc repro` made, show the table.

    Raises:
        GateError: a model that stands did not pass.
        UserError: the journal of promotions cannot be read.
        StoreUnavailable, LedgerHeld: the registry's store is away; another promotion does not end.
    """
    from pipelines.core import promotion, registry, runner

    board = Board(root, {name: Row(name, "cached") for name in needed})
    stops = whole.load(root / "params.yaml").flow.failed_gate == "stop"
    trouble: list[UserError] = []
    try:
        promotion.recover(root)  # who is champion is asked below
    except UserError as error:  # a journal that cannot be read holds up neither verdicts nor delivery
        trouble.append(error)
    for name, row in board.rows.items():
        row.metric = outcome.key_metric(root, name, state.shows.get(name))
        try:
            judged = outcome.judge(root, name)
            again = partial(outcome.judge, root, name, again=True)
            try:
                judged = outcome.promote_all(root, judged, False, again, lambda done: _say(console, [done]))
            except (GateError, StoreUnavailable, LedgerHeld) as error:
                trouble.append(error)
            row.verdict = outcome.cell(judged)
            if failed := "\n".join(one.table() for one in judged if not one.passed):
                if stops:
                    trouble.append(GateError(failed))
                else:
                    _say(console, [failed])
        except (GateError, StoreUnavailable) as error:
            trouble.append(error)
    try:
        registry.reconcile(root, lambda stage: runner.measure_for(root, stage))
    except StoreUnavailable as error:
        trouble.append(error)
    console.print("nothing has changed, no stage runs")
    console.print(view.stages_table(board))
    if trouble:
        raise min(trouble, key=lambda one: not isinstance(one, GateError))


def whats_next(root: Path, needed: list[str]) -> list[str]:
    """What there is now and what to type next, a line each; paths relative to the repository."""
    specs = graph.load(root)
    rules = policy.load(root)
    lines = []
    for name in needed:
        output = specs[name].output
        lines += [f"model     {output}/{model.model}" for _, model in rules.of_stage(name, root / output)]
        if (root / output / "report.html").exists():
            lines.append(f"report    {output}/report.html")
    sluice = command_name(root)
    lines.append(f"next      {sluice} status    {sluice} report --open    make ui")
    lines.append("          change a value in params.yaml and type `make run` again: only what depends on it runs")
    return lines


def command_name(root: Path) -> str:
    """How to type `sluice` here: plain when the shell finds this environment's, else by its path."""
    own = Path(sys.executable).parent / "sluice"
    found = shutil.which("sluice")
    if found is not None and Path(found) == own and not own.is_relative_to(root):
        return "sluice"
    return own.relative_to(root).as_posix() if own.is_relative_to(root) else own.as_posix()


def _say(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
