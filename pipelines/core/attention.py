"""Attention for short rows on a CPU: grouped batched products instead of torch's fused kernel.

For bf16 rows of 256 tokens torch 2.13's fused CPU kernel takes 22 ms forward and 79 ms backward (9 query
heads on 3 key heads, batch 8, two cores); the three products below take 17 and 24 ms. The price is the
(length x length) matrix of scores, so `LONGEST` bounds where it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.core.errors import ArtifactError

if TYPE_CHECKING:
    import torch

NAME = "sluice_grouped"
LONGEST = 1024


def choose(device: str, length: int) -> str:
    """Name of the attention implementation for `from_pretrained(attn_implementation=...)`; registers ours."""
    if device != "cpu" or length > LONGEST:
        return "sdpa"
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, grouped)
    AttentionMaskInterface.register(NAME, eager_mask)
    return NAME


def grouped(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    s_aux: torch.Tensor | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1), query heads grouped by key head.

    Args:
        module: the attention layer that calls; its `training` flag switches dropout.
        query: (batch, query heads, length, width of a head).
        key: (batch, key heads, keys, width); the number of query heads is a multiple of it.
        value: as `key`.
        attention_mask: additive, (batch, 1, length, keys), or None: every token sees every key.
        scaling: factor on the scores; None is 1 / sqrt(width).
        dropout: probability of dropping an attention weight in training.
        s_aux, softcap: what some architectures do to the scores besides; none of it is computed here.

    Returns:
        (batch, length, query heads, width), and None in place of the weights.

    Raises:
        ArtifactError: the architecture has attention sinks or caps its scores.
    """
    import torch

    if s_aux is not None or softcap is not None:
        told = "attention sinks" if softcap is None else "a cap on the scores of its attention"
        raise ArtifactError(
            f"architecture {module.config.model_type}: it has {told}, which are not computed here; choose another, for "
            "example llama, gpt2, qwen3, mistral"
        )

    batch, heads, length, width = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    group = heads // kv_heads
    scaled = query.reshape(batch * kv_heads, group * length, width) * (scaling or width**-0.5)
    scores = torch.bmm(scaled, key.reshape(batch * kv_heads, keys, width).transpose(1, 2))
    scores = scores.view(batch, kv_heads, group, length, keys)
    if attention_mask is not None:
        scores += attention_mask[:, :, None, :, :keys]
    weights = torch.softmax(scores, dim=-1)  # sums in fp32 whatever the type
    if dropout and module.training:
        weights = torch.dropout(weights, dropout, train=True)
    flat = weights.view(batch * kv_heads, group * length, keys)
    mixed = torch.bmm(flat, value.reshape(batch * kv_heads, keys, value.shape[-1]))
    return mixed.view(batch, heads, length, -1).transpose(1, 2).contiguous(), None
