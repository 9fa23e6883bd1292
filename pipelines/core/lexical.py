"""BM25: text in, terms out; and the best documents for a query's terms, exactly, out of bm25s's memory-mapped files.

The arrays are those that `bm25s` builds (Lù, "BM25S", 2024; Lucene's variant): of every term the documents that hold it
and what it adds to their scores. Searched by MaxScore (Turtle & Flood, 1995), so that at a million documents a frequent
word costs only what can still reach the best. Flat-importable: imports nothing of the project.
"""

from __future__ import annotations

import json
import re
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

VERSION = 2  # of `terms`: an index and its queries must agree
K1, B = 1.2, 0.75  # Lucene's defaults
DATA, INDICES, POINTERS = "data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy"  # as bm25s names them
VOCABULARY = "vocab.index.json"
BOUNDS = "bounds.npy"  # beside bm25s's own: the most a term can add
MANY_TERMS = 64  # beyond, looking for what can be skipped costs more than it saves
LONG_LIST = 4096  # documents of a term from which it pays to look
MARKS = 30  # combining marks in a row, as Unicode's Stream-Safe Text Format (UAX 15) has it: sorting them is quadratic
# Lucene's English stop words and those of questions. Left out of queries alone: `for` and `not` are Python, too.
STOP_WORDS = frozenset(
    [
        "a", "about", "am", "an", "and", "any", "are", "as", "at", "be", "but", "by", "can", "could", "did", "do",
        "does", "for", "from", "had", "has", "have", "how", "i", "if", "in", "into", "is", "it", "its", "me",
        "my", "no", "not", "of", "on", "or", "shall", "should", "such", "that", "the", "their", "then", "there",
        "these", "they", "this", "to", "was", "we", "were", "what", "when", "where", "which", "who", "why",
        "will", "with", "would", "you", "your",
    ]
)  # fmt: skip

# A name with dots and underscores, or one sign that is no punctuation (arrows to dingbats, emoji).
_WORD = re.compile(r"\w+(?:\.\w+)*|[\u2190-\u2bff\U0001f000-\U0001faff]")
_PART = re.compile(r"[^\W_]+")
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
# Scripts written without spaces, or with endings that stick to the word: Thai, Lao, Burmese, Khmer, kana, CJK, Hangul.
_UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3040-\u30ff\u3130-\u318f\u3400-\u9fff\uac00-\ud7af"
    r"\U00020000-\U0003ffff]+"
)
# What is left out in most texts: accents, the points of Hebrew and Arabic, and what stretches an Arabic word.
_ACCENTS = re.compile(
    r"[\u0300-\u036f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u0640\u064b-\u065f\u0670\u06d6-\u06dc"
    r"\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed]"
)
VOWELS = (*range(0x0900, 0x1D00), *range(0xA800, 0xAC00), *range(0x11000, 0x12000))  # where marks are parts of words
_VOWELED = re.compile(r"[\u0900-\u1cff\ua800-\uabff\U00011000-\U00011fff]")  # the same
_SIGNS = re.compile(rf"[^\w\s]{{{MARKS + 1},}}")


def terms(text: str) -> list[str]:
    """What a text is found by, in order, repeated as often as it occurs.

    `numpy.flip_lr` gives itself, `numpy`, `flip_lr`, `flip` and `lr`; `DataFrame` itself, `data` and `frame`; a plural
    its singular; accents go, and the points of Hebrew and Arabic. Korean, Chinese, Japanese, Thai, Burmese and Khmer
    give pairs of characters (as Lucene's CJK analyzer).
    """
    return [term for word in _words(text) for term in _of_word(word)]


def _words(text: str) -> list[str]:
    """Names and signs as they are written, without accents."""
    if not text.isascii():
        # Decomposed, accents are characters of their own; composed again, Hangul is what it was
        text = unicodedata.normalize("NFKD", _SIGNS.sub(_few_marks, text))
        text = unicodedata.normalize("NFC", _ACCENTS.sub("", text))
        if _VOWELED.search(text):  # seldom: dashes and quotation marks are beyond ASCII, too
            return _with_vowels()[0].findall(text)
    return _WORD.findall(text)


