"""The graph as `dvc.yaml` has it: what each stage reads, runs and writes. Nothing else repeats it.

Names: an artifact directory `artifacts/NAME` is the input or output `NAME`; anything else that a stage reads
as data (`metrics/NAME.json`, `mlflow/registry.yaml`, `artifacts/NAME/model` that a dial names) is named by its path.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from pipelines.core.errors import UserError


@dataclass(frozen=True)
class StageSpec:
    """One stage of `dvc.yaml`; every path is relative to the repository's root."""

    name: str
    code: tuple[str, ...]  # deps that are Python files: they go into the fingerprint, not into `inputs`
    inputs: dict[str, str]  # name -> path of the deps that are data
    output: str  # the one directory it fills
    metrics: str  # the JSON file of its metrics
    parents: tuple[str, ...]  # stages whose output or metrics it reads


def load(root: Path) -> dict[str, StageSpec]:
    """Stages of `root/dvc.yaml`, parents before children.

    Raises:
        UserError: no `dvc.yaml`, no YAML, no stages, or one without exactly one output directory and one metrics file.
    """
    path = root / "dvc.yaml"
    if not path.exists():
        raise UserError(f"dvc.yaml: no such file in {root}. Run from the repository's root.")
    return dict(parse(path.read_text(encoding="utf-8")))


@lru_cache
def parse(text: str) -> dict[str, StageSpec]:
    """The stages of `dvc.yaml`'s text, read once a process: everybody asks, and its thousand lines take a while."""
    try:
        whole = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"dvc.yaml is not valid YAML: {error}") from None
    raw = whole.get("stages") if isinstance(whole, dict) else None
    if not isinstance(raw, dict) or not all(isinstance(stage, dict) for stage in raw.values()):
        raise UserError("dvc.yaml: expected `stages:` and below it each stage with its cmd, deps, outs and metrics")
    made_by = {path: name for name, stage in raw.items() for key in ("outs", "metrics") for path in _paths(stage, key)}
    specs = {name: _spec(name, stage, made_by) for name, stage in raw.items()}
    ordered: dict[str, StageSpec] = {}
    while len(ordered) < len(specs):
        ready = [s for n, s in specs.items() if n not in ordered and all(p in ordered for p in s.parents)]
        if not ready:
            raise UserError(f"dvc.yaml: the stages {sorted(set(specs) - set(ordered))} depend on one another")
        ordered.update({spec.name: spec for spec in ready})
    return ordered


def stage(root: Path, name: str) -> StageSpec:
    """One stage by name.

    Raises:
        UserError: there is no such stage; the message lists those there are.
    """
    stages = load(root)
    if name not in stages:
        raise UserError(f"no stage {name!r} in dvc.yaml; there are: {', '.join(stages)}")
    return stages[name]


def needed(parents: dict[str, tuple[str, ...]], wanted: Iterable[str]) -> list[str]:
    """Some stages and all that they wait for, parents first.

    Args:
        parents: stage -> the stages it waits for; parents come first.
    """
    keep = set(wanted)
    for name in reversed(parents):
        if name in keep:
            keep.update(parents[name])
    return [name for name in parents if name in keep]


def made(root: Path, path: str | None) -> list[Path]:
    """The path, if it lies in what a stage makes: it need not be there yet. A graph in error is told elsewhere."""
    place = Path(os.path.normpath(root / path)) if path else None
    if place is None or not place.is_relative_to(os.path.normpath(root / "artifacts")):
        return []
    try:
        outputs = [os.path.normpath(root / spec.output) for spec in load(root).values()]
    except UserError:
        return []
    return [place for output in outputs if place.is_relative_to(output)]


def _spec(name: str, raw: dict[str, Any], made_by: dict[str, str]) -> StageSpec:
    deps, outs, metrics = (_paths(raw, key) for key in ("deps", "outs", "metrics"))
    if len(outs) != 1 or len(metrics) != 1:
        raise UserError(
            f"dvc.yaml: stage {name} must have one entry in outs and one in metrics, found {outs}, {metrics}"
        )
    return StageSpec(
        name=name,
        code=tuple(dep for dep in deps if dep.endswith(".py")),
        inputs={_name(dep): dep for dep in deps if not dep.endswith(".py")},
        output=outs[0],
        metrics=metrics[0],
        parents=tuple(dict.fromkeys(maker for dep in deps if (maker := _maker(dep, made_by)) is not None)),
    )


def _maker(path: str, made_by: dict[str, str]) -> str | None:
    """The stage that makes a path, or the directory it lies in."""
    pure = PurePosixPath(path)
    return next((made_by[part.as_posix()] for part in (pure, *pure.parents) if part.as_posix() in made_by), None)


def _paths(stage: dict[str, Any], key: str) -> list[str]:
    """Entries of deps, outs or metrics, each a path, or a path with options; none where nothing is below the key."""
    return [str(next(iter(item)) if isinstance(item, dict) else item) for item in stage.get(key) or []]


def _name(path: str) -> str:
    pure = PurePosixPath(path)
    return pure.name if pure.parent == PurePosixPath("artifacts") else path
