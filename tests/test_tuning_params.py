"""Keys `method`, `lora_rank` and `tuning`: what each stage and method accepts, and how the rest is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.core.errors import ParamsError
from pipelines.core.params import whole
from pipelines.core.params.tuning import Tuning

ROOT = Path(__file__).parents[1]
STAGES = ("pretrain", "sft", "reward", "ppo", "dpo", "transfer")


def load(place: Path, stage: str, **changes: Any) -> Tuning:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw[stage] |= changes
    (place / "params.yaml").write_text(yaml.safe_dump(raw))
    found: Tuning = getattr(whole.load(place / "params.yaml"), stage)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_left_out_or_empty_means_the_same(stage: str, tmp_path: Path) -> None:
    known = load(tmp_path, stage)
    assert known == load(tmp_path, stage, tuning=dict.fromkeys(("lora_alpha", "layers", "unfreeze", "optimizer")))
    assert all(value is None for _, value in known.tuning) and known.lora_alpha == 2 * known.lora_rank
    assert load(tmp_path, stage, method="lora", tuning={"lora_alpha": 5}).lora_alpha == 5


@pytest.mark.parametrize(
    ("stage", "method", "accepted"),
    [
        ("pretrain", "head", "'full', 'last_n', 'lora' or 'qlora'"),
        ("sft", "head", "'full', 'last_n', 'lora' or 'qlora'"),
        ("reward", "qlora", "'full', 'last_n', 'head' or 'lora'"),
        ("dpo", "qlora", "'full', 'last_n' or 'lora'"),
        ("ppo", "last_n", "'full' or 'lora'"),
    ],
)
def test_methods_a_stage_does_not_have(stage: str, method: str, accepted: str, tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=rf"{stage}\.method: Input should be {accepted} \(found '{method}'\)"):
        load(tmp_path, stage, method=method)


@pytest.mark.parametrize(
    ("stage", "method", "dials", "told"),
    [
        ("sft", "full", {"lora_targets": ["q_proj"]}, "tuning.lora_targets: method full does not use it, method lora"),
        ("sft", "last_n", {"lora_alpha": 8}, "tuning.lora_alpha: method last_n does not use it, method lora, qlora"),
        ("sft", "lora", {"layers": 2}, "tuning.layers: method lora does not use it, method last_n does"),
        ("sft", "full", {"layers": 2}, "tuning.layers: method full does not use it, method last_n does"),
        ("reward", "head", {"unfreeze": True}, "tuning.unfreeze: method head does not use it, method full, last_n"),
        ("pretrain", "qlora", {"layer_decay": 0.9}, "tuning.layer_decay: method qlora does not use it"),
        ("pretrain", "qlora", {"lora_init": "pissa"}, "accepted: default, gaussian; or method: lora"),
        ("sft", "qlora", {"lora_init": "orthogonal"}, "accepted: default, gaussian; or method: lora"),
        ("reward", "lora", {"lora_init": "olora"}, "stage ppo puts the adapter on the SFT model as it is"),
        ("ppo", "lora", {"lora_init": "pissa"}, "the reference is the same backbone without adapters"),
        ("ppo", "lora", {"lora_init": "orthogonal"}, "accepted: default, gaussian"),
        ("ppo", "lora", {"lora_dropout": 0.1}, "ppo never drops anything"),
        ("ppo", "full", {"layer_decay": 0.9}, "ppo trains each model at one rate; leave it out (found 0.9)"),
        ("ppo", "full", {"unfreeze": True}, "ppo trains policy and value from the first iteration"),
        ("ppo", "lora", {"optimizer": "adamw8bit"}, "accepted: adamw (found 'adamw8bit')"),
        ("dpo", "lora", {"lora_dropout": 0.1}, "dpo never drops anything"),
        ("sft", "last_n", {"layers": 1, "unfreeze": True}, "accepted: layers of 2 or more"),
        (
            "transfer",
            "head",
            {"layer_decay": 0.9},
            "tuning.layer_decay: method head does not use it",
        ),
        ("transfer", "last_n", {"layers": 16}, "tuning.layers (16) must be at most transferred_layers (15)"),
        ("sft", "lora", {"lora_init": "eva"}, "sft.tuning.lora_init: Input should be 'default', 'gaussian'"),
        ("sft", "lora", {"lora_targets": []}, "sft.tuning.lora_targets"),
        ("sft", "lora", {"lora_rnk": 2}, "sft.tuning.lora_rnk: no such key; accepted here: layer_decay, layers"),
    ],
)
def test_dials_that_are_refused(stage: str, method: str, dials: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ParamsError) as error:
        load(tmp_path, stage, method=method, tuning=dials)
    assert told in str(error.value) and str(error.value).startswith(f"params.yaml: {stage}")


def test_an_odd_rank_has_no_orthogonal_start(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="even lora_rank \\(found 3\\)"):
        load(tmp_path, "sft", lora_rank=3, tuning={"lora_init": "orthogonal"})


@pytest.mark.parametrize("method", ["last_n", "lora", "qlora"])
def test_random_weights_are_trained_in_full(method: str, tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=f"method: {method} needs a base model"):
        load(tmp_path, "pretrain", base=None, method=method)


@pytest.mark.parametrize(
    ("method", "dials", "words"),
    [
        ("full", {}, "all weights"),
        ("head", {}, "the head alone"),
        ("last_n", {"layers": 3}, "the top 3 block(s) and the final norm"),
        ("lora", {}, "LoRA of rank 4 on every linear layer, merged"),
        ("lora", {"lora_variant": "dora", "lora_init": "pissa"}, "DoRA of rank 4 begun by pissa on every linear layer"),
        ("lora", {"lora_targets": ("q", "v")}, "LoRA of rank 4 on q, v, merged"),
        ("qlora", {}, "LoRA of rank 4 over the base in 4 bits, merged into the base as it was before"),
        ("qlora", {"lora_targets": ("q",)}, "LoRA of rank 4 on q over the base in 4 bits, merged into the base as it"),
    ],
)
def test_what_a_card_says(method: str, dials: dict[str, Any], words: str) -> None:
    assert Tuning.model_validate({"method": method, "lora_rank": 4, "tuning": dials}).words().startswith(words)
