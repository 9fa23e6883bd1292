"""The student of a distillation: made of the teacher's layers, random and narrower, or read from a directory.

Papers: Sanh et al., "DistilBERT" (2019), section 3 (layers taken from the teacher at even spacing); Jiao et al.,
"TinyBERT" (2020), section 3 (which layer of the teacher each layer of the student is matched with). Whether teacher
and student fit together is settled in `student_checks`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipelines.core import language_models, tuning
from pipelines.core.errors import ArtifactError, ParamsError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

NOT_PER_LAYER = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id")  # lists of a length of their own
MAY_DIFFER = (
    "layer_idx",
    "layer_id",
    "training",
    "gradient_checkpointing",
)  # a block's place, and how it is used at the moment
SHOWN = 5  # names of weights that a message lists


@dataclass(frozen=True)
class _Vocabulary:
    """What `language_models.random_weights` asks of a tokenizer, from a model's configuration."""

    size: int
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None

    def __len__(self) -> int:
        return self.size


def spacing(blocks: int, keep: int) -> list[int]:
    """Which `keep` of `blocks` blocks a student gets: evenly spaced, the first and the last among them.

    Of 12 blocks 6 are 0, 2, 4, 7, 9, 11, those DistilBERT takes. One block alone is the last: the final norm and the
    head were trained on its output, and `pairs` matches it with the teacher's last output as in any student. It starts
    worse than the first alone would, but not for long: SmolLM2-135M on Python, one seed, nats a token after 0, 20, 40
    and 60 steps: last 54, 9.1, 7.2, 6.9; first 18, 10.6, 7.5, 6.6.

    Raises:
        ParamsError: `keep` is not between 1 and `blocks`.
    """
    if not 1 <= keep <= blocks:
        raise ParamsError(f"distill.keep_layers: {keep}; the teacher has {blocks} blocks; accepted: 1 to {blocks}")
    if keep == 1:
        return [blocks - 1]
    gaps = keep - 1
    return [(2 * i * (blocks - 1) + gaps) // (2 * gaps) for i in range(keep)]  # i (blocks - 1) / gaps, halves up


def pairs(teacher_blocks: int, student_blocks: int, kept: list[int] | None = None) -> list[tuple[int, int]]:
    """Pairs (teacher's block, student's block), counted from 0, whose outputs are matched; the last with the last.

    Args:
        teacher_blocks: N.
        student_blocks: M.
        kept: the teacher's blocks a student of `from_layers` is made of: each is matched with its origin, so that
            what is matched agrees before the first block was left out.

    Without `kept`, TinyBERT's uniform mapping (section 3): with blocks counted from 1, the student's block m and the
    teacher's g(m) = m N / M, rounded, halves up. A student that is deeper than its teacher is mapped the other way
    round: each of the teacher's blocks has one of the student's, and the others are free.
    """
    if kept is not None:
        return [(origin, block) for block, origin in enumerate(kept)]
    count = min(teacher_blocks, student_blocks)

    def place(m: int, blocks: int) -> int:
        return (2 * m * blocks + count) // (2 * count) - 1

    return [(place(m, teacher_blocks), place(m, student_blocks)) for m in range(1, count + 1)]


def from_layers(teacher: PreTrainedModel, keep_layers: int) -> tuple[PreTrainedModel, list[int]]:
    """A student of `keep_layers` of the teacher's blocks, its embeddings, norm and head; and which blocks they are.

    DistilBERT's initialisation (section 3). The student is built from the teacher's configuration with fewer blocks,
    so each block knows its own place in the key-value cache, and what is in memory is what a saved student loads as.
    It has the teacher's type, device and mode. The teacher is left as it is, and no random number is used up.

    Raises:
        ParamsError: `keep_layers` is not between 1 and the teacher's blocks.
        ArtifactError: the teacher is quantized, carries adapters, or its architecture has no list of blocks that
            can be put in other places.
    """
    from transformers import AutoModelForCausalLM

    stack = _stack(teacher)
    kept = spacing(len(tuning.blocks(teacher)), keep_layers)
    config = _cut(teacher.config, kept)
    with torch.random.fork_rng(devices=[]):
        student = AutoModelForCausalLM.from_config(
            config, dtype=teacher.dtype, attn_implementation=teacher.config._attn_implementation
        )
    weights = _renumbered(teacher.state_dict(), stack, kept)
    wanted = student.state_dict()
    if odd := sorted(name for name in wanted.keys() | weights.keys() if not _same_shape(name, wanted, weights)):
        raise ArtifactError(f"{_unfit(teacher)}; weights that do not fit in their new place: {', '.join(odd[:SHOWN])}")
    student.load_state_dict(weights)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    student.to(teacher.device).train(teacher.training)
    for place, origin in enumerate(kept):
        _refuse_other_kind(teacher, origin, student, place)
    return student, kept


def random(
    teacher_config: PreTrainedConfig, depth: int, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> PreTrainedModel:
    """A student of the teacher's architecture with `depth` blocks, 64 x depth wide, and random weights.

    Everything follows from `depth` as in the `pretrain` stage (`language_models.random_weights`). Kept of the teacher
    are the rows of its embedding, the ids of its special tokens and its context length. The weights come from torch's
    global generator: seed it before.

    Raises:
        ParamsError: the architecture is no decoder-only language model.
    """
    vocabulary = _Vocabulary(
        teacher_config.vocab_size,
        *(getattr(teacher_config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")),
    )
    length: Any = getattr(teacher_config, "max_position_embeddings", None)  # None: the architecture has no limit
    return language_models.random_weights(teacher_config.model_type, depth, vocabulary, length, dtype, attention)


def from_directory(place: Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> PreTrainedModel:
    """The model saved in a directory, as a student to train further.

    Raises:
        ArtifactError: there is no model, or a damaged one; it is quantized or an adapter, neither of which can be
            trained as a whole; or weights are missing or left over, which transformers would draw at random or drop.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    _refuse_adapter(place)
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{place}: no causal language model could be loaded: {error}") from None
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, told[what])):
            raise ArtifactError(f"{place}: {what.replace('_keys', '')} weights: {', '.join(names[:SHOWN])}")
    _refuse_altered(model, str(place))
    return model


def without_weights(place: Path) -> PreTrainedModel:
    """The architecture of a model directory on torch's device `meta`: its sizes, and no memory taken.

    Raises:
        ArtifactError: no configuration of a causal language model, or of an adapter.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    _refuse_adapter(place)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{place}: no causal language model: {error}") from None


def _refuse_adapter(place: Path) -> None:
    """Raises ArtifactError where a directory holds no model, or an adapter beside it."""
    if not (place / "config.json").is_file():
        found = "only an adapter" if (place / "adapter_config.json").is_file() else "no config.json"
        raise ArtifactError(f"{place}: {found}; a Hugging Face model directory is needed (adapters merged)")
    if (place / "adapter_config.json").is_file():
        raise ArtifactError(f"{place}: adapter_config.json beside the model; merge the adapter and save the result")


def _stack(teacher: PreTrainedModel) -> str:
    """The name of the module that holds the teacher's blocks.

    Raises:
        ArtifactError: as `from_layers`.
    """
    _refuse_altered(teacher, "the teacher")
    stack = tuning.stack(teacher)
    if stack is None:
        raise ArtifactError(f"{_unfit(teacher)}: it has no list of {teacher.config.num_hidden_layers} blocks")
    return str(next(name for name, part in teacher.named_modules() if part is stack))


def _refuse_altered(model: PreTrainedModel, what: str) -> None:
    """Raises ArtifactError where the weights are not the plain ones of the architecture."""
    if getattr(model, "is_quantized", False):
        raise ArtifactError(f"{what} is quantized; its layers cannot be trained: use the model it was made from")
    if getattr(model, "peft_config", None):
        raise ArtifactError(f"{what} carries adapters; merge them into its weights and save the result")


def _cut(config: Any, kept: list[int]) -> Any:
    """The configuration of a model of these blocks alone, as it is read back from a file.

    Raises:
        ArtifactError: it cannot be said in this architecture's configuration.
    """
    from huggingface_hub.errors import StrictDataclassError

    blocks = config.num_hidden_layers
    shorter = copy.deepcopy(config)
    shorter.num_hidden_layers = len(kept)
    for name, value in config.to_dict().items():
        if isinstance(value, (list, tuple)) and len(value) == blocks and name not in NOT_PER_LAYER:
            setattr(shorter, name, [value[origin] for origin in kept])
    try:
        return type(config).from_dict(shorter.to_dict())
    except (ValueError, StrictDataclassError) as error:
        raise ArtifactError(f"architecture {config.model_type}: blocks {kept} alone are refused: {error}") from None


def _renumbered(weights: dict[str, torch.Tensor], stack: str, kept: list[int]) -> dict[str, torch.Tensor]:
    """The weights without the blocks left out, the others under their new numbers."""
    places = {str(origin): place for place, origin in enumerate(kept)}
    chosen = {}
    for name, values in weights.items():
        if not name.startswith(f"{stack}."):
            chosen[name] = values
            continue
        origin, _, rest = name.removeprefix(f"{stack}.").partition(".")
        if origin in places:
            chosen[f"{stack}.{places[origin]}.{rest}"] = values
    return chosen


def _same_shape(name: str, left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return name in left and name in right and left[name].shape == right[name].shape


def _refuse_other_kind(teacher: PreTrainedModel, origin: int, student: PreTrainedModel, place: int) -> None:
    """Raises ArtifactError where a block computes something else in its new place (GPT-2 with attention scores
    divided by the layer's number, say): its plain settings are compared, its weights are known to be equal."""
    theirs, ours = tuning.blocks(teacher)[origin], tuning.blocks(student)[place]
    for (name, old), (_, new) in zip(theirs.named_modules(), ours.named_modules(), strict=True):
        for key in sorted(vars(old).keys() | vars(new).keys()):
            was, now = vars(old).get(key), vars(new).get(key)
            plain = isinstance(was, (bool, int, float, str, type(None))) and not key.startswith("_")
            if plain and key not in MAY_DIFFER and was != now:
                raise ArtifactError(
                    f"{_unfit(teacher)}; block {origin}, {name or 'itself'}: {key} is {was}, in place {place} {now}"
                )


def _unfit(teacher: PreTrainedModel) -> str:
    return (
        f"architecture {teacher.config.model_type}: no student can be made of its layers; those of llama, gpt2, "
        "gpt_neox, mistral, qwen2, qwen3 can; otherwise set distill.depth or name a model directory"
    )
