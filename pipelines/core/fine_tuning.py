"""The model to fine-tune, whatever of it is trained (`core/tuning.py`), over a 4-bit base too; and its merge.

Paper: Dettmers et al., "QLoRA" (2023).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipelines.core import attention, cpu, language_models, training, tuning
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError
from pipelines.core.params.tuning import WHOLE, Method, Tuning

PAPER_LR, PAPER_WIDTH = 9.65e-6, 2048  # InstructGPT, appendix C.1: its 1.3B model
LORA_FACTOR = 10.0  # Biderman et al., "LoRA Learns Less and Forgets Less" (2024): the best rate is about ten times

BLOCK_PARTS = ("self_attn", "attn", "attention", "mlp", "feed_forward")  # two of them in each block


def load(place: Path, params: Tuning, longest: int, context: StageContext) -> Any:
    """The model of a Hugging Face directory, ready to be trained: fp32 weights, or frozen ones and fp32 adapters.

    Args:
        longest: tokens of the longest row it will see.

    Raises:
        ArtifactError: no causal language model, or one whose logits are more than states x output embedding.
        ParamsError: a dial that this model or machine cannot follow.
    """
    model = read(place, params.method, longest, context.dtype if params.adapted else torch.float32, context)
    language_models.body_and_head(model)
    return tuning.prepare(model, params, context).to(context.device)


def read(place: Path, method: Method, longest: int, dtype: torch.dtype, context: StageContext) -> Any:
    """The model of a Hugging Face directory as it is: its linear layers in 4 bits for method qlora, else in `dtype`.

    Raises:
        ArtifactError: no causal language model.
    """
    kind = attention.choose(context.device, longest)
    if method == "qlora":
        return _in_4_bits(place, kind, context)
    return language_models.load(str(place), dtype, kind)


def merged(model: Any, place: Path, params: Tuning, context: StageContext) -> Any:
    """A plain model in the context's type, with what was trained in it."""
    whole = params.model_copy(update={"method": "lora"})
    model = unpacked(model, params.method, lambda: load(place, whole, attention.LONGEST, context))
    plain = model.merge_and_unload() if params.adapted else model
    return plain.to(context.dtype)


def unpacked(model: Any, method: Method, again: Callable[[], Any]) -> Any:
    """The model to merge: adapters over a 4-bit base move to the base as it was before it was quantised.

    Rounding the sum to 4 bits again would lose most of what was learned, which is smaller than the steps of the grid.

    Args:
        again: makes the same model with method lora.
    """
    if method != "qlora":
        return model
    exact = again()
    training.load_trained_state(exact, training.trained_state(model))
    return exact


def save(model: Any, base: Path, params: Tuning, tokenizer: Any, place: Path, context: StageContext) -> Any:
    """Write the merged model with its tokenizer, what others load, into `place`; returns it."""
    plain = merged(model, base, params, context)
    end_with_eos(plain, tokenizer)
    plain.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return plain


def end_with_eos(model: Any, tokenizer: Any) -> None:
    """Have the model's generation config name the tokenizer's EOS, beside what else it names.

    A base's own may not: its chats were to end with another token, and what is served would never stop.
    """
    told = model.generation_config.eos_token_id
    known = told if isinstance(told, list) else [told] * (told is not None)
    if tokenizer.eos_token_id not in (None, *known):
        model.config.eos_token_id = [tokenizer.eos_token_id, *known]
        settings = model.generation_config
        settings.eos_token_id = [tokenizer.eos_token_id, *known]
        # transformers saves a published config whose dials contradict one another (a temperature without `do_sample`),
        # but refuses one that was changed since: it stays as published, but for its EOS.
        settings._original_object_hash = hash(settings)


def rate_factor(method: Method) -> float:
    """What the peak rate of all weights is multiplied by: ten for adapters and for a head alone."""
    return 1.0 if method in WHOLE else LORA_FACTOR


def learning_rate(width: int, method: Method) -> float:
    """Peak rate: the paper's at its width, in inverse proportion to the width; ten times that for adapters."""
    return PAPER_LR * PAPER_WIDTH / width * rate_factor(method)


def residual_dropout(model: Any, share: float) -> None:
    """From now on, in training mode, drop a share of what attention and feed-forward add to the residual stream.

    Raises:
        ArtifactError: the architecture's blocks hold no attention and feed-forward module that are recognised.
    """
    if share == 0.0:
        return
    blocks, config = tuning.blocks(model), tuning.inner(model).config
    parts = [part for block in blocks for name, part in block.named_children() if name in BLOCK_PARTS]
    if len(parts) != 2 * config.num_hidden_layers:
        raise ArtifactError(
            f"architecture {config.model_type}: no residual dropout is known for its blocks. Set sft.dropout: 0"
        )

    def drop(part: Any, _: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return torch.nn.functional.dropout(output[0], share, part.training), *output[1:]
        return torch.nn.functional.dropout(output, share, part.training)

    for part in parts:
        part.register_forward_hook(drop)


def _in_4_bits(place: Path, kind: str, context: StageContext) -> Any:
    """The model with its linear layers in NF4, doubly quantised; the rest in the context's type."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=context.dtype,
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            place, quantization_config=config, dtype=context.dtype, attn_implementation=kind, device_map=context.device
        )
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{place}: no causal language model could be loaded in 4 bits: {error}") from None
    return cpu.guarded(model)
