"""What of a model is trained: all of it, its top blocks, its head, or adapters; at which rate, and from when on.

Papers: Hu et al., "LoRA" (2021); Kalajdzievski, "rsLoRA" (2023); Liu et al., "DoRA" (2024); Meng et al., "PiSSA"
(2024); Buyukakyuz, "OLoRA" (2024). Gradual unfreezing and a rate of its own for each layer: Howard and Ruder,
"Universal Language Model Fine-tuning for Text Classification" (2018), sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from pipelines.core import distributed, low_rank
from pipelines.core.context import StageContext
from pipelines.core.errors import ParamsError
from pipelines.core.params.tuning import MOVES_BASE, Tuning

DEFAULT_SHARE = 4  # method last_n: one block of so many is trained
SHOWN = 8  # names of modules that a message lists


class Report(NamedTuple):
    """How much is trained."""

    parameters: int  # numbers that get a gradient
    share: float  # of all numbers of the model, its adapters included

    def metrics(self) -> dict[str, float]:
        """As the stages call them."""
        return {"trained_parameters": float(self.parameters), "trained_share": self.share}


class Depths(NamedTuple):
    """A model's parameters by their place: outside the blocks below, in the blocks, outside above."""

    below: list[torch.nn.Parameter]  # embeddings, and an output embedding that is tied to them
    blocks: list[list[torch.nn.Parameter]]  # from the top
    above: list[torch.nn.Parameter]  # the final norm; a head; an output embedding of its own


def prepare(
    model: Any, params: Tuning, context: StageContext, head: str | None = None, adapter: str = "default"
) -> Any:
    """The model with what `params.method` does not train frozen; wrapped by peft where adapters are trained.

    Args:
        head: name of a classifier's new head, which is always trained, in fp32.
        adapter: its name, for methods with adapters.

    Raises:
        ParamsError: a dial that this model or machine cannot follow; the message names `<stage>.tuning.<dial>`.
    """
    dials, stage = params.tuning, context.stage
    if dials.optimizer == "adamw8bit" and (context.device != "cuda" or context.world.sharding == "full"):
        raise ParamsError(
            f"{stage}.tuning.optimizer: adamw8bit needs a CUDA device and weights that are not split (found "
            f"compute.device {context.device}, sharding {context.world.sharding}); accepted here: adamw"
        )
    if dials.unfreeze and context.world.size > 1 and context.world.sharding == "full":
        raise ParamsError(
            f"{stage}.tuning.unfreeze: FSDP settles at the first step which weights get a gradient; accepted with "
            "compute.sharding: full: false"
        )
    if params.adapted:
        model = _with_adapters(model, params, stage, head, adapter)
    elif params.method != "full":
        _freeze(model, params, stage)
    if head is not None:
        getattr(inner(model), head).float().requires_grad_(True)
    return model


def inner(model: Any) -> Any:
    """The model that peft has wrapped, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def blocks(model: Any) -> list[Any]:
    """The transformer's blocks, from the bottom; empty where the architecture has no list of them."""
    found = stack(model)
    return [] if found is None else list(found)


def stack(model: Any) -> torch.nn.ModuleList | None:
    """The module that holds the blocks, if there is one."""
    inside = inner(model)
    layers = inside.config.num_hidden_layers
    lists = (part for part in inside.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == layers)
    return next(lists, None)


