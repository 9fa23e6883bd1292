"""The adapter that stage `reward` saves: peft's own format, and only for the model that it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import LORA, model, prepared, tokenizer

from pipelines.core import actors, artifacts, k_way, reward_model, segments
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError
from pipelines.core.params.tuning import Tuning

ARCHITECTURES = ("llama", "gpt2")
MEAN = 0.25  # what demonstrations score


@pytest.fixture(scope="module")
def known() -> Any:
    return tokenizer()


def store(known: Any, root: Path, architecture: str, adapters: Tuning = LORA) -> Path:
    """An SFT model in `sft`, and in `reward` what stage `reward` would make of it."""
    sft = model(known, architecture, length=128)
    with torch.no_grad():  # logits of a size at which a temperature matters
        sft.get_output_embeddings().weight.mul_(2.0)
    sft.save_pretrained(root / "sft")
    torch.manual_seed(5)
    judge = prepared(reward_model.initial(root / "sft", known, 3, torch.float32, "sdpa"), adapters, reward_model.HEAD)
    disturb(judge.named_parameters(), "lora_B")
    reward_model.save_adapter(judge, root / "sft", root / "reward/adapter")
    reward_model.save(judge, known, root / "reward/model", torch.float32)
    reward_model.save_constants(root / "reward/model", judge, reward_model.Level(MEAN, 1.0))
    return root


def disturb(named: Any, part: str = "", scale: float = 0.05) -> None:
    """As if something had been learned."""
    with torch.no_grad():
        for name, value in named:
            if part in name:
                value.add_(torch.randn(value.shape) * scale)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_adapter_is_pefts_own_format(known: Any, tmp_path: Path, architecture: str) -> None:
    """peft itself loads it onto the SFT model as a classifier; with the head beside it that is the merged model."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    root = store(known, tmp_path, architecture)
    plain = reward_model.initial(root / "sft", known, 99, torch.float32, "sdpa")
    loaded = PeftModel.from_pretrained(plain, str(root / "reward/adapter")).eval()
    head = load_file(root / "reward/adapter/head.safetensors")
    assert head["score.weight"].dtype == torch.float32 and list(head) == ["score.weight"]
    loaded.get_base_model().load_state_dict(head, strict=False)
    merged = AutoModelForSequenceClassification.from_pretrained(root / "reward/model").eval()
    with torch.no_grad():
        for ids in (torch.tensor([[11, 12, 13, 40, 41, 1]]), torch.tensor([[21, 22, 50]])):
            torch.testing.assert_close(loaded(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
    config = json.loads((root / "reward/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "sluice-sft" and config["r"] == 4 and config["inference_mode"]
    assert config["target_modules"] == sorted(config["target_modules"]), "an order that is the same in every process"
    weights = artifacts.content_hash(root / "sft/model.safetensors")
    assert json.loads((root / "reward/adapter/base.json").read_text()) == {"model.safetensors": weights}


def test_variants_go_onto_the_policys_backbone(known: Any, context: StageContext, tmp_path: Path) -> None:
    """A DoRA reward model becomes reward and value, beside a policy that is rank-stabilised on two layers."""
    dora = Tuning.model_validate({"method": "lora", "lora_rank": 4, "tuning": {"lora_variant": "dora"}})
    root = store(known, tmp_path, "llama", dora)
    dials = {"lora_variant": "rslora", "lora_targets": ["q_proj", "v_proj"]}
    own = Tuning.model_validate({"method": "lora", "lora_rank": 2, "tuning": dials})
    roles = actors.shared(root / "sft", root / "reward", own, 64, 1, context)
    prompt, said = [11, 12, 13], [[40, 41, 1], [50, 1]]
    batch = k_way.of_bins([segments.of_completions(prompt, said)], [[0]], pad=0)
    merged, _ = reward_model.load(root / "reward/model", context)
    with torch.no_grad():
        expected = reward_model.rewards(merged, batch, context) - MEAN
        found = roles.rewards(batch, roles.hidden(("reward",), batch.rows, context)[0])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    names = set(roles.trained_state())
    assert {name.split(".")[-4] for name in names if ".policy" in name} == {"q_proj", "v_proj"}
    assert sum("lora_magnitude_vector.value" in name for name in names) == 2 * 7, "DoRA's lengths are learned too"
    assert roles.report().parameters == sum(value.numel() for value in roles.trained_state().values())
    disturb(roles._named["policy"].items())
    with torch.no_grad():
        (states,) = roles.hidden(("policy",), batch.rows, context)
        wanted = roles.log_probabilities("policy", batch, states, 1.0).log_probabilities
        roles.save(tmp_path / "policy", known, context)
        plain = actors.separate(tmp_path / "policy", None, 64, 1, context)
        (states,) = plain.hidden(("policy",), batch.rows, context)
        ours = plain.log_probabilities("policy", batch, states, 1.0).log_probabilities
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)


def test_an_adapter_that_does_not_belong_is_refused(known: Any, context: StageContext, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    root = store(known, tmp_path / "own", "llama")
    other = model(known, length=128)
    disturb(other.named_parameters())
    other.save_pretrained(tmp_path / "sft")
    with pytest.raises(
        ArtifactError, match=r"trained on another SFT model than .*/sft\. Make it again: dvc repro reward"
    ):
        actors.shared(tmp_path / "sft", root / "reward", LORA, 64, 1, context)
    file = root / "reward/adapter" / reward_model.ADAPTER
    kept = load_file(file)
    name = next(iter(kept))
    save_file({key: value for key, value in kept.items() if key != name}, file)
    with pytest.raises(ArtifactError, match=r"the adapter does not fit .*: 1 weights, e\.g\. .*reward"):
        actors.shared(root / "sft", root / "reward", LORA, 64, 1, context)
    save_file(kept | {name.replace("layers.0", "layers.9"): kept[name].clone()}, file)
    with pytest.raises(ArtifactError, match=r"does not fit .*: 1 weights, e\.g\. .*layers\.9"):
        actors.shared(root / "sft", root / "reward", LORA, 64, 1, context)
    save_file(kept, file)
    config = json.loads((root / "reward/model/config.json").read_text())
    (root / "reward/model/config.json").write_text(json.dumps({**config, "reward_mean": None}))
    with pytest.raises(ArtifactError, match="has no reward_mean"):
        actors.shared(root / "sft", root / "reward", LORA, 64, 1, context)
