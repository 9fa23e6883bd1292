"""GPT-1's zero-shot heuristics against transformers' own forward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toy_tasks
from models import model, tokenizer
from pydantic import ValidationError

from pipelines.core import attention, packing, snapshots, task_zero_shot, zero_shot
from pipelines.core.context import StageContext, Stopped
from pipelines.core.errors import ParamsError
from pipelines.core.params.transfer import Heuristic
from pipelines.core.task_inputs import Example, Task


@pytest.fixture(scope="module")
def known() -> Any:
    return tokenizer()


def tokens(known: Any, text: str) -> list[int]:
    return list(known(text, add_special_tokens=False)["input_ids"])


def mean_log_probability(lm: Any, known: Any, prompt: str, response: str, most: int = 10**9) -> float:
    """`most`: of the prompt's tokens the last ones that are read."""
    before, after = [packing.separator_id(known), *tokens(known, prompt)[-most:]], tokens(known, response)
    with torch.no_grad():
        logits = lm(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1].float()
    return float(torch.log_softmax(logits, dim=1)[range(len(after)), after].mean())


def example(number: int, *parts: str, choices: tuple[str, ...] = ()) -> Example:
    return Example(str(number), str(number), (), 0.0, parts, choices)


def task(kind: Any, labels: tuple[str, ...], test: list[Example], regression: bool = False) -> Task:
    return Task("t", kind, labels, regression, [], [], test, [], 0, ("text",))


@pytest.fixture(scope="module")
def lm(known: Any) -> Any:
    attention.choose("cpu", 1)
    return model(known).eval()


def test_the_likeliest_candidate(known: Any, lm: Any, context: StageContext) -> None:
    tests = [example(n, f"def area_{n}", choices=("return w", f"shape {n} of w", "h")[: 2 + n % 2]) for n in range(6)]
    found = zero_shot.predict(lm, known, task("choice", (), tests), context, lambda done, total: None)
    for one, said in zip(tests, found, strict=True):
        scores = [mean_log_probability(lm, known, one.parts[0] + "\n", choice) for choice in one.choices]
        assert said == scores.index(max(scores))


def test_the_likeliest_name_less_what_it_is_anyway(known: Any, lm: Any, context: StageContext) -> None:
    labels = ("yes", "no", "area")
    tests = [example(n, f"return w * {n}", f"shape {n * 3}") for n in range(6)]
    asked = task("entailment", labels, tests)
    found = zero_shot.predict(lm, known, asked, context, lambda done, total: None)
    usual = [mean_log_probability(lm, known, zero_shot.CUE, f" {label}") for label in labels]
    for one, said in zip(tests, found, strict=True):
        prompt = "\n".join(one.parts) + zero_shot.CUE
        scores = [mean_log_probability(lm, known, prompt, f" {x}") - u for x, u in zip(labels, usual, strict=True)]
        assert said == scores.index(max(scores))


def test_a_score_is_no_text(known: Any, context: StageContext) -> None:
    with pytest.raises(ValueError, match="a score is no text"):
        zero_shot.predict(None, known, task("similarity", (), [], regression=True), context, lambda d, t: None)


def test_the_likelier_word_after_the_cue(known: Any, lm: Any, context: StageContext) -> None:
    tests = [example(n, f"return area of w {n} shape"[n:]) for n in range(6)]
    asked = task("classification", ("bad", "good"), tests)
    for cue, used in ((None, " very"), (" so", " so")):
        heuristic = Heuristic(task="t", kind="words", cue=cue, words=("shape", "return"))
        found = zero_shot.predict(lm, known, asked, context, lambda d, t: None, heuristic)
        for one, said in zip(tests, found, strict=True):
            scores = [mean_log_probability(lm, known, one.parts[0] + used, f" {x}") for x in ("shape", "return")]
            assert said == scores.index(max(scores))


def test_threshold_by_hand() -> None:
    train, labels = [-1.0, -2.0, -3.0, -4.0, -5.0], [1, 1, 0, 1, 0]
    # Cuts -2.5 and -4.5 are right four times of five; the lower one is taken.
    assert zero_shot.thresholded(train, labels, [-4.4, -4.6, -2.0]) == [1.0, 0.0, 1.0]
    assert zero_shot.thresholded(train, [1 - label for label in labels], [-4.4, -4.6]) == [0.0, 1.0]


def test_acceptability_is_a_threshold_on_likelihood(known: Any, lm: Any, context: StageContext) -> None:
    texts = [f"return area of {n}" if n % 2 else f"h {n} w w {n * 7} shape" for n in range(8)]
    train = [example(n, text)._replace(label=float(n % 2)) for n, text in enumerate(texts)]
    tests = [example(n, text) for n, text in enumerate(["return shape of 9", "w w 8 h"])]
    asked = task("classification", ("bad", "good"), tests)._replace(train=train)
    heuristic = Heuristic(task="t", kind="acceptability")
    found = zero_shot.predict(lm, known, asked, context, lambda d, t: None, heuristic)
    scores = [[mean_log_probability(lm, known, "", text.parts[0]) for text in side] for side in (train, tests)]
    assert found == zero_shot.thresholded(scores[0], [n % 2 for n in range(8)], scores[1])


