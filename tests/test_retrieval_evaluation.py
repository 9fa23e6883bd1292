"""Which queries measure an index and which choose its settings; the pool; fusion and threshold by what they promise."""

from __future__ import annotations

import random
import signal
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_reward import write

from pipelines.core import relevance_threshold as relevance
from pipelines.core import retrieval_evaluation as evaluation
from pipelines.core.context import StageContext, Stopped
from pipelines.core.params.rag import RagParams
from pipelines.core.retrieval import Passage

PARAMS = RagParams(
    embedder="minilm-l6-v2", reranker=None, chunk_tokens=64, chunk_overlap=0.1, embedded_chunks=None,
    exact_chunks=1000, fusion_k=10.0, dense_weight=1.5, tune=True, tuning_share=0.4, kinds=("line",), pool=None,
    threshold_queries=50, samples=2,
)  # fmt: skip


class Told:
    """An index that finds the same documents for every query, each as relevant as it was told."""

    def __init__(self, relevance: dict[str, float]) -> None:
        self.relevance = relevance
        self.documents = list(relevance)
        self.hidden: list[set[str]] = []

    def search(self, query: str, count: int = 10, *, exclude: Collection[str] = ()) -> list[Passage]:
        self.hidden.append(set(exclude))
        left = [name for name in self.relevance if name not in exclude][:count]
        return [Passage(name, name, name, name, None, 1.0, self.relevance[name], 0, 1, 1) for name in left]

    def duplicates(self, document: str) -> list[str]:
        return ["twin"] if document == "d0" else []

    def rankings(self, queries: list[str], method: str, depth: int, documents: Collection[str] | None) -> Any:
        names = [name for name in self.relevance if documents is None or name in documents]
        return [names[::-1] if method == "dense" else names] * len(queries)


def data(root: Path, unanswerable: int = 0) -> Path:
    """Sixty lines about ten documents, each its own group, on three sides; as many questions about the first."""
    sides = {"train": range(40), "validation": range(40, 50), "test": range(50, 60)}
    for split, numbers in sides.items():
        rows = [
            {"id": f"l{n:02}", "group": f"g{n}", "kind": "line", "query": f"line {n}", "target": f"d{n % 10}",
             "answers": None} for n in numbers
        ]  # fmt: skip
        asked = {"kind": "what", "target": "d0", "answers": ["a"]}
        rows += [{**row, **asked, "id": f"q{row['id']}"} for row in rows]
        rows += [{**row, "id": f"u{row['id']}", "target": None} for row in rows[:unanswerable]]
        write(root / "queries" / f"{split}.parquet", rows)
    return root


def test_no_query_of_the_test_side_and_no_judged_group_chooses_anything(tmp_path: Path) -> None:
    found = evaluation.queries(PARAMS, data(tmp_path))
    assert [query.id for query in found.measured] == [f"l{n:02}" for n in range(60)]
    tuning, judged = {q.group for q in found.every if q.tuning}, {q.group for q in found.judged}
    assert 10 <= len(tuning) <= 30 and not tuning & judged and len(tuning | judged) == 60
    assert judged >= {f"g{n}" for n in range(50, 60)}
    assert not evaluation.queries(PARAMS, tmp_path / "nothing").every
    everything = evaluation.queries(PARAMS.model_copy(update={"kinds": ()}), tmp_path)
    assert {query.kind for query in everything.measured} == {"line", "what"}


def test_the_pool_holds_every_target_and_stays_as_documents_are_added(tmp_path: Path) -> None:
    asked = evaluation.queries(PARAMS, data(tmp_path))
    names = [f"d{n}" for n in range(400)]
    of_30 = PARAMS.model_copy(update={"pool": 30})
    before, after = evaluation.pool(of_30, names[:200], asked), evaluation.pool(of_30, names, asked)
    assert before is not None and after is not None and len(before) == len(after) == 30
    assert {f"d{n}" for n in range(10)} <= set(before) & set(after)
    assert len(set(before) & set(after)) >= 15, "half of the others stay when their number doubles"
    assert evaluation.pool(of_30, names[:30], asked) is None and evaluation.pool(PARAMS, names, asked) is None


def test_ranks_come_in_the_order_of_the_queries_and_stop_for_a_signal(tmp_path: Path, context: StageContext) -> None:
    asked = evaluation.queries(PARAMS, data(tmp_path)).measured
    index = Told({f"d{n}": 0.5 for n in range(9)})
    found = evaluation.ranks(index, asked, ("bm25", "dense"), None, context)
    assert found["bm25"].tolist() == [(n % 10 + 1) % 10 for n in range(60)], "d9 is in no ranking"
    assert found["dense"].tolist() == [9 - n % 10 for n in range(60)]
    assert evaluation.ranks(index, asked, ("dense",), ["d0", "d1"], context)["dense"][:3].tolist() == [2, 1, 0]
    context.signal_number = signal.SIGTERM
    with pytest.raises(Stopped):
        evaluation.ranks(index, asked, ("bm25",), None, context)


def test_fusion_is_tuned_by_the_tuning_part_alone(tmp_path: Path, context: StageContext) -> None:
    asked = evaluation.queries(PARAMS, data(tmp_path))
    index = Told({f"d{n}": 0.5 for n in range(10)})
    chosen = evaluation.tuned(index, asked, None, context)
    only = evaluation.Queries([], [query for query in asked.measured if query.tuning])
    assert chosen is not None and evaluation.tuned(index, only, None, context) == chosen
    assert evaluation.tuned(index, evaluation.Queries([], asked.judged), None, context) is None


