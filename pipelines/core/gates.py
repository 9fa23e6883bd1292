"""A gate, evaluated: the rules of `mlflow/registry.yaml`, a stage's metrics and per-example rows in, a verdict out.

A budget looks at one number. A comparison pairs two models example by example and asks a 95 % interval of
their difference (paired bootstrap, `pipelines.core.statistics`). Rows are paired by `id`; rows that are not the
same examples are never compared. A file of rows has `id` (unique), optionally `group` (drawn as a whole), and
score columns. Fewer groups than an interval can be drawn of pass no comparison.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.core.errors import GateError
from pipelines.core.policy import CHAMPION, STAGE, Budget, Comparison, ModelPolicy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Baseline(NamedTuple):
    """Rows to compare with. Without rows the rule is decided by `passed`, and `note` says why."""

    name: str
    rows: Path | None
    note: str = ""
    passed: bool = False


NOT_MEASURED = "not measured: these data do not give it"
NO_CHAMPION = Baseline(CHAMPION, None, "no champion yet", passed=True)


@dataclass(frozen=True)
class Row:
    """One rule and what came of it. `low`, `high` and `bound` of a comparison are about the difference."""

    rule: str
    value: float | None
    low: float | None
    high: float | None
    bound: float | None
    baseline: str | None
    passed: bool
    note: str = ""
    by_hand_without: str = ""  # what the rule was not measured without, so that a person promotes


@dataclass(frozen=True)
class Verdict:
    """What a gate says of one content. The last five fields are filled in when it is registered."""

    stage: str
    model: str
    rows: tuple[Row, ...]
    gate: str = ""  # hash of the rules
    content_hash: str = ""
    version: str = ""
    run_id: str = ""
    champion: str | None = field(default=None)  # the version that was compared with
    store: str = ""  # whose version it is, see `store.place`

    @property
    def passed(self) -> bool:
        """Whether every rule passed."""
        return all(row.passed for row in self.rows)

    @property
    def unmeasured(self) -> str:
        """Waived rules without whose evidence only a person promotes, and what they need; empty where none is."""
        return "; ".join(f"{row.rule} (needs {row.by_hand_without})" for row in self.rows if row.by_hand_without)

    @property
    def by_hand(self) -> str:
        """That only a person promotes a version that passed, what to type and why; empty where every rule was asked."""
        if not (self.passed and self.unmeasured):
            return ""
        typed = f"`sluice promote {self.model} {self.version or 'VERSION'} --why ...`"
        return f"promoted by hand alone ({typed}), for what was not measured: {self.unmeasured}"

    def to_json(self) -> dict[str, Any]:
        """As stored in `.sluice/verdicts/<stage>.json`."""
        return {**asdict(self), "rows": [asdict(row) for row in self.rows], "passed": self.passed}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Verdict:
        """The inverse of `to_json`."""
        known = {key: value for key, value in raw.items() if key != "passed"}
        return cls(**{**known, "rows": tuple(Row(**row) for row in raw["rows"])})

    def table(self) -> str:
        """The verdict as a text table a person can read."""
        head = ("rule", "value", "baseline", "difference, 95 %", "bound", "")
        cells = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
        ]
        title = f"{self.model}{f' version {self.version}' if self.version else ''}: gate "
        return "\n".join([title + ("passed" if self.passed else "FAILED"), *lines, *filter(None, [self.by_hand])])


def evaluate(
    model: str,
    policy: ModelPolicy,
    metrics: Mapping[str, float],
    evaluation: Path | None,
    baselines: Mapping[str, Baseline],
) -> Verdict:
    """Ask every rule of a model's gate.

    Args:
        metrics: the stage's `metrics/<stage>.json`.
        evaluation: its `evaluation.parquet`; only comparisons need it.
        baselines: rows of `champion` and of every `stage:NAME` that the rules name.

    Raises:
        GateError: a metric, file or column is missing, or two files do not hold the same examples.
    """
    mine = _read(evaluation, f"stage {policy.stage}") if policy.comparisons else {}
    rows = [
        _budget(rule, metrics, policy.stage)
        if isinstance(rule, Budget)
        else _comparison(rule, mine, baselines.get(rule.baseline))
        for rule in policy.gate
    ]
    return Verdict(policy.stage, model, tuple(rows), gate=gate_hash(policy))


def gate_hash(policy: ModelPolicy) -> str:
    """A hash of the rules: a verdict of other rules is not reused."""
    text = "\n".join(rule.model_dump_json() for rule in policy.gate)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rows_hash(evaluation: Path, policy: ModelPolicy, scores: frozenset[str]) -> str:
    """A hash of what the examples are: every column but the scores, with those that a champion's are divided by."""
    table = _read(evaluation, f"stage {policy.stage}")
    sizes = {rule.per for rule in policy.comparisons if rule.per and rule.baseline == CHAMPION}
    given = {name for name in table if any(fnmatchcase(name, pattern) for pattern in scores)}
    names = sorted(name for name in table if name not in given or name in sizes)
    digest = hashlib.sha256(repr(names).encode())
    for values in zip(*(table[name].tolist() for name in names), strict=True):
        digest.update(f"{values!r}\n".encode())
    return digest.hexdigest()


