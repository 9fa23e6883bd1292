"""Zero-shot answers along pre-training: GPT-1, section 5 and figure 2 right.

Every snapshot that `pretrain` kept (`core/snapshots.py`) is asked once, about all tasks, and the final model last.
What one has said is kept in the stage's scratch, so a stage that is killed asks none of them again.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core import artifacts, attention, k_way, language_models, snapshots, task_evaluation, zero_shot
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError
from pipelines.core.task_inputs import Task

if TYPE_CHECKING:
    from pipelines.core.params.transfer import Heuristic

Answers = dict[str, list[float]]  # of each task: number of the class or candidate of each test example


def along(
    pretrain: Path, tokenizer: Any, tasks: Sequence[Task], heuristics: Sequence[Heuristic], context: StageContext
) -> dict[int, Answers]:
    """What the model answered after so many steps of pre-training; the last is the final model. No regressions.

    Args:
        pretrain: output of stage `pretrain`.
        tokenizer: the final model's own.

    Raises:
        ArtifactError: a snapshot is damaged, or the run's history is not there.
        Stopped: a signal came; what is known is kept.
    """
    asked = [task for task in tasks if not task.regression]
    own = {one.task: one for one in heuristics}
    last = _steps(pretrain)
    found: dict[int, Answers] = {}
    for step in [*snapshots.steps(pretrain), last] if asked else []:
        place = context.work / "zero_shot" / f"{step:06d}"
        if not place.exists():
            model = _final(pretrain, context) if step == last else snapshots.load(pretrain, step, context)
            answers = {}
            for task in asked:
                tell = k_way.teller(context, f"{task.name}, zero-shot after step {step} of {last}")
                answers[task.name] = zero_shot.predict(model, tokenizer, task, context, tell, own.get(task.name))
            with artifacts.published(place) as draft:
                artifacts.write_json(draft / "answers.json", answers)
        found[step] = json.loads((place / "answers.json").read_text())
    return found


def curve(
    tasks: Sequence[Task], answered: Mapping[int, Answers], metrics: Sequence[Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Rows of `zero_shot.csv`: task, step, score with its 95 % interval (low, high), relative.

    relative: as in the paper's figure, 0 is the majority's score and 1 that of the fine-tuned model; empty where that
    one is not above the majority.

    Args:
        metrics: of each task (`task_evaluation.judge`).
    """
    rows: list[dict[str, Any]] = []
    for task, known in zip(tasks, metrics, strict=True):
        for step, answers in answered.items():
            if task.name not in answers:
                continue
            score, low, high = task_evaluation.interval(task, answers[task.name])
            room = known["score"] - known["majority"]
            relative = (score - known["majority"]) / room if room > 0 else None
            rows.append(
                {"task": task.name, "step": step, "score": score, "low": low, "high": high, "relative": relative}
            )
    return rows


def _steps(pretrain: Path) -> int:
    """Steps of the pre-training run."""
    try:
        with (pretrain / "history.csv").open(encoding="utf-8", newline="") as file:
            return max(int(row["step"]) for row in csv.DictReader(file))
    except (OSError, KeyError, ValueError):
        raise ArtifactError(f"{pretrain / 'history.csv'}: no steps of pre-training; run `dvc repro pretrain`") from None


def _final(pretrain: Path, context: StageContext) -> Any:
    kind = attention.choose(context.device, attention.LONGEST)
    return language_models.load(str(pretrain / "model"), context.dtype, kind).to(context.device).eval()
