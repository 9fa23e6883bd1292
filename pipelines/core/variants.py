"""The compressed forms of a model: what they are called, how a directory of each is loaded, what its layers stand for.

Each form's own code is imported where it is needed: bitsandbytes takes seconds.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any, Literal

from pipelines.core.errors import ArtifactError

PLAIN = "plain"  # a model as it is, in bf16
DYNAMIC = "dynamic-int8"  # made when it is loaded, from the original's directory
GGUF: dict[str, Literal["f16", "q8_0", "q4_0"]] = {"gguf-f16": "f16", "gguf-q8_0": "q8_0", "gguf-q4_0": "q4_0"}
UNREAD = ("head_dim", "rope_parameters", "attention_bias", "mlp_bias")  # of a GGUF file, by transformers
PACKED = ("int8", "int4")  # layers of ours: modules of that name
BNB = ("nf4", "llm-int8")


def load(place: Path, kind: str, classifier: bool = False, original: Path | None = None) -> Any:
    """A model ready to answer on the CPU, its floating-point part in bf16, or in fp32 where bf16 is slow (`cpu.ready`),
    and of a GGUF file always.

    Args:
        kind: `PLAIN` or the name of a variant.
        classifier: whether it scores texts rather than continues them (a reward model).
        original: directory that it was made from; what transformers does not read out of a GGUF file is taken from it.
    """
    from pipelines.core import cpu

    return cpu.ready(_load(place, kind, classifier, original))


def modules(kind: str) -> tuple[str, ...]:
    """The modules that `load` imports for a form, beside transformers' own."""
    if kind in PACKED:
        return (f"pipelines.core.{kind}",)
    return ("bitsandbytes",) if kind in BNB else ()


def dense(model: Any, kind: str) -> Any:
    """A model whose packed layers of ours are made dense, in the model itself: what many rows at a time need."""
    return _packed(kind).dense(model) if kind in PACKED else model


def cannot_run(kind: str) -> str | None:
    """Why this machine cannot compute in a form: what a product of 64 x 64 has raised, its class before a colon; None
    where it can.

    GGUF files are not computed with here.
    """
    import torch

    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dynamic quantization is deprecated in favour of torchao
            _try(kind, torch.nn.Linear(64, 64, bias=False).bfloat16(), torch.ones(1, 64, dtype=torch.bfloat16))
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # no kernel, or no library
        return f"{type(error).__name__}: {error}"
    return None


def _try(kind: str, layer: Any, x: Any) -> None:
    """Multiply x (1, in) with a linear layer in a form."""
    import torch

    if kind == "int8":
        int8 = _packed(kind)
        made = int8.empty(layer)
        made.weight.data, made.scale.data = int8.to_int8(layer.weight)
        made.product()(x)
    elif kind == "int4":
        int4 = _packed(kind)
        grid = int4.grid(layer.weight, 32)
        made = int4.Int4Linear(layer.in_features, layer.out_features, 32, bias=False)
        made.weight.data = int4.pack(int4.to_int4(layer.weight, grid))
        made.scales.data, made.zeros.data = grid
        made.product()(x)
    elif kind == DYNAMIC:
        plain = torch.nn.Sequential(layer.float())
        torch.ao.quantization.quantize_dynamic(plain, {torch.nn.Linear}, dtype=torch.qint8)(x.float())  # type: ignore[no-untyped-call]
    elif kind in BNB:
        import bitsandbytes as bnb

        sizes = layer.in_features, layer.out_features
        if kind == "nf4":
            made = bnb.nn.Linear4bit(*sizes, bias=False, quant_type="nf4")
        else:
            made = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
        made.to("cpu")(x)  # which quantizes it; in training mode, in which nothing is packed for one kernel


def weight_of(layer: Any) -> Any:
    """The weight (out, in) that a layer stands for, as a torch tensor; None for what is no linear layer."""
    import torch

    if isinstance(layer, torch.nn.Linear) and layer.weight.is_floating_point():
        return layer.weight
    if hasattr(layer, "dense") and hasattr(layer, "in_features"):
        return layer.dense()
    if type(layer).__module__.startswith("bitsandbytes"):
        from pipelines.core import bnb_variants

        return bnb_variants.weight_of(layer)
    return None


def size(place: Path) -> int:
    """Bytes of a directory's weights: those that are loaded."""
    return sum(file.stat().st_size for file in _weights(place))


def parameters(place: Path) -> int:
    """How many numbers a directory's weights are; torch's own files are taken for bf16.

    Raises:
        ArtifactError: a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    count = 0
    for file in _weights(place):
        if file.suffix != ".safetensors":
            count += file.stat().st_size // 2
            continue
        try:
            with safe_open(file, "pt") as tensors:
                count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise ArtifactError(f"{file}: damaged ({error}); copy or make it again") from None
    return count


def _weights(place: Path) -> list[Path]:
    """The files of weights that transformers reads, other programs' copies beside them (`consolidated.safetensors`)
    not among them: one of safetensors, or the parts that an index names, else one of GGUF, else torch's own.
    """
    whole, index = place / "model.safetensors", place / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [place / name for name in sorted(parts) if (place / name).is_file()]
    return [*place.glob("*.gguf")] or [*place.glob("pytorch_model*.bin")]


def _packed(kind: str) -> Any:
    """The module of a form of ours."""
    import importlib

    return importlib.import_module(f"pipelines.core.{kind}")


def _load(place: Path, kind: str, classifier: bool, original: Path | None) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from pipelines.core import cpu

    if kind in PACKED:
        return _packed(kind).load(place, classifier)
    if kind in BNB:
        from pipelines.core import bnb_variants

        return bnb_variants.load(place)
    if kind == DYNAMIC:
        from pipelines.core import bnb_variants

        return bnb_variants.dynamic_int8(AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval())
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    if kind in GGUF:  # as transformers reads it: made dense
        (file,) = place.glob("*.gguf")
        config = AutoConfig.from_pretrained(place, gguf_file=file.name)
        known = config if original is None else AutoConfig.from_pretrained(original)
        for key in UNREAD:
            if hasattr(known, key):
                setattr(config, key, getattr(known, key))
        # In fp32: half precision has more digits than bf16, whose rounding would be taken for the file's
        return auto.from_pretrained(place, gguf_file=file.name, config=config, dtype=torch.float32).eval()
    kept = torch.bfloat16 if cpu.multiplies(torch.bfloat16) else torch.float32
    return auto.from_pretrained(place, dtype=kept).eval()
