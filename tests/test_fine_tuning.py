"""What of a model is trained, and how fast; residual dropout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import LORA, model, tokenizer
from transformers import GenerationConfig

from pipelines.core import fine_tuning, generate, language_models, training
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError
from pipelines.core.params.tuning import Tuning


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "gpt_neox"])
def test_residual_dropout(architecture: str) -> None:
    lm = model(tokenizer(), architecture)
    ids = torch.arange(1, 40)[None]
    before = lm(input_ids=ids).logits
    fine_tuning.residual_dropout(lm, 0.3)
    assert sum(len(part._forward_hooks) for part in lm.modules()) == 2 * 2, "attention and feed-forward of each block"
    assert torch.equal(lm(input_ids=ids).logits, before), "none where nothing is trained"
    assert not torch.allclose(lm.train()(input_ids=ids).logits, before)


def test_residual_dropout_of_unknown_blocks_is_refused() -> None:
    with pytest.raises(ArtifactError, match="Set sft.dropout: 0"):
        fine_tuning.residual_dropout(model(tokenizer(), "opt"), 0.1)


def test_learning_rate_from_the_width() -> None:
    assert fine_tuning.learning_rate(2048, "full") == 9.65e-6
    assert fine_tuning.learning_rate(1024, "lora") == pytest.approx(2 * 9.65e-5)


def test_adapters_begin_as_the_base(context: StageContext, tmp_path: Path) -> None:
    model(tokenizer()).save_pretrained(tmp_path)
    base = fine_tuning.load(tmp_path, Tuning(method="full", lora_rank=4), 128, context)
    adapted = fine_tuning.load(tmp_path, LORA, 128, context)
    ids = torch.arange(1, 40)[None]
    assert torch.equal(base(input_ids=ids).logits, adapted(input_ids=ids).logits)
    assert set(training.trained_state(adapted)).isdisjoint(training.trained_state(base))


@pytest.mark.parametrize("of_base", [None, 7, [7, 9]])
def test_what_is_saved_ends_with_the_tokenizers_eos(
    of_base: int | list[int] | None, context: StageContext, tmp_path: Path
) -> None:
    """A base's own generation config may name another token, and what is served would talk on after each answer."""
    known, lm = tokenizer(), model(tokenizer())
    whole = Tuning(method="full", lora_rank=4)
    fine_tuning.save(lm, tmp_path, whole, known, tmp_path / "same", context)
    assert GenerationConfig.from_pretrained(tmp_path / "same").eos_token_id == known.eos_token_id
    lm.config.eos_token_id = lm.generation_config.eos_token_id = of_base
    lm.generation_config.repetition_penalty = 1.3
    fine_tuning.save(lm, tmp_path, whole, known, tmp_path / "other", context)
    others = [7, 9] if of_base == [7, 9] else [7] if of_base else []
    assert generate.endings(language_models.load(str(tmp_path / "other"), torch.float32, "sdpa"), known) == {
        known.eos_token_id, *others
    }  # fmt: skip
    assert GenerationConfig.from_pretrained(tmp_path / "other").repetition_penalty == 1.3


def test_a_published_generation_config_that_contradicts_itself_is_kept(context: StageContext, tmp_path: Path) -> None:
    """A temperature without `do_sample`: transformers saves it as it was read, but not once its EOS is another."""
    known, whole = tokenizer(), Tuning(method="full", lora_rank=4)
    model(known).save_pretrained(tmp_path / "base")
    published = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 7}
    (tmp_path / "base/generation_config.json").write_text(json.dumps(published))
    lm = language_models.load(str(tmp_path / "base"), torch.float32, "sdpa")
    fine_tuning.save(lm, tmp_path / "base", whole, known, tmp_path / "out", context)
    saved = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert saved["eos_token_id"] == [known.eos_token_id, 7] and (saved["temperature"], saved["top_p"]) == (0.6, 0.9)