def _budget(rule: Budget, metrics: Mapping[str, float], stage: str) -> Row:
    if rule.metric not in metrics:
        if rule.where_measured:
            return _waived(rule, rule.metric, None)
        raise GateError(f"metrics of {stage} hold no {rule.metric!r}; there are: {', '.join(sorted(metrics))}")
    value = float(metrics[rule.metric])
    if rule.at_most is not None:
        return Row(f"{rule.metric} at most", value, None, None, rule.at_most, None, value <= rule.at_most)
    bound = rule.at_least if rule.at_least is not None else float("nan")
    return Row(f"{rule.metric} at least", value, None, None, bound, None, value >= bound)


def _comparison(rule: Comparison, mine: dict[str, NDArray[Any]], baseline: Baseline | None) -> Row:
    from pipelines.core.statistics import MIN_GROUPS, bootstrap, clusters, paired_bootstrap

    score = f"{rule.score} per {rule.per}" if rule.per else rule.score
    ask = "better than" if rule.better_than else f"not worse by {rule.margin:.2%} than"
    text = f"{score} {ask} {rule.baseline}"
    every, mine = len(mine["id"]), _weighed(mine, rule)
    if not len(mine["id"]):
        if rule.where_measured:
            return _waived(rule, text, rule.baseline)
        raise GateError(f"{text}: no example has a weight in {rule.per}")
    values, weight = _column(mine, rule.score), _column(mine, rule.per) if rule.per else None
    value = bootstrap(values, weight, resamples=1).estimate
    other_file = rule.baseline == CHAMPION or rule.baseline.startswith(STAGE)
    if other_file:
        if baseline is None:
            raise GateError(f"{text}: no rows of {rule.baseline} were given")
        if baseline.rows is None:
            return Row(text, value, None, None, None, baseline.name, baseline.passed, baseline.note)
        theirs = _weighed(_read(baseline.rows, baseline.name), rule)
        _same_examples(mine, theirs, rule, baseline.name)
        against, name = _column(theirs, rule.score), baseline.name
    else:
        against, name = _column(mine, rule.baseline), rule.baseline
    group = mine["group"].astype(str).tolist() if "group" in mine else None
    difference = paired_bootstrap(values, against, weight, group=group)
    reference = bootstrap(against, weight, resamples=1).estimate
    allowed = (rule.margin or 0.0) * abs(reference)
    worst = difference.high if rule.lower_is_better else -difference.low
    passed = worst < 0 if rule.better_than else worst <= allowed
    count = clusters(len(values), group)
    side = "the test side has" if len(values) == every else f"with a weight in {rule.per} there are"
    note = _too_few(side, count, group is not None) if count < MIN_GROUPS else ""
    bound = allowed if rule.lower_is_better else 0.0 - allowed  # a table is not to say -0
    shown = f"{name}: {reference:.4g}"
    return Row(text, value, difference.low, difference.high, bound, shown, bool(passed) and not note, note)


