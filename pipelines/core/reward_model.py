"""A reward model: a classifier of transformers with one label that reads prompt and response up to the EOS.

Stored as a Hugging Face directory. Its configuration carries two constants, `reward_mean` and `reward_std`: what
human-written demonstrations score on average, and their spread. `score` takes the mean off, so that 0 is the level
of the demonstrations (InstructGPT, section 3.5); plain transformers does not.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipelines.core import artifacts, chats, fine_tuning, k_way, segments
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError
from pipelines.core.params.tuning import Method

PAPER_LR, PAPER_WIDTH = 9e-6, 4096  # InstructGPT, appendix C.2: its 6B model
HEAD = "score"  # what transformers' decoder-only classifiers call their head
ADAPTER = "adapter_model.safetensors"  # peft's name
Item = tuple[str, Sequence[str]]  # a prompt as stored by `data`, and responses to it


class Level(NamedTuple):
    """What human-written demonstrations score, before it is taken off."""

    mean: float
    deviation: float


def initial(place: Path, tokenizer: Any, seed: int, dtype: torch.dtype, kind: str) -> Any:
    """The SFT model with a new head in place of its output embedding.

    The head is normal with standard deviation 1 / sqrt(width + 1): Stiennon et al., "Learning to summarize from
    human feedback" (2020), appendix B.1.

    Raises:
        ArtifactError: transformers has no classifier of this architecture, or one that the weights do not fit.
    """
    model = _classifier(place, dtype, kind, new_head=True)
    head = getattr(model, HEAD)
    width = head.weight.shape[1]
    drawn = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) / (width + 1) ** 0.5
    with torch.no_grad():
        head.weight.copy_(drawn)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def learning_rate(width: int, method: Method) -> float:
    """Peak rate: the paper's at its width, in inverse proportion to the width; for adapters as in `fine_tuning`."""
    return PAPER_LR * PAPER_WIDTH / width * fine_tuning.rate_factor(method)


def load(place: Path, context: StageContext, kind: str = "sdpa") -> tuple[Any, Any]:
    """Reward model, ready to score, and its tokenizer, whose padding token is the model's: many classifiers name none.

    Raises:
        ArtifactError: the directory holds no reward model: no head of one label, or no constants.
    """
    from transformers import AutoTokenizer

    model = _classifier(place, context.dtype, kind, new_head=False)
    tokenizer = AutoTokenizer.from_pretrained(place)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(context.device).eval(), tokenizer


def rewards(model: Any, batch: k_way.Responses, context: StageContext) -> torch.Tensor:
    """What the head says at the end of each response: (N,) fp32, the constants not applied."""
    head = getattr(model.get_base_model() if hasattr(model, "get_base_model") else model, HEAD)
    hidden = segments.hidden_states(model, batch.rows, context)
    ends = hidden[batch.row.to(context.device), batch.column.to(context.device)]
    # In fp32 whatever the body's type: bf16 would put rewards of neighbouring responses on one and the same step.
    found: torch.Tensor = (ends.float() @ head.weight.float().t())[:, 0]
    return found


def score(
    model: Any, tokenizer: Any, items: Sequence[Item], context: StageContext, tell: k_way.Tell
) -> list[list[float]]:
    """Reward of each response of each item, less the mean of the demonstrations.

    Raises:
        ArtifactError: the model has no constants: it is not what stage `reward` saves.
    """
    encoded = [k_way.encode(tokenizer, chats.messages_of(prompt), responses) for prompt, responses in items]
    return score_sequences(model, encoded, context, tell)


def score_sequences(
    model: Any, sequences: Sequence[segments.Sequence], context: StageContext, tell: k_way.Tell
) -> list[list[float]]:
    """As `score`, of prompts and responses that are tokens already (`segments.of_completions`)."""
    mean = getattr(model.config, "reward_mean", None)
    if mean is None:
        raise ArtifactError(
            "the reward model's config.json has no reward_mean: it was not made by stage reward, or not to its end"
        )
    raw = raw_scores(model, sequences, context, tell)
    return [[value - mean for value in one] for one in raw]


def raw_scores(
    model: Any, sequences: Sequence[segments.Sequence], context: StageContext, tell: k_way.Tell
) -> list[list[float]]:
    """What transformers' own forward pass gives for each prompt and response."""

    def values(batch: k_way.Responses) -> torch.Tensor:
        return rewards(model, batch, context)

    return k_way.over_all(sequences, model.config.pad_token_id, tell, values)


