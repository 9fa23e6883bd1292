"""Pages for people beside a variant: its card, the table for the Pareto plot, and what the variants answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.core import cards, variants
from pipelines.core.completions import Prompt
from pipelines.core.params.quantize import CALIBRATED, QuantizeParams
from pipelines.core.policy_answers import Said
from pipelines.core.quantization import Subject, whole_name

HOW = {
    "int8": "Weight-only int8, symmetric per output channel; activations in bf16.",
    "int4": "4 bits a weight, asymmetric in groups of {group} along the inputs, one bf16 scale and zero point a group.",
    "nf4": "4-bit NormalFloat in blocks of 64 with doubly quantized scales, in bitsandbytes' format.",
    "llm-int8": "LLM.int8 in bitsandbytes' format: int8 weights and activations, outliers above 6 in high precision.",
    "gguf-f16": "One GGUF file for llama.cpp and Ollama, every matrix in half precision.",
    "gguf-q8_0": "One GGUF file for llama.cpp and Ollama, blocks of 32 in int8.",
    "gguf-q4_0": "One GGUF file for llama.cpp and Ollama, blocks of 32 in 4 bits.",
}
LOAD = {
    "int8": "from pipelines.core import int8\nmodel = int8.load(path)",
    "int4": "from pipelines.core import int4\nmodel = int4.load(path)",
    "nf4": "from pipelines.core import bnb_variants\nmodel = bnb_variants.load(path)",
    "llm-int8": "from pipelines.core import bnb_variants\nmodel = bnb_variants.load(path)",
}
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
) -> str:
    """Model card, with the front matter the hub reads. Figures of a machine are not in it: they differ by machine."""
    gguf = variant in variants.GGUF
    library = "gguf" if gguf else "transformers"
    lines = [f"---\nlibrary_name: {library}\npipeline_tag: text-generation\n---\n\n# sluice-quantized-{name}\n"]
    lines.append(HOW[variant].format(group=params.group_size))
    if params.keep_in_high_precision:
        lines.append(f"Kept in high precision: {', '.join(params.keep_in_high_precision)}.")
    if variant in CALIBRATED and not subject.classifier:
        lines.append(_fitted(variant, params))
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
    lines.append(NOT_TIMED if gguf else f"```python\n{LOAD[variant]}\n```")
    return "\n".join(lines) + "\n"


def _fitted(variant: str, params: QuantizeParams) -> str:
    """Where its codes come from."""
    data = (
        f"{params.calibration_rows} rows of at most {params.calibration_length} tokens of stage data's training side: "
        "demonstrations and pieces of the corpus in turns"
    )
    how = f"Its codes were chosen by GPTQ on {data}." if params.calibrate else "Rounded to the nearest."
    if variant in params.aware.variants:
        how = f"Fine-tuned for {params.aware.steps} steps with rounded weights on {data}. {how}"
    return how


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


def samples(prompts: Sequence[Prompt], said: Mapping[str, Said], count: int) -> str:
    """Greedy answers of all variants to the first `count` held-out prompts."""
    lines = ["# Answers to held-out prompts, greedy"]
    for number, prompt in enumerate(prompts[:count]):
        lines.append(f"\n**Prompt:** {cards.inline(prompt.text)}\n")
        lines += [f"- *{name}*: {cards.inline(one.greedy.texts[number][0])}" for name, one in said.items()]
        if prompt.reference is not None:
            lines.append(f"- *a person*: {cards.inline(prompt.reference)}")
    return "\n".join(lines) + "\n"