@pytest.mark.parametrize(
    ("kind", "labels", "heuristic", "told"),
    [
        ("entailment", ("a", "b"), {"kind": "acceptability"}, "accepted: classifications"),
        ("classification", ("a", "b", "c"), {"kind": "acceptability"}, "3 labels; accepted: two"),
        (
            "classification",
            ("a", "b"),
            {"kind": "words", "words": ("x",)},
            "1 words; accepted: 2, one for each",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused(kind: str, labels: Any, heuristic: dict[str, Any], told: str) -> None:
    with pytest.raises(ParamsError, match=told):
        zero_shot.check(task(kind, labels, []), Heuristic(task="t", **heuristic))


def test_heuristics_that_nothing_would_use_are_refused() -> None:
    one = {"task": "t", "kind": "acceptability"}
    assert toy_tasks.params(ablations=("zero_shot",), heuristics=(one,)).heuristics[0].kind == "acceptability"
    with pytest.raises(ValidationError, match="heuristics: only ablation zero_shot uses them"):
        toy_tasks.params(heuristics=(one,))
    with pytest.raises(ValidationError, match=r"one for each task at most \(found two for t\)"):
        toy_tasks.params(ablations=("zero_shot",), heuristics=(one, one | {"kind": "words", "words": ("a", "b")}))


def test_relative_score_by_hand() -> None:
    tests = [example(n, "x")._replace(label=float(n % 2), group=str(n)) for n in range(4)]
    asked = task("classification", ("bad", "good"), tests)
    answered: dict[int, dict[str, list[float]]] = {0: {"t": [0, 0, 0, 0]}, 7: {"t": [0, 1, 0, 0]}}
    rows = task_zero_shot.curve([asked], answered, [{"score": 1.0, "majority": 0.5}])
    assert [(row["step"], row["score"], row["relative"]) for row in rows] == [(0, 0.5, 0.0), (7, 0.75, 0.5)]
    assert all(row["low"] <= row["score"] <= row["high"] for row in rows)
    none = task_zero_shot.curve([asked], {7: {"t": [0, 1, 0, 1]}}, [{"score": 0.4, "majority": 0.5}])
    assert [row["relative"] for row in none] == [None]


def test_what_is_longer_than_the_context_is_cut_and_told(known: Any, context: StageContext) -> None:
    """The context is 64 tokens, and positions of gpt2 are learned: there is none beyond."""
    lm, long, choices = model(known, "gpt2").eval(), "shape of w\n" * 40, ("return w", "h")
    asked = task("choice", (), [example(0, long, choices=choices)])
    (found,) = zero_shot.predict(lm, known, asked, context, lambda d, t: None)
    left = 64 - 1 - max(len(tokens(known, one)) for one in choices)
    scores = [mean_log_probability(lm, known, long + "\n", one, left) for one in choices]
    assert found == scores.index(max(scores))
    assert context.samples[-1] == "warning: zero-shot: 1 of 1 texts of t were cut to the model's context of 64 tokens"

    lm.config.sliding_window = 40
    zero_shot.predict(lm, known, asked, context, lambda d, t: None)
    assert context.samples[-1].endswith("cut to the model's context of 40 tokens")
    lm.config.sliding_window = None

    train = [example(n, ["w", long][n])._replace(label=float(n)) for n in range(2)]
    judged = task("classification", ("bad", "good"), [example(0, long)])._replace(train=train)
    heuristic = Heuristic(task="t", kind="acceptability")
    zero_shot.predict(lm, known, judged, context, lambda d, t: None, heuristic)
    assert "1 of 2 texts" in context.samples[-2] and "1 of 1 texts" in context.samples[-1]


def test_each_snapshot_is_asked_once_and_not_again(
    known: Any, lm: Any, tmp_path: Path, context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm.save_pretrained(tmp_path / "pretrain/model")
    (tmp_path / "pretrain/history.csv").write_text("step,loss\n1,2.0\n9,1.0\n")
    other = model(known).eval()
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(1.5)
    loads: list[int] = []

    def load(place: Path, step: int, _: StageContext) -> Any:
        loads.append(step)
        return {0: lm, 4: other}[step]

    monkeypatch.setattr(snapshots, "steps", lambda place: [0, 4])
    monkeypatch.setattr(snapshots, "load", load)
    pick = [example(n, f"def area_{n}", choices=("return w", f"shape {n}", "h")) for n in range(6)]
    tasks = [task("choice", (), pick)._replace(name=name) for name in ("one", "two")]

    def stop() -> None:
        if loads == [0, 4]:  # while the second snapshot is asked
            raise Stopped(15)

    with monkeypatch.context() as patch:
        patch.setattr(context, "stop_if_asked", stop)
        with pytest.raises(Stopped):
            task_zero_shot.along(tmp_path / "pretrain", known, tasks, (), context)
    found = task_zero_shot.along(tmp_path / "pretrain", known, tasks, (), context)
    assert loads == [0, 4, 4] and list(found) == [0, 4, 9]
    said = [zero_shot.predict(one, known, tasks[0], context, lambda d, t: None) for one in (lm, other)]
    assert found[0] == found[9] == {"one": said[0], "two": said[0]} and found[4] == {"one": said[1], "two": said[1]}
    assert task_zero_shot.along(tmp_path / "pretrain", known, tasks, (), context) == found and loads == [0, 4, 4]
