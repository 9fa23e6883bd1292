"""How good an answer is, against accepted answers and against the passages that it cites.

Exact match and token F1 are SQuAD's (Rajpurkar et al., EMNLP 2016, section 6.1): lower case, without punctuation,
articles and extra white space; the best over the accepted answers. Of scripts without spaces each sign is a word, as in
MLQA (Lewis et al., ACL 2020). Citations are judged by the document that is known to answer the question (for what a
citation is, `citing`); groundedness is the share of an answer's n-grams that stand in the passages it cites.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

from pipelines.core import citing, text_scores

NGRAM = 3  # words; of a shorter sentence all of it
_PUNCTUATION = str.maketrans("", "", string.punctuation + "。，、！？：；「」『』（）《》【】")
_UNSPACED = re.compile(f"([{text_scores.NO_SPACES}])")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


class Scores(NamedTuple):
    """An answer against the accepted ones, each from 0 to 1."""

    exact_match: float
    f1: float
    chrf: float


class Citations(NamedTuple):
    """An answer's citations against the document that answers the question."""

    cited: int  # documents
    right: int  # of them the one that answers it: 0 or 1


def score(answer: str, accepted: Sequence[str]) -> Scores:
    """The best of each score over the accepted answers; an empty answer has 0.

    Raises:
        ValueError: no accepted answer.
    """
    if not accepted:
        raise ValueError("an answer is scored against at least one accepted answer, found none")
    if not answer.strip():
        return Scores(0.0, 0.0, 0.0)
    return Scores(
        max(float(normalised(answer) == normalised(one)) for one in accepted),
        max(f1(answer, one) for one in accepted),
        max(text_scores.chrf(answer, one) for one in accepted),
    )


def normalised(text: str) -> str:
    """Lower case, without ASCII and Chinese punctuation, English articles and extra white space; signs of scripts that
    are written without spaces apart.
    """
    bare = _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION))
    return " ".join(_UNSPACED.sub(r" \1 ", bare).split())


def f1(answer: str, accepted: str) -> float:
    """Harmonic mean of precision and recall over words, each counted as often as it comes in both."""
    ours, theirs = normalised(answer).split(), normalised(accepted).split()
    shared = sum((Counter(ours) & Counter(theirs)).values())
    if not ours or not theirs:  # nothing but articles and punctuation
        return float(ours == theirs)
    return 2 * shared / (len(ours) + len(theirs))


def contains(text: str, accepted: Sequence[str]) -> bool:
    """Whether a text spells one of the accepted answers: a question that it comes with is not unanswerable."""
    whole = f" {normalised(text)} "
    return any(f" {normalised(one)} " in whole for one in accepted)


def citations(documents: Collection[str], target: str) -> Citations:
    """Which documents an answer cites, and whether the one that answers the question is among them."""
    distinct = set(documents)
    return Citations(len(distinct), int(target in distinct))


def groundedness(answer: str, passages: Sequence[str]) -> float:
    """Share of the n-grams of the answer's sentences that stand in one of the passages it cites; 0 without any.

    Args:
        answer: without marks.
        passages: texts, with their titles, of those that it cites.
    """
    known = [citing.words(passage) for passage in passages]
    found = []
    for sentence in citing.sentences(answer):
        words = citing.words(sentence)
        size = min(NGRAM, len(words))
        grams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1) if size]
        there = {tuple(one[start : start + size]) for one in known for start in range(len(one) - size + 1)}
        found += [gram in there for gram in grams]
    return sum(found) / len(found) if found else 0.0
