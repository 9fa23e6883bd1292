"""From which relevance on a question is worth answering: chosen by one part of the queries, judged by the other.

Relevance is the cosine of a query and a passage. A small model that is given passages about something else answers all
the same, so it is not asked where the best of them is less relevant than the threshold.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipelines.core import retrieval_metrics
from pipelines.core.context import StageContext
from pipelines.core.params.rag import RagParams
from pipelines.core.retrieval_evaluation import BLOCK, Queries, Query, drawn
from pipelines.core.retrieval_metrics import Array, Threshold

BEST_OF = 5  # passages whose best relevance is held against the threshold, about as many as an answer is made from
UNKNOWN = -1.0  # relevance where nothing with a vector was found: the least that a cosine can be


class Relevances(NamedTuple):
    """Relevance of the best passage that was found, of queries that have an answer and of queries that have none."""

    answerable: Array
    unanswerable: Array


class Chosen(NamedTuple):
    """A threshold of relevance."""

    value: float
    mistakes: Threshold | None  # on the judged part; None: it has no query with a target
    given: bool  # whether people gave the queries that nothing answers


def choose(params: RagParams, queries: Queries, index: Any, context: StageContext) -> Chosen | None:
    """The threshold that the tuning part gives, and its mistakes on the other; None: nothing to choose it by.

    Raises:
        Stopped: a signal came.
    """
    chosen_by = relevances(params, queries, index, True, context)
    if chosen_by is None:
        context.say(
            "warning: no query with a target is in the part that the threshold of relevance is chosen by "
            "(rag.tuning_share of the groups, none of the test side): an assistant will answer whatever it is asked"
        )
        return None
    value = retrieval_metrics.calibrate(*chosen_by)
    judged_by = relevances(params, queries, index, False, context)
    mistakes = None if judged_by is None else retrieval_metrics.mistakes(value, *judged_by)
    return Chosen(value, mistakes, bool(_given(queries)))


def relevances(
    params: RagParams, queries: Queries, index: Any, tuning: bool, context: StageContext
) -> Relevances | None:
    """How relevant the best passages are to queries of one part.

    Asked are queries with accepted answers, as an assistant is asked; where there are none, the measured ones.
    Those without an answer are the user's, where both parts have some; else the same queries while their target, and
    what nearly repeats it, is kept out of the search. None: the part has no query with a target.
    """
    given = _given(queries)
    asked = [query for query in queries.every if query.target is not None and query.answers] or queries.measured
    known = _first([query for query in asked if query.tuning == tuning], params.threshold_queries)
    if not known:
        return None
    if given:
        unknown = _first([query for query in given if query.tuning == tuning], params.threshold_queries)
        hidden = [(query, list[str]()) for query in unknown]
    else:
        targets = [query.target or "" for query in known]
        hidden = [(query, [one, *index.duplicates(one)]) for query, one in zip(known, targets, strict=True)]
    found = np.array(list(_best([*((query, list[str]()) for query in known), *hidden], index, context)))
    return Relevances(found[: len(known)], found[len(known) :])


def told(chosen: Chosen | None) -> dict[str, Any]:
    """What threshold.json holds; `threshold` null: every question is answered."""
    if chosen is None:
        return {"threshold": None}
    mistakes = {} if chosen.mistakes is None else chosen.mistakes._asdict()
    return {"threshold": chosen.value, "unanswerable": "given" if chosen.given else "hidden", "passages": BEST_OF} | {
        name: value for name, value in mistakes.items() if name != "value"
    }


def metrics(chosen: Chosen | None) -> dict[str, float]:
    """What the stage's metrics say of a threshold."""
    if chosen is None:
        return {}
    found = {"relevance_threshold": chosen.value}
    if chosen.mistakes is not None:
        found |= {
            "false_answer_rate": chosen.mistakes.false_answers,
            "false_refusal_rate": chosen.mistakes.false_refusals,
        }
    return found


def _given(queries: Queries) -> list[Query]:
    """The user's queries that nothing answers; none unless both parts have some."""
    found = [query for query in queries.every if query.target is None]
    return found if len({query.tuning for query in found}) == 2 else []


def _first(queries: Sequence[Query], count: int) -> list[Query]:
    """`count` of the queries, or all there are, by hash of the id."""
    return sorted(queries, key=lambda query: (drawn("threshold", query.id), query.id))[:count]


def _best(pairs: Sequence[tuple[Query, Collection[str]]], index: Any, context: StageContext) -> Iterator[float]:
    """Relevance of the best of the first passages for each query, some documents hidden from it."""
    for number, (query, hidden) in enumerate(pairs):
        found = index.search(query.text, BEST_OF, exclude=hidden)
        yield max((one.relevance for one in found if one.relevance == one.relevance), default=UNKNOWN)
        if number % BLOCK == 0:
            context.progress(number, len(pairs), searching="the threshold of relevance")
            context.stop_if_asked()
