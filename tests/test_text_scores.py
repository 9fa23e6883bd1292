"""The scores by hand-worked examples."""

from __future__ import annotations

import pytest

from pipelines.core import text_scores


def test_rouge_l_by_hand() -> None:
    """Longest common subsequence `return the area`: 3 of 4 words said, 3 of 6 wanted."""
    assert text_scores.rouge_l("Return all the area", "return the area of a shape") == pytest.approx(2 * 3 / (4 + 6))
    assert text_scores.rouge_l("same words", "Same words.") == 1.0
    assert text_scores.rouge_l("", "something") == text_scores.rouge_l("other", "something") == 0.0


def test_rouge_l_in_other_scripts() -> None:
    """Without a word of it, every model had 0, and no gate on it could be passed."""
    assert text_scores.rouge_l("배열을 뒤집는다", "배열을 위아래로 뒤집는다.") == pytest.approx(2 * 2 / (2 + 3))
    assert text_scores.rouge_l("Поверните массив", "поверните массив!") == 1.0
    assert text_scores.rouge_l("翻转数组", "上下翻转这个数组") == pytest.approx(2 * 4 / (4 + 8))
    assert text_scores.rouge_l("cafe\u0301 noir", "Café noir") == 1.0, "composed or not"


def test_words_of_ascii_are_those_of_rouge_score() -> None:
    from rouge_score.tokenizers import DefaultTokenizer

    text = "".join(map(chr, range(128))) + " def f_2(x): return 1.5e-3 * X['a']"
    assert text_scores.words(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)


def test_chrf_by_hand() -> None:
    """`ab` for `abc`: precision 1 and 1, recall 2/3 and 1/2, which counts twice; longer n-grams are in neither."""
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    expected = 5 * precision * recall / (4 * precision + recall)
    assert text_scores.chrf("ab", "abc") == pytest.approx(expected)
    assert text_scores.chrf("same", "same") == 1.0 and text_scores.chrf("", "something") == 0.0
