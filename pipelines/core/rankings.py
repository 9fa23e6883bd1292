"""Comparisons as the feedback artifact keeps them: written as they come, counted on the way.

One row is one labeler's ranking of the answers to one prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipelines.core.agreement import Counted, agreement, kendall_tau, length_only_accuracy, longer_wins, total
from pipelines.core.ranking_tasks import task

if TYPE_CHECKING:
    import pyarrow as pa

ROW_GROUP = 1024


class Comparison(NamedTuple):
    """A ranking: dense ranks of the responses (1 is best), by whom; votes and gold scores where there are any."""

    id: str
    group: str
    prompt: str
    responses: list[str]
    ranks: list[int]
    labeler: str | None
    votes: list[int] | None
    gold: list[float] | None


class Measured(NamedTuple):
    """One ranking's row of the evaluation."""

    id: str
    group: str
    longer: Counted


@dataclass
class Tally:
    """What one side's rankings add up to."""

    rows: int = 0
    responses: int = 0
    distinct: int = 0
    all_pairs: int = 0
    measured: list[Measured] = field(default_factory=list)
    by_task: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # task id, responses sorted: labeler: ranks
    groups: dict[str, str] = field(default_factory=dict)  # task id -> group
    labelers: set[str] = field(default_factory=set)

    def add(self, row: Comparison) -> None:
        """Count one ranking."""
        count = len(row.responses)
        self.rows += 1
        self.responses += count
        self.distinct += len(set(row.responses))
        self.all_pairs += count * (count - 1) // 2
        self.measured.append(Measured(row.id, row.group, longer_wins(row.responses, row.ranks)))
        if row.labeler is not None:  # two rankings without a name may be one person's
            order = sorted(range(count), key=row.responses.__getitem__)  # each may have had them in another one
            own = task(row.prompt, [row.responses[number] for number in order]).id
            self.by_task.setdefault(own, {})[row.labeler] = [row.ranks[number] for number in order]
            self.groups[own] = row.group
            self.labelers.add(row.labeler)

    @property
    def pairs(self) -> int:
        """Pairs that are not tied."""
        return sum(one.longer.pairs for one in self.measured)


def write(place: Path, rows: Iterable[Comparison]) -> Tally:
    """Write one side's comparisons, a row group in memory at a time, and count them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    place.parent.mkdir(parents=True, exist_ok=True)
    tally, waiting = Tally(), []
    with pq.ParquetWriter(place, _schema(), compression="zstd") as writer:
        for row in rows:
            tally.add(row)
            waiting.append(row._asdict())
            if len(waiting) == ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(waiting, _schema()))
                waiting = []
        if waiting or not tally.rows:
            writer.write_table(pa.Table.from_pylist(waiting, _schema()))
    return tally


def figures(tallies: dict[str, Tally]) -> dict[str, float]:
    """What the rankings of all sides say about themselves; agreement only where two labelers ranked the same."""
    import numpy as np

    from pipelines.core.statistics import bootstrap

    train, test = tallies["train"], tallies["test"]
    every = list(tallies.values())
    lengths = {name: total(one.longer for one in tally.measured) for name, tally in tallies.items()}
    found = {
        "comparisons_train": float(train.rows),
        "comparisons_test": float(test.rows),
        "pairs_train": float(train.pairs),
        "pairs_test": float(test.pairs),
        "ties_share": 1.0 - sum(one.pairs for one in every) / sum(one.all_pairs for one in every),
        "completions_per_prompt": sum(one.responses for one in every) / sum(one.rows for one in every),
        "distinct_share": sum(one.distinct for one in every) / sum(one.responses for one in every),
        "longer_wins": lengths["test"].share,
        "length_only_accuracy": length_only_accuracy(lengths["train"], lengths["test"]),
        "labelers": float(len(set[str]().union(*(one.labelers for one in every)))),
    }
    tasks = [(one.groups[key], list(ranks.values())) for one in every for key, ranks in one.by_task.items()]
    agreed = [(group, counted) for group, ranks in tasks if (counted := agreement(ranks)).pairs]
    if agreed:
        groups, counts = zip(*agreed, strict=True)
        right, pairs = (np.array(column, np.float64) for column in zip(*counts, strict=True))
        interval = bootstrap(right, pairs, group=groups)
        found |= {"agreement": interval.estimate, "agreement_low": interval.low, "agreement_high": interval.high}
    tau = kendall_tau(ranks for _, ranks in tasks)
    return found if tau is None else found | {"kendall_tau": tau}


def page(file: Path, count: int) -> str:
    """The first rankings of a file as Markdown, best answer first."""
    import pyarrow.parquet as pq

    lines = ["# Rankings of held-out prompts", ""]
    for row in pq.ParquetFile(file).read_row_group(0).slice(0, count).to_pylist():
        who = row["labeler"] or "a labeler without a name"
        lines += [f"**Prompt:** {_inline(row['prompt'])}", "", f"Ranked by {who}:", ""]
        gold = row["gold"] or [None] * len(row["ranks"])
        for place in sorted(range(len(gold)), key=lambda number: row["ranks"][number]):
            told = "" if gold[place] is None else f" (gold {gold[place]:.2f})"
            lines.append(f"- {row['ranks'][place]}{told}: {_inline(row['responses'][place])}")
        lines.append("")
    return "\n".join(lines)


def _inline(text: str) -> str:
    """A text on one line, as code."""
    return "`" + text.replace("\n", "⏎").replace("`", "'") + "`" if text else "(empty)"


def _schema() -> pa.Schema:
    import pyarrow as pa

    text = pa.string()
    return pa.schema(
        [
            *(("id", text), ("group", text), ("prompt", text), ("responses", pa.list_(text))),
            *(("ranks", pa.list_(pa.int32())), ("labeler", text), ("votes", pa.list_(pa.int32()))),
            ("gold", pa.list_(pa.float64())),
        ]
    )