def groups(model: Any, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups of what is trained, for an optimizer: each with its decay, and a `factor` on the learning rate.

    The factor of block i from the top, i = 0, 1, ..., is layer_decay^i. What lies above the blocks has 1, the
    embeddings below L blocks layer_decay^L: so does an output embedding that is tied to them. Matrices decay, gains
    and biases do not (GPT-1, section 4.1).
    """
    if layer_decay == 1.0:
        return decayed(model.parameters(), weight_decay)
    depths = by_depth(model)
    levels = [(depths.above, 0), *((block, i) for i, block in enumerate(depths.blocks))]
    levels.append((depths.below, len(depths.blocks)))
    return [
        {**group, "factor": layer_decay**depth} for values, depth in levels for group in decayed(values, weight_decay)
    ]


def decayed(parameters: Iterable[torch.Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Those that are trained in two groups: matrices, which decay, and the rest; split weights (FSDP) apart."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return [
        {"params": same, "weight_decay": decay}
        for decay, chosen in (
            (weight_decay, [parameter for parameter in trained if parameter.dim() >= 2]),
            (0.0, [parameter for parameter in trained if parameter.dim() < 2]),
        )
        for same in distributed.by_kind(chosen)
    ]


@contextmanager
def unfreezing(model: Any, params: Tuning, step: int, steps: int) -> Iterator[None]:
    """Inside, in step 0..steps-1, only what has been unfrozen by then gets a gradient (dial `unfreeze`).

    The L blocks that are trained share the run equally: the top one learns from the start, one more from each L-th
    of the run on; the embeddings join with the bottom block. Outside, everything that is ever trained is marked as
    trained, so that optimizers and checkpoints hold all of it.
    """
    if not params.tuning.unfreeze:
        yield
        return
    depths = by_depth(model)
    trained = [[value for value in block if value.requires_grad] for block in depths.blocks]
    waiting = [block for block in trained if block]
    waiting = waiting[1 + step * len(waiting) // steps :]
    frozen = [value for block in waiting for value in block]
    frozen += [value for value in depths.below if value.requires_grad and waiting]
    for value in frozen:
        value.requires_grad_(False)
    try:
        yield
    finally:
        for value in frozen:
            value.requires_grad_(True)


def report(model: Any) -> Report:
    """How many numbers are trained, and what share of all they are; those packed by quantization count as what they
    stand for."""
    trained = every = 0
    for value in model.parameters():
        packed = getattr(value, "quant_state", None)
        every += value.numel() if packed is None else packed.shape.numel()
        trained += value.numel() * value.requires_grad
    return Report(trained, trained / every)


def by_depth(model: Any) -> Depths:
    """The parameters by their place; each once, adapters with the layer they are on."""
    inside = inner(model)
    stack = [list(block.parameters()) for block in reversed(blocks(inside))]
    within = {id(value) for block in stack for value in block}
    embeddings = [part for part in inside.modules() if isinstance(part, torch.nn.Embedding)]
    looked_up = {id(value) for part in embeddings for value in part.parameters()}
    outside = [value for value in inside.parameters() if id(value) not in within]
    return Depths(
        below=[value for value in outside if id(value) in looked_up],
        blocks=stack,
        above=[value for value in outside if id(value) not in looked_up],
    )


def _freeze(model: Any, params: Tuning, stage: str) -> None:
    """Train nothing (method head), or the top blocks and the norm above them (method last_n).

    Raises:
        ParamsError: there are fewer blocks.
    """
    depths = by_depth(model)
    model.requires_grad_(False)
    if params.method == "head":
        return
    have = len(depths.blocks)
    count = params.tuning.layers or max(1, have // DEFAULT_SHARE)
    if not 1 <= count <= have:
        raise ParamsError(f"{stage}.tuning.layers: {count}; the model has {have} blocks; accepted: 1 to {have}")
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    kept = {id(value) for value in output.parameters()} if output is not None else set()
    above = [value for value in depths.above if id(value) not in kept]
    for value in [*above, *(value for block in depths.blocks[:count] for value in block)]:
        value.requires_grad_(True)


def _with_adapters(model: Any, params: Tuning, stage: str, head: str | None, name: str) -> Any:
    """The model wrapped by peft; the adapters are fp32 whatever the base's type, everything else is frozen."""
    from peft import LoraConfig, get_peft_model

    dials = params.tuning
    targets = dials.lora_targets or "all-linear"
    _refuse_targets(model, params, stage)
    config = LoraConfig(
        r=params.lora_rank,
        lora_alpha=params.lora_alpha,
        target_modules=targets if targets == "all-linear" else list(targets),
        lora_dropout=dials.lora_dropout or 0.0,
        use_dora=dials.lora_variant == "dora",
        use_rslora=dials.lora_variant == "rslora",
        init_lora_weights=True if dials.lora_init in (None, "default") else dials.lora_init,
        task_type="CAUSAL_LM" if head is None else None,
        # Excluded, not handed to peft's `modules_to_save`: that keeps a second, frozen copy of the head.
        exclude_modules=None if head is None else [head],
    )
    adapted = get_peft_model(model, config, adapter_name=name)
    low_rank.fuse(adapted)
    return adapted


def _refuse_targets(model: Any, params: Tuning, stage: str) -> None:
    """Raises ParamsError where adapters would be on nothing, or cannot begin as asked."""
    from transformers.pytorch_utils import Conv1D

    dials, inside = params.tuning, {id(part) for block in blocks(model) for part in block.modules()}
    linear = {
        name: part
        for name, part in model.named_modules()
        if id(part) in inside and isinstance(part, (torch.nn.Linear, Conv1D))
    }
    if isinstance(dials.lora_targets, tuple):
        known = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
        ours = {wanted: [n for n in linear if n == wanted or n.endswith(f".{wanted}")] for wanted in dials.lora_targets}
        if strange := [wanted for wanted, found in ours.items() if not found]:
            raise ParamsError(
                f"{stage}.tuning.lora_targets: {', '.join(strange)}: no linear layer of the model's blocks has this "
                f"name; accepted: all-linear, or some of {', '.join(known[:SHOWN])}"
            )
        linear = {name: linear[name] for found in ours.values() for name in found}
    if dials.lora_init not in MOVES_BASE:
        return
    if dials.lora_init == "olora" and any(isinstance(part, Conv1D) for part in linear.values()):
        raise ParamsError(
            f"{stage}.tuning.lora_init: peft's olora cannot begin on the transposed layers of "
            f"{model.config.model_type}; accepted here: default, gaussian, orthogonal, pissa"
        )
    narrowest = min((min(part.weight.shape) for part in linear.values()), default=0)
    if params.lora_rank > narrowest:
        raise ParamsError(
            f"{stage}.lora_rank: {params.lora_rank}; tuning.lora_init: {dials.lora_init} takes directions out of the "
            f"weights, the narrowest of which has {narrowest}; accepted: 1 to {narrowest}"
        )
