"""`sluice status` and `sluice report`: what stands, what is stale and why, who is champion. Changes nothing."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from flows import outcome, stages
from pipelines.core import graph, policy
from pipelines.core.errors import UserError
from pipelines.core.gates import Verdict

REASONS_SHOWN = 4


def show(root: Path, console: Console) -> None:
    """Print stages (fresh, or stale and why), the spool's backlog, promotions that have no end yet, champions and what
    waits for a person to promote it.

    Raises:
        UserError: after the table, when the journal of promotions cannot be read.
        StoreUnavailable: after the table, when the registry's store is away.
    """
    from pipelines.core import promotion, registry, tracking, verdicts

    state = stages.look(root)
    suspects, declared = state.suspects(), policy.load(root)
    judged: dict[str, Verdict] = {}
    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "", "why", "metric", "verdict"):
        table.add_column(heading, overflow="fold")
    for name in state.parents:
        word = "stale" if name in state.reasons else "waits" if name in suspects else "fresh"
        output = root / graph.stage(root, name).output
        every = [found for model, _ in declared.of_stage(name, output) if (found := verdicts.stored(root, model))]
        judged |= {one.model: one for one in every}
        table.add_row(
            name,
            word,
            why(state, name),
            outcome.key_metric(root, name, state.shows.get(name)),
            outcome.cell(every),
        )
    console.print(table, markup=False)  # a file may be called [old] notes.txt
    waiting = tracking.backlog(root)
    if waiting:
        console.print(f"spool     {len(waiting)} runs not delivered to MLflow yet; `sluice run` delivers them")
    for model, version in registry.champions(root).items():
        console.print(f"champion  {model} {version if version is not None else '(none yet)'}")
        if (one := judged.get(model)) is not None and one.by_hand and one.version != version:
            console.print(f"waits     {model} {one.version} is {one.by_hand}", markup=False)
    for line in promotion.unfinished(root):
        console.print(f"begun     {line}", markup=False, highlight=False, soft_wrap=True)


def why(state: stages.State, name: str) -> str:
    """Why a stage is stale, in a line; empty for a fresh one."""
    reasons = state.reasons.get(name, ())
    if reasons:
        more = len(reasons) - REASONS_SHOWN
        return ", ".join(reasons[:REASONS_SHOWN]) + (f" and {more} more" if more > 0 else "")
    stale = [parent for parent in state.parents[name] if parent in state.suspects()]
    return f"runs after {', '.join(stale)}" if stale else ""


def report_page(root: Path) -> Path:
    """Where the report's page is, whether or not it stands."""
    return root / graph.stage(root, "report").output / "report.html"


def report_needs(root: Path) -> list[str]:
    """Stages that have to run before the report tells how things are now, the report itself among them."""
    state = stages.look(root)
    suspects = state.suspects()
    return [name for name in state.needed(["report"]) if name in suspects]


def require_report(root: Path, needs: list[str]) -> Path:
    """The report's page, be it of an earlier state.

    Raises:
        UserError: no report was ever made.
    """
    page = report_page(root)
    if not page.exists():
        raise UserError(f"no report yet: {', '.join(needs)} must run first. Type `sluice run`.")
    return page
