"""What a policy is worth: plain forward passes, numbers worked by hand, and a policy that is the SFT model itself."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from models import TEXTS, model, tokenizer

from pipelines.core import alignment_tax, language_models, policy_answers, policy_card, policy_evaluation
from pipelines.core.completions import Prompt
from pipelines.core.context import StageContext
from pipelines.core.errors import DataError
from pipelines.core.params.dpo import DpoParams
from pipelines.core.policy_answers import Answers, Said
from pipelines.core.policy_evaluation import Compared, Golds
from pipelines.tokenizer import CHAT_TEMPLATE

PARAMS = DpoParams(
    seed=5, method="full", lora_rank=4, rankings=None, epochs=1, batch_prompts=2, micro_tokens=128, max_length=64,
    too_long="refuse", beta=0.1, lr=None, warmup_share=0.0, weight_decay=0.0, clip_norm=1.0, judge="overlap",
    eval_rankings=None, eval_prompts=5, eval_samples=4, eval_bytes=1024, max_new_tokens=7, max_prompt_tokens=64,
    checkpoint_steps=1, checkpoint_seconds=1.0, samples=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sft/model`, `twin` (the same), `policy` (the same with noise on its weights), and `data`."""
    root, known = tmp_path_factory.mktemp("models"), tokenizer()
    known.chat_template = CHAT_TEMPLATE
    made = model(known, depth=2, length=128)
    made.save_pretrained(root / "sft/model")
    with torch.no_grad():
        for number, value in enumerate(made.parameters()):
            value += 0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
    made.save_pretrained(root / "policy")
    for folder in ("sft/model", "policy"):
        known.save_pretrained(root / folder)
    shutil.copytree(root / "sft/model", root / "twin")
    rows = [
        {"id": f"p{n}", "group": f"g{n // 2}", "prompt": f"area {n} of w?", "reference": f"w * {n}" if n % 3 else None}
        for n in range(9)
    ]
    write(root / "data/prompts/test.parquet", rows)
    texts = [{"id": f"c{n}", "group": f"c{n // 4}", "text": text} for n, text in enumerate(TEXTS)]
    write(root / "data/corpus/test.parquet", texts)
    return root


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def length(prompts: list[str], responses: list[str]) -> list[float]:
    """A proxy that anybody can check."""
    assert len(prompts) == len(responses) and all(prompt.startswith("area") for prompt in prompts)
    return [float(len(response)) for response in responses]


def prompts_of(place: Path, params: DpoParams = PARAMS) -> list[Prompt]:
    tokens = language_models.load_tokenizer(str(place / "policy"))
    return policy_answers.held_out(params, place / "data", tokens, StageContext("dpo", place, "f" * 64))


def evaluated(place: Path, policy: str, out: Path, context: StageContext) -> tuple[Compared, dict[str, float]]:
    out.mkdir()
    asked = (prompts_of(place), place / policy, place / "sft/model", length, out, context)
    return policy_evaluation.evaluate(PARAMS, *asked)


# --- on models -----------------------------------------------------------------------------------------------


def test_kl_is_that_of_plain_forward_passes(place: Path, tmp_path: Path, context: StageContext) -> None:
    found, metrics = evaluated(place, "policy", tmp_path / "out", context)
    models = [language_models.load(str(place / name), torch.float32, "sdpa").eval() for name in ("policy", "sft/model")]
    expected = []
    for prompt, answers in zip(found.prompts, found.policy.sampled.ids, strict=True):
        assert len(answers) == 4
        for ids in answers:
            sums = []
            for one in models:
                with torch.no_grad():
                    logits = one(input_ids=torch.tensor([prompt.ids + ids])).logits[0, len(prompt.ids) - 1 : -1]
                sums.append(float(torch.log_softmax(logits, dim=1)[range(len(ids)), ids].sum()))
            expected.append(sums[0] - sums[1])
    assert metrics["kl"] == pytest.approx(np.mean(expected), abs=1e-4) and metrics["kl"] > 0.01
    rows = pd.read_parquet(tmp_path / "out/evaluation.parquet")
    assert rows["kl"].tolist() == pytest.approx(np.array(expected).reshape(-1, 4).mean(axis=1), abs=1e-4)
    assert rows["tokens"].tolist() == [np.mean([len(ids) for ids in one]) for one in found.policy.sampled.ids]
    lengths = [np.mean([len(text) for text in texts]) for texts in found.sft.sampled.texts]
    assert rows["proxy_sft"].tolist() == pytest.approx(lengths)
    assert metrics["eos_share"] == rows["ended"].mean() == np.mean(found.policy.sampled.ended)


