"""Scores of an answer, against numbers worked by hand and against another program."""

from __future__ import annotations

import pytest
from sacrebleu.metrics.chrf import CHRF

from pipelines.core import answer_metrics
from pipelines.core.answer_metrics import Citations, Scores


def test_normalised_is_squads() -> None:
    assert answer_metrics.normalised("The  `numpy.flip`, a function; of An array!") == "numpyflip function of array"
    assert answer_metrics.normalised("theatre another") == "theatre another"  # articles are whole words


@pytest.mark.parametrize(
    ("answer", "accepted", "expected"),
    [
        ("the width of the area", "width of area", 1.0),  # articles do not count
        ("width of area", "the height", 0.0),
        ("width width", "width", 2 / 3),  # precision 1/2, recall 1
        ("the", "a", 1.0),  # nothing is left of either
        ("the", "width", 0.0),
        ("배열을 뒤집는다", "배열을 돌린다", 0.5),
        ("上下翻转数组", "翻转数组。", 0.8),  # a sign each: precision 4/6, recall 1
    ],
)
def test_f1(answer: str, accepted: str, expected: float) -> None:
    assert answer_metrics.f1(answer, accepted) == pytest.approx(expected)
    assert answer_metrics.f1(accepted, answer) == pytest.approx(expected), "it is symmetric"


def test_score_is_the_best_over_accepted_answers() -> None:
    found = answer_metrics.score("`numpy.flip`", ["numpy.rot90", "Numpy.flip."])
    chrf = CHRF().sentence_score("`numpy.flip`", ["Numpy.flip."]).score / 100
    assert found == Scores(1.0, 1.0, pytest.approx(chrf))
    assert answer_metrics.score(" ", ["a"]) == Scores(0.0, 0.0, 0.0), "an empty answer is not the article"
    with pytest.raises(ValueError, match="at least one accepted answer"):
        answer_metrics.score("x", [])


def test_contains_looks_for_whole_words() -> None:
    assert answer_metrics.contains("It is numpy.flip, said he.", ["`numpy.flip`"])
    assert not answer_metrics.contains("numpy.flipped", ["numpy.flip"])


def test_answers_without_spaces_are_compared_sign_by_sign() -> None:
    """A whole answer was one word: every model had 0, and the first of equals became the assistant's."""
    assert answer_metrics.score("北京。", ["北京"]).exact_match == 1.0
    assert answer_metrics.score("答案是北京", ["北京"]).f1 == pytest.approx(2 * 2 / (5 + 2))
    assert answer_metrics.contains("中国的首都是北京。", ["北京"]) and not answer_metrics.contains("北方", ["北京"])


def test_citations_count_documents_once() -> None:
    assert answer_metrics.citations(["a", "a", "b"], "a") == Citations(2, 1)
    assert answer_metrics.citations(["a"], "b") == Citations(1, 0)
    assert answer_metrics.citations([], "b") == Citations(0, 0)


def test_groundedness_is_the_share_of_ngrams_in_what_is_cited() -> None:
    passages = ["Reverse the order of elements in an array along the given axis."]
    assert answer_metrics.groundedness("Reverse the order of elements.", passages) == 1.0
    # reverse-the-order, the-order-of, order-of-rows, of-rows-quickly
    assert answer_metrics.groundedness("Reverse the order of rows quickly.", passages) == pytest.approx(2 / 4)
    # A short sentence counts as a whole, and no n-gram reaches over the end of a sentence.
    assert answer_metrics.groundedness("Reverse the order. An axis.", passages) == pytest.approx(1 / 2)
    assert answer_metrics.groundedness("Reverse the order.", []) == 0.0
    assert answer_metrics.groundedness("", passages) == 0.0
