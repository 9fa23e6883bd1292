"""A Hugging Face model directory as one GGUF file, which llama.cpp and Ollama load.

The layout is that of llama.cpp's convert_hf_to_gguf.py (tensor names, keys, types); the blocks are those of the
package `gguf`, the reference in Python:

* f16: every matrix in half precision.
* q8_0: blocks of 32 along a row, int8 with one f16 scale: 8.5 bits a weight.
* q4_0: the same with 4 bits: 4.5 bits a weight. The output matrix is kept in q8_0, as llama-quantize keeps it
  where its own choice, q6_K, does not fit; it hurts most of all.

Vectors (norms, biases) stay f32. A matrix whose rows are not a multiple of 32 cannot be cut into blocks and is
kept in f16, as llama.cpp does; the report names it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import gguf
import numpy as np
import torch
from safetensors import SafetensorError

from pipelines.core import artifacts, gguf_vocabulary
from pipelines.core.errors import ArtifactError, ParamsError
from pipelines.core.gguf_vocabulary import Vocabulary

Kind = Literal["f16", "q8_0", "q4_0"]
Type = gguf.GGMLQuantizationType

FILE_TYPES = {  # general.file_type, what most of the matrices are
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
MATRICES = {"f16": Type.F16, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0}
ARCHITECTURES = {  # model_type of config.json -> llama.cpp's graph for it
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
LARGEST_F16 = 65504.0
ROPE_FACTORS = "rope_freqs.weight"


class Report(NamedTuple):
    """What was written. `kept_in_f16` are the matrices a block type was asked for and does not fit."""

    kind: Kind
    architecture: str  # general.architecture
    pre: str  # tokenizer.ggml.pre
    parameters: int
    bytes: int  # of the file
    tensors: dict[str, int]  # GGML type -> how many
    kept_in_f16: tuple[str, ...]


class Planned(NamedTuple):
    """One tensor of the file: its GGUF name, its values (rows, columns) or (entries,), the type it gets."""

    name: str
    values: torch.Tensor
    type: Any


def export(place: Path, file: Path, kind: Kind) -> Report:
    """Write the model directory `place` as `file`, whole or not at all; an older file is replaced.

    Raises:
        ParamsError: `kind` is none of f16, q8_0, q4_0, or `file` does not end in .gguf, or cannot be a file.
        ArtifactError: no such directory; an architecture, a position encoding or a tokenizer that llama.cpp would
            compute otherwise; weights that are missing, not finite, or too large for f16.
    """
    if kind not in get_args(Kind):
        raise ParamsError(f"gguf: unknown type {kind!r}; known: {', '.join(get_args(Kind))}")
    if file.suffix != ".gguf":
        raise ParamsError(f"gguf: the file must end in .gguf, found {file.name!r}")
    if file.is_dir():
        raise ParamsError(f"gguf: {file} is a directory; a file is written")
    above = next(place for place in file.parents if place.exists())
    if not above.is_dir():
        raise ParamsError(f"gguf: {above} is no directory, so nothing can be written in it")

    # 1. Read the model and its tokenizer; refuse what the file could not say.
    architecture = _architecture(place)
    model, tokenizer = _load(place)
    vocabulary = gguf_vocabulary.read(tokenizer, model.get_input_embeddings().weight.shape[0])
    plan = _plan(model, architecture, kind)

    parameters = sum(one.values.numel() for one in plan if one.name != ROPE_FACTORS)

    # 2. Write beside the place, then move.
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}.partial")
    writer = gguf.GGUFWriter(draft, gguf.MODEL_ARCH_NAMES[architecture])
    _describe(writer, model.config, file.stem, kind, parameters)
    _write_vocabulary(writer, vocabulary)
    try:
        _write(writer, plan)
        artifacts.sync(draft)
        draft.replace(file)
        artifacts.sync(file.parent)
    finally:
        writer.close()
        draft.unlink(missing_ok=True)

    types = [one.type.name for one in plan]
    return Report(
        kind=kind,
        architecture=writer.arch,
        pre=vocabulary.pre,
        parameters=parameters,
        bytes=file.stat().st_size,
        tensors={name: types.count(name) for name in sorted(set(types))},
        kept_in_f16=tuple(one.name for one in plan if kind != "f16" and one.type == Type.F16),
    )


def check(place: Path, model: Any) -> None:
    """Refuse what no file of a directory's model could say: what takes no look at its weights.

    Raises:
        ArtifactError: as `export`.
    """
    from transformers import AutoTokenizer

    _architecture(place)
    gguf_vocabulary.read(AutoTokenizer.from_pretrained(place), model.get_input_embeddings().weight.shape[0])


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection, (heads x width, ...), from halves to pairs within each head.

    transformers rotates entry i of a head with entry i + width / 2, llama.cpp's llama graph entry 2i with 2i + 1
    (RoFormer, section 3.4.2). A bias is permuted likewise.
    """
    width = weight.shape[0] // heads
    return weight.reshape(heads, 2, width // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _architecture(place: Path) -> Any:
    """llama.cpp's graph for the model in `place`, read from its configuration."""
    from transformers import AutoConfig

    if not (place / "config.json").is_file():
        raise ArtifactError(f"{place}: no config.json; a Hugging Face model directory is needed")
    try:
        config = AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{place}/config.json: {error}") from None
    if config.model_type not in ARCHITECTURES:
        raise ArtifactError(
            f"{place}: architecture {config.model_type!r} cannot be exported; supported: {', '.join(ARCHITECTURES)}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ArtifactError(f"{place}: the model is quantized; export the one it was made from")
    if config.hidden_act != "silu":
        raise ArtifactError(f"{place}: hidden_act is {config.hidden_act!r}; llama.cpp computes silu")
    if config.model_type == "qwen3" and config.attention_bias:
        raise ArtifactError(f"{place}: attention_bias is true; llama.cpp's qwen3 has none and loads no such file")
    rope = config.rope_parameters
    known = {"default", "linear"} | ({"llama3"} if ARCHITECTURES[config.model_type] == gguf.MODEL_ARCH.LLAMA else set())
    if rope["rope_type"] not in known or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ArtifactError(
            f"{place}: rope_parameters {rope} cannot be exported; supported: {', '.join(sorted(known))}"
        )
    return ARCHITECTURES[config.model_type]


def _load(place: Path) -> tuple[Any, Any]:
    """The model as saved, in its own precision, and its tokenizer. Nothing may be missing or left over."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        model, found = AutoModelForCausalLM.from_pretrained(place, dtype="auto", output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{place}: {error}") from None
    for what in ("missing_keys", "unexpected_keys"):
        if found[what]:
            raise ArtifactError(f"{place}: {what.replace('_keys', '')} weights: {', '.join(sorted(found[what])[:5])}")
    return model.eval(), tokenizer


def _plan(model: Any, architecture: Any, kind: Kind) -> list[Planned]:
    """Every tensor of the file in order, checked; the output matrix is left out where it is the embedding."""
    config = model.config
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    head = "token_embd.weight" if tied else "output.weight"
    plan = []
    for name, values in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ArtifactError(f"{name}: llama.cpp's {gguf.MODEL_ARCH_NAMES[architecture]} has no such tensor")
        largest = values.abs().max().item()
        if not largest <= LARGEST_F16:  # also true of NaN
            raise ArtifactError(f"{name}: largest absolute value {largest}; finite values up to {LARGEST_F16} fit")
        if architecture == gguf.MODEL_ARCH.LLAMA and ".q_proj." in name:
            values = permute(values, config.num_attention_heads)
        if architecture == gguf.MODEL_ARCH.LLAMA and ".k_proj." in name:
            values = permute(values, config.num_key_value_heads)
        plan.append(Planned(new, values, _type(values, kind, new == head)))
    if config.rope_parameters["rope_type"] == "llama3":
        plan.append(Planned(ROPE_FACTORS, _rope_factors(model), Type.F32))
    return plan


def _type(values: torch.Tensor, kind: Kind, head: bool) -> Any:
    """The GGML type of one tensor."""
    if values.ndim == 1:
        return Type.F32
    wanted = Type.Q8_0 if kind == "q4_0" and head else MATRICES[kind]
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if values.shape[-1] % block == 0 else Type.F16


def _rope_factors(model: Any) -> torch.Tensor:
    """By what each frequency is divided, (head width / 2,): Llama 3.1's stretching, which has no keys in GGUF."""
    actual: torch.Tensor = model.base_model.rotary_emb.inv_freq.float()
    base: float = model.config.rope_parameters["rope_theta"]
    width = 2 * len(actual)
    unstretched = torch.tensor(base) ** (-torch.arange(0, width, 2) / width)
    return unstretched / actual


def _describe(writer: Any, config: Any, name: str, kind: Kind, parameters: int) -> None:
    """General keys and hyperparameters. A sliding window shortens the context: inside of it both agree."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(parameters, parameters, 0, 0))
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_context_length(min(config.max_position_embeddings, window))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def _write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """The `tokenizer.*` keys. Whether BOS is added is always said: llama.cpp's default depends on the rule."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for kind, index in vocabulary.ids.items():
        getattr(writer, f"add_{kind}_token_id")(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(False)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _write(writer: Any, plan: list[Planned]) -> None:
    """Header, keys, then tensor by tensor, so that one quantized tensor at a time is in memory."""
    for one in plan:
        shape = gguf.quant_shape_to_byte_shape(tuple(one.values.shape), one.type)
        plain = {Type.F32: np.float32, Type.F16: np.float16}.get(one.type)
        if plain is None:
            writer.add_tensor_info(one.name, shape, np.dtype(np.uint8), int(np.prod(shape)), one.type)
        else:
            writer.add_tensor_info(one.name, tuple(one.values.shape), np.dtype(plain), int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for one in plan:
        values = one.values.detach().float().contiguous().numpy()
        writer.write_tensor_data(gguf.quants.quantize(values, one.type))
    writer.flush()