def save(model: Any, tokenizer: Any, place: Path, dtype: torch.dtype) -> None:
    """A whole classifier in `dtype`, adapters merged, with its tokenizer."""
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    merged.to(dtype).save_pretrained(place)
    tokenizer.save_pretrained(place)


def save_adapter(model: Any, sft: Path, place: Path) -> None:
    """What LoRA trained on the SFT model in the directory `sft`, before it is merged: so that another model on the
    same backbone can take it up. peft's format, the head beside it, and the hash of the weights it belongs to.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    place.mkdir(parents=True)
    config = copy.deepcopy(model.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = "sluice-sft", True
    # By name and in one order, the head not among them: a causal language model has none that could be excluded.
    config.target_modules, config.exclude_modules = sorted(set(config.target_modules) - {HEAD}), None
    config.save_pretrained(place)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    whole = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(whole, place / ADAPTER, metadata={"format": "pt"})
    head = getattr(model.get_base_model(), HEAD).weight.detach().float().cpu()
    save_file({f"{HEAD}.weight": head.clone()}, place / "head.safetensors")
    artifacts.write_json(place / "base.json", _weights(sft))


def load_adapter(model: Any, place: Path, sft: Path, name: str) -> torch.Tensor:
    """Give a causal language model on the SFT backbone the adapter that `save_adapter` wrote, under a name.

    Returns the head's weight, (1, width) fp32.

    Raises:
        ArtifactError: the adapter was trained on another SFT model, or does not fit this one.
    """
    from peft import PeftConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    if json.loads((place / "base.json").read_text(encoding="utf-8")) != _weights(sft):
        raise ArtifactError(
            f"{place}: the reward model was trained on another SFT model than {sft}. Make it again: dvc repro reward"
        )
    model.add_adapter(name, PeftConfig.from_pretrained(place))
    state = load_file(place / ADAPTER)
    told = set_peft_model_state_dict(model, state, adapter_name=name)
    absent = [key for key in told.missing_keys if f".{name}." in key and "lora_" in key]
    strange = list(told.unexpected_keys) + absent
    if strange:
        raise ArtifactError(f"{place}: the adapter does not fit {sft}: {len(strange)} weights, e.g. {strange[0]}")
    head: torch.Tensor = load_file(place / "head.safetensors")[f"{HEAD}.weight"]
    return head


def _weights(place: Path) -> dict[str, str]:
    """Content hash of each file of a model's weights."""
    return {file.name: artifacts.content_hash(file) for file in sorted(place.glob("*.safetensors"))}


def level(model: Any, demonstrations: Sequence[segments.Sequence], context: StageContext, tell: k_way.Tell) -> Level:
    """Mean and standard deviation of the demonstrations' raw scores."""
    found = torch.tensor(raw_scores(model, demonstrations, context, tell), dtype=torch.float64)
    return Level(float(found.mean()), float(found.std(correction=0)))


def save_constants(place: Path, model: Any, found: Level) -> None:
    """Put the level into a saved model's configuration, and into that of the same model in memory."""
    file = place / "config.json"
    constants = {"reward_mean": found.mean, "reward_std": found.deviation}
    config = json.loads(file.read_text(encoding="utf-8")) | constants
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    model.config.reward_mean, model.config.reward_std = found


def _classifier(place: Path, dtype: torch.dtype, kind: str, new_head: bool) -> Any:
    from transformers import AutoModelForSequenceClassification

    quiet: dict[str, Any] = {"num_labels": 1, "dtype": dtype, "attn_implementation": kind}
    try:
        model, told = AutoModelForSequenceClassification.from_pretrained(place, output_loading_info=True, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{place.name}: no reward model can be made of it: {error}") from None
    if getattr(model.config, "quantization_config", None) is not None:  # whose codes were read as weights
        raise ArtifactError(f"{place}: the reward model is quantized; name the one it was made from")
    head = getattr(model, HEAD, None)
    if head is None or tuple(head.weight.shape[:1]) != (1,) or getattr(head, "bias", None) is not None:
        raise ArtifactError(
            f"architecture {model.config.model_type}: its classifier in transformers has no plain head {HEAD!r}; "
            "a decoder-only one is needed, for example llama, gpt2, qwen3, mistral"
        )
    missing = set(told["missing_keys"]) - ({f"{HEAD}.weight"} if new_head else set())
    if missing:
        raise ArtifactError(
            f"{place.name}: {len(missing)} weights of a {type(model).__name__} are not in it, e.g. {min(missing)}: "
            "they would be random"
        )
    return model
