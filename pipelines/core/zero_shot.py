"""What a language model knows of a task before it is fine-tuned: GPT-1's heuristics (section 5, figure 2 right).

Nothing is trained, no example is shown; the answer is what the model finds likely as text:

* **choice**: the candidate with the highest mean log-probability of its tokens after the context (there: RACE);
* **classes**: after text and a cue, the class's name with the highest mean log-probability of its tokens, less what the
  cue alone gives that name: a word that is frequent anyway says nothing (Zhao et al., "Calibrate Before Use", 2021);
* **words**: after text and the cue " very", the likelier of two words, one a class (there: the sentiment task);
* **acceptability**: one of two classes, by a threshold on the mean log-probability of the text's tokens (there: CoLA).
  The paper does not say where its threshold comes from; here it is the one that is right most often on the training
  rows, and the class whose training texts are the likelier ones on average lies above it.

A regression has no such answer. Of what is longer than the model's context a text before an answer loses its beginning,
since the cue stands at its end, and a candidate or a text that is judged itself loses its end; how many is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipelines.core import context_window, k_way, packing, segments
from pipelines.core.context import StageContext
from pipelines.core.errors import ParamsError
from pipelines.core.task_inputs import Example, Task

if TYPE_CHECKING:
    from pipelines.core.params.transfer import Heuristic

CUE = "\nAnswer:"
PAPER_CUE = " very"


def check(task: Task, heuristic: Heuristic) -> None:
    """Raises ParamsError where the task has no such answer."""
    where = f"transfer.heuristics: task {task.name}, kind {heuristic.kind}"
    if task.kind != "classification":
        raise ParamsError(f"{where}: a {task.kind} task has one way of being answered; accepted: classifications")
    if heuristic.kind == "acceptability" and len(task.labels) != 2:
        raise ParamsError(f"{where}: {len(task.labels)} labels; accepted: two, apart by a threshold")
    if heuristic.kind == "words" and len(heuristic.words) != len(task.labels):
        raise ParamsError(
            f"{where}: {len(heuristic.words)} words; accepted: {len(task.labels)}, one for each of "
            f"{', '.join(task.labels)} in this order"
        )


def predict(
    model: Any, tokenizer: Any, task: Task, context: StageContext, tell: k_way.Tell, heuristic: Heuristic | None = None
) -> list[float]:
    """Number of the class or candidate for each test example.

    Args:
        model: a causal language model on the context's device; `tokenizer` is its own.
        heuristic: words or acceptability (`check` passed); None: by the kind of task.

    Raises:
        ValueError: the task is a regression.
    """
    if task.regression:
        raise ValueError(f"{task.name}: a score is no text that could be likely")
    asked: list[tuple[str, Sequence[str]]]
    if heuristic is not None and heuristic.kind == "acceptability":

        def likely(examples: Sequence[Example]) -> list[float]:
            texts = [("", [one.parts[0]]) for one in examples]
            return [row[0] for row in _mean_log_probabilities(model, tokenizer, task, texts, context, tell)]

        return thresholded(likely(task.train), [int(one.label) for one in task.train], likely(task.test))
    if task.kind == "choice":
        asked = [(one.parts[0] + "\n", one.choices) for one in task.test]
        return [_likeliest(row) for row in _mean_log_probabilities(model, tokenizer, task, asked, context, tell)]
    if heuristic is not None:
        cue = PAPER_CUE if heuristic.cue is None else heuristic.cue
        words = [f" {word}" for word in heuristic.words]
        asked = [("\n".join(one.parts) + cue, words) for one in task.test]
        return [_likeliest(row) for row in _mean_log_probabilities(model, tokenizer, task, asked, context, tell)]
    names = [f" {label}" for label in task.labels]
    asked = [*(("\n".join(one.parts) + CUE, names) for one in task.test), (CUE, names)]
    *scores, alone = _mean_log_probabilities(model, tokenizer, task, asked, context, tell)
    return [_likeliest([value - usual for value, usual in zip(row, alone, strict=True)]) for row in scores]


def thresholded(train: Sequence[float], labels: Sequence[int], test: Sequence[float]) -> list[float]:
    """Class 0 or 1 of each test score, by the cut between two training scores that is right most often there.

    Of equally good cuts the lowest. The class with the higher mean training score lies above the cut.
    """
    sides = [[score for score, label in zip(train, labels, strict=True) if label == side] for side in (0, 1)]
    above = int(sum(sides[1]) / len(sides[1]) >= sum(sides[0]) / len(sides[0]))
    known = sorted(set(train))
    cuts = [float("-inf"), *((low + high) / 2 for low, high in zip(known, known[1:], strict=False)), float("inf")]

    def right(cut: float) -> int:
        return sum((above if score > cut else 1 - above) == label for score, label in zip(train, labels, strict=True))

    best = max(cuts, key=right)
    return [float(above if score > best else 1 - above) for score in test]


def _mean_log_probabilities(
    model: Any,
    tokenizer: Any,
    task: Task,
    asked: Sequence[tuple[str, Sequence[str]]],
    context: StageContext,
    tell: k_way.Tell,
) -> list[list[float]]:
    """Of each response to each prompt, after what opens a document."""
    start, room = packing.separator_id(tokenizer), context_window.length(model.config)
    ids = iter(packing.encode(tokenizer, [text for prompt, responses in asked for text in (prompt, *responses)]))
    sequences, cut = [], 0
    for _, responses in asked:
        before, after = next(ids), [next(ids) for _ in responses]
        if room is not None and 1 + len(before) + max(map(len, after)) > room:
            cut += 1
            after = [one[: room - 1] for one in after]
            left = room - 1 - max(map(len, after))
            before = before[max(0, len(before) - left) :]
        sequences.append(segments.of_completions([start, *before], after))
    if cut:
        told = f"{cut} of {len(asked)} texts of {task.name} were cut to the model's context of {room} tokens"
        context.say(f"warning: zero-shot: {told}")
    pad = start if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return k_way.mean_log_probabilities_of(model, sequences, pad, context, tell)


def _likeliest(row: Sequence[float]) -> float:
    return float(max(range(len(row)), key=row.__getitem__))