def test_fusion_is_the_best_of_all_that_are_tried() -> None:
    drawn = random.Random(4)
    names = [f"d{n}" for n in range(30)]
    targets = [drawn.choice(names) for _ in range(50)]

    def ranking(target: str, noise: float) -> list[str]:
        score = {name: drawn.gauss(1.0 if name == target else 0.0, noise) for name in names}
        return sorted(names, key=lambda name: -score[name])[:20]

    bm25, dense = [ranking(target, 1.0) for target in targets], [ranking(target, 0.5) for target in targets]

    def mrr(k: float, weight: float) -> float:
        total = 0.0
        for first, second, target in zip(bm25, dense, targets, strict=True):
            score = dict.fromkeys(names, 0.0)
            for part, ranked in ((1.0, first), (weight, second)):
                for place, name in enumerate(ranked, 1):
                    score[name] += part / (k + place)
            if score[target]:
                tied = sum(value == score[target] for value in score.values()) - 1
                total += 1 / (1 + sum(value > score[target] for value in score.values()) + tied / 2)
        return total

    chosen = evaluation.choose_fusion(bm25, dense, targets)
    tried = {(k, weight): mrr(k, weight) for k in evaluation.KS for weight in evaluation.WEIGHTS}
    assert mrr(*chosen) == pytest.approx(max(tried.values())) and mrr(*chosen) > mrr(10.0, 0.5)


def test_hidden_targets_and_their_twins_stand_for_what_nothing_answers(tmp_path: Path, context: StageContext) -> None:
    asked = evaluation.queries(PARAMS, data(tmp_path))
    index = Told({"d0": 0.9, "twin": 0.8, "d5": 0.3, "d6": float("nan")})
    found = relevance.relevances(PARAMS, asked, index, True, context)
    assert found is not None
    questions = [query for query in asked.every if query.answers and query.tuning]
    assert questions and len(found.answerable) == len(found.unanswerable) == len(questions)
    assert set(found.answerable) == {0.9} and set(found.unanswerable) == {0.3}
    assert index.hidden[-1] == {"d0", "twin"} and index.hidden[0] == set()
    nothing = relevance.relevances(PARAMS, asked, Told({"d0": float("nan")}), True, context)
    assert nothing is not None and set(nothing.unanswerable) == {relevance.UNKNOWN}
    chosen = relevance.choose(PARAMS, asked, index, context)
    assert chosen is not None and chosen.mistakes is not None and not chosen.given
    assert chosen.value == pytest.approx(0.6) and chosen.mistakes[1:] == (0.0, 0.0)
    assert relevance.told(chosen)["threshold"] == chosen.value and relevance.told(None) == {"threshold": None}


def test_queries_without_a_target_stand_for_themselves_where_both_parts_have_some(
    tmp_path: Path, context: StageContext
) -> None:
    asked = evaluation.queries(PARAMS, data(tmp_path, unanswerable=10))
    index = Told({"d0": 0.9, "d5": 0.3})
    for tuning in (True, False):
        found = relevance.relevances(PARAMS, asked, index, tuning, context)
        assert found is not None and set(found.unanswerable) == {0.9}
    assert not any(index.hidden)
    chosen = relevance.choose(PARAMS, asked, index, context)
    assert chosen is not None and chosen.given
    few = evaluation.Queries([query for query in asked.every if query.target or not query.tuning], asked.measured)
    found = relevance.relevances(PARAMS, few, index, True, context)
    assert found is not None and set(found.unanswerable) == {0.3}


def test_a_threshold_is_chosen_by_the_tuning_part_and_judged_on_the_other(
    tmp_path: Path, context: StageContext
) -> None:
    """Relevances that differ by part: what fits the one part is wrong on the other."""
    asked = evaluation.queries(PARAMS, data(tmp_path))

    class Parted(Told):
        def search(self, query: str, count: int = 10, *, exclude: Collection[str] = ()) -> list[Passage]:
            found = super().search(query, count, exclude=exclude)
            tuning = next(one for one in asked.every if one.text == query).tuning
            return found if tuning else [one._replace(relevance=one.relevance - 0.5) for one in found]

    chosen = relevance.choose(PARAMS, asked, Parted({"d0": 0.9, "d5": 0.3}), context)
    assert chosen is not None and chosen.mistakes is not None
    assert chosen.value == pytest.approx(0.6) and chosen.mistakes[1:] == (0.0, 1.0)


def test_rows_say_what_was_ranked(tmp_path: Path) -> None:
    asked = evaluation.queries(PARAMS, data(tmp_path)).measured[:3]
    found = evaluation.rows(asked, {"hybrid": np.array([1, 0, 4]), "bm25": np.array([2, 1, 0])}, "hash")
    assert found["id"] == ["l00", "l01", "l02"] and found["documents"] == ["hash"] * 3 and found["judged"] == [1.0] * 3
    assert found["mrr"] == [1.0, 0.0, 0.25] and found["mrr_bm25"] == [0.5, 1.0, 0.0]
    assert found["recall_at_5"] == [1.0, 0.0, 1.0] and found["recall_at_1_bm25"] == [0.0, 1.0, 0.0]
