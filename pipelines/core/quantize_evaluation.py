"""What each variant is: how small, how fast, how far from the original, and what it answers.

The same held-out text and the same prompts for all; speeds in turns, each in a process of its own (`speed`).
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoConfig

from pipelines.core import (
    bnb_variants,
    compression,
    judges,
    quantization_checks,
    reward_model,
    speed,
    statistics,
    variants,
)
from pipelines.core.completions import Prompt
from pipelines.core.context import StageContext
from pipelines.core.errors import DataError
from pipelines.core.held_out import HeldOut
from pipelines.core.params.quantize import QuantizeParams
from pipelines.core.policy_answers import Said, ask, kept
from pipelines.core.quantization import Subject, full_name, whole_name

RANKED = 8  # answers drawn for a prompt to be ranked
ROUNDS = 5  # of decoding in turns: there are many models, and no gate asks how fast they are


class Told(NamedTuple):
    """What is known of a subject's variants, by full name."""

    metrics: dict[str, float]
    bits: dict[str, list[float]]  # of each held-out text, the original's under the subject's name
    said: dict[str, Said]
    layers: list[dict[str, Any]]  # rows of layers.csv
    missed: dict[str, str]  # by full name of a GGUF file, the budgets that it does not keep


def language_model(
    subject: Subject,
    made: Mapping[str, Path],
    original: Any,
    tokenizer: Any,
    held_out: HeldOut,
    prompts: list[Prompt],
    rows: Sequence[list[int]],
    params: QuantizeParams,
    context: StageContext,
) -> Told:
    """Measure the variants of a model that continues text. What is finished is kept in the stage's scratch.

    Args:
        made: directories by variant.
        original: in the context's type.
        rows: token ids of a few calibration rows, for the errors of the layers.
    """
    told = Told({}, {}, {}, [], {})
    whole = whole_name(subject)
    known = compression.reference(original, tokenizer, list(held_out.texts))
    exact = compression.own_bits(known)
    told.bits[whole] = exact
    sizes = np.array(held_out.sizes, dtype=float)
    parameters = sum(value.numel() for value in original.parameters())
    per_byte = float(sum(exact) / sizes.sum())
    # Computed in another type than it is kept in, the original and a GGUF file of it are rounded by different ways.
    as_kept = AutoConfig.from_pretrained(subject.place).dtype == original.dtype
    told.metrics.update({f"{whole}/bytes": float(variants.size(subject.place)), f"{whole}/bits_per_byte": per_byte})
    _answered(told, whole, ask(params, prompts, subject.place, whole, context, keep=whole), params, prompts)
    for variant, place in made.items():
        name = full_name(subject, variant)
        context.progress(0, None, measuring=name)
        context.stop_if_asked()
        beside = original, known, rows
        found, said = _compared_and_asked(subject, variant, place, beside, params, prompts, context)
        told.bits[name] = found["bits"]
        told.layers.extend(
            {"variant": name, "layer": layer, "error": error} for layer, error in found["layers"].items()
        )
        loss = statistics.paired_bootstrap(np.array(found["bits"]), np.array(exact), sizes, group=held_out.groups)
        told.metrics.update({
            f"{name}/bits_per_byte": float(sum(found["bits"]) / sizes.sum()),
            f"{name}/bits_per_byte_delta": loss.estimate,
            f"{name}/loss": loss.estimate / per_byte,
            f"{name}/loss_high": loss.high / per_byte,
            f"{name}/kl": found["kl"],
            f"{name}/agreement": found["agreement"],
        } | _sizes(name, variant, place, parameters))  # fmt: skip

        agreement = found["agreement"] if as_kept else None
        if budgets := quantization_checks.missed(variant, loss.estimate / per_byte, agreement):
            told.missed[name] = "; ".join(budgets)
        _answered(told, name, said, params, prompts)
        gc.collect()
    return told


def _compared_and_asked(
    subject: Subject,
    variant: str,
    place: Path,
    beside: tuple[Any, compression.Reference, Sequence[list[int]]],
    params: QuantizeParams,
    prompts: list[Prompt],
    context: StageContext,
) -> tuple[dict[str, Any], Said]:
    """What a variant has lost and how far its layers' outputs are off, and what it answers; loaded once for both.

    Args:
        beside: the original, what it says of the held-out text, the rows for the layers.
    """
    original, known, rows = beside
    name = full_name(subject, variant)

    @cache
    def loaded() -> Any:
        return variants.dense(variants.load(place, variant, original=subject.place), variant)

    def lost() -> dict[str, Any]:
        model = loaded()
        errors = compression.layer_errors(original, model, rows, variants.weight_of)
        if variant in variants.GGUF:
            model = copy.deepcopy(model)
            for value in model.parameters():  # compared in one type: what differs is the file's
                value.data = value.data.to(original.dtype)
        return {**compression.compare(known, model)._asdict(), "layers": errors}

    def speaker() -> Any:
        return loaded().to(context.device)

    found = kept(context, f"measured-{name}", lost)
    return found, ask(params, prompts, subject.place, name, context, keep=name, load=speaker)