def test_a_policy_that_is_the_sft_model_is_worth_as_much(place: Path, tmp_path: Path, context: StageContext) -> None:
    """Same random numbers, so the same answers; and of all pairs each side wins half."""
    found, metrics = evaluated(place, "twin", tmp_path / "out", context)
    assert found.policy == found.sft
    assert metrics["gold_win_rate"] == metrics["gold_win_rate_low"] == metrics["gold_win_rate_high"] == 0.5
    assert metrics["gold_gain"] == metrics["gold_gain_low"] == metrics["gold_gain_high"] == 0.0
    assert metrics["gold"] == metrics["gold_sft"] and metrics["gold_greedy"] == metrics["gold_greedy_sft"]
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-4) and metrics["best_of_n_at_equal_kl"] == pytest.approx(
        1, abs=0.01
    )
    assert metrics["best_of_n_gold_at_equal_kl"] == pytest.approx(metrics["gold"], abs=1e-3)


def test_greedy_answers_are_the_most_likely_tokens(place: Path, context: StageContext) -> None:
    prompts = prompts_of(place)
    said = policy_answers.ask(PARAMS, prompts, place / "policy", "the policy", context)
    causal = language_models.load(str(place / "policy"), torch.float32, "sdpa").eval()
    for prompt, (ids,) in zip(prompts, said.greedy.ids, strict=True):
        with torch.no_grad():
            logits = causal(input_ids=torch.tensor([prompt.ids + ids])).logits[0, len(prompt.ids) - 1 : -1]
        assert logits.argmax(dim=1).tolist() == ids


def test_what_was_asked_before_a_kill_is_not_asked_again(place: Path, tmp_path: Path, context: StageContext) -> None:
    evaluated(place, "policy", tmp_path / "first", context)

    def never(prompts: list[str], responses: list[str]) -> list[float]:
        raise AssertionError("scored twice")

    (tmp_path / "second").mkdir()
    gone = (tmp_path / "no policy", tmp_path / "no sft", never, tmp_path / "second", context)
    policy_evaluation.evaluate(PARAMS, prompts_of(place), *gone)
    for name in ("evaluation.parquet", "best_of_n.csv"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_another_policy_is_measured_afresh(place: Path, tmp_path: Path, context: StageContext) -> None:
    evaluated(place, "policy", tmp_path / "out", context)
    first = pd.read_parquet(tmp_path / "out/evaluation.parquet")
    for name, same in (("policy", True), ("sft/model", False)):
        inputs = {"sft": place / "sft", "data": place / "data"}
        policy_evaluation.measure(PARAMS, inputs, context, place / name, tmp_path / "again.parquet")
        again = pd.read_parquet(tmp_path / "again.parquet")
        assert again[["id", "group"]].equals(first[["id", "group"]])
        assert again[["gold", "wins", "gold_greedy"]].equals(first[["gold", "wins", "gold_greedy"]]) == same
    assert (again["wins"] == 0.5).all(), "the SFT model against itself"


def test_which_prompts(place: Path, tmp_path: Path, context: StageContext) -> None:
    found = prompts_of(place)
    assert len(found) == 5 and all(prompt.reference is not None for prompt in found)
    schema = pa.schema([(name, pa.string()) for name in ("id", "group", "prompt", "reference")])
    for rows in ([], [{"id": "p", "group": "g", "prompt": "area?", "reference": None}]):
        file = tmp_path / str(len(rows)) / "data/prompts/test.parquet"
        file.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows, schema), file)
    tokens = language_models.load_tokenizer(str(place / "policy"))
    assert [one.id for one in policy_answers.held_out(PARAMS, tmp_path / "1/data", tokens, context)] == ["p"]
    with pytest.raises(DataError, match=r"prompts/test has no row; accepted: at least one"):
        policy_answers.held_out(PARAMS, tmp_path / "0/data", tokens, context)
    with pytest.raises(DataError, match="judge: slots needs prompts that list attributes"):
        prompts_of(place, PARAMS.model_copy(update={"judge": "slots"}))
    with pytest.raises(DataError, match=r"dpo.max_prompt_tokens accepts 3"):
        prompts_of(place, PARAMS.model_copy(update={"max_prompt_tokens": 3}))


# --- by hand -------------------------------------------------------------------------------------------------


def said(texts: list[list[str]], log_probability: float) -> Said:
    ids = [[[7] * len(text) for text in one] for one in texts]
    sampled = Answers(texts, ids, [[log_probability] * len(one) for one in texts], [[True, False] for _ in texts])
    return Said(sampled, Answers([[one[0]] for one in texts], [], [], []))


