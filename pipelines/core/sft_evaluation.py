"""How the `sft` stage measures a model, and what it writes for people: scores, samples, model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.core import answers, artifacts, attention, cards, chats, language_models, scoring
from pipelines.core.answers import Answers
from pipelines.core.context import StageContext
from pipelines.core.demonstrations import Demonstration
from pipelines.core.params.sft import SftParams

INHERITED = ("license:", "base_model:")  # lines of the base model's card that hold for this model too


def of_model(
    params: SftParams, place: Path, held_out: list[Demonstration], context: StageContext, what: str
) -> tuple[dict[str, list[float]], Answers]:
    """Columns `bits`, `rouge_l` and `chrf` of the model and tokenizer of a Hugging Face directory, and its answers."""
    model, tokenizer = _loaded(place, context)
    bits = answers.reference_bits(model, tokenizer, held_out, params.micro_tokens, context, what)
    given = answers.greedy(model, tokenizer, held_out, params.max_new_tokens, context, f"answers {what}", [])
    return {"bits": bits} | answers.scores("", given, held_out), given


def before_training(
    params: SftParams, base: Path, held_out: list[Demonstration], shots: list[Demonstration], context: StageContext
) -> dict[str, Any]:
    """Columns of the model before training, asked as it is and after `shots`; its answers (`Answers`, as dicts)."""
    model, tokenizer = _loaded(base, context)
    bits = answers.reference_bits(model, tokenizer, held_out, params.micro_tokens, context, "before training")
    columns, given = {"bits_before": bits}, {}
    for name, demonstrated in (("zero_shot", []), ("few_shot", shots)):
        what = f"{name.replace('_', '-')} answers before training"
        answered = answers.greedy(model, tokenizer, held_out, params.max_new_tokens, context, what, demonstrated)
        columns |= answers.scores(f"_{name}", answered, held_out)
        given[name] = answered._asdict()
    return {"columns": columns, **given}


def write(
    params: SftParams,
    outputs: Path,
    held_out: list[Demonstration],
    columns: dict[str, list[float]],
    given: Answers,
    before: dict[str, Any],
    context: StageContext,
) -> dict[str, float]:
    """Write the evaluation and the samples; returns the metrics of the answers. `before`: of `before_training`."""
    zero, few = Answers(**before["zero_shot"]), Answers(**before["few_shot"])
    answers.write(outputs / "evaluation.parquet", held_out, columns)
    shown = {"reference": [example.reference for example in held_out], "fine-tuned": given.texts}
    shown |= {"before, zero-shot": zero.texts, "before, few-shot": few.texts}
    prompts = [example.prompt[-1]["content"] for example in held_out[: params.samples]]
    samples = cards.continuations(prompts, shown)
    context.say(samples)
    artifacts.write_text(outputs / "samples.md", samples)
    tokenizer = language_models.load_tokenizer(str(outputs / "model"))
    spoken = [len(chats.encode_response(tokenizer, example.reference)) for example in held_out]
    return answers.metrics(held_out, columns) | {
        "response_tokens": sum(given.tokens) / len(held_out),
        "response_tokens_reference": sum(spoken) / len(held_out),
        "eos_share": sum(given.ended) / len(held_out),
        "eos_share_zero_shot": sum(zero.ended) / len(held_out),
    }


def card(params: SftParams, place: Path, base: Path, metrics: dict[str, float]) -> str:
    """Model card, with the front matter the hub reads; licence and origin are those of the base model's card."""
    from transformers import AutoConfig

    above = base / "README.md"
    lines = above.read_text(encoding="utf-8").splitlines() if above.exists() else []
    known = [line for line in lines if line.startswith(INHERITED)]
    front = "\n".join(["---", "library_name: transformers", "pipeline_tag: text-generation", *known, "---"])

    def line(name: str, suffix: str) -> str:
        return f"| {name} | {metrics['rouge_l' + suffix]:.3f} | {metrics['chrf' + suffix]:.3f} |\n"

    return (
        f"{front}\n\n# sluice-sft\n\n{AutoConfig.from_pretrained(place).model_type}, "
        f"{metrics['parameters'] / 1e6:.1f} million parameters. Starting point: the model of stage pretrain "
        f"(sluice-base). Fine-tuned to answer as people did (InstructGPT, section 3.5): {params.words()}, on "
        f"{metrics['training_examples']:.0f} demonstrations, {metrics['epochs']:.0f} epoch(s), {metrics['steps']:.0f} "
        f"steps; the state of step {metrics['best_step']:.0f} had the lowest validation loss.\n\n"
        "| greedy answers to held-out prompts | ROUGE-L | chrF |\n| --- | --- | --- |\n"
        + line("this model", "")
        + line("before, asked the same way", "_zero_shot")
        + line(f"before, after {params.few_shot} demonstrations", "_few_shot")
        + f"\nBits per byte of the reference answer: {metrics['response_bits_per_byte']:.4f} "
        f"({metrics['response_bits_per_byte_low']:.4f} to {metrics['response_bits_per_byte_high']:.4f}), before "
        f"{metrics['response_bits_per_byte_before']:.4f}. Answers end by themselves in {metrics['eos_share']:.0%} of "
        f"the cases, after {metrics['response_tokens']:.1f} tokens on average "
        f"(people: {metrics['response_tokens_reference']:.1f}).\n\n"
        "It answers in the manner of its demonstrations, and states wrong things fluently.\n"
    )


def _loaded(place: Path, context: StageContext) -> tuple[Any, Any]:
    """Model, in the compute type, and tokenizer of a directory."""
    kind = attention.choose(context.device, scoring.WINDOW)
    model = language_models.load(str(place), context.dtype, kind).to(context.device)
    return model, language_models.load_tokenizer(str(place))
