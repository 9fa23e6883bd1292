"""Checkpoints of a training stage: whole, verified, the newest two.

A checkpoint is a directory `step-N/` with `state.pt` (weights, optimizer, schedule, random states, curves) and
`manifest.json` (step, fingerprint, SHA-256 of the state). It is written aside, flushed and renamed, so a crash
leaves either the whole of it or none. Only one whose fingerprint matches and whose hash is right is ever used.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.core import artifacts

KEEP = 2


@dataclass
class Checkpoints:
    """The checkpoints of one run below `place`, due every `steps` steps and every `seconds` seconds."""

    place: Path
    fingerprint: str
    steps: int
    seconds: float
    _last: float = field(default_factory=time.monotonic)

    def due(self, step: int) -> bool:
        """Whether a checkpoint should be written after `step`. What is computed does not depend on it."""
        return step % self.steps == 0 or time.monotonic() - self._last >= self.seconds

    @property
    def last(self) -> int:
        """The step of the newest checkpoint that is there; 0 without one."""
        whole = self._whole()
        return int(whole[0].name.removeprefix("step-")) if whole else 0

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write the checkpoint of `step` and drop all but the newest two.

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        import torch

        with artifacts.published(self.place / f"step-{step}") as draft:
            with (draft / "state.pt").open("wb") as file:
                torch.save(dict(state), file)
            manifest = {"step": step, "fingerprint": self.fingerprint, "sha256": _hash(draft)}
            artifacts.write_json(draft / "manifest.json", manifest)
        for old in self._whole()[KEEP:]:
            shutil.rmtree(old)
        self._last = time.monotonic()

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps."""
        for place in self._whole():
            if int(place.name.removeprefix("step-")) > step:
                shutil.rmtree(place)

    def newest(self) -> dict[str, Any] | None:
        """State of the newest usable checkpoint, or None. One that cannot be used is set aside with a warning."""
        import torch

        for place in self._whole():
            problem = self._problem(place)
            if problem is None:
                state: dict[str, Any] = torch.load(place / "state.pt", map_location="cpu", weights_only=True)
                return state
            aside = place.with_name(f"unusable-{place.name}-{time.time_ns()}")
            place.rename(aside)
            print(f"checkpoint {place.name} {problem}: set aside as {aside}", file=sys.stderr, flush=True)
        return None

    def _whole(self) -> list[Path]:
        """Directories of checkpoints, newest first."""
        found = [place for place in self.place.glob("step-*") if place.name.removeprefix("step-").isdigit()]
        return sorted(found, key=lambda place: int(place.name.removeprefix("step-")), reverse=True)

    def _problem(self, place: Path) -> str | None:
        """What is wrong with a checkpoint, or None."""
        try:
            manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
            if manifest["fingerprint"] != self.fingerprint:
                return "belongs to other params, inputs or code"
            return None if manifest["sha256"] == _hash(place) else "is damaged (its hash does not match)"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"is damaged ({type(error).__name__}: {error})"


def _hash(place: Path) -> str:
    return artifacts.content_hash(place / "state.pt")
