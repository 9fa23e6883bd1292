"""Pages for people beside a variant: its card, the table for the Pareto plot, and what the variants answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.core import cards, variants
from pipelines.core.completions import Prompt
from pipelines.core.params.quantize import CALIBRATED, QuantizeParams
from pipelines.core.policy_answers import Said
from pipelines.core.quantization import Subject, by_gptq, is_tuned, whole_name

HOW = {
    "int8": "Weight-only int8, symmetric per output channel; activations in bf16.",
    "int4": "4 bits a weight, asymmetric in groups of {group} along the inputs, one bf16 scale and zero point a group.",
    "nf4": "4-bit NormalFloat in blocks of 64 with doubly quantized scales, in bitsandbytes' format.",
    "llm-int8": "LLM.int8 in bitsandbytes' format: int8 weights and activations, outliers above 6 in high precision.",
    "gguf-f16": "One GGUF file for llama.cpp and Ollama, every matrix in half precision.",
    "gguf-q8_0": "One GGUF file for llama.cpp and Ollama, blocks of 32 in int8.",
    "gguf-q4_0": "One GGUF file for llama.cpp and Ollama, blocks of 32 in 4 bits.",
}
LOADER = {"int8": "int8", "int4": "int4", "nf4": "bnb_variants", "llm-int8": "bnb_variants"}
NOT_TIMED = (
    "Speed and memory were not measured: llama.cpp is not a dependency of this project (`ollama run`, `llama-bench`)."
)
WORST = 5  # layers that the card names


def card(
    name: str,
    subject: Subject,
    variant: str,
    params: QuantizeParams,
    metrics: Mapping[str, float],
    layers: Sequence[Mapping[str, Any]],
    absent: Mapping[str, str],
) -> str:
    """Model card, with the front matter the hub reads. Figures of a machine are not in it: they differ by machine.

    Args:
        layers: rows of `layers.csv` of this variant.
        absent: variants that were asked for and are not there, and in words why.
    """
    gguf = variant in variants.GGUF
    library = "gguf" if gguf else "transformers"
    task = "text-classification" if subject.classifier else "text-generation"
    lines = [f"---\nlibrary_name: {library}\npipeline_tag: {task}\n---\n\n# sluice-quantized-{name}\n"]
    lines.append(HOW[variant].format(group=params.group_size))
    if params.keep_in_high_precision and not gguf:
        lines.append(f"Kept in high precision, of the layers it has: {', '.join(params.keep_in_high_precision)}.")
    if told := _fitted(subject, variant, params):
        lines.append(told)
    rows = [
        ("bytes of weights", "bytes", "{:,.0f}"), ("share of the original's bytes in fp32", "size_ratio", "{:.3f}"),
        ("bits a weight of the quantized layers", "bits_per_weight", "{:.4f}"),
        ("bits per byte of held-out text", "bits_per_byte", "{:.4f}"), ("more than the original's", "loss", "{:+.2%}"),
        ("KL from the original, nats a token", "kl", "{:.5f}"), ("same likeliest token", "agreement", "{:.1%}"),
        ("gold of its answers", "gold", "{:.3f}"), ("pairs of answers ranked alike", "rank_agreement", "{:.1%}"),
    ]  # fmt: skip
    table = [f"| {told} | {form.format(metrics[f'{name}/{key}'])} |" for told, key, form in rows
             if f"{name}/{key}" in metrics]  # fmt: skip
    lines.append("\n".join(["", "| | |", "| --- | --- |", *table, ""]))
    if layers:
        worst = sorted(layers, key=lambda row: -row["error"])[:WORST]
        told = ", ".join(f"{row['layer']} {row['error']:.2%}" for row in worst)
        lines.append(f"Layers whose outputs are furthest off (`layers.csv` has all): {told}.")
    lines.append(NOT_TIMED if gguf else _loading(variant, subject.classifier))
    lines += _told(absent)
    return "\n".join(lines) + "\n"


def _loading(variant: str, classifier: bool) -> str:
    """How it is loaded, in Python."""
    module, more = LOADER[variant], ", classifier=True" if classifier else ""
    return f"```python\nfrom pipelines.core import {module}\nmodel = {module}.load(path{more})\n```"


def _fitted(subject: Subject, variant: str, params: QuantizeParams) -> str:
    """Where its codes come from; nothing where its format alone says it."""
    data = (
        f"up to {params.calibration_rows} rows of {params.calibration_length} tokens of stage data's training side: "
        "demonstrations and pieces of the corpus in turns"
    )
    told = []
    if is_tuned(subject, variant, params):
        told.append(f"Fine-tuned for {params.aware.steps} steps with rounded weights on {data}.")
    if variant in CALIBRATED:
        chosen = f"Its codes were chosen by GPTQ on {data}."
        told.append(chosen if by_gptq(subject, variant, params) else "Rounded to the nearest.")
    return " ".join(told)


def pareto(
    subjects: Sequence[Subject], made: Mapping[str, tuple[Subject, str, Path]], metrics: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row a language model: what it is called, what it was made from, bytes, bits per byte, gold."""
    rows = []
    for subject in subjects:
        if subject.classifier:
            continue
        whole = whole_name(subject)
        own = [name for name, (of, variant, _) in made.items() if of == subject and variant != variants.DYNAMIC]
        for name in [whole, *own]:
            gold = metrics.get(f"{name}/gold")
            rows.append({
                "name": name, "of": whole, "bytes": int(metrics[f"{name}/bytes"]),
                "bits_per_byte": metrics[f"{name}/bits_per_byte"], "gold": "" if gold is None else gold,
            })  # fmt: skip
    return rows


def _told(absent: Mapping[str, str]) -> list[str]:
    return [f"\n`{variant}` {why}." for variant, why in absent.items()]


def samples(prompts: Sequence[Prompt], said: Mapping[str, Said], count: int, absent: Mapping[str, str]) -> str:
    """Greedy answers of all variants to the first `count` held-out prompts, and what is absent."""
    lines = ["# Answers to held-out prompts, greedy", *_told(absent)]
    for number, prompt in enumerate(prompts[:count]):
        lines.append(f"\n**Prompt:** {cards.inline(prompt.text)}\n")
        lines += [f"- *{name}*: {cards.inline(one.greedy.texts[number][0])}" for name, one in said.items()]
        if prompt.reference is not None:
            lines.append(f"- *a person*: {cards.inline(prompt.reference)}")
    return "\n".join(lines) + "\n"
