"""What the runner gives every stage: where to compute, where to log, and when to stop.

Three kinds of number are kept apart. `log` takes points of a curve: the same on every run, they belong to
`history.csv`. `measure` takes figures of this machine (times, speeds): they reach the metrics file and MLflow,
never an output. `progress` takes what a person watching wants to see: it goes to the terminal and is gone.
"""

from __future__ import annotations

import csv
import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from pipelines.core import artifacts, environment
from pipelines.core.distributed import World, any_of

if TYPE_CHECKING:
    import torch

Curve = Callable[[int, dict[str, float]], None]
LIVE_SECONDS = 0.5  # how often the live file is written at most


class Stopped(Exception):
    """SIGTERM or SIGINT was received and the stage's checkpoint, if it has one, is written."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number


@dataclass
class StageContext:
    """One run of one stage. `device` is torch's name of it, `precision` is `fp32` or `bf16`, already decided."""

    stage: str
    root: Path
    fingerprint: str
    device: str = "cpu"
    precision: str = "fp32"
    threads: int = 1
    world: World = World()
    curve: Curve = lambda step, metrics: None
    history: list[dict[str, float]] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)
    signal_number: int = 0
    _live: dict[str, Any] = field(default_factory=dict)
    _written: float = 0.0

    @property
    def work(self) -> Path:
        """Scratch that survives a kill: `.work/<stage>/<fingerprint>/`, removed once the output stands."""
        place = self.root / environment.WORK / self.stage / self.fingerprint[:16]
        place.mkdir(parents=True, exist_ok=True)
        return place

    @property
    def documents(self) -> Path:
        """A directory for people, outside the output: what is written here may carry times and paths."""
        place = self.root / environment.STATE / "documents" / self.stage
        place.mkdir(parents=True, exist_ok=True)
        return place

    @property
    def dtype(self) -> torch.dtype:
        """torch's type of the precision: what models are computed and saved in."""
        import torch

        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def log(self, step: int, **metrics: float) -> None:
        """Add a point to the stage's curves: the same numbers on every run of the same inputs."""
        self.history.append({"step": step, **metrics})
        self.curve(step, metrics)

    def resume(self, history: list[dict[str, float]]) -> None:
        """Take over the curves of a checkpoint; points that tracking already holds are not doubled there."""
        self.history[:] = history
        for row in history:
            self.curve(int(row["step"]), {key: value for key, value in row.items() if key != "step"})

    def measure(self, **figures: float) -> None:
        """Note figures of this machine, such as a speed, for the metrics file."""
        self.measured.update(figures)

    def say(self, text: str) -> None:
        """Show a person what the stage works on or has made: printed, and kept with the run's record."""
        if self.world.leads:
            self.samples.append(text)
            print(text, flush=True)

    def progress(self, step: int, total: int | None = None, **shown: float | str) -> None:
        """Tell whoever watches how far the stage is. Cheap: the live file is written twice a second."""
        if not self.world.leads:
            return
        if total != self._live.get("total") or step < self._live.get("step", 0):
            self._live.update(since=time.time(), first=step)  # another part of the stage, at another pace
        self._live.update(step=step, total=total, shown=shown)
        if time.monotonic() - self._written >= LIVE_SECONDS or step == total:
            self.live("running")

    def live(self, state: str, message: str | None = None, exit_code: int | None = None) -> None:
        """Write `.sluice/live/<stage>.json`, which the terminal view and the flow read."""
        self._written = time.monotonic()
        self._live.setdefault("started", time.time())
        self._live.update(stage=self.stage, state=state, updated=time.time(), message=message, exit_code=exit_code)
        place = live_file(self.root, self.stage)
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = place.with_suffix(".partial")
        draft.write_text(json.dumps({"step": 0, "total": None, "shown": {}, **self._live}), encoding="utf-8")
        draft.replace(place)

    def write_history(self, place: Path) -> None:
        """Write the curves as CSV: one row a step, one column a metric, empty where a step has none."""
        columns = list(dict.fromkeys(key for row in self.history for key in row)) or ["step"]
        with place.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.history)

    def catch_signals(self) -> None:
        """From now on SIGTERM and SIGINT set `signal_number`; the second one interrupts at once."""
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number:
            raise Stopped(number)
        self.signal_number = number
        print(f"{self.stage}: {signal.Signals(number).name} received, stopping", file=sys.stderr, flush=True)

    def stop_if_asked(self) -> None:
        """Raise `Stopped` when a signal has come. Stages call it where nothing would be lost."""
        if self.signal_number:
            raise Stopped(self.signal_number)

    def after_step(self, checkpoint_is_due: bool) -> tuple[bool, bool]:
        """Whether to write a checkpoint now and whether to stop: the same answers in every process.

        A signal reaches the processes at different moments, and what they exchange in a step must match.
        """
        stop, due = any_of(self.world, bool(self.signal_number), checkpoint_is_due)
        if stop and not self.signal_number:
            self.signal_number = signal.SIGTERM
        return stop or due, stop


def live_file(root: Path, stage: str) -> Path:
    """Where a stage tells how far it is."""
    return root / environment.STATE / "live" / f"{stage}.json"


def remember_measured(root: Path, stage: str, fingerprint: str, figures: dict[str, float]) -> dict[str, float]:
    """The figures of this machine that belong to a fingerprint: those measured first, for good.

    Running an unchanged stage again must leave `dvc.lock` unchanged although a speed is never the same twice,
    so the first measurement of a fingerprint stays, and a later one only adds keys that were not there.
    """
    place = root / environment.STATE / "measured" / f"{stage}-{fingerprint[:16]}.json"
    known: dict[str, float] = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
    merged = {**figures, **known}
    if merged != known:
        artifacts.write_json(place, merged)
    return merged
