"""The gates as far as the report can judge them: by the same code as the registry, on the report's own inputs.

In: the stages, `mlflow/registry.yaml`. Out: one verdict row a rule. Budgets, comparisons of two columns and
comparisons with another stage follow from files that are inputs of the report. Who is champion does not: that
changes without any file changing, so those rules carry a note and are judged when a version is registered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.core import gates, policy
from pipelines.core.report_inputs import Stage

AT_REGISTRATION = "judged at registration"
NOT_HERE = "that stage is not part of this report"


@dataclass(frozen=True)
class ModelGate:
    """The gate of one registered model. No rows: its stage is not part of the report."""

    model: str
    stage: str
    rows: tuple[gates.Row, ...]

    @property
    def judged(self) -> tuple[gates.Row, ...]:
        """The rules that were decided here."""
        return tuple(row for row in self.rows if is_judged(row))


def is_judged(row: gates.Row) -> bool:
    """Whether a rule was decided here."""
    return row.note not in (AT_REGISTRATION, NOT_HERE, gates.NOT_MEASURED)


def judge(found: Sequence[Stage], registry: Path) -> list[ModelGate]:
    """Every gate of `registry` (the path of `mlflow/registry.yaml`), models sorted by name.

    Raises:
        GateError: the file is not accepted, or names a metric or a column that a stage did not write.
    """
    by_name = {stage.name: stage for stage in found}
    declared = policy.load(registry.parents[1])
    judged = []
    for name, model in sorted(_every(declared, by_name)):
        stage = by_name.get(model.stage)
        rows: tuple[gates.Row, ...] = ()
        if stage is not None and stage.metrics and policy.ANY not in name:
            baselines = {rule.baseline: _baseline(rule.baseline, by_name) for rule in model.comparisons}
            rows = gates.evaluate(name, model, stage.metrics, stage.file("evaluation.parquet"), baselines).rows
        judged.append(ModelGate(name, model.stage, rows))
    return judged


def _every(declared: policy.Policy, by_name: dict[str, Stage]) -> Iterator[tuple[str, policy.ModelPolicy]]:
    """Models by name; an entry with `*` as those that the stage's artifact holds, or as it is where there is none."""
    for name, model in declared.models.items():
        stage = by_name.get(model.stage)
        found = declared.of_stage(model.stage, stage.artifact) if stage and stage.artifact else []
        yield from found or [(name, model)]


def _baseline(name: str, by_name: dict[str, Stage]) -> gates.Baseline:
    if name == policy.CHAMPION:
        return gates.Baseline(name, None, AT_REGISTRATION)
    other = by_name.get(name.removeprefix(policy.STAGE))
    rows = other.file("evaluation.parquet") if other is not None else None
    return gates.Baseline(name, rows, "" if rows is not None else NOT_HERE)
