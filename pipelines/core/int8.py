"""Weight-only int8, symmetric per output channel, in plain safetensors that transformers loads.

A weight row w is kept as round(w / s) in int8 and one scale s = max|w| / 127. The error of a weight is at most s / 2;
for Gaussian rows of K weights its size relative to theirs is about sqrt(2 ln K) / (127 sqrt 12): 0.7 % at K = 576.
A token's product runs in torch's packed kernel, in bf16, which reads one byte a weight; many rows are multiplied with
the weight made dense for the moment, since the kernel's time grows with them.

A directory is a normal Hugging Face one: `quantization_config.quant_method` is `sluice-int8`, tensors `*.weight`
(int8) and `*.scale` (bf16). After `register()`, transformers' `from_pretrained` loads it. This file imports nothing of
the project: a registered model carries it along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.functional import embedding, linear
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "sluice-int8"
LEVELS = 127  # -127 .. 127: symmetric, so that 0 is 0
FEW_ROWS = 32  # rows for which the packed kernel is faster than a dense product: its time grows with them
STEP = 16  # inputs the packed kernel reads at a time; it crashes the process where a row is no multiple


def to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (out, in) -> int8 (out, in) and scale (out,) in bf16, |weight - int8 x scale| <= scale / 2.

    The scale is rounded up to bf16 before it is used, so that its rounding is not an error. A row of zeros gets
    scale 1 and stays zero.

    Raises:
        ValueError: NaN or infinity in the weight.
    """
    rows = weight.detach().float().contiguous()
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(f"{int((~torch.isfinite(rows)).sum())} of {rows.numel()} weights are NaN or infinite")
    exact = rows.abs().amax(dim=1) / LEVELS
    exact[exact == 0] = 1.0
    scale = exact.to(torch.bfloat16)
    below = scale.float() < exact  # rounded down: the next bf16, whose bits are those of the next int16
    scale[below] = (scale[below].view(torch.int16) + 1).view(torch.bfloat16)
    return (rows / scale.float()[:, None]).round_().clamp_(-LEVELS, LEVELS).to(torch.int8), scale


class Int8Linear(torch.nn.Module):
    """y = x W^T + b with W kept in int8. Not trainable."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=torch.int8), requires_grad=False)
        self.scale = torch.nn.Parameter(torch.empty(outputs, dtype=torch.bfloat16), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None

    @property
    def packed(self) -> bool:
        """Whether torch's packed kernel can multiply with it."""
        return self.weight.device.type == "cpu" and self.in_features % STEP == 0

    def dense(self) -> torch.Tensor:
        """The weight (out, in) that it stands for, in the scale's type."""
        return self.weight.to(self.scale.dtype) * self.scale[:, None]

    def product(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The layer for few rows, (M, in) -> (M, out) in bf16, without what a module's call costs."""
        if not self.packed:
            return self
        weight, scale, bias = self.weight.data, self.scale.data.bfloat16(), self.bias
        if bias is None:
            return lambda x: torch._weight_int8pack_mm(x.bfloat16(), weight, scale)
        return lambda x: torch._weight_int8pack_mm(x.bfloat16(), weight, scale) + bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out), in x's type."""
        rows = x.reshape(-1, self.in_features)
        if len(rows) <= FEW_ROWS and self.packed:
            # In bf16 only: with fp32 activations the kernel takes a scalar path, 12 times slower.
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale.bfloat16()).to(x.dtype)
        else:
            y = linear(rows, self.dense().to(x.dtype))
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


