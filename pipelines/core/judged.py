"""Sampled answers with what the gold judge says of them; written for best-of-n, counted for the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipelines.core import judges
from pipelines.core.completions import Completed
from pipelines.core.ranking_tasks import Task, task


class Sampled(NamedTuple):
    """Answers to one prompt, and what the judge sees in each; None where it has nothing to compare them with."""

    task: Task
    completed: Completed
    seen: list[judges.Aspects] | None
    gold: list[float] | None


def of(completed: Completed, judge: judges.Judge) -> Sampled:
    """Answers with their gold scores.

    Raises:
        DataError: `judge: slots` and a prompt without attributes.
    """
    text, reference = completed.prompt.text, completed.prompt.reference
    seen = gold = None
    if reference is not None or judge == "slots":
        seen = [judges.aspects(judge, text, response, reference) for response in completed.responses]
        gold = [judges.gold_of(judge, one) for one in seen]
    return Sampled(task(text, completed.responses), completed, seen, gold)


def write(place: Path, sampled: Sequence[Sampled]) -> None:
    """Write the answers to held-out prompts with their gold scores; no file where there are none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "id": one.completed.prompt.id,
            "group": one.completed.prompt.group,
            "prompt": one.completed.prompt.text,
            "reference": one.completed.prompt.reference,
            "responses": one.completed.responses,
            "gold": one.gold,
        }
        for one in sampled
        if one.completed.prompt.split == "test" and one.gold is not None
    ]
    if not rows:
        return
    text = pa.string()
    names = [(name, text) for name in ("id", "group", "prompt", "reference")]
    schema = pa.schema([*names, ("responses", pa.list_(text)), ("gold", pa.list_(pa.float64()))])
    place.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), place, compression="zstd")


def figures(sampled: Sequence[Sampled]) -> dict[str, float]:
    """Length and end of all answers, gold of those to held-out prompts; nothing where none were sampled."""
    if not sampled:
        return {}
    tokens = [length for one in sampled for length in one.completed.tokens]
    ended = [end for one in sampled for end in one.completed.ended]
    found = {"response_tokens": sum(tokens) / len(tokens), "eos_share": sum(ended) / len(ended)}
    gold = [score for one in sampled if one.completed.prompt.split == "test" for score in one.gold or []]
    return found | ({"gold_mean": sum(gold) / len(gold)} if gold else {})
