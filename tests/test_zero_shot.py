"""GPT-1's zero-shot heuristics against transformers' own forward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import model, tokenizer

from pipelines.core import packing, zero_shot
from pipelines.core.context import StageContext
from pipelines.core.task_inputs import Example, Task


@pytest.fixture(scope="module")
def known() -> Any:
    return tokenizer()


def mean_log_probability(lm: Any, known: Any, prompt: str, response: str) -> float:
    before = [packing.separator_id(known), *known(prompt, add_special_tokens=False)["input_ids"]]
    after = known(response, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = lm(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1].float()
    return float(torch.log_softmax(logits, dim=1)[range(len(after)), after].mean())


def example(number: int, *parts: str, choices: tuple[str, ...] = ()) -> Example:
    return Example(str(number), str(number), (), 0.0, parts, choices)


def task(kind: Any, labels: tuple[str, ...], test: list[Example], regression: bool = False) -> Task:
    return Task("t", kind, labels, regression, [], [], test, [], 0, ("text",))


def saved(known: Any, place: Path) -> tuple[Path, Any]:
    lm = model(known)
    lm.save_pretrained(place)
    return place, lm


def test_the_likeliest_candidate(known: Any, tmp_path: Path, context: StageContext) -> None:
    place, lm = saved(known, tmp_path / "m")
    tests = [example(n, f"def area_{n}", choices=("return w", f"shape {n} of w", "h")[: 2 + n % 2]) for n in range(6)]
    found = zero_shot.predict(place, known, task("choice", (), tests), context, lambda done, total: None)
    for one, said in zip(tests, found, strict=True):
        scores = [mean_log_probability(lm, known, one.parts[0] + "\n", choice) for choice in one.choices]
        assert said == scores.index(max(scores))


def test_the_likeliest_name_less_what_it_is_anyway(known: Any, tmp_path: Path, context: StageContext) -> None:
    place, lm = saved(known, tmp_path / "m")
    labels = ("yes", "no", "area")
    tests = [example(n, f"return w * {n}", f"shape {n * 3}") for n in range(6)]
    asked = task("entailment", labels, tests)
    found = zero_shot.predict(place, known, asked, context, lambda done, total: None)
    usual = [mean_log_probability(lm, known, zero_shot.CUE, f" {label}") for label in labels]
    for one, said in zip(tests, found, strict=True):
        prompt = "\n".join(one.parts) + zero_shot.CUE
        scores = [mean_log_probability(lm, known, prompt, f" {x}") - u for x, u in zip(labels, usual, strict=True)]
        assert said == scores.index(max(scores))


def test_a_score_is_no_text(known: Any, tmp_path: Path, context: StageContext) -> None:
    with pytest.raises(ValueError, match="a score is no text"):
        zero_shot.predict(tmp_path, known, task("similarity", (), [], regression=True), context, lambda d, t: None)
