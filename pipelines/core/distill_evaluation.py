"""What a student has kept of its teacher, and whether the teacher was worth it.

Four models answer the same held-out prompts with the same random numbers, and say the same held-out text: the student
before training (`before`), the same student trained on the same tokens without the teacher (`no_teacher`), the student,
and the teacher. Retention is the share of the teacher's gold that the student reaches, and the teacher's bits per byte
over the student's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

from pipelines.core import judges, reading, speed, statistics, variants
from pipelines.core.completions import Prompt
from pipelines.core.context import StageContext
from pipelines.core.held_out import HeldOut
from pipelines.core.params.distill import DistillParams
from pipelines.core.policy_answers import Said, ask, kept

STUDENT, BEFORE, NO_TEACHER, TEACHER = "", "_before", "_no_teacher", "_teacher"  # ends of metrics' and columns' names


class Found(NamedTuple):
    """The models' answers, and the metrics."""

    prompts: list[Prompt]
    said: dict[str, Said]
    metrics: dict[str, float]


def evaluate(
    params: DistillParams,
    data: Path,
    prompts: list[Prompt],
    models: Mapping[str, Path],
    outputs: Path,
    context: StageContext,
) -> Found:
    """Measure the models; write `evaluation.parquet` (one row a held-out text) and `answers.parquet` (a prompt).

    Scores and answers are kept in the stage's scratch, for a run that goes on after a kill.

    Args:
        models: directories by `STUDENT`, `BEFORE`, `NO_TEACHER` and `TEACHER`.

    Raises:
        ArtifactError: the data have no held-out corpus; prompt and answer do not fit a model's context.
        Stopped: a signal came; what was finished is kept.
    """
    held_out = HeldOut.of(data, params.eval_bytes)
    names = {end: end.removeprefix("_") or "student" for end in models}
    bits = {
        end: kept(
            context,
            f"bits-{names[end]}",
            partial(held_out.bits_of_directory, place, context, f"held-out text, {names[end]}"),
        )
        for end, place in models.items()
    }
    held_out.write(outputs / "evaluation.parquet", {f"bits{end}": values for end, values in bits.items()})
    said = {end: ask(params, prompts, place, names[end], context, keep=names[end]) for end, place in models.items()}
    golds = {end: _gold(params.judge, prompts, one) for end, one in said.items()}
    rows: dict[str, list[float] | list[str]] = {
        "id": [prompt.id for prompt in prompts], "group": [prompt.group for prompt in prompts],
    }  # fmt: skip
    reading.write_evaluation(
        outputs / "answers.parquet", rows | {f"gold{end}": of_end for end, of_end in golds.items() if of_end}
    )
    return Found(prompts, said, _metrics(held_out, bits, golds))


def _metrics(
    held_out: HeldOut, bits: Mapping[str, list[float]], golds: Mapping[str, list[float] | None]
) -> dict[str, float]:
    """Means, retention, and the gain over the student without the teacher with its 95 % interval."""
    sizes = np.array(held_out.sizes, dtype=float)
    found = {f"bits_per_byte{end}": float(sum(values) / sizes.sum()) for end, values in bits.items()}
    pair = np.array(bits[NO_TEACHER]), np.array(bits[STUDENT])
    gain = statistics.paired_bootstrap(*pair, sizes, group=held_out.groups)
    found |= {"gain_over_no_teacher": gain.estimate, "gain_over_no_teacher_low": gain.low}
    found |= {"gain_over_no_teacher_high": gain.high}
    found["retention"] = found[f"bits_per_byte{TEACHER}"] / found["bits_per_byte"]
    means = {end: fmean(one) for end, one in golds.items() if one}
    found |= {f"gold{end}": value for end, value in means.items()}
    if means.get(TEACHER):
        found["retention_gold"] = means[STUDENT] / means[TEACHER]
    return found


def speeds(models: Mapping[str, Path], context: StageContext) -> None:
    """Measure how fast student and teacher answer; figures of this machine, which reach no output."""
    asked = {end: (models[end], variants.PLAIN) for end in (STUDENT, TEACHER)}
    found = speed.measure(asked, context.threads, lambda done, total: context.progress(done, total, timing="decoding"))
    for end, one in found.items():
        context.measure(
            **{f"decode_tokens_per_second{end}": one.decode, f"prefill_tokens_per_second{end}": one.prefill}
        )
    speedup, low, high = speed.ratio(found[STUDENT], found[TEACHER])
    context.measure(decode_speedup=speedup, decode_speedup_low=low, decode_speedup_high=high)


def _gold(judge: judges.Judge, prompts: list[Prompt], said: Said) -> list[float] | None:
    """Mean gold of a prompt's answers, greedy and sampled; None where the prompts cannot be judged."""
    if judge == "overlap" and any(prompt.reference is None for prompt in prompts):
        return None
    return [
        fmean(judges.gold(judge, prompt.text, text, prompt.reference) for text in [*sampled, *greedy])
        for prompt, sampled, greedy in zip(prompts, said.sampled.texts, said.greedy.texts, strict=True)
    ]
