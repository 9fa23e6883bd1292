"""Pages for people beside a student: its model card, and what it and the others answer to held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pipelines.core import cards
from pipelines.core.distill_evaluation import BEFORE, NO_TEACHER, STUDENT, TEACHER, Found
from pipelines.core.params.distill import DistillParams

NAMES = {
    TEACHER: "teacher",
    STUDENT: "student",
    NO_TEACHER: "the student without the teacher",
    BEFORE: "the student before training",
}


def samples(found: Found, count: int) -> str:
    """Greedy answers of all models to the first `count` held-out prompts."""
    lines = ["# Answers to held-out prompts, greedy"]
    for number, prompt in enumerate(found.prompts[:count]):
        lines.append(f"\n**Prompt:** {cards.inline(prompt.text)}\n")
        for end, name in NAMES.items():
            lines.append(f"- *{name}*: {cards.inline(found.said[end].greedy.texts[number][0])}")
        if prompt.reference is not None:
            lines.append(f"- *a person*: {cards.inline(prompt.reference)}")
    return "\n".join(lines) + "\n"


def card(params: DistillParams, place: Path, metrics: Mapping[str, float]) -> str:
    """Model card, with the front matter the hub reads."""
    model_type = json.loads((place / "config.json").read_text(encoding="utf-8"))["model_type"]
    weights = ", ".join(f"{name} {weight:g}" for name, weight in params.weights if weight)
    rows = "".join(
        f"| {name} | {metrics[f'bits_per_byte{end}']:.3f} | "
        + (f"{metrics[f'gold{end}']:.3f} |\n" if f"gold{end}" in metrics else "not judged |\n")
        for end, name in NAMES.items()
    )
    made = {
        "layers": f"{params.keep_layers} of the teacher's blocks at even spacing",
        "random": f"random weights, {params.depth} blocks",
    }.get(params.student, params.student)
    fitted = "" if params.fit is None else ", was fitted to the teacher's states by least squares"
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# sluice-student\n\n{model_type}, {metrics['parameters'] / 1e6:.1f} million parameters, "
        f"{metrics['size_ratio']:.0%} of the teacher's. It began as {made}{fitted} and learned from "
        f"{metrics['training_tokens']:,.0f} tokens of texts and chats in {metrics['steps']:.0f} optimizer steps; "
        f"terms of the loss: {weights}.\n\n| model | bits per byte | gold |\n| --- | --- | --- |\n{rows}\n"
        f"Gain over the student without the teacher: {metrics['gain_over_no_teacher']:.4f} bits per byte "
        f"({metrics['gain_over_no_teacher_low']:.4f} to {metrics['gain_over_no_teacher_high']:.4f}). It keeps "
        f"{metrics['retention']:.0%} of the teacher's (bits per byte of the teacher over its own)"
        + (f" and {metrics['retention_gold']:.0%} of its gold" if "retention_gold" in metrics else "")
        + ".\n\n95 % interval by bootstrap over groups of held-out texts. It makes its teacher's mistakes, and more.\n"
    )