def _waived(rule: Budget | Comparison, text: str, baseline: str | None) -> Row:
    """The row of a rule that these data do not measure."""
    by_hand_without = rule.by_hand_without or ""
    return Row(text, None, None, None, None, baseline, True, NOT_MEASURED, by_hand_without)


def _too_few(side: str, count: int, grouped: bool) -> str:
    """Why a comparison of so few groups, or of so few examples without groups, does not pass."""
    from pipelines.core.statistics import MIN_GROUPS

    if not grouped:
        return f"{side} {count} examples, and at least {MIN_GROUPS} are needed: give it more"
    return (
        f"{side} {count} groups (column group), and at least {MIN_GROUPS} are needed: give it more groups, "
        "or a finer group column"
    )


def _read(path: Path | None, whose: str) -> dict[str, NDArray[Any]]:
    """Columns of a file of rows, ordered by id."""
    import numpy as np
    import pyarrow.parquet as parquet

    if path is None or not path.exists():
        raise GateError(f"{whose} has no evaluation.parquet to compare with")
    table = parquet.read_table(path)
    if "id" not in table.column_names:
        raise GateError(f"{path.name} of {whose} has no column id; found: {', '.join(table.column_names)}")
    columns = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    ids = columns["id"].astype(str)
    if len(set(ids)) != len(ids):
        raise GateError(f"{path.name} of {whose} holds an id twice: its rows cannot be paired")
    order = np.argsort(ids, kind="stable")
    return {name: values[order] for name, values in columns.items()}


def _column(table: dict[str, NDArray[Any]], name: str) -> NDArray[np.float64]:
    import numpy as np

    if name not in table:
        raise GateError(f"evaluation.parquet has no column {name!r}; found: {', '.join(sorted(table))}")
    try:
        values = table[name].astype(np.float64)
    except (TypeError, ValueError):
        raise GateError(f"evaluation.parquet: column {name!r} is not numeric") from None
    if not np.isfinite(values).all():
        worst = table["id"][int(np.argmin(np.isfinite(values)))]
        raise GateError(f"evaluation.parquet: column {name!r} has no finite number at id {worst!r}")
    return values


def _weighed(table: dict[str, NDArray[Any]], rule: Comparison) -> dict[str, NDArray[Any]]:
    """The examples that have a part in a comparison."""
    if rule.per is None:
        return table
    part = _column(table, rule.per) != 0
    return {name: values[part] for name, values in table.items()}


def _same_examples(
    mine: dict[str, NDArray[Any]], theirs: dict[str, NDArray[Any]], rule: Comparison, whose: str
) -> None:
    """Refuse to compare numbers that come from different data."""
    left, right = set(mine["id"].tolist()), set(theirs["id"].tolist())
    if left != right:
        odd = sorted(map(str, left ^ right))[:3]
        raise GateError(
            f"{whose} was measured on other examples ({len(left - right)} are missing there, "
            f"{len(right - left)} are extra, e.g. {', '.join(odd)}): numbers from different data are not compared"
        )
    if rule.per and (_column(mine, rule.per) != _column(theirs, rule.per)).any():
        raise GateError(f"{whose} counts {rule.per} differently on the same ids: the examples are not the same")


def _cells(row: Row) -> tuple[str, str, str, str, str, str]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    interval = "" if row.low is None else f"[{row.low:+.4g}, {row.high:+.4g}]"
    result = ("passed" if row.passed else "FAILED") + (f" ({row.note})" if row.note else "")
    return row.rule, number(row.value), row.baseline or "", interval, number(row.bound), result