@cache
def _with_vowels() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Words and their parts in any script: from Hindi to Khmer vowels are marks, which `\\w` leaves out."""
    marks = "".join(chr(code) for code in VOWELS if unicodedata.category(chr(code)).startswith("M"))
    word = _WORD.pattern.replace(r"\w+", rf"\w[\w{marks}]*")
    return re.compile(word), re.compile(rf"(?:[^\W_][{marks}]*)+")


def _few_marks(signs: re.Match[str]) -> str:
    """Signs without the marks that are too many in a row: no language has them."""
    runs = groupby(signs[0], lambda sign: unicodedata.combining(sign) > 0)
    return "".join("".join(islice(run, MARKS) if marks else run) for marks, run in runs)


def _of_word(word: str) -> list[str]:
    """A word as a whole, and its parts where it has any."""
    whole = word.casefold().strip("_")
    if whole.isascii() and whole.isalnum() and (word.islower() or word[1:].islower() or len(word) == 1):
        return [_singular(whole)]  # nearly every word
    found = [_singular(whole)] if whole else []
    parts = _PART if word.isascii() or word.isalnum() else _with_vowels()[1]  # a mark is no letter
    for name in word.split("."):
        if name != word and len(parts.findall(name)) > 1:
            found.append(name.casefold().strip("_"))
        for part in parts.findall(name):
            humps = _HUMP.split(part)
            pieces = [part, *humps] if len(humps) > 1 else [part]
            found += [piece for one in pieces if (piece := _singular(one.casefold())) != (found or [""])[0]]
    if word.isascii():
        return found
    return [piece for one in found for piece in _pairs(one)]


def _singular(word: str) -> str:
    """Without the ending of a plural (Harman's S stemmer, 1991): `arrays` is `array`, `queries` `query`."""
    if len(word) < 4 or word[-1] != "s" or not word.isascii():
        return word
    if word.endswith("ies") and word[-4] not in "ae":
        return word[:-3] + "y"
    return word if word[-2] in "uis" else word[:-1]


def _pairs(word: str) -> list[str]:
    """A word, its runs of unspaced script taken apart into overlapping pairs of characters."""
    found: list[str] = []
    at = 0
    for match in _UNSPACED.finditer(word):
        run = match[0]
        found += [word[at : match.start()]] if match.start() > at else []
        found += [run[place : place + 2] for place in range(max(len(run) - 1, 1))]
        at = match.end()
    return found + ([word[at:]] if at < len(word) else [])


def query_terms(text: str) -> list[str]:
    """The different terms of a query, without stop words unless there is nothing else."""
    words = _words(text)
    asked = [word for word in words if word.casefold() not in STOP_WORDS] or words
    return list(dict.fromkeys(term for word in asked for term in _of_word(word)))


def build(texts: Iterable[str], folder: Path) -> None:
    """Write the files of an index over texts, in their order. The same texts give the same bytes."""
    import bm25s

    vocabulary: dict[str, int] = {}  # ids in the order of first use
    known: dict[str, list[int]] = {}  # of a word as it is written, the ids of its terms
    ids, lengths = array("i"), array("i")
    for text in texts:
        before = len(ids)
        for word in _words(text):
            made = known.get(word)
            if made is None:
                made = known[word] = [vocabulary.setdefault(term, len(vocabulary)) for term in _of_word(word)]
            ids.extend(made)
        lengths.append(len(ids) - before)
    index: Any = bm25s.BM25(k1=K1, b=B, method="lucene")
    data, indices, pointers = _postings(np.array(ids), np.array(lengths), len(vocabulary))
    index.scores = {"data": data, "indices": indices, "indptr": pointers, "num_docs": len(lengths)}
    index.vocab_dict, index.nonoccurrence_array = vocabulary, None
    index.save(folder, show_progress=False)
    np.save(folder / BOUNDS, np.maximum.reduceat(data, pointers[:-1]) if len(data) else data)


def _postings(
    ids: NDArray[np.int32], lengths: NDArray[np.int32], terms: int
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int64]]:
    """Scores and documents of every term, term after term, and where each term's begin (bm25s's arrays).

    Lucene's BM25 (Kamphuis et al., "Which BM25 do you mean?", 2020), as `bm25s.BM25.index`, which loops over documents.
    """
    count = len(lengths)
    document = np.repeat(np.arange(count, dtype=np.int64), lengths)
    pairs, times = np.unique((ids.astype(np.int64) << 32) | document, return_counts=True)
    term, document = pairs >> 32, pairs & 0xFFFFFFFF
    frequency = np.bincount(term, minlength=terms)
    idf = np.log(1 + (count - frequency + 0.5) / (frequency + 0.5))
    norm = K1 * (1 - B + B * lengths / max(float(lengths.mean()) if count else 1.0, 1e-9))
    data = (idf[term] * times / (norm[document] + times)).astype(np.float32)
    return data, document.astype(np.int32), np.concatenate([[0], np.cumsum(frequency)])


