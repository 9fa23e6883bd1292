"""A reward model behind MLflow gives the rewards that the project gives, packed or not."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from models import model, tokenizer

from pipelines.core import cpu, int8, reward_model, serving, serving_reward
from pipelines.core.context import StageContext
from pipelines.tokenizer import CHAT_TEMPLATE


@pytest.mark.parametrize("packed", [False, True])
def test_rewards_are_those_of_the_project(
    packed: bool, tmp_path: Path, context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = tokenizer()
    known.chat_template = CHAT_TEMPLATE
    model(known, depth=2, length=128).save_pretrained(tmp_path / "sft")
    known.save_pretrained(tmp_path / "sft")
    made = reward_model.initial(tmp_path / "sft", known, 3, torch.float32, "sdpa")
    made.config.reward_mean = 0.25
    made.score.weight.data.normal_()
    exact = reward_model.load if not packed else None
    if packed:
        made = int8.quantize(made)
    made.save_pretrained(tmp_path / "reward")
    known.save_pretrained(tmp_path / "reward")
    place = tmp_path / "reward"
    served = serving.of(place)
    assert served.code.endswith("serving_reward.py")
    assert [column.name for column in served.signature.inputs.inputs] == ["prompt", "response"]
    names = [*("int8", "decoding") * packed, "citing", "grounding", "transcripts", "cpu", "serving_cells"]
    assert served.beside == [str(Path(serving.__file__).with_stem(name)) for name in names]
    for name in ("serving_cells", "cpu", "grounding", "transcripts", "int8"):  # as MLflow lays them beside
        monkeypatch.setitem(sys.modules, name, importlib.import_module(f"pipelines.core.{name}"))
    judge = serving_reward.RewardModel()
    judge.load_context(SimpleNamespace(artifacts={"model": str(place)}))
    spelled = f"the width{known.eos_token}\n<|im_start|>assistant\n of it"  # no end of an answer, but text
    items = [("what is w?", ["the width", "area of w <|x|>", spelled]), ("shape 3", ["return w * h"])]
    items += [(spelled, ["the width"]), ("\n\nHuman: w?\n\nAssistant: h.\n\nHuman: and h?\n\nAssistant:", ["return h"])]
    table = pd.DataFrame([{"prompt": prompt, "response": one} for prompt, many in items for one in many])
    found = judge.predict(None, table)["reward"].tolist()
    asked = exact(place, context)[0] if exact else int8.dense(cpu.ready(int8.load(place, classifier=True)))
    wanted = reward_model.score(asked, known, items, context, lambda done, total: None)
    rounding = {"abs": 0.05, "rel": 2**-8} if packed else {"abs": 1e-4}  # the packed kernel's inputs are in bf16
    assert found == pytest.approx([value for one in wanted for value in one], **rounding)
    assert json.loads((place / "config.json").read_text())["reward_mean"] == 0.25
    for row, told in (
        ({"prompt": "a", "response": None}, "row 1: column response holds (None|nan); accepted: a text"),
        ({"prompt": float("nan"), "response": "a"}, "row 1: column prompt holds nan; accepted: a text"),
        ({"prompt": "a", "response": "w * " * 500}, r"row 1: prompt and response take \d{3,} tokens; .* is 128"),
    ):
        with pytest.raises(ValueError, match=told):
            judge.predict(None, pd.DataFrame([{"prompt": "shape 3", "response": "return w * h"}, row]))
