"""Has something changed? Statistical tests of today's data and scores against those of an accepted version.

Each test gives a probability that chance alone makes a difference like this one, and the size of the difference. It is
drift when both say so: of all tests of one evaluation at most 5 % may cry wolf together (Holm, *A Simple Sequentially
Rejective Multiple Test Procedure*, 1979), and a difference that is sure but small concerns nobody.

1. Scores: the change of a ratio of sums, in standard errors of the bootstrap over groups (`pipelines.core.statistics`);
   paired where the examples are the same, else the errors of two independent samples. Only a change for the worse. Of
   fewer than `MIN_GROUPS` groups on a side there are no errors: they tell of nothing.
2. Lengths: two-sample Kolmogorov-Smirnov test on the characters of a row; its size is the distance of the
   distribution functions.
3. Texts: classifier two-sample test (Lopez-Paz & Oquab, *Revisiting Classifier Two-Sample Tests*, ICLR 2017,
   section 3): where nothing has changed, no classifier tells the two apart better than a coin, and the share it gets
   right on rows it has not seen is binomial. The classifier is logistic regression over hashed words; the size is what
   exceeds 1/2.

Rows of one group are alike, so that other groups of the same kind would look like other data: lengths and texts are
those of one row a group.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.core.statistics import MIN_GROUPS, Interval, bootstrap, clusters, paired_bootstrap
from pipelines.core.tables import COMMON

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

LEVEL = 0.05
DISTANCE = 0.1  # of two distribution functions: a tenth of all rows are elsewhere
ADVANTAGE = 0.05  # over a coin, of telling old texts from new ones
ROWS = 2000  # drawn of each side; enough to see either size nine times in ten, at any number of tests there is here
FEWEST = 20
WIDTH = 2 * 1.959964  # of a 95 % interval, in standard errors


class Change(NamedTuple):
    """One question, and what the numbers say."""

    about: str  # such as `sluice-base bits` or `corpus texts`
    before: float | None
    now: float | None
    size: float  # of the difference, in the unit of `allowed`
    allowed: float
    p: float


def judge(tests: Sequence[Change]) -> list[bool]:
    """Which of several tests tell of drift: Holm's procedure over all of them, and the size exceeds what is allowed."""
    order = sorted(range(len(tests)), key=lambda each: tests[each].p)
    sure = [False] * len(tests)
    for rank, each in enumerate(order):
        if tests[each].p > LEVEL / (len(tests) - rank):
            break
        sure[each] = True
    return [yes and one.size > one.allowed for yes, one in zip(sure, tests, strict=True)]


def score(
    about: str,
    before: pd.DataFrame,
    now: pd.DataFrame,
    name: str,
    per: str | None,
    lower_is_better: bool,
    margin: float,
) -> Change:
    """Whether a score is worse than it was, by more than `margin` of it.

    Args:
        before: rows of `evaluation.parquet` (id, group, scores) that the version was accepted with.
        now: of the same version, on today's examples.
        per: column that weighs; examples without a weight have no part.

    Raises:
        KeyError: a column is missing.
        ValueError: no example has a weight.
    """
    old, new = (_weighed(table, per) for table in (before, now))
    first, second = (_estimate(table, name, per) for table in (old, new))
    same = list(old["id"]) == list(new["id"]) and (per is None or bool((old[per] == new[per]).all()))
    if same:
        weight = None if per is None else _numbers(new[per])
        paired = paired_bootstrap(_numbers(new[name]), _numbers(old[name]), weight, group=_groups(new))
        error = (paired.high - paired.low) / WIDTH
    else:
        error = math.hypot(first.high - first.low, second.high - second.low) / WIDTH
    worse = (second.estimate - first.estimate) * (1 if lower_is_better else -1)
    p = 0.5 * math.erfc(worse / error / math.sqrt(2)) if error > 0 else float(worse <= 0)
    if min(clusters(len(table), _groups(table)) for table in (old, new)) < MIN_GROUPS:
        p = 1.0
    reference = abs(first.estimate)
    size = worse / reference if reference else math.inf if worse > 0 else 0.0
    return Change(about, first.estimate, second.estimate, size, margin, p)