class Int8Embedding(torch.nn.Module):
    """Rows of an embedding kept in int8; shares weight and scale with an `Int8Linear` where the head is tied."""

    def __init__(self, count: int, width: int, padding_idx: int | None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = count, width, padding_idx
        self.weight = torch.nn.Parameter(torch.empty(count, width, dtype=torch.int8), requires_grad=False)
        self.scale = torch.nn.Parameter(torch.empty(count, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (...) -> (..., width), in the scale's type."""
        return embedding(ids, self.weight).to(self.scale.dtype) * self.scale[ids][..., None]


def convertible(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Linear layers (GPT-2's `Conv1D` too) and the embedding of tokens by name. Not among them: the output layer of a
    classifier, which is small, and whose scores are the model's answer; an embedding that does more than look up rows,
    as Gemma's, which scales them."""
    found = cast("Any", model).get_input_embeddings()
    tokens: Any = found if type(found) is torch.nn.Embedding else None
    for name, module in model.named_modules():
        if module is tokens or (isinstance(module, torch.nn.Linear | Conv1D) and name != "score"):
            yield name, module


def kept(name: str, patterns: Sequence[str]) -> bool:
    """Whether a layer's name, or its end, is one of the patterns (`lm_head`, `layers.0.*`)."""
    return any(fnmatch(name, pattern) or fnmatch(name, f"*.{pattern}") for pattern in patterns)


def quantize(model: Any, keep: Sequence[str] = ()) -> Any:
    """Put int8 layers in the place of linear layers and of the embedding, in the model itself; the rest becomes bf16.

    Args:
        model: a transformers model.
        keep: names or patterns of layers that stay in bf16 (`kept`). Of a head and the embedding it is tied to both
            stay where one is named.

    Raises:
        ValueError: NaN or infinity in a weight; the layer is named.
    """
    head, tokens = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and model.config.get_text_config().tie_word_embeddings
    stay = [head, tokens] if tied else []
    if not any(kept(name, keep) for name, module in convertible(model) if module in stay):
        stay = stay[:1]  # the head is made of its embedding, below
    made = {}
    for name, module in list(convertible(model)):
        if kept(name, keep) or module in stay:
            continue
        try:
            weight, scale = to_int8(rows_of(module))
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None
        layer = empty(module)
        layer.weight.data, layer.scale.data = weight, scale
        if getattr(layer, "bias", None) is not None:
            layer.bias.data = cast("Any", module).bias.detach()
        made[name] = layer
    if tied:
        made |= _tied(model, made)
    for name, layer in made.items():
        model.set_submodule(name, layer)
    tie_scales(model)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.bfloat16()
    model.config.dtype = torch.bfloat16
    model.config.quantization_config = Int8Config(layers=sorted(made))
    return model


class Int8Config(QuantizationConfigMixin):  # type: ignore[misc]  # transformers ships no types for it
    """`quantization_config` of a directory: which layers are in int8."""

    def __init__(self, layers: list[str], **_: Any) -> None:
        self.quant_method = METHOD
        self.layers = layers


class Int8Quantizer(HfQuantizer):  # type: ignore[misc]  # transformers ships no types for it
    """Tells transformers to build int8 layers before it reads a directory's tensors."""

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        place(model, self.quantization_config.layers, empty)
        tie_scales(model)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        own_memory(model)

    def is_serializable(self) -> bool:
        """The tensors are plain ones."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Rounded weights have no gradient."""
        return False


def register() -> None:
    """Make `sluice-int8` known to transformers' `from_pretrained`. Does nothing the second time."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(Int8Quantizer)
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(Int8Config)


def load(place: Path, classifier: bool = False) -> Any:
    """The model of a directory, with int8 layers, the rest of it in bf16."""
    register()
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    return kind.from_pretrained(place, dtype=torch.bfloat16).eval()


def dense(model: Any) -> Any:
    """Put dense layers in the place of int8 ones, in the model itself: what many rows at a time are faster with."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Int8Linear):
            model.set_submodule(name, plain(module))
        elif isinstance(module, Int8Embedding):
            table = torch.nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta")
            weight = module.weight.to(module.scale.dtype) * module.scale[:, None]
            table.weight = torch.nn.Parameter(weight, requires_grad=False)
            model.set_submodule(name, table)
    return model


def plain(module: Any) -> torch.nn.Linear:
    """The dense layer that a packed one stands for."""
    layer = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    layer.weight = torch.nn.Parameter(module.dense(), requires_grad=False)
    if module.bias is not None:
        layer.bias = module.bias
    return layer


def place(model: Any, names: Sequence[str], make: Callable[[Any], Any]) -> None:
    """Put what `make` gives for each named layer in its place.

    Raises:
        ValueError: the model has no such layer.
    """
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ValueError(f"config.json: quantization_config: the model has no layer {name}")
        model.set_submodule(name, make(modules[name]))


def own_memory(model: Any) -> None:
    """Give packed tensors memory of their own: torch's kernels crash the process on those mapped from a file."""
    moved: dict[int, torch.Tensor] = {}
    for module in model.modules():
        if hasattr(module, "dense") or isinstance(module, Int8Embedding):
            for part in module.parameters(recurse=False):
                if (where := part.data_ptr()) not in moved:
                    moved[where] = part.data.clone()
                part.data = moved[where]
    model.requires_grad_(False)


def rows_of(module: Any) -> torch.Tensor:
    """A layer's weight as (out, in); GPT-2's `Conv1D` has it the other way round."""
    weight: torch.Tensor = module.weight
    return weight.t() if isinstance(module, Conv1D) else weight


def empty(module: Any) -> Any:
    """An int8 layer of a layer's shape, where the layer is (transformers builds on the device `meta`)."""
    device = module.weight.device
    if isinstance(module, torch.nn.Embedding):
        return Int8Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx).to(device)
    outputs, inputs = rows_of(module).shape
    return Int8Linear(inputs, outputs, getattr(module, "bias", None) is not None).to(device)


def tie_scales(model: Any) -> None:
    """Tell transformers that a tied head shares the embedding's scale as it does its weight."""
    head, tokens = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, Int8Linear) and model.config.get_text_config().tie_word_embeddings:
        names = {id(module): name for name, module in model.named_modules()}
        tie = {f"{names[id(head)]}.scale": f"{names[id(tokens)]}.scale"}
        model._tied_weights_keys = (model._tied_weights_keys or {}) | tie  # what saving looks at
        model.all_tied_weights_keys |= tie  # what loading does


def _tied(model: Any, made: dict[str, Any]) -> dict[str, Any]:
    """The int8 head of a tied model, made of its embedding; none where the embedding is kept."""
    names = {id(module): name for name, module in model.named_modules()}
    table = made.get(names[id(model.get_input_embeddings())])
    if table is None:
        return {}
    head = empty(model.get_output_embeddings())
    head.weight, head.scale = table.weight, table.scale
    if head.bias is not None:
        head.bias.data = model.get_output_embeddings().bias.detach()
    return {names[id(model.get_output_embeddings())]: head}