GOLDS = Golds([[0.4, 0.8], [0.5, 0.5]], [[0.2, 0.6], [0.5, 0.9]], [[0.3], [0.4]], [[0.1], [0.2]])


def compared(kl: float, gold: bool = True) -> Compared:
    """Two prompts of two answers each; of prompt 0 the proxy likes the better one of SFT's answers, of prompt 1 not."""
    return Compared(
        [Prompt(f"p{n}", f"g{n}", "test", f"prompt {n}", f"reference {n}" if gold else None, [1]) for n in range(2)],
        said([["aa", "a"], ["b", "b"]], -3.0),
        said([["c", "dd"], ["e", "f"]], -4.0),
        reference=[[-3.0 - kl] * 2] * 2,
        proxy=[[1.0, 2.0], [3.0, 4.0]],
        proxy_sft=[[0.0, 1.0], [5.0, 2.0]],
        gold=Golds([[0.4, 0.8], [0.5, 0.5]], [[0.2, 0.6], [0.5, 0.9]], [[0.3], [0.4]], [[0.1], [0.2]])
        if gold
        else None,
    )


def test_rows_and_metrics_by_hand() -> None:
    rows = policy_evaluation.table(compared(1.5))
    assert rows["gold"] == pytest.approx([0.6, 0.5]) and rows["gold_sft"] == pytest.approx([0.4, 0.7])
    # Prompt 0: .4 beats .2 and not .6, .8 beats both. Prompt 1: .5 ties with .5, .9 beats both.
    assert rows["wins"] == [0.75, 0.25] and rows["chance"] == [0.5, 0.5] and rows["judged"] == [1.0, 1.0]
    assert rows["kl"] == [1.5, 1.5] and rows["proxy"] == [1.5, 3.5] and rows["ended"] == [0.5, 0.5]
    assert rows["tokens"] == [1.5, 1.0] and rows["distinct"] == [1.0, 0.5] and rows["distinct_sft"] == [1.0, 1.0]
    metrics = policy_evaluation.metrics(rows)
    assert metrics["gold_win_rate"] == 0.5 and (metrics["gold_win_rate_low"], metrics["gold_win_rate_high"]) == (
        0.25,
        0.75,
    )
    assert metrics["gold_gain"] == pytest.approx(0.0, abs=1e-9) and metrics["gold_gain_low"] == pytest.approx(-0.2)
    assert metrics["kl"] == 1.5 and metrics["eos_share"] == 0.5 and metrics["response_tokens"] == 1.25
    assert metrics["gold_greedy"] == pytest.approx(0.35) and metrics["gold_greedy_sft"] == pytest.approx(0.15)


def test_win_share() -> None:
    assert policy_evaluation.win_share([1.0], [0.0]) == 1.0 and policy_evaluation.win_share([1.0, 2.0], [3.0]) == 0.0
    assert policy_evaluation.win_share([1.0, 2.0], [2.0, 0.0]) == pytest.approx((0 + 1 + 0.5 + 1) / 4)


@pytest.mark.parametrize(
    ("kl", "n", "golds", "reached"),
    [
        (-0.2, 1.0, [0.4, 0.7], 1.0),  # the mean of SFT's answers
        ((math.log(2) - 0.5) / 2, 1.5, [0.5, 0.6], 1.0),  # half-way, in KL, to the best of two: .6 and .5
        (math.log(2) - 0.5 - 1e-9, 2.0, [0.6, 0.5], 1.0),
        (3.0, 2.0, [0.6, 0.5], 0.0),
    ],
)
def test_best_of_n_at_the_policys_kl(kl: float, n: float, golds: list[float], reached: float) -> None:
    found = compared(kl)
    rows = policy_evaluation.table(found)
    curve, told = policy_evaluation.best_of_n(found, rows)
    assert told["best_of_n_at_equal_kl"] == pytest.approx(n) and told["best_of_n_reached"] == reached
    assert rows["gold_best_of_n"] == pytest.approx(golds)
    assert told["best_of_n_gold_at_equal_kl"] == pytest.approx(sum(golds) / 2)
    assert [row["n"] for row in curve] == [1, 2] and curve[0]["kl"] == 0.0
    assert curve[1]["kl"] == pytest.approx(math.log(2) - 0.5)
    assert [row["gold"] for row in curve] == pytest.approx([0.55, 0.55])
    assert [row["proxy"] for row in curve] == pytest.approx([(0.5 + 3.5) / 2, (1.0 + 5.0) / 2])
    assert curve[1]["gold_low"] == pytest.approx(0.5) and curve[1]["gold_high"] == pytest.approx(0.6)


