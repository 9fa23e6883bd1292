"""LLM.int8 and NF4 through bitsandbytes, and torch's dynamic int8: written once, loaded with what must be guarded.

Four things go wrong silently on a CPU (bitsandbytes 0.50, transformers 5.23): a 4-bit layer repacks its weight in its
first evaluation, after which it gives no gradient and is saved as garbage; shapes that its packed kernel does not
accept fail in evaluation only; a model that was loaded quantized cannot be saved again; and an adapter that is merged
into 4-bit weights is lost in their rounding. So: directories are saved before any forward, loaded with the packing
switched off, and shapes are checked before. Merging is refused where it would happen (`fine_tuning.unpacked`).
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import safe_open

from pipelines.core import cpu, int8
from pipelines.core.errors import ArtifactError

BLOCK = 64  # weights that share a scale in NF4
INPUTS, OUTPUTS = 64, 32  # bitsandbytes' 4-bit kernels on a CPU take multiples of these


class Grid(NamedTuple):
    """What the codes of a weight (out, in) stand for."""

    book: torch.Tensor  # (16,), ascending
    scales: torch.Tensor  # (out, in / 64) fp32, as their own quantization has left them
    state: Any  # bitsandbytes' own record of them


def grid(weight: torch.Tensor) -> Grid:
    """NF4's scales of a weight (out, in): the largest of each 64, themselves kept in 8 bits."""
    import bitsandbytes as bnb

    _, state = bnb.functional.quantize_4bit(
        weight.bfloat16(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return Grid(state.code.clone(), scales.float().view(len(weight), -1), state)


def nf4(
    source: Path,
    place: Path,
    keep: Sequence[str] = (),
    chosen: Mapping[str, tuple[torch.Tensor, Grid]] | None = None,
) -> None:
    """Write a model directory in 4-bit NormalFloat with double quantization (Dettmers et al., "QLoRA", 2023).

    Args:
        keep: names or patterns of layers that stay in bf16.
        chosen: codes (out, in) by layer and what they stand for; None: the nearest.

    Raises:
        ArtifactError: a layer of a shape that the format's kernels do not accept.
    """
    model = _quantized(source, keep, _nf4_config)
    for name, (codes, of_layer) in (chosen or {}).items():
        _store(model.get_submodule(name), codes, of_layer)
    _save(model, source, place)


def llm_int8(source: Path, place: Path, keep: Sequence[str] = ()) -> None:
    """Write a model directory in LLM.int8 (Dettmers et al., 2022)."""
    _save(_quantized(source, keep, _int8_config), source, place)


def load(place: Path) -> Any:
    """The model of a directory, the rest of it in bf16, guarded."""
    from transformers import AutoModelForCausalLM

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each product: inputs are cast
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16, device_map="cpu").eval()
    return cpu.guarded(model)


def dynamic_int8(model: Any) -> Any:
    """A copy with torch's dynamic quantization of the blocks: int8 weights, activations rounded tensor by tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated in favour of torchao
        made: Any = torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]
            copy.deepcopy(model), dynamic_names(model), dtype=torch.qint8
        )
        return made


def dynamic_names(model: Any) -> set[str]:
    """The layers that `dynamic_int8` rounds; none of GPT-2's, which are of another class."""
    head = model.get_output_embeddings()
    return {name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and part is not head}


def weight_of(layer: Any) -> torch.Tensor | None:
    """The weight (out, in) in fp32 that a layer of bitsandbytes stands for; None for any other."""
    import bitsandbytes as bnb

    if isinstance(layer, bnb.nn.Linear4bit):
        return cast("torch.Tensor", bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float())
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        codes = layer.weight.data if layer.state.CB is None else layer.state.CB
        return cast("torch.Tensor", codes.float() * scales.float()[:, None] / int8.LEVELS)
    return None


def bits_per_parameter(place: Path) -> float:
    """Bits that a directory keeps for each weight of its 4-bit layers: codes, scales, and the scales' own scales.

    Raises:
        ArtifactError: the directory has no such layer.
    """
    parts: dict[str, int] = {}
    weights = 0
    for file in sorted(place.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a safetensors file is no mapping
                value = tensors.get_tensor(name)
                parts[name] = value.numel() * value.element_size()
    layers = [name.removesuffix(".absmax") for name in parts if name.endswith(".weight.absmax")]
    for name in layers:
        weights += 2 * parts[name]  # two codes a byte
    stored = sum(size for name, size in parts.items() if any(name.startswith(layer) for layer in layers))
    if not layers:
        raise ArtifactError(f"{place}: no layer in 4 bits")
    return 8 * stored / weights


def check(model: Any, keep: Sequence[str] = ()) -> None:
    """Refuse layers of a shape that bitsandbytes' 4-bit kernels fail on, though only when they answer.

    Raises:
        ArtifactError: the first such layer, its shape, and what to do.
    """
    ends = {id(part) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    for name, module in int8.convertible(model):
        if id(module) in ends or int8.kept(name, keep):
            continue
        outputs, inputs = int8.rows_of(module).shape
        if outputs % OUTPUTS or inputs % INPUTS:
            raise ArtifactError(
                f"layer {name} has {inputs} inputs and {outputs} outputs; NF4 needs multiples of {INPUTS} and "
                f"{OUTPUTS} on a CPU: add it to quantize.keep_in_high_precision, or leave out nf4"
            )


def _nf4_config(skipped: list[str]) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=skipped,
    )  # fmt: skip


def _int8_config(skipped: list[str]) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)


def _quantized(source: Path, keep: Sequence[str], config: Any) -> Any:
    """The model of a directory as bitsandbytes rounds it, on the CPU, its head in bf16."""
    from transformers import AutoModelForCausalLM

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with torch.device("meta"):
        from transformers import AutoConfig

        plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    if config is _nf4_config:
        check(plain, keep)
    head = [name for name, module in plain.named_modules() if module is plain.get_output_embeddings()]
    skipped = head + [name for name, _ in int8.convertible(plain) if int8.kept(name, keep)]
    return cpu.guarded(
        AutoModelForCausalLM.from_pretrained(
            source, quantization_config=config(skipped), dtype=torch.bfloat16, device_map="cpu"
        )
    )


def _store(module: Any, codes: torch.Tensor, of_layer: Grid) -> None:
    """Put other codes into a 4-bit layer, two a byte along the flat weight, the first in the high half."""
    flat = codes.flatten()
    module.weight.data.copy_(((flat[0::2] << 4) | flat[1::2]).view_as(module.weight.data))
    module.weight.quant_state = module.quant_state = of_layer.state


def _save(model: Any, source: Path, place: Path) -> None:
    from transformers import AutoTokenizer

    model.save_pretrained(place)
    AutoTokenizer.from_pretrained(source).save_pretrained(place)