class Bm25:
    """The files of an index, memory-mapped."""

    def __init__(self, folder: Path, size: int) -> None:
        """Open them. `size`: documents. Raises ValueError, OSError for what cannot be read."""
        self.size = size
        self.data, self.indices, self.pointers, self.bounds = (
            np.load(folder / name, mmap_mode="r") for name in (DATA, INDICES, POINTERS, BOUNDS)
        )
        with (folder / VOCABULARY).open(encoding="utf-8") as file:
            self.vocabulary: dict[str, int] = json.load(file)

    def search(
        self, query: str, count: int, allowed: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The `count` best of the documents that share a term with the query: numbers and scores, best first.

        Equal scores in the order of documents. `allowed` [documents]: those that may be found.
        """
        known = [self.vocabulary[term] for term in query_terms(query) if term in self.vocabulary]
        # What adds most comes first; what is left can then be the less.
        ids = np.array(sorted(known, key=lambda term: (-self.bounds[term], term)), np.int64)
        left = np.append(np.cumsum(self.bounds[ids][::-1])[::-1], 0) * np.float32(1 + 1e-5)  # rounding of sums
        scores = np.zeros(self.size, np.float32)
        seen: list[NDArray[np.int32]] = []  # documents with a score, each once: of a million, few have one
        candidates: NDArray[np.int32] | None = None  # None: any document may still be among the best
        for place, term in enumerate(ids.tolist()):
            first, last = int(self.pointers[term]), int(self.pointers[term + 1])
            if candidates is None and place and last - first > LONG_LIST and len(ids) <= MANY_TERMS:
                candidates = _promising(_allowed(seen, allowed), scores, left[place], count)
            holders = self.indices[first:last]
            if candidates is None:
                # A term has a document once, so plain indexing adds every one
                before = scores[holders]
                seen.append(holders[before == 0])
                scores[holders] = before + self.data[first:last]
                continue
            where = np.searchsorted(holders, candidates)
            where[where == len(holders)] = 0
            hit = holders[where] == candidates
            scores[candidates[hit]] += self.data[first:last][where[hit]]
        found = candidates if candidates is not None else _allowed(seen, allowed)
        return best(found.astype(np.int64), scores[found], count)


def _allowed(seen: Sequence[NDArray[np.int32]], allowed: NDArray[np.bool_] | None) -> NDArray[np.int32]:
    """Those of the documents seen that may be found."""
    found: NDArray[np.int32] = np.concatenate([np.zeros(0, np.int32), *seen])
    return found if allowed is None else found[allowed[found]]


def _promising(
    found: NDArray[np.int32], scores: NDArray[np.float32], left: np.float32, count: int
) -> NDArray[np.int32] | None:
    """Documents that can still be among the best, or None while one without a score can."""
    if len(found) <= count:
        return None
    own = scores[found]
    reached = np.partition(own, len(found) - count)[len(found) - count]
    if left >= reached:
        return None
    kept: NDArray[np.int32] = found[own + left >= reached]
    return kept


def best(
    numbers: NDArray[np.int64], scores: NDArray[np.float32], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The `count` highest, highest first; equal ones by number."""
    if len(scores) > count:
        lowest = np.partition(scores, len(scores) - count)[len(scores) - count] if count else np.inf
        kept = scores >= lowest
        numbers, scores = numbers[kept], scores[kept]
    order = np.lexsort((numbers, -scores))[:count]
    return numbers[order], scores[order]
