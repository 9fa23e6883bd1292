"""4-bit weights, asymmetric in groups, in plain safetensors that transformers loads; embedding and head in int8.

A group of `group_size` weights of a row is kept as codes 0 to 15 with a scale and a zero point in bf16; a code c stands
for (c - 8) x scale + zero, as torch's packed kernel reads it. Rounded to the nearest (`to_int4`), a weight inside its
group's range is off by at most half a scale, and what rounding scale and zero adds; `gptq` chooses the codes better.

A directory is a normal Hugging Face one: `quantization_config.quant_method` is `sluice-int4`, tensors `*.weight` (two
codes a byte, the first in the low half), `*.scales` and `*.zeros`; the layers of `int8_layers` as `int8` keeps them.
After `register()`, transformers' `from_pretrained` loads it. This file imports nothing of the project but `int8`: a
registered model carries both along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

# In the project `pipelines.core.int8`; beside a registered model `int8`.
int8: Any = import_module(f"{__package__}.int8" if __package__ else "int8")

METHOD = "sluice-int4"
LEVELS, MIDDLE = 15, 8
FEW_ROWS = 32  # rows for which the packed kernel is faster than a dense product
OUTPUTS = 16  # torch's kernel takes multiples of that many outputs


class Grid(NamedTuple):
    """What the codes of a weight (out, in) stand for."""

    scales: torch.Tensor  # (out, in / group) bf16
    zeros: torch.Tensor  # (out, in / group) bf16, the value of code 8


def grid(weight: torch.Tensor, group: int) -> Grid:
    """Scales and zero points that reach from the smallest to the largest weight of each group.

    A group of equal weights gets scale 1 and is exact but for the rounding of its zero point.

    Raises:
        ValueError: the inputs are no multiple of the group; NaN or infinity in the weight.
    """
    if weight.shape[1] % group:
        raise ValueError(_unfit(weight.shape[1], group))
    if not bool(torch.isfinite(weight).all()):
        count = int((~torch.isfinite(weight)).sum())
        raise ValueError(f"{count} of {weight.numel()} weights are NaN or infinite")
    groups = weight.float().reshape(len(weight), -1, group)
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    scales = ((high - low) / LEVELS).to(torch.bfloat16)
    scales[scales == 0] = 1.0
    return Grid(scales, torch.where(high == low, low, low + MIDDLE * scales.float()).to(torch.bfloat16))


def to_int4(weight: torch.Tensor, found: Grid) -> torch.Tensor:
    """Codes (out, in) uint8 of the nearest values on a grid."""
    groups = weight.float().reshape(*found.scales.shape, -1)
    scales, zeros = (part.float()[..., None] for part in found)
    codes = ((groups - zeros) / scales).round_().add_(MIDDLE).clamp_(0, LEVELS)
    return codes.to(torch.uint8).flatten(1)


def from_int4(codes: torch.Tensor, found: Grid) -> torch.Tensor:
    """What codes (out, in) stand for, in fp32."""
    groups = codes.float().reshape(*found.scales.shape, -1) - MIDDLE
    scales, zeros = (part.float()[..., None] for part in found)
    values: torch.Tensor = groups * scales + zeros
    return values.flatten(1)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes (out, in) as (out, in / 2) bytes, the first of each two in the low half."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`."""
    return torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)