def test_without_references_there_is_no_gold() -> None:
    found = compared(1.0, gold=False)
    rows = policy_evaluation.table(found)
    curve, told = policy_evaluation.best_of_n(found, rows)
    assert set(curve[0]) == {"n", "kl", "proxy"} and told == {}
    assert rows["judged"] == rows["gold"] == rows["wins"] == rows["chance"] == rows["gold_best_of_n"] == [0.0, 0.0]
    assert not [key for key in policy_evaluation.metrics(rows) if "gold" in key]
    assert policy_evaluation.golds("overlap", found.prompts, found.policy, found.sft) is None
    page = policy_card.samples(found, 1)
    assert "gold" not in page and "(reward 1.00): `aa`" in page and "prompt 0" in page and "prompt 1" not in page


# --- the alignment tax, and the pages ------------------------------------------------------------------------


def test_tax_is_the_difference_in_bits_per_byte(place: Path, tmp_path: Path, context: StageContext) -> None:
    models = {alignment_tax.SFT: place / "sft/model", alignment_tax.POLICY: place / "policy"}
    metrics = alignment_tax.evaluate(place / "data", 1024, models, tmp_path, context)
    rows = pd.read_parquet(tmp_path / "tax.parquet")
    assert list(rows.columns) == ["id", "group", "bytes", "bits_sft", "bits"] and len(rows) > 5
    expected = (rows["bits"].sum() - rows["bits_sft"].sum()) / rows["bytes"].sum()
    assert metrics["alignment_tax_bits"] == pytest.approx(expected) and set(metrics) == {
        "alignment_tax_bits", "alignment_tax_bits_low", "alignment_tax_bits_high",
    }  # fmt: skip
    gone = dict.fromkeys(models, tmp_path / "gone")
    assert alignment_tax.evaluate(place / "data", 1024, gone, tmp_path, context) == metrics, "scored once"


def test_what_pre_training_gradients_repair() -> None:
    scores = {"bits_sft": [100.0, 50.0] * 5, "bits": [110.0, 50.0] * 5, "bits_without_ptx": [130.0, 65.0] * 5}
    metrics = alignment_tax.metrics(scores, [20, 10] * 5, list("abcdefghij"))
    assert metrics["alignment_tax_bits"] == pytest.approx(10 / 30)
    assert metrics["alignment_tax_bits_without_ptx"] == pytest.approx(45 / 30)
    assert metrics["ptx_repairs"] == pytest.approx(35 / 30)
    assert 1.0 <= metrics["ptx_repairs_low"] < 35 / 30 < metrics["ptx_repairs_high"] <= 1.5
    pairs = alignment_tax.metrics(scores, [20, 10] * 5, list("aabbccddee"))
    assert pairs["ptx_repairs_low"] == pairs["ptx_repairs_high"], "texts of one group are drawn together"
    few = alignment_tax.metrics(scores, [20, 10] * 5, ["a"] * 10)
    assert few["ptx_repairs_low"] == pytest.approx(-1.5), "one group shows nothing, and its gate does not pass"


def test_pages() -> None:
    found = compared(1.5)
    rows = policy_evaluation.table(found)
    _, told = policy_evaluation.best_of_n(found, rows)
    tax = alignment_tax.metrics({"bits_sft": [8.0, 9.0], "bits": [8.8, 9.9]}, [10, 10], ["a", "b"])
    metrics = {**policy_evaluation.metrics(rows), **told, **tax, "prompts_test": 2.0, "parameters": 1.5e6}
    page = policy_card.card("llama", "Trained.", metrics)
    assert page.startswith("---\nlibrary_name") and "1.5 million parameters. Trained." in page
    assert "50.0% of the pairs (25.0% to 75.0%)" in page and "which does not reach it" in page
    assert "+0.0850 (-0.0900 to +0.0900)." in page and "without pre-training" not in page
    plain = {key.replace("tax_bits", "tax_bits_without_ptx"): 2 * value for key, value in tax.items()}
    assert "without pre-training gradients +0.1700" in policy_card.card("llama", "", metrics | plain)
    bare = {key: value for key, value in metrics.items() if "gold" not in key and "best_of_n" not in key}
    assert "best-of-n" not in policy_card.card("llama", "", bare).lower()
    shown = policy_card.samples(found, 2)
    assert (
        shown.count("**Prompt:**") == 2 and "*policy, greedy* (gold 0.30): `aa`" in shown and "`reference 1`" in shown
    )
