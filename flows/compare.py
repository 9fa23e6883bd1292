"""`sluice compare A B`: two versions of a model side by side, on the terminal or as Markdown for a form or a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.core import terminal
from pipelines.core.errors import GateError

if TYPE_CHECKING:
    from pipelines.core.comparing import Compared

SCORES = ("score", "A", "B", "B - A, 95 %", "B wins", "")
METRICS = ("metric", "A", "B")


def compare(root: Path, first: str, second: str) -> Compared:
    """Compare two versions of a model, measured again where they saw different examples.

    Raises:
        UserError, GateError, StoreUnavailable: as `comparing.compare`.
    """
    from pipelines.core import comparing, references, rejudging, runner, store

    client, _ = store.connect(root)
    with store.answering(root):
        stage = references.resolve(client, first).tags.get(rejudging.STAGE)
        if stage is None:
            raise GateError(f"{first}: no stage of this repository made it, so there is nothing to compare by")
        return comparing.compare(root, client, first, second, runner.measure_for(root, stage))


def show(found: Compared, console: Console) -> None:
    """Print scores, metrics and samples."""
    console.print(*title(found), sep="\n", markup=False, highlight=False, soft_wrap=True)
    for head, rows in ((SCORES, score_rows(found)), (METRICS, metric_rows(found))):
        if rows:
            table = Table(box=None, pad_edge=False)
            for name in head:
                table.add_column(name, overflow="fold")
            for row in rows:
                table.add_row(*map(escape, row))
            console.print("", table)
    if found.samples:
        table = Table(pad_edge=False, show_lines=True)
        for name in ("prompt", "A", "B"):
            table.add_column(name, overflow="fold", ratio=1)
        for sample in found.samples:
            table.add_row(*(escape(terminal.clean(cell)) for cell in sample))
        console.print("", table)


def markdown(found: Compared) -> str:
    """The same as Markdown, as an approval shows it."""
    lines = [*title(found), ""]
    for head, rows in (
        (SCORES, score_rows(found)),
        (METRICS, metric_rows(found)),
        (("prompt", "A", "B"), found.samples),
    ):
        if rows:
            lines += [_row(head), _row(["---"] * len(head)), *map(_row, rows), ""]
    return "\n".join(lines)


def title(found: Compared) -> list[str]:
    """Which is A and which is B, and on what they were measured."""
    lines = [
        f"{name}: {entry.name} {entry.version}{_aliases(entry)}" for name, entry in (("A", found.a), ("B", found.b))
    ]
    if not found.same_data:
        lines.append("made with different held-out data: scores are measured again on today's, metrics are left out")
    return lines


def score_rows(found: Compared) -> list[list[str]]:
    """Cells of the scores."""
    rows = []
    for one in found.scores:
        wins = "" if one.wins is None else f"{one.wins.estimate:.1%} [{one.wins.low:.1%}, {one.wins.high:.1%}]"
        values = [f"{each.estimate:.4g} [{each.low:.4g}, {each.high:.4g}]" for each in (one.a, one.b)]
        difference = f"{one.difference.estimate:+.4g} [{one.difference.low:+.4g}, {one.difference.high:+.4g}]"
        rows.append([f"{one.name} ({one.examples} examples)", *values, difference, wins, one.verdict])
    return rows


def metric_rows(found: Compared) -> list[list[str]]:
    """Cells of the metrics that differ."""
    return [[name, f"{a:.6g}", f"{b:.6g}"] for name, a, b in found.metrics]


def _aliases(entry: object) -> str:
    names = sorted(getattr(entry, "aliases", []) or [])
    return f" ({', '.join(names)})" if names else ""


def _row(cells: list[str] | tuple[str, ...]) -> str:
    plain = [cell.replace("|", "\\|").replace("\n", "<br>") for cell in cells]
    return f"| {' | '.join(plain)} |"
