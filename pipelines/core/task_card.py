"""Pages for people beside fine-tuned task models: their cards, and what they said of held-out examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipelines.core.cards import inline
from pipelines.core.task_evaluation import Answers
from pipelines.core.task_inputs import Example, Task

if TYPE_CHECKING:
    from pipelines.core.params.transfer import TransferParams

COMPARED = {
    "majority": "the most frequent answer",
    "tfidf": "TF-IDF and a linear model, the same training rows",
    "tfidf_all": "TF-IDF and a linear model, all training rows",
    "zero_shot": "the pre-trained model, not fine-tuned",
    "no_auxiliary": "without the auxiliary loss",
    "random": "without pre-training",
}


def example(task: Task, tokenizer: object) -> str:
    """A training example as the model sees it, with the answer that is supervised."""
    one = task.train[0]
    decode = tokenizer.decode  # type: ignore[attr-defined]  # transformers' tokenizers share no typed base
    lines = [f"{task.name} ({task.kind}): {len(task.train)} examples; the first:"]
    lines += [f"  {inline(decode(list(ids)))}" for ids in one.sequences]
    return "\n".join([*lines, f"  answer: {inline(truth(task, one))}"])


def truth(task: Task, one: Example) -> str:
    """The right answer in words."""
    return named(task, one, one.label)


def named(task: Task, one: Example, answer: float) -> str:
    """An answer in words: the class, the candidate, or the score."""
    if task.regression:
        return f"{answer:.2f}"
    return one.choices[int(answer)] if task.kind == "choice" else task.labels[int(answer)]


def samples(tasks: Sequence[Task], answers: Sequence[Answers], count: int) -> str:
    """The first held-out examples of each task with answer, its probability and the truth."""
    lines = ["# Held-out examples"]
    for task, given in zip(tasks, answers, strict=True):
        for number, one in enumerate(task.test[:count]):
            said = given.predictions[number]
            sure = "" if given.probabilities is None else f" ({max(given.probabilities[number]):.2f})"
            lines.append(f"\n**Prompt:** {task.name}: {' / '.join(inline(part) for part in one.parts)}\n")
            lines.append(f"- *model*{sure}: {inline(named(task, one, said))}")
            lines.append(f"- *truth*: {inline(truth(task, one))}")
    return "\n".join(lines) + "\n"


def card(params: TransferParams, task: Task, metrics: Mapping[str, float], parameters: int) -> str:
    """Model card, with the front matter the hub reads. `metrics`: of this task, without its name."""
    score = "Pearson's correlation" if task.regression else "accuracy"
    own = metrics.get("score_of_model", metrics["score"])  # of several seeds `score` is the median
    rows = [f"| this model | {own:.3f} ({metrics['score_low']:.3f} to {metrics['score_high']:.3f}) |"]
    if "score_of_model" in metrics:
        rows.append(f"| median of {params.seeds} seeds | {metrics['score']:.3f} |")
    rows += [f"| {told} | {metrics[key]:.3f} |" for key, told in COMPARED.items() if key in metrics]
    how = {"full": "all weights", "head": "the linear head on a frozen body"}
    trained = how.get(params.method, f"{params.words()}, and the head")
    listed = f"Labels: {', '.join(task.labels)}.\n\n" if task.labels else ""
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-classification\n---\n\n"
        f"# sluice-transfer-{task.name}\n\nA {task.kind} model, {parameters / 1e6:.1f} million parameters, fine-tuned "
        f"from the pre-trained model as GPT-1 was: {trained}, on {len(task.train):,} examples; weight of "
        f"the auxiliary language-model loss {params.auxiliary:g}. Columns: {', '.join(task.columns)}; `task.json` says "
        f"how they become its input.\n\n{listed}"
        f"| {score} on {len(task.test):,} held-out examples | |\n| --- | --- |\n" + "\n".join(rows) + "\n\n"
        "95 % intervals by bootstrap over groups of examples (of a correlation by Fisher's transformation).\n"
    )
