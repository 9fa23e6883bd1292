"""What a language model knows of a task before it is fine-tuned: GPT-1's heuristics (section 5, figure 2 right).

Nothing is trained, no example is shown; the answer is what the model finds likely as text:

* **choice**: the candidate with the highest mean log-probability of its tokens after the context (there: RACE);
* **classes**: after text and a cue, the class's name with the highest mean log-probability of its tokens (there: the
  sentiment task, whose output is restricted to two words), less what the cue alone gives that name: a word that is
  frequent anyway says nothing (Zhao et al., "Calibrate Before Use", 2021).

A regression has no such answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.core import k_way, packing, segments
from pipelines.core.context import StageContext
from pipelines.core.task_inputs import Task

CUE = "\nAnswer:"


def predict(place: Path, tokenizer: Any, task: Task, context: StageContext, tell: k_way.Tell) -> list[float]:
    """Number of the class or candidate for each test example.

    Args:
        place: directory of a causal language model; `tokenizer` is its own.

    Raises:
        ValueError: the task is a regression.
    """
    if task.regression:
        raise ValueError(f"{task.name}: a score is no text that could be likely")
    start = packing.separator_id(tokenizer)
    asked: list[tuple[str, Sequence[str]]] = [(one.parts[0] + "\n", one.choices) for one in task.test]
    if task.kind != "choice":
        names = [f" {label}" for label in task.labels]
        asked = [*(("\n".join(one.parts) + CUE, names) for one in task.test), (CUE, names)]
    texts = [text for prompt, responses in asked for text in (prompt, *responses)]
    ids = iter(packing.encode(tokenizer, texts))
    sequences = [segments.of_completions([start, *next(ids)], [next(ids) for _ in responses]) for _, responses in asked]
    pad = start if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    scores = k_way.mean_log_probabilities(place, sequences, pad, context, tell)
    if task.kind != "choice":
        *scores, alone = scores
        scores = [[value - usual for value, usual in zip(row, alone, strict=True)] for row in scores]
    return [float(max(range(len(row)), key=row.__getitem__)) for row in scores]
