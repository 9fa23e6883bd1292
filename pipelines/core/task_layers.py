"""The blocks of a causal language model: which are kept, which are trained, and how fast each learns.

The depth of a parameter counts blocks from the top: 0 for the linear head, the final norm, an output embedding of its
own and the top block; i for the i-th block below it; the number of blocks for the embeddings.
"""

from __future__ import annotations

from typing import Any

import torch

from pipelines.core import distributed
from pipelines.core.errors import ArtifactError, ParamsError

BETAS = (0.9, 0.999)  # of GPT-1's published fine-tuning code
NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "final_norm")  # what follows the last block


def inner(lm: Any) -> Any:
    """The causal language model itself, where peft has wrapped it."""
    return lm.get_base_model() if hasattr(lm, "get_base_model") else lm


def blocks(lm: Any) -> Any:
    """The list of the model's blocks, bottom first.

    Raises:
        ArtifactError: no list of `num_hidden_layers` modules is found.
    """
    return getattr(*_owner(lm))


def final_norm(lm: Any) -> Any:
    """The norm that the last block's output passes through.

    Raises:
        ArtifactError: the architecture has none of a known name.
    """
    owner, _ = _owner(lm)
    found = next((getattr(owner, name) for name in NORMS if getattr(owner, name, None) is not None), None)
    if found is None:
        raise ArtifactError(
            f"architecture {inner(lm).config.model_type}: no norm after its blocks is known. "
            "Set transfer.method: full or lora"
        )
    return found


def keep_first(lm: Any, count: int | None) -> None:
    """Drop all blocks but the first `count`, in place; None keeps all (GPT-1, figure 2 left: layers transferred).

    Raises:
        ParamsError: the model has fewer.
    """
    every, config = blocks(lm), inner(lm).config
    if count is None:
        return
    if count > len(every):
        raise ParamsError(f"transfer.transferred_layers: {count}; the base model has {len(every)} (null: all of them)")
    del every[count:]
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]


def top(lm: Any, count: int) -> list[Any]:
    """The last `count` blocks.

    Raises:
        ParamsError: the model has fewer.
    """
    every = blocks(lm)
    if count > len(every):
        raise ParamsError(
            f"transfer.trained_layers: {count}; the model has {len(every)} blocks (all of them: method full)"
        )
    return list(every)[len(every) - count :]


def depths(model: Any) -> dict[int, int]:
    """Depth of every parameter of a `task_model.TaskModel`, by `id`."""
    every = list(blocks(model.lm))
    found = {id(value): 0 for value in model.parameters()}
    below = [inner(model.lm).get_input_embeddings()] + [
        part for part in inner(model.lm).modules() if isinstance(part, torch.nn.Embedding)
    ]
    for part in below:
        found.update({id(value): len(every) for value in part.parameters()})
    for number, block in enumerate(every):
        found.update({id(value): len(every) - 1 - number for value in block.parameters()})
    return found


def groups(model: Any, lr: float, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups of all that is trained: one a depth, matrices (which decay) apart from gains and biases.

    `factor` is what `training.update` multiplies the rate with: layer_decay ^ depth (Howard and Ruder, "ULMFiT",
    2018, section 3.2: discriminative fine-tuning, there with 1 / 2.6).
    """
    depth = depths(model)
    trained = [value for value in model.parameters() if value.requires_grad]
    made = []
    for level in sorted({depth[id(value)] for value in trained}):
        for decay, matrices in ((weight_decay, True), (0.0, False)):
            chosen = [value for value in trained if depth[id(value)] == level and (value.dim() >= 2) == matrices]
            factor = layer_decay**level
            made += [
                {"params": same, "lr": lr * factor, "weight_decay": decay, "factor": factor, "depth": level}
                for same in distributed.by_kind(chosen)
            ]
    return made


def thaw(optimizer: torch.optim.Optimizer, epoch: int | None) -> None:
    """Train the groups of depth 0 to `epoch`, and nothing below; None: all.

    ULMFiT, section 3.3: gradual unfreezing. One block more in each epoch; the embeddings come after the bottom block.
    """
    for group in optimizer.param_groups:
        for value in group["params"]:
            value.requires_grad_(epoch is None or group["depth"] <= epoch)


def _owner(lm: Any) -> tuple[Any, str]:
    model = inner(lm)
    count = model.config.num_hidden_layers
    for part in model.modules():
        for name, child in part.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == count:
                return part, name
    raise ArtifactError(
        f"architecture {model.config.model_type}: no list of its {count} blocks is found; choose another, for "
        "example llama, gpt2, qwen3, mistral"
    )
