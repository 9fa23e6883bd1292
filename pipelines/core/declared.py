"""What the stages say they write; the rules of `mlflow/registry.yaml` held against it, before anything is computed."""

from __future__ import annotations

import importlib
from fnmatch import fnmatchcase
from pathlib import Path

from pipelines.core import graph, policy
from pipelines.core.errors import GateError


def check(root: Path) -> None:
    """Hold `mlflow/registry.yaml` against the graph and what the stages say they write.

    Raises:
        GateError: it is malformed, or names a stage, metric or column that does not exist; all are listed.
    """
    rules = policy.load(root)
    stages = graph.load(root)
    mistakes: list[str] = []
    for name, model in rules.models.items():
        entry = f"{policy.FILE}: models.{name}"
        if model.stage not in stages:
            known = ", ".join(stages)
            mistakes.append(f"{entry}.stage: no stage {model.stage!r} in dvc.yaml; there are: {known}")
            continue
        for number, rule in enumerate(model.gate):
            mistakes += [f"{entry}.gate.{number}.{mistake}" for mistake in _unknown(rule, model.stage, stages)]
        every = _of(model.stage, "METRICS") | optional(model.stage)
        if model.best is not None and not _fits(model.best.lowest, every):
            mistakes.append(f"{entry}.best.lowest: {model.stage} has no metric {model.best.lowest!r}")
    if mistakes:
        raise GateError("\n".join(mistakes))


def _unknown(rule: policy.Budget | policy.Comparison, stage: str, stages: dict[str, graph.StageSpec]) -> list[str]:
    """What a rule names that nothing writes."""
    if isinstance(rule, policy.Budget):
        always, sometimes = _of(stage, "METRICS") | measured(stage), optional(stage)
        if not _fits(rule.metric, always | sometimes):
            return [f"metric: {stage} has no metric {rule.metric!r}; known: {', '.join(sorted(always | sometimes))}"]
        if rule.where_measured != _fits(rule.metric, sometimes):
            given = "always measured: leave it out" if rule.where_measured else "not given by all data: set it to true"
            return [f"where_measured: {rule.metric} is {given}"]
        return []
    columns = _of(stage, "SCORES")
    wanted = {"score": rule.score, "per": rule.per}
    key = "better_than" if rule.better_than else "not_worse_than"
    if rule.baseline.startswith(policy.STAGE):
        other = rule.baseline.removeprefix(policy.STAGE)
        if other not in stages:
            return [f"{key}: no stage {other!r} in dvc.yaml; there are: {', '.join(stages)}"]
        before = graph.needed({name: spec.parents for name, spec in stages.items()}, stages[stage].parents)
        if other not in before:
            earlier = ", ".join(before) or "none"
            return [f"{key}: {stage} does not wait for stage {other}, which may be running then; accepted: {earlier}"]
        if not _fits(rule.score, _of(other, "SCORES")):
            return [f"{key}: the evaluation of stage {other} has no column {rule.score!r}"]
    elif rule.baseline != policy.CHAMPION:
        wanted[key] = rule.baseline
    return [
        f"{key}: the evaluation of stage {stage} has no column {column!r}; known: {', '.join(sorted(columns))}"
        for key, column in wanted.items()
        if column is not None and not _fits(column, columns)
    ]


def _fits(name: str, declared: frozenset[str]) -> bool:
    """Whether a name is declared, or fits a declared pattern."""
    return any(fnmatchcase(name, pattern) for pattern in declared)


def scores(stage: str) -> frozenset[str]:
    """Columns of the stage's `evaluation.parquet`, or patterns, that are results, not what the example is."""
    return _of(stage, "SCORES")


def optional(stage: str) -> frozenset[str]:
    """Metrics of a stage that only some data give, such as what needs the names of labelers."""
    found: frozenset[str] = getattr(importlib.import_module(f"pipelines.{stage}"), "OPTIONAL", frozenset())
    return found


def measured(stage: str) -> frozenset[str]:
    """Figures of the machine that a stage always measures and a gate may ask for, such as a ratio of speeds."""
    found: frozenset[str] = getattr(importlib.import_module(f"pipelines.{stage}"), "MEASURED", frozenset())
    return found


def _of(stage: str, what: str) -> frozenset[str]:
    module = importlib.import_module(f"pipelines.{stage}")
    declared = getattr(module, what, None)
    if not isinstance(declared, frozenset):
        raise GateError(f"pipelines/{stage}.py declares no {what}: frozenset[str], which its gate is checked against")
    return declared
