"""Two versions of a model side by side: scores on the same examples with intervals, win rates, metrics, samples.

Scores are those that the model's gate compares (their weight and direction are declared there); where it compares
none, every score that the stage declares, as a plain mean without a direction. Differences are B minus A, paired by
example (`pipelines.core.statistics`). A win is an example on which B is better; a tie is half a win.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.core import declared, policy, references, rejudging, release, store, versions
from pipelines.core.errors import GateError, UserError
from pipelines.core.statistics import Interval, bootstrap, paired_bootstrap
from pipelines.core.verdicts import EVALUATION, Measure

if TYPE_CHECKING:
    import pandas as pd

SAMPLES = "samples.md"  # what stages write for people to read
PROMPT = re.compile(r"^\*\*Prompt:\*\*", re.MULTILINE)  # each sample of it begins so


@dataclass(frozen=True)
class Score:
    """One score of both versions, on the same examples."""

    name: str
    lower_is_better: bool | None
    a: Interval
    b: Interval
    difference: Interval  # b - a
    wins: Interval | None  # share of examples on which b is better; None without a direction
    examples: int

    @property
    def verdict(self) -> str:
        """Which is better, if the interval of the difference excludes zero."""
        if self.lower_is_better is None or self.difference.low <= 0 <= self.difference.high:
            return ""
        return "B better" if (self.difference.high < 0) == self.lower_is_better else "A better"


class Sample(NamedTuple):
    """What both versions say to one prompt, as their stage wrote it."""

    prompt: str
    a: str
    b: str


@dataclass(frozen=True)
class Compared:
    """What there is to see of two versions."""

    a: Any  # versions as MLflow has them
    b: Any
    scores: tuple[Score, ...]
    metrics: tuple[tuple[str, float, float], ...]  # name, a, b: those that differ; none where the data do
    same_data: bool  # whether both were measured on the same examples when they were made
    samples: tuple[Sample, ...]


def compare(root: Path, client: Any, first: str, second: str, measure: Measure | None) -> Compared:
    """Compare two versions, given as references (`sluice-base@champion`, `sluice-base/3`).

    Args:
        measure: of their stage, see `runner.measure_for`; needed when they were measured on different examples.

    Raises:
        UserError: a reference means nothing, or they are of two models, or the same version.
        GateError: they cannot be compared on the same examples.
        StoreUnavailable: the store is away.
    """
    a, b = references.resolve(client, first), references.resolve(client, second)
    if a.name != b.name:
        raise UserError(f"{references.shown(a)} and {references.shown(b)} are of two models: only one's compare")
    if str(a.version) == str(b.version):
        raise UserError(f"{first} and {second} are the same version: {references.shown(a)}")
    found = release.entry_of(policy.load(root), a.name)
    if found is None:
        raise GateError(f"{policy.FILE} declares no {a.name}, so what is better is not known")
    same = a.tags.get(versions.ROWS) is not None and a.tags.get(versions.ROWS) == b.tags.get(versions.ROWS)
    scores: tuple[Score, ...] = ()
    if same or found.comparisons:
        with tempfile.TemporaryDirectory() as place:
            files = rejudging.rows(root, (a, b), found, measure, Path(place))
            try:
                scores = tuple(_scores(found, *map(_table, files, (a, b))))
            except (ValueError, TypeError) as error:  # no finite number, no number at all, a weight below zero
                pair = f"{references.shown(a)} and {references.shown(b)}"
                raise GateError(f"{pair}: their {EVALUATION} cannot be compared: {error}") from None
    metrics = tuple(_metrics(client, a, b)) if same else ()
    said = [_samples(root, client, entry) for entry in (a, b)]
    both = [Sample(prompt, text, said[1][prompt]) for prompt, text in said[0].items() if prompt in said[1]]
    return Compared(a, b, scores, metrics, same, tuple(both))


def _table(path: Path, entry: Any) -> pd.DataFrame:
    """Rows of a version, in the order of their ids."""
    import pandas as pd

    table = pd.read_parquet(path)
    if "id" not in table or table["id"].duplicated().any():
        raise GateError(f"evaluation.parquet of {references.shown(entry)} needs a column id without doubles")
    return table.set_index("id").sort_index()


def _scores(found: policy.ModelPolicy, a: pd.DataFrame, b: pd.DataFrame) -> list[Score]:
    if set(a.index) != set(b.index):
        raise GateError("the two were measured on different examples: numbers from different data are not compared")
    wanted: dict[tuple[str, str | None], bool | None] = {
        (rule.score, rule.per): rule.lower_is_better for rule in found.comparisons
    }
    if not wanted:
        patterns = declared.scores(found.stage)
        known = [name for name in a.columns if any(fnmatchcase(name, pattern) for pattern in patterns)]
        wanted = {(name, None): None for name in known if a[name].dtype.kind in "fiub"}
    there = {None, *a.columns} & {None, *b.columns}
    return [_score(a, b, name, per, lower) for (name, per), lower in wanted.items() if {name, per} <= there]


def _score(a: pd.DataFrame, b: pd.DataFrame, name: str, per: str | None, lower: bool | None) -> Score:
    import numpy as np

    part = np.ones(len(a), bool) if per is None else (a[per] != 0).to_numpy()
    if per is not None and (a[per] != b[per]).any():
        raise GateError(f"{per} differs on the same ids: the examples are not the same")
    if not part.any():
        raise GateError(f"no example has a weight in {per}")
    left, right = (table[name].to_numpy(np.float64)[part] for table in (a, b))
    weight = None if per is None else a[per].to_numpy(np.float64)[part]
    group = a["group"].astype(str)[part].tolist() if "group" in a else None
    wins = None
    if lower is not None:
        better = right < left if lower else right > left
        wins = bootstrap(np.where(right == left, 0.5, better.astype(np.float64)), group=group)
    return Score(
        name if per is None else f"{name} per {per}",
        lower,
        bootstrap(left, weight, group=group),
        bootstrap(right, weight, group=group),
        paired_bootstrap(right, left, weight, group=group),
        wins,
        int(part.sum()),
    )


def _metrics(client: Any, a: Any, b: Any) -> list[tuple[str, float, float]]:
    """Metrics of both runs that differ, by name; none where the store has a run no more."""
    runs = [references.run(client, entry) for entry in (a, b)]
    ours, theirs = (run.data.metrics if run is not None else {} for run in runs)
    return [(key, ours[key], theirs[key]) for key in sorted(ours.keys() & theirs.keys()) if ours[key] != theirs[key]]


def _samples(root: Path, client: Any, entry: Any) -> dict[str, str]:
    """What the run of a version kept for people to read, by prompt."""
    import mlflow

    if references.run(client, entry) is None:
        return {}
    if SAMPLES not in {item.path for item in client.list_artifacts(entry.run_id)}:
        return {}
    with tempfile.TemporaryDirectory() as place:
        uri = f"runs:/{entry.run_id}/{SAMPLES}"
        copied = mlflow.artifacts.download_artifacts(uri, dst_path=place, tracking_uri=store.address(root))
        text = Path(copied).read_bytes().decode()  # a prompt may hold carriage returns, which would end its line
    parts = [part.strip().partition("\n") for part in PROMPT.split(text)[1:]]
    return {prompt.strip(): said.strip() for prompt, _, said in parts}