def lengths(about: str, before: Sequence[str], now: Sequence[str]) -> Change:
    """Whether rows are as long as they were. Before and now are mean characters."""
    from scipy.stats import ks_2samp

    old, new = [len(text) for text in before], [len(text) for text in now]
    found = ks_2samp(old, new)
    means = sum(old) / len(old), sum(new) / len(new)
    return Change(about, *means, float(found.statistic), DISTANCE, float(found.pvalue))


def texts(about: str, before: Sequence[str], now: Sequence[str]) -> Change:
    """Whether a classifier can tell old texts from new ones. A text that is in both is on one side of the split."""
    import numpy as np
    from scipy.stats import binomtest
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression

    fewer = min(len(before), len(now))  # as many of either, so that a coin is right in half of the cases
    every = [*before[:fewer], *now[:fewer]]
    side = np.repeat([0, 1], fewer)
    learns = np.array([zlib.crc32(text.encode()) % 2 == 0 for text in every])
    features = HashingVectorizer(n_features=2**14, alternate_sign=False, norm="l2").transform(every)
    if len(set(side[learns].tolist())) < 2 or not (~learns).any():
        return Change(about, 0.5, 0.5, 0.0, ADVANTAGE, 1.0)
    model = LogisticRegression(max_iter=300, class_weight="balanced").fit(features[learns], side[learns])
    right = model.predict(features[~learns]) == side[~learns]
    # By side, so that a lucky split of unequal halves is no advantage
    shares = [right[side[~learns] == each] for each in (0, 1)]
    accuracy = float(np.mean([part.mean() if len(part) else 0.5 for part in shares]))
    p = float(binomtest(round(accuracy * len(right)), len(right), 0.5, alternative="greater").pvalue)
    return Change(about, 0.5, accuracy, accuracy - 0.5, ADVANTAGE, p)


def tables(before: Path, now: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Held-out tables that both data directories have: name, texts then, texts now; one a group, at most `ROWS`.

    Tables with fewer than `FEWEST` groups on a side are left out: no test could say anything.
    """
    for place in sorted([*now.rglob("test.parquet"), *now.rglob("all.parquet")]):
        name = place.relative_to(now)
        if (before / name).exists():
            old, new = _texts(before / name), _texts(place)
            if min(len(old), len(new)) >= FEWEST:
                yield name.parent.as_posix(), old, new


def _texts(place: Path) -> list[str]:
    """The texts of a table's rows, one a group, each with all the words of its row."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(place)
    groups = table["group"].to_pylist()
    table = table.select([name for name in table.column_names if name not in (*COMMON, "url")])
    rows = [" ".join(_words(list(row.values()))) for row in table.to_pylist()]
    drawn: dict[str, str] = {}
    # Drawn by content: the same rows on both sides stay the same rows
    for text, group in sorted(zip(rows, groups, strict=True), key=lambda row: _mix(row[0])):
        drawn.setdefault(group, text)
    return [drawn[group] for group in sorted(drawn, key=_mix)[:ROWS]]


def _mix(text: str) -> int:
    return zlib.crc32(text.encode(), 1)


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _words(one)


def _estimate(table: pd.DataFrame, name: str, per: str | None) -> Interval:
    return bootstrap(_numbers(table[name]), None if per is None else _numbers(table[per]), group=_groups(table))


def _weighed(table: pd.DataFrame, per: str | None) -> pd.DataFrame:
    table = table.sort_values("id").reset_index(drop=True)
    return table if per is None else table[table[per] != 0].reset_index(drop=True)


def _groups(table: pd.DataFrame) -> list[str] | None:
    return table["group"].astype(str).tolist() if "group" in table else None


def _numbers(column: pd.Series[Any]) -> NDArray[np.float64]:
    return column.to_numpy(dtype="float64")