def _answered(told: Told, name: str, said: Said, params: QuantizeParams, prompts: list[Prompt]) -> None:
    told.said[name] = said
    if (gold := gold_of(params.judge, prompts, said)) is not None:
        told.metrics[f"{name}/gold"] = gold


def _sizes(name: str, variant: str, place: Path, parameters: int) -> dict[str, float]:
    """Bytes, their share of the original's in fp32, what bitsandbytes' layers take; nothing of what is not saved."""
    if variant == variants.DYNAMIC:
        return {}
    found = {
        f"{name}/bytes": float(variants.size(place)),
        f"{name}/size_ratio": variants.size(place) / (4.0 * parameters),
    }
    if variant == "nf4":
        bits = bnb_variants.bits_per_parameter(place)
        found |= {f"{name}/bits_per_weight": bits, f"{name}/linear_ratio": bits / 32}
    return found


def gold_of(judge: judges.Judge, prompts: Sequence[Prompt], said: Said) -> float | None:
    """Mean gold of all answers, greedy and sampled; None where the prompts cannot be judged."""
    if judge == "overlap" and any(prompt.reference is None for prompt in prompts):
        return None
    return fmean(
        judges.gold(judge, prompt.text, text, prompt.reference)
        for prompt, sampled, greedy in zip(prompts, said.sampled.texts, said.greedy.texts, strict=True)
        for text in [*sampled, *greedy]
    )


def reward(
    subject: Subject,
    made: Mapping[str, Path],
    prompts: Sequence[Prompt],
    policy: Path,
    params: QuantizeParams,
    context: StageContext,
) -> dict[str, float]:
    """Whether a smaller reward model puts answers into the same order as the original.

    The answers are some that the policy draws for each held-out prompt, as where a reward model is used, its greedy
    one, and people's. What the policy's variants say does not count: they draw with the same luck, so that pairs would
    differ by a word, and by less in score than bf16 rounds it. Agreement is over all pairs of different answers to one
    prompt; a pair that either model finds equal counts one half.

    Raises:
        DataError: there is no such pair.
    """
    more = params.model_copy(update={"eval_samples": RANKED})
    said = ask(more, list(prompts), policy, "the policy, to be ranked", context, keep="ranked")
    items = []
    for number, prompt in enumerate(prompts):
        answers = [text for part in said for text in part.texts[number]]
        known = [] if prompt.reference is None else [prompt.reference]
        items.append((prompt.text, list(dict.fromkeys([*answers, *known]))))
    asked = [item for item in items if len(item[1]) > 1]
    if not asked:
        raise DataError(
            f"quantize: the policy gave one and the same answer to each of the {len(prompts)} held-out prompts, so the "
            "reward model has nothing to put into an order; raise quantize.eval_prompts, or set reward_variants: []"
        )
    model, tokenizer = reward_model.load(subject.place, context)
    parameters = sum(value.numel() for value in model.parameters())

    def tell(done: int, total: int) -> None:
        context.progress(done, total, measuring="the reward model")

    exact = kept(context, "rewards", partial(reward_model.score, model, tokenizer, asked, context, tell))
    found: dict[str, float] = {}
    for variant, place in made.items():
        name = full_name(subject, variant)

        def scores(variant: str = variant, place: Path = place) -> list[list[float]]:
            smaller = variants.dense(variants.load(place, variant, classifier=True), variant).to(context.device)
            return reward_model.score(smaller, tokenizer, asked, context, tell)

        ours = kept(context, f"rewards-{name}", scores)
        found |= {
            **_sizes(name, variant, place, parameters),
            f"{name}/rank_agreement": rank_agreement(exact, ours),
        }
    return found


def rank_agreement(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    """Share of the pairs of a prompt's answers that both put into the same order; equal in either: one half."""
    same: list[float] = []
    for ours, theirs in zip(first, second, strict=True):
        for a in range(len(ours)):
            for b in range(a):
                product = (ours[a] - ours[b]) * (theirs[a] - theirs[b])
                same.append(0.5 if product == 0 else float(product > 0))
    return fmean(same)


def speeds(models: Mapping[str, tuple[Path, str]], context: StageContext) -> None:
    """Measure how fast models answer, and the rate at which memory is read: figures of this machine."""

    def tell(done: int, total: int) -> None:
        context.progress(done, total, timing="decoding")

    for name, one in speed.measure(models, context.threads, tell, ROUNDS).items():
        context.measure(**{
            f"{name}/decode_tokens_per_second": one.decode,
            f"{name}/decode_tokens_per_second_low": min(one.rounds),
            f"{name}/decode_tokens_per_second_high": max(one.rounds),
            f"{name}/prefill_tokens_per_second": one.prefill,
            f"{name}/load_seconds": one.load_seconds,
            f"{name}/peak_memory_mb": one.memory_mb,
        })  # fmt: skip
    context.measure(memory_bytes_per_second=speed.bandwidth(context.threads))
