"""What a labelled task gives away without a language model: the majority, and TF-IDF with a linear model.

Both learn from training examples and predict `task.test`, in its order. A fine-tuned model that does not beat them
has learned nothing that word counts do not tell. Nothing is random: the same rows give the same predictions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.core.task_inputs import Example, Task

# Words, and each other character that is not white space: one-letter words and punctuation count in signatures and
# in grammar, and no text that is not blank is without features.
TOKEN = r"\w+|[^\w\s]"
ITERATIONS = 1000


def majority(task: Task) -> list[float]:
    """The same prediction for every test example, from `task.train`.

    The most frequent class, or position of the right choice (of equally frequent ones the first); for a regression
    the mean, which has the least squared error.
    """
    labels = [example.label for example in task.train]
    if task.regression:
        return [sum(labels) / len(labels)] * len(task.test)
    counts = Counter(labels)
    best = min(counts, key=lambda label: (-counts[label], label))
    if task.kind != "choice":
        return [best] * len(task.test)
    # Where a test example has fewer candidates, its last one.
    return [min(best, len(example.choices) - 1.0) for example in task.test]


def tfidf(task: Task, rows: Sequence[Example]) -> list[float]:
    """TF-IDF of words and word pairs (sublinear term frequency) and a linear model, fitted on `rows`.

    Logistic regression for classes, ridge for regressions. Two texts become both vectors, their product and their
    absolute difference, side by side. A choice is a binary task on context and candidate: the most probable wins.

    Args:
        rows: `task.train` or `task.train_all`; two or more classes, unless a regression.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [text for example in rows for text in (*example.parts, *example.choices)]
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=TOKEN).fit(texts)
    if task.kind == "choice":
        return _choose(vectorizer, rows, task.test)
    x, y = _features(vectorizer, [example.parts for example in rows]), [example.label for example in rows]
    held_out = _features(vectorizer, [example.parts for example in task.test])
    return [float(value) for value in _linear(task.regression).fit(x, y).predict(held_out)]


def _choose(vectorizer: Any, rows: Sequence[Example], test: Sequence[Example]) -> list[float]:
    """The candidate of each test example that a binary classifier of (context, candidate) finds most probable."""
    import numpy as np

    y = [float(number == example.label) for example in rows for number in range(len(example.choices))]
    classifier = _linear(regression=False).fit(_features(vectorizer, _candidates(rows)), y)
    # Decisions are log odds: in the order of the probabilities, and never rounded to 1.
    decisions = classifier.decision_function(_features(vectorizer, _candidates(test)))
    ends = np.cumsum([len(example.choices) for example in test])[:-1]
    return [float(part.argmax()) for part in np.split(decisions, ends)]


def _candidates(examples: Sequence[Example]) -> list[tuple[str, ...]]:
    return [(*example.parts, choice) for example in examples for choice in example.choices]


def _features(vectorizer: Any, parts: Sequence[tuple[str, ...]]) -> Any:
    """Sparse features of one text or of two. [rows, features]"""
    from scipy.sparse import hstack

    vectors = [vectorizer.transform(texts) for texts in zip(*parts, strict=True)]
    if len(vectors) == 1:
        return vectors[0]
    first, second = vectors
    return hstack([first, second, first.multiply(second), abs(first - second)], format="csr")


def _linear(regression: bool) -> Any:
    """A linear model whose solver uses no chance."""
    from sklearn.linear_model import LogisticRegression, Ridge

    if regression:
        return Ridge(solver="sparse_cg", max_iter=ITERATIONS)
    return LogisticRegression(solver="lbfgs", max_iter=ITERATIONS, random_state=0)