class Int4Linear(torch.nn.Module):
    """y = x W^T + b with W kept in 4 bits. Not trainable."""

    def __init__(self, inputs: int, outputs: int, group: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group = inputs, outputs, group
        codes = torch.empty(outputs, inputs // 2, dtype=torch.uint8)
        scales, zeros = torch.empty(2, outputs, inputs // group, dtype=torch.bfloat16)
        self.weight = torch.nn.Parameter(codes, requires_grad=False)
        self.scales = torch.nn.Parameter(scales.clone(), requires_grad=False)
        self.zeros = torch.nn.Parameter(zeros.clone(), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None

    def dense(self) -> torch.Tensor:
        """The weight (out, in) that it stands for, in the scales' type."""
        whole = from_int4(unpack(self.weight), Grid(self.scales, self.zeros))
        return whole.to(self.scales.dtype)

    @property
    def packed(self) -> bool:
        """Whether torch's packed kernel can multiply with it."""
        return self.weight.device.type == "cpu" and self.out_features % OUTPUTS == 0 and self.group >= 32

    def product(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The layer for few rows, (M, in) -> (M, out) in bf16: its weight once more, in the order the kernel reads."""
        if not self.packed:
            return self
        weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack(self.weight).int(), 1)
        both = torch.stack([self.scales, self.zeros], dim=2).transpose(0, 1).contiguous().bfloat16()
        group, bias, multiply = self.group, self.bias, torch.ops.aten._weight_int4pack_mm_for_cpu
        if bias is None:
            return lambda x: multiply(x.bfloat16(), weight, group, both)
        return lambda x: multiply(x.bfloat16(), weight, group, both) + bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out), in x's type; the weight is made dense for the moment (`product` does not)."""
        return linear(x, self.dense().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def quantize(
    model: Any, group: int, keep: Sequence[str] = (), codes: Mapping[str, tuple[torch.Tensor, Grid]] | None = None
) -> Any:
    """Put 4-bit layers in the place of the blocks' linear layers and int8 in that of embedding and head, in the model.

    Args:
        model: a transformers model.
        group: weights of a row that share a scale.
        keep: names or patterns of layers that stay in bf16 (`int8.kept`).
        codes: by layer, codes (out, in) and their grid; a layer without is rounded to the nearest.

    Raises:
        ValueError: as `grid`; the layer is named.
    """
    names = [name for name, _ in layers(model, keep)]  # the layers themselves go one by one as they are replaced
    for name in names:
        module = model.get_submodule(name)
        weight = int8.rows_of(module)
        try:
            found = (codes or {}).get(name) or (to_int4(weight, grid(weight, group)), grid(weight, group))
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None
        layer = _empty(module, group)
        layer.weight.data, layer.scales.data, layer.zeros.data = pack(found[0]), *found[1]
        if layer.bias is not None:
            layer.bias.data = module.bias.detach()
        model.set_submodule(name, layer)
    int8.quantize(model, keep)  # what is left: embedding and head; the rest becomes bf16
    others = model.config.quantization_config.layers
    model.config.quantization_config = Int4Config(layers=sorted(names), int8_layers=others, group_size=group)
    return model


def check(model: Any, group: int, keep: Sequence[str] = ()) -> None:
    """Refuse layers that groups do not fit, as `quantize` does, without a look at their weights.

    Raises:
        ValueError: the inputs of a layer are no multiple of the group; the layer is named.
    """
    for name, module in layers(model, keep):
        if (inputs := int8.rows_of(module).shape[1]) % group:
            raise ValueError(f"layer {name}: {_unfit(inputs, group)}")


def layers(model: Any, keep: Sequence[str] = ()) -> list[tuple[str, Any]]:
    """What `quantize` keeps in 4 bits, by name: linear layers but for the head."""
    ends = {id(part) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    return [
        (name, part) for name, part in int8.convertible(model) if id(part) not in ends and not int8.kept(name, keep)
    ]


class Int4Config(QuantizationConfigMixin):  # type: ignore[misc]  # transformers ships no types for it
    """`quantization_config` of a directory: which layers are in 4 bits, and which in int8."""

    def __init__(self, layers: list[str], int8_layers: list[str], group_size: int, **_: Any) -> None:
        self.quant_method = METHOD
        self.layers, self.int8_layers, self.group_size = layers, int8_layers, group_size


class Int4Quantizer(HfQuantizer):  # type: ignore[misc]  # transformers ships no types for it
    """Tells transformers to build packed layers before it reads a directory's tensors."""

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        asked = self.quantization_config
        int8.place(model, asked.layers, lambda module: _empty(module, asked.group_size))
        int8.place(model, asked.int8_layers, int8.empty)
        int8.tie_scales(model)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        int8.own_memory(model)

    def is_serializable(self) -> bool:
        """The tensors are plain ones."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False


def register() -> None:
    """Make `sluice-int4` known to transformers' `from_pretrained`. Does nothing the second time."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(Int4Quantizer)
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(Int4Config)


def load(place: Path, classifier: bool = False) -> Any:
    """The model of a directory, with packed layers, the rest of it in bf16."""
    register()
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    return kind.from_pretrained(place, dtype=torch.bfloat16).eval()


def dense(model: Any) -> Any:
    """Put dense layers in the place of packed ones, in the model itself: what many rows at a time are faster with."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Int4Linear):
            model.set_submodule(name, int8.plain(module))
    return int8.dense(model)


def _unfit(inputs: int, group: int) -> str:
    return f"{inputs} inputs are no multiple of group_size {group}; keep it in high precision"


def _empty(module: Any, group: int) -> Int4Linear:
    """A 4-bit layer of a layer's shape, where the layer is."""
    outputs, inputs = int8.rows_of(module).shape
    bias = getattr(module, "bias", None) is not None
    return Int4Linear(inputs, outputs, group, bias).to(module.weight.device)
