"""One sequence, token by token, without what makes transformers slow at it on a CPU.

A step of SmolLM2-135M through `generate` spends most of its time outside the products: some 900 small operations and
Python around them, keys and values copied whole into a longer cache at every layer, masks and attention for one row.
Here a block is four products (query, key and value are one; gate and up are one), the cache is written in place, and
the queries that share a key are rows of one attention, so that nothing is repeated and no mask is needed.
`docs/notes.md` has the figures, and why threads must not sleep between products (`GOMP_SPINCOUNT`). What is chosen from
the logits is the part of `generate.py`.

Works for the families whose block is RMSNorm, rotary attention, RMSNorm, gated SiLU (`FAMILIES`), with layers of any
kind. This file imports nothing of the project: a registered model carries it along.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch.nn.functional import linear, scaled_dot_product_attention, silu

Product = Callable[[torch.Tensor], torch.Tensor]  # (M, in) -> (M, out)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class Block(NamedTuple):
    """What a step needs of one block."""

    norm: torch.Tensor  # (D,) fp32
    query_key_value: Product  # (1, D) -> (1, (H + 2 KV) x d)
    head_norms: tuple[torch.Tensor, torch.Tensor] | None  # (d,) each: of queries and of keys (qwen3)
    output: Product
    second_norm: torch.Tensor  # (D,) fp32
    gate_up: Product  # (1, D) -> (1, 2 F)
    down: Product
    window: int | None  # how many keys it sees, itself included


def unsupported(model: Any) -> str | None:
    """Why a model cannot be decoded here; nothing where it can."""
    config = model.config
    if config.model_type not in FAMILIES:
        return f"architecture {config.model_type}; supported: {', '.join(FAMILIES)}"
    if config.hidden_act != "silu":
        return f"hidden_act {config.hidden_act}; supported: silu"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ("default", "linear", "llama3"):
        return f"rope_type {rope}, which changes with the length; supported: default, linear, llama3"
    return None


class Decoder:
    """A model with room for one sequence of at most `length` tokens. Not thread-safe.

    Args:
        model: a transformers model of one of `FAMILIES`; its query, key and value layers become one, as do gate and
            up, and share memory with the model's own.
        length: tokens of prompt and continuation together.

    Raises:
        ValueError: a model that it does not support (`unsupported`).
    """

    def __init__(self, model: Any, length: int) -> None:
        if reason := unsupported(model):
            raise ValueError(reason)
        config, body = model.config, model.base_model
        self.model = model
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.blocks = [_block(block, config) for block in body.layers]
        self.size = body.layers[0].self_attn.head_dim
        self.scaling, self.epsilon = body.layers[0].self_attn.scaling, config.rms_norm_eps
        self.norm, self.tokens, self.head = body.norm.weight.float(), body.embed_tokens, product(model.lm_head)
        self.type, self.length = body.norm.weight.dtype, 0
        self.make_room(length)

    def make_room(self, length: int) -> None:
        """Have places for `length` tokens or more; where they must be made, what was read is forgotten."""
        if length <= self.length:
            return
        self.length, self.count = length, 0
        first = len(self.blocks), 1, self.groups, length, self.size
        self.keys, self.values = torch.empty(first, dtype=self.type), torch.empty(first, dtype=self.type)
        cos, sin = self.model.base_model.rotary_emb(torch.zeros(1), torch.arange(length)[None])
        sign = torch.ones(self.size)
        sign[: self.size // 2] = -1  # rotate_half: (-second, first), as a roll with signs
        self.cos, self.sin = cos[0].float(), sin[0].float() * sign

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> torch.Tensor:
        """Read a prompt from the start; logits (V,) in fp32 of what follows.

        Raises:
            ValueError: an empty prompt, or one with no room for a token after it.
        """
        if not 0 < len(ids) < self.length:
            raise ValueError(f"a prompt of {len(ids)} tokens; accepted: 1 to {self.length - 1}")
        made = self.model(input_ids=torch.tensor([list(ids)]), use_cache=True, logits_to_keep=1)
        for number, layer in enumerate(made.past_key_values.layers):
            seen = layer.keys.shape[2]  # fewer than the prompt's where the layer sees a window
            part = slice(len(ids) - seen, len(ids))
            self.keys[number, :, :, part], self.values[number, :, :, part] = layer.keys, layer.values
        self.count = len(ids)
        return cast("torch.Tensor", made.logits[0, -1].float())

    @torch.inference_mode()
    def step(self, token: int) -> torch.Tensor:
        """Append a token; logits (V,) in fp32 of what follows it.

        Raises:
            ValueError: no room.
        """
        if self.count >= self.length:
            raise ValueError(f"all {self.length} places are taken")
        place, heads, groups = self.count, self.heads, self.groups
        cos, sin, half = self.cos[place], self.sin[place], self.size // 2
        x = self.tokens(torch.tensor([token])).float()
        for number, block in enumerate(self.blocks):
            mixed = block.query_key_value(self._normed(x, block.norm)).float().view(-1, self.size)
            turned = mixed[: heads + groups]
            if block.head_norms is not None:
                queries, keys = block.head_norms
                turned = torch.cat([_rms(turned[:heads], self.epsilon) * queries,
                                    _rms(turned[heads:], self.epsilon) * keys])  # fmt: skip
            turned = turned * cos + turned.roll(half, 1) * sin
            keys, values = self.keys[number], self.values[number]
            keys[0, :, place], values[0, :, place] = turned[heads:], mixed[heads + groups :]
            first = 0 if block.window is None else max(0, place + 1 - block.window)
            # The heads of a group are its rows: one token attends to all that is there, so there is no mask.
            rows = turned[:heads].view(1, groups, heads // groups, self.size).to(self.type)
            seen = scaled_dot_product_attention(
                rows, keys[:, :, first : place + 1], values[:, :, first : place + 1], scale=self.scaling
            )
            x = x + block.output(seen.reshape(1, -1))
            gate, up = block.gate_up(self._normed(x, block.second_norm)).chunk(2, dim=1)
            x = x + block.down(silu(gate) * up)
        self.count += 1
        logits: torch.Tensor = self.head(self._normed(x, self.norm))[0].float()
        return logits

    def _normed(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return (_rms(x, self.epsilon) * gain).to(self.type)


def _rms(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


def _block(block: Any, config: Any) -> Block:
    attention, mlp = block.self_attn, block.mlp
    norms = None
    if hasattr(attention, "q_norm"):
        norms = attention.q_norm.weight.float(), attention.k_norm.weight.float()
    return Block(
        norm=block.input_layernorm.weight.float(),
        query_key_value=joined([attention.q_proj, attention.k_proj, attention.v_proj]),
        head_norms=norms,
        output=product(attention.o_proj),
        second_norm=block.post_attention_layernorm.weight.float(),
        gate_up=joined([mlp.gate_proj, mlp.up_proj]),
        down=product(mlp.down_proj),
        window=getattr(attention, "sliding_window", getattr(config, "sliding_window", None)),
    )


def joined(layers: Sequence[Any]) -> Product:
    """Layers of one input as one product; their tensors then are views of its tensors.

    Layers of several kinds stay apart, and so do those that cannot be joined row by row (bitsandbytes').
    """
    first = layers[0]
    names = [name for name, part in first.named_parameters(recurse=False) if part is not None]
    if len({type(layer) for layer in layers}) > 1 or not (type(first) is torch.nn.Linear or hasattr(first, "product")):
        products = [product(layer) for layer in layers]
        return lambda x: torch.cat([one(x) for one in products], dim=1)
    whole = copy.copy(first)
    whole._parameters = dict(first._parameters)
    for name in names:
        parts = [getattr(layer, name) for layer in layers]
        together = torch.cat([part.detach() for part in parts])
        for part, view in zip(parts, torch.split(together, [len(part) for part in parts]), strict=True):
            part.data = view
        whole._parameters[name] = torch.nn.Parameter(together, requires_grad=False)
    whole.out_features = sum(layer.out_features for layer in layers)
    return product(whole)


def product(layer: Any) -> Product:
    """A layer as a function of few rows; a layer that has a quick one (`Int8Linear.product`) gives it."""
    if hasattr(layer, "product"):
        quick: Product = layer.product()
        return quick
    if type(layer) is torch.nn.Linear:
        weight, bias = layer.weight, layer.bias
        return lambda x: linear(x, weight, bias)
    return cast("Product", layer)
