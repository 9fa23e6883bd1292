"""What is known of each stage while a flow runs: filled by the flow's threads, read by the terminal view."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flows import failures
from pipelines.core.errors import UserError

StageState = Literal["waiting", "running", "run", "restored", "cached", "failed"]


@dataclass
class Row:
    """One stage. `restored`: DVC brought the output back from its cache; `cached`: nothing had changed."""

    stage: str
    state: StageState = "waiting"
    log: Path | None = None
    started: float | None = None  # time.monotonic()
    seconds: float | None = None
    live: dict[str, Any] = field(default_factory=dict)
    metric: str = ""
    verdict: str = ""
    error: UserError | None = None
    notes: list[str] = field(default_factory=list)  # said once, in order

    def begin(self) -> None:
        """The stage starts, or starts again."""
        self.state, self.started, self.seconds, self.live = "running", time.monotonic(), None, {}

    def end(self, state: StageState) -> None:
        """The stage is over."""
        self.seconds = self.elapsed()
        self.state = state

    def elapsed(self) -> float | None:
        """Seconds since the stage started, or that it took."""
        if self.seconds is not None or self.started is None:
            return self.seconds
        return time.monotonic() - self.started

    def share(self) -> float | None:
        """How much of the stage is done, 0 to 1; None when it has not said how long it is."""
        total = self.live.get("total")
        return min(1.0, self.live.get("step", 0) / total) if total else None

    def remaining(self) -> float | None:
        """Seconds to go in the present part of the stage, at its pace; None when it cannot be told yet."""
        total, step, first = (self.live.get(key) for key in ("total", "step", "first"))
        if not total or first is None or step <= first or self.elapsed() is None:
            return None
        return float((self.live["updated"] - self.live["since"]) / (step - first) * (total - step))

    def shown(self) -> str:
        """The figures that the stage shows, such as `loss 2.31`."""
        shown = self.live.get("shown") or {}
        return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())


@dataclass
class Board:
    """Every stage of the flow, parents first."""

    root: Path
    rows: dict[str, Row]
    title: str = ""

    def refresh(self) -> None:
        """Read what the running stages say of themselves."""
        for row in self.rows.values():
            if row.state == "running":
                row.live = failures.live(self.root, row.stage)

    def error(self) -> UserError | None:
        """The first error in the graph's order."""
        return next((row.error for row in self.rows.values() if row.error is not None), None)
