"""What a person sees in the terminal: a live table on a terminal, plain lines in a log file or CI.

Plain lines are one per change of state, everything a stage prints, and its progress at most every ten
seconds. Both end with the same table of stages.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flows.board import Board, Row

PROGRESS_SECONDS = 10.0
# What DVC advises after each stage; the log keeps it.
_ADVICE = (
    "Generating lock file", "Updating lock file", "To track the changes with git", "git add ",
    "To enable auto staging", "dvc config core.autostage", "Use `dvc push`",
)  # fmt: skip
_STYLES = {
    "waiting": "dim", "running": "bold cyan", "run": "green", "restored": "green", "cached": "green dim",
    "failed": "bold red",
}  # fmt: skip


@contextlib.contextmanager
def shown(board: Board, console: Console, plain: bool) -> Iterator[Callable[[], None]]:
    """Show the board until the block ends; the block calls what it is given, a few times a second."""
    if plain or not console.is_terminal:
        lines = _Lines(board, console)
        try:
            yield lines.update
        finally:
            lines.update()
        return
    noted: dict[str, int] = {}
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def update() -> None:
            board.refresh()
            for row in board.rows.values():
                _say_notes(console, row, noted)  # they stay, above the table
            live.update(_live_table(board), refresh=True)

        try:
            yield update
        finally:
            update()


@dataclass
class _Lines:
    board: Board
    console: Console
    states: dict[str, str] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)
    progressed: dict[str, float] = field(default_factory=dict)

    def update(self) -> None:
        self.board.refresh()
        for row in self.board.rows.values():
            for line in self._new_output(row):
                _say(self.console, row, f"| {line}")
            state = row.state  # once: a thread of the flow changes it
            if self.states.get(row.stage, "waiting") != state:
                self.states[row.stage] = state
                self.progressed[row.stage] = time.monotonic()
                _say(self.console, row, _sentence(row))
            _say_notes(self.console, row, self.noted)
            if state == "running" and time.monotonic() - self.progressed[row.stage] >= PROGRESS_SECONDS:
                self.progressed[row.stage] = time.monotonic()
                _say(self.console, row, _progress(row))

    def _new_output(self, row: Row) -> list[str]:
        """Whole lines that the stage printed since the last call; all of them once it is over."""
        if row.log is None or not row.log.exists():
            return []
        with row.log.open("rb") as file:
            file.seek(self.read.get(row.stage, 0))
            fresh = file.read()
        whole = fresh if row.state != "running" else fresh[: fresh.rfind(b"\n") + 1]
        self.read[row.stage] = self.read.get(row.stage, 0) + len(whole)
        lines = whole.decode("utf-8", "replace").splitlines()
        return [line for line in lines if line.strip() and not line.strip().startswith(_ADVICE)]


def _say(console: Console, row: Row, text: str) -> None:
    console.print(f"{row.stage:<10} {text}", markup=False, highlight=False, soft_wrap=True)


def _say_notes(console: Console, row: Row, noted: dict[str, int]) -> None:
    """What there is to tell of a stage and was not told yet; `noted`: how many notes of each stage were."""
    told = noted.get(row.stage, 0)
    for note in row.notes[told:]:
        _say(console, row, note)
        told += 1
    noted[row.stage] = told


def _sentence(row: Row) -> str:
    took = f" in {duration(row.seconds)}" if row.seconds is not None and row.state in ("run", "failed") else ""
    return "  ".join(part for part in (f"{row.state}{took}", row.metric, row.verdict) if part)


def _progress(row: Row) -> str:
    share, left = row.share(), row.remaining()
    parts = [f"{duration(row.elapsed())} so far"]
    if share is not None:
        parts.insert(0, f"{share:.0%} ({row.live['step']}/{row.live['total']})")
    if left is not None:
        parts.append(f"{duration(left)} to go")
    return "  ".join([*parts, row.shown()]).rstrip()


def _live_table(board: Board) -> RenderableType:
    table = Table(box=None, pad_edge=False, title=board.title, title_justify="left", title_style="dim")
    for heading in ("stage", "", "progress", "elapsed", "to go", ""):
        table.add_column(heading, no_wrap=True)
    for row in board.rows.values():
        share, left = row.share(), row.remaining()
        running = row.state == "running"
        bar: RenderableType = ""
        if running:
            bar = ProgressBar(total=1.0, completed=share or 0.0, width=24, pulse=share is None)
        table.add_row(
            row.stage,
            Text(row.state, _STYLES[row.state]),
            bar,
            duration(row.elapsed()),
            duration(left) if running else "",
            row.shown() if running else "  ".join(p for p in (row.metric, row.verdict) if p),
        )
    return table


def stages_table(board: Board) -> Table:
    """The table at the end: one row a stage."""
    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "", "time", "metric", "verdict"):
        table.add_column(heading, no_wrap=heading not in ("metric", "verdict"))
    for row in board.rows.values():
        state = "not run" if row.state == "waiting" else row.state
        took = "" if row.state == "cached" else duration(row.seconds)
        table.add_row(row.stage, Text(state, _STYLES[row.state]), took, row.metric, row.verdict)
    return table


def duration(seconds: float | None) -> str:
    """`0.4s`, `12s`, `3m05s`, `1h02m`; empty for None."""
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
