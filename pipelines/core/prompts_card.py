"""What lies beside a chosen prompt for people and programs: `prompt.yaml`, `examples.jsonl`, its card, and samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from pipelines.core import artifacts, prompt_rendering
from pipelines.core.cards import inline
from pipelines.core.errors import ArtifactError
from pipelines.core.prompt_cells import Cell, Use
from pipelines.core.prompt_choice import Entry, Judged
from pipelines.core.prompt_rendering import COLUMNS, Example
from pipelines.core.prompt_strategies import STRATEGIES
from pipelines.core.prompt_tasks import Question, Task

if TYPE_CHECKING:
    from pipelines.core.params.prompts import PromptsParams

PROMPT, EXAMPLES = "prompt.yaml", "examples.jsonl"
_OF_USE = ("strategy", "name", "version", "kind", "system", "instruction", "template", "answer")


class Chosen(NamedTuple):
    """What `publish` wrote, read."""

    task: str
    model: str  # of which stage
    use: Use
    prior: list[float]  # a number a label, or [] where nothing calibrates
    labels: tuple[str, ...]


def publish(place: Path, task: Task, judged: Judged, page: str) -> None:
    """Write the directory of a task's choice, which `serving_prompt.py` serves and `read` reads."""
    use, strategy = judged.chosen.use, STRATEGIES[judged.chosen.use.strategy]
    choices, passages = (["choices"] if task.kind == "choice" else []), (["passages"] if strategy.passages else [])
    told: dict[str, Any] = {
        "task": task.name,
        "model": judged.chosen.model,
        **{name: getattr(use, name) for name in _OF_USE},
        "columns": [*COLUMNS[task.kind], *choices, *passages],
        "labels": list(task.labels),
        "examples": {"how": use.how, "shots": use.shots, "seed": use.seed},
        "prior": judged.chosen.cell.prior,
    }
    text = yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=110)
    artifacts.write_text(place / PROMPT, text)
    lines = [json.dumps(one._asdict(), ensure_ascii=False) + "\n" for one in use.pool]
    artifacts.write_text(place / EXAMPLES, "".join(lines))
    artifacts.write_text(place / "README.md", page)


def read(place: Path) -> Chosen:
    """The choice in a directory that `publish` filled.

    Raises:
        ArtifactError: it is no such directory.
    """
    try:
        told = yaml.safe_load((place / PROMPT).read_text(encoding="utf-8"))
        lines = (place / EXAMPLES).read_text(encoding="utf-8").split("\n")  # a text may hold other line ends
        pool = tuple(_example(json.loads(line)) for line in lines if line)
        use = Use(**{name: told[name] for name in _OF_USE}, pool=pool, **told["examples"])
        return Chosen(told["task"], told["model"], use, told["prior"], tuple(told["labels"]))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ArtifactError(f"{place}: no prompt that stage prompts chose ({type(error).__name__}: {error})") from None


def card(
    params: PromptsParams, task: Task, entries: Sequence[Entry], judged: Judged, found: Mapping[str, float]
) -> str:
    """The card of a task's choice. `found`: the metrics of the task."""
    use, strategy = judged.chosen.use, STRATEGIES[judged.chosen.use.strategy]
    measure = "chrF" if task.kind == "generation" else "accuracy"
    majority = "" if "majority" not in found else f"| the most frequent answer | {found['majority']:.3f} | |\n"
    lines = [
        f"# sluice-prompt-{task.name}\n",
        f"The prompt that was chosen for {task.name} ({task.kind}): `{use.name}`, version `{use.version[:12]}`, "
        f"strategy {use.strategy} ({strategy.words}), for the model of stage {judged.chosen.model}. `prompt.yaml` has "
        f"the text, `examples.jsonl` what examples are chosen from, all of it training rows.\n",
        f"| {measure} on {len(task.test)} test questions | | tokens a question |\n| --- | --- | --- |\n"
        f"| this prompt | {found['chosen']:.3f} ({found['chosen_low']:.3f} to {found['chosen_high']:.3f}) | "
        f"{found['chosen_tokens']:.0f} |\n"
        f"| zero-shot, same model | {found['chosen_zero_shot']:.3f} | {found['chosen_zero_shot_tokens']:.0f} |\n"
        f"{majority}",
        f"Gain over zero-shot: {found['chosen_gain']:+.3f} ({found['chosen_gain_low']:+.3f} to "
        f"{found['chosen_gain_high']:+.3f}). The rule: of {len(entries)} cells measured on {len(task.validation)} "
        f"validation questions, {judged.tied} are within a standard error of the best (paired, by groups of "
        "questions); of those the one with the fewest tokens. The test questions were asked once.\n",
    ]
    if task.classes and not strategy.reasons:
        lines.append(
            "Each option's mean log-probability is taken less its `prior`, its mean over the validation questions "
            "(batch calibration); no label was looked at for it.\n"
        )
    if strategy.reasons:
        lines.append(f"Texts without an option count as wrong: {judged.test.unparsed} of {judged.test.written}.\n")
    if strategy.passages:
        lines.append(
            f"It shows {params.passages} passages of the index of stage rag, or as many as fit into "
            f"{params.max_prompt_tokens} tokens, an open book: where the knowledge holds "
            "what the task was made from, the answer may stand in a passage.\n"
        )
    example = task.pool[0] if task.pool else task.validation[0]
    turns = prompt_rendering.messages(use._asdict(), example.columns, example.options, (), ("…",) * strategy.passages)
    told = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    fence = "`" * 4
    return "\n".join([*lines, f"A question, without its examples:\n\n{fence}\n{told}\n{fence}\n"])


def samples(tasks: Sequence[Task], judged: Sequence[Judged], count: int) -> str:
    """The first test questions of each task with what the choice and zero-shot said."""
    lines = ["# Held-out questions"]
    for task, one in zip(tasks, judged, strict=True):
        for number, question in enumerate(task.test[:count]):
            asked = " / ".join(inline(part) for part in question.columns.values())
            lines.append(f"\n**Prompt:** {task.name}: {asked}\n")
            for name, cell in ((one.chosen.use.strategy, one.test), ("zero_shot", one.zero_shot)):
                lines.append(f"- *{name}* ({one.chosen.model}): {said(question, cell, number)}")
            lines.append(f"- *truth*: {inline(question.answer)}")
    return "\n".join(lines) + "\n"


def said(question: Question, cell: Cell, number: int) -> str:
    """What a cell answered to a question: a text, and the option that was taken out of it."""
    text, answer = cell.texts[number], cell.answers[number]
    if not cell.written:
        return inline(text)
    return f"{inline(text)}: {inline(question.options[answer]) if answer is not None else 'no option'}"


def _example(told: dict[str, Any]) -> Example:
    return Example(told["id"], told["columns"], tuple(told["options"]), told["label"], told["answer"])
