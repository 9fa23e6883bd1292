"""Stage `ppo` on models of one layer: what it writes, what it learns, what stops it, and that it can be stopped."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from models import model, tokenizer
from test_reward import TINY as REWARD
from test_reward import comparisons, write

from pipelines import ppo, reward
from pipelines.core import artifacts, episodes, guards, language_models, ppo_setup, ppo_step, reward_model, training
from pipelines.core.context import StageContext, Stopped
from pipelines.core.errors import ArtifactError, DataError, ParamsError
from pipelines.core.params.ppo import PpoParams
from pipelines.core.params.reward import RewardParams
from pipelines.core.reward_functions import Scores
from pipelines.tokenizer import CHAT_TEMPLATE

TINY: dict[str, Any] = {
    "seed": 1, "method": "lora", "lora_rank": 4, "rewards": [], "judge": "overlap", "iterations": 3, "batch_prompts": 4,
    "samples_per_prompt": 3, "minibatches": 2, "epochs": 1, "micro_tokens": 256, "max_new_tokens": 8,
    "max_prompt_tokens": 64, "too_long": "refuse", "temperature": 1.0, "kl_coefficient": 0.02, "kl_target": None,
    "kl_horizon": 1000, "clip": 0.2, "value_clip": 0.2, "discount": 1.0, "trace": 0.95, "missing_eos_penalty": 0.0,
    "group_baseline": True, "lr": 5e-3, "value_lr": 5e-3, "warmup_iterations": 0, "weight_decay": 0.0, "clip_norm": 1.0,
    "ptx_coefficient": 0.1, "ptx_rows": 2, "ptx_length": 32, "without_ptx": True, "kl_ceiling": 50.0,
    "entropy_floor": 0.0, "cap_share": 1.0, "eval_prompts": 6, "eval_samples": 3, "eval_bytes": 1024,
    "checkpoint_steps": 1, "checkpoint_seconds": 1e9, "samples": 1,
}  # fmt: skip
SHORT = {"without_ptx": False, "ptx_coefficient": 0.0}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, draw = tmp_path_factory.mktemp("inputs"), random.Random(0)
    known = tokenizer()
    known.chat_template = CHAT_TEMPLATE
    model(known, depth=1, length=128).save_pretrained(root / "sft/model")
    known.save_pretrained(root / "sft/model")
    told = [{"role": "user", "content": "what is w?"}, {"role": "assistant", "content": "the width of the area"}]
    write(root / "data/demonstrations/train.parquet", [{"id": f"d{n}", "messages": told} for n in range(12)])
    for split, count in (("train", 20), ("test", 12)):
        write(root / f"feedback/comparisons/{split}.parquet", comparisons(split, count, draw))
        prompts = [
            {"id": f"{split}{n}", "group": f"{split}{n}", "prompt": f"shape {n} {split}", "reference": "area of w"}
            for n in range(count)
        ]
        write(root / f"data/prompts/{split}.parquet", prompts)
        texts = [
            {"id": f"{split}{n}", "group": f"{split}{n}", "text": f"Return the area of shape {n}.\n" * 20}
            for n in range(40)
        ]
        write(root / f"data/corpus/{split}.parquet", texts)
    found = {name: root / name for name in ("data", "sft", "feedback")}
    for method in ("lora", "full"):
        place = root / method
        place.mkdir()
        context = StageContext(stage="reward", root=root, fingerprint=method)
        reward.run(RewardParams(**REWARD | {"method": method, "held_out_labelers": 0}), found, place, context)
    return {"data": root / "data", "sft": root / "sft", "reward": root / "lora"}


def run(
    inputs: dict[str, Path], root: Path, context: StageContext | None = None, **changes: Any
) -> tuple[dict[str, float], Path, StageContext]:
    out = root / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    context = context or StageContext(stage="ppo", root=root, fingerprint="f" * 64)
    return ppo.run(PpoParams(**TINY | changes), inputs, out, context), out, context


def function(root: Path, body: str) -> str:
    """A reward of the user's own: a file with the function `reward(prompts, responses)`."""
    root.mkdir(parents=True, exist_ok=True)
    lines = "\n    ".join(body.splitlines())
    (root / "own.py").write_text(f"CALLS = []\n\ndef reward(prompts, responses):\n    CALLS.append(1)\n    {lines}\n")
    return "own.py:reward"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_files_and_metrics(inputs: dict[str, Path], tmp_path: Path, method: str) -> None:
    given = {**inputs, "reward": inputs["reward"].parent / method}
    metrics, out, context = run(given, tmp_path, method=method)
    assert ppo.METRICS <= set(metrics) <= ppo.METRICS | ppo.OPTIONAL
    assert {"gold_win_rate_low", "alignment_tax_bits_without_ptx", "best_of_n_gold_at_equal_kl"} <= set(metrics)
    assert metrics["steps"] == 6 and metrics["episodes"] == 36
    rows = pd.read_parquet(out / "evaluation.parquet")
    assert len(rows) == 6 and set(rows.columns) >= ppo.SCORES | {"id", "group"}
    history = pd.read_csv(out / "history.csv")
    assert {"score", "gold", "kl", "entropy", "ptx_ratio", "plain_kl"} <= set(history.columns)
    assert history["kl"].dropna().tolist()[0] == 0 == history["plain_kl"].dropna().tolist()[0]
    assert history["kl_k3"].dropna().tolist()[-1] > 0 and (history["ptx_ratio"].dropna() > 0).all()
    files = {place.name for place in out.iterdir()}
    assert files == {"model", "history.csv", "evaluation.parquet", "tax.parquet", "best_of_n.csv", "samples.md"}
    assert {"generate_seconds", "score_seconds", "update_seconds", "update_matmul_share"} <= set(context.measured)


def test_the_reward_rises_and_kl_is_what_it_costs(inputs: dict[str, Path], tmp_path: Path) -> None:
    """A reward for the letter `e` is learned; a larger coefficient keeps the policy nearer to where it was."""
    ends = []
    for coefficient in (0.01, 3.0):
        root = tmp_path / str(coefficient)
        named = function(root, "return [text.count('e') / 4 for text in responses]")
        more = {
            "method": "full",
            "iterations": 20,
            "batch_prompts": 8,
            "kl_coefficient": coefficient,
            "eval_prompts": 1,
        }
        _, out, _ = run(inputs, root, rewards=[named], lr=3e-3, **SHORT | more)
        history = pd.read_csv(out / "history.csv")
        ends.append((history["score"][-3:].mean() - history["score"][:2].mean(), history["kl"][-3:].mean()))
    (gain, far), (little, near) = ends
    assert gain > 0.25 and far > 0.3 and near < far / 3 and little < gain, ends


@pytest.mark.parametrize("moment", [(2, "generate"), (2, "update"), (5, "update")])
def test_stopped_anywhere_it_ends_with_the_same_bytes(
    inputs: dict[str, Path], tmp_path: Path, moment: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a rollout, between two minibatches, and in the second arm."""
    _, whole, _ = run(inputs, tmp_path / "whole")
    iteration, where = moment
    context = StageContext(stage="ppo", root=tmp_path / "cut", fingerprint="f" * 64)
    take, begun = ppo_step.take, []

    def killed(*args: Any) -> Any:
        begun.append(1)
        if where == "update" and len(begun) == 2 * iteration:
            raise KeyboardInterrupt
        return take(*args)

    def stop(step: int, metrics: dict[str, float]) -> None:
        context.signal_number = 15 if where == "generate" and step == iteration else 0

    monkeypatch.setattr(ppo_step, "take", killed)
    context.curve = stop
    with pytest.raises((Stopped, KeyboardInterrupt)):
        run(inputs, tmp_path / "cut", context)
    monkeypatch.setattr(ppo_step, "take", take)
    _, out, again = run(inputs, tmp_path / "cut")
    assert any("resuming after iteration" in line for line in again.samples)
    assert artifacts.content_hash(out) == artifacts.content_hash(whole)


def test_a_signal_in_a_rollout_costs_that_rollout_only(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints are due after hundreds of iterations: what is there was written because of the signal."""
    rare = SHORT | {"checkpoint_steps": 500, "checkpoint_seconds": 1e6}
    context = StageContext(stage="ppo", root=tmp_path, fingerprint="f" * 64)

    progress = context.progress

    def note(step: int, total: int | None = None, **shown: float | str) -> None:
        progress(step, total, **shown)
        context.signal_number = 15 if str(shown.get("sampling")).startswith("3 of") else 0

    monkeypatch.setattr(context, "progress", note)
    with pytest.raises(Stopped):
        run(inputs, tmp_path, context, **rare)
    kept = [place.name for place in (tmp_path / ".work/ppo").glob("*/checkpoints/step-*")]
    assert kept == ["step-2"]


class Forgetful(dict[int, Any]):
    """Keeps nothing."""

    def __setitem__(self, key: int, value: Any) -> None:
        pass


def test_what_both_runs_begin_with_is_made_once(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is what the second run would have made: as when it is made again."""
    generate, made = episodes.generate, []

    def counted(*args: Any) -> Any:
        made.append(args[4])
        return generate(*args)

    monkeypatch.setattr(episodes, "generate", counted)
    _, once, _ = run(inputs, tmp_path / "once")
    assert made == [0, 1, 2, 1, 2]
    monkeypatch.setattr(ppo_setup.Task, "__new__", lambda kind, *given: tuple.__new__(kind, (*given[:-1], Forgetful())))
    _, twice, _ = run(inputs, tmp_path / "twice")
    assert made[5:] == [0, 1, 2, 0, 1, 2] and artifacts.content_hash(once) == artifacts.content_hash(twice)


def test_same_seed_same_bytes_other_seed_other_bytes(inputs: dict[str, Path], tmp_path: Path) -> None:
    hashes = [
        artifacts.content_hash(run(inputs, tmp_path / str(n), seed=seed, **SHORT)[1])
        for n, seed in enumerate((1, 1, 2))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_accumulation_changes_nothing_but_memory(inputs: dict[str, Path], tmp_path: Path) -> None:
    found = [
        pd.read_csv(run(inputs, tmp_path / str(size), micro_tokens=size, **SHORT)[1] / "history.csv")
        for size in (64, 4096)
    ]
    for name in ("policy_loss", "value_loss", "score", "grad_norm"):
        assert found[0][name].tolist() == pytest.approx(found[1][name].tolist(), rel=2e-3, abs=2e-4)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("return [float('nan')] * len(responses)", "call 1"),
        ("return [1.0] * (len(responses) - 1)", "call 1"),
        ("if len(CALLS) == 3: raise RuntimeError('out of order')\nreturn [len(text) for text in responses]", "call 3"),
        ("return [0.5] * len(responses)", "nothing can be learned"),
        ("return [float(text.split()[1]) for text in prompts]", "Does it read the prompts"),
    ],
)
def test_a_reward_that_cannot_be_used(inputs: dict[str, Path], tmp_path: Path, body: str, told: str) -> None:
    with pytest.raises(DataError, match=told) as raised:
        run(inputs, tmp_path, rewards=[function(tmp_path, body)], **SHORT)
    kept = sorted((tmp_path / ".work/ppo").glob("*/checkpoints/step-*"))
    assert [place.name for place in kept] == (["step-1", "step-2"] if "3" in told else [])
    assert not (tmp_path / "out/model").exists() and "own.py:reward" in str(raised.value)
    assert ("the checkpoint after iteration 2 stays in .work/ppo" if kept else "Nothing was published.") in str(
        raised.value
    )


@pytest.mark.parametrize("bad", ["raise RuntimeError('out of order')", "return [float('nan')] * len(responses)"])
def test_a_reward_that_fails_costs_that_iteration_only(inputs: dict[str, Path], tmp_path: Path, bad: str) -> None:
    """Checkpoints are due after hundreds of iterations; what goes on from there is what a whole run makes."""
    rare = SHORT | {"checkpoint_steps": 500, "checkpoint_seconds": 1e6}
    good = "return [len(text) for text in responses]"
    _, whole, _ = run(inputs, tmp_path / "whole", rewards=[function(tmp_path / "whole", good)], **rare)
    with pytest.raises(DataError, match=r"call 3: .* the checkpoint after iteration 2 stays in \.work/ppo"):
        run(inputs, tmp_path, rewards=[function(tmp_path, f"if len(CALLS) == 3: {bad}\n{good}")], **rare)
    kept = [place.name for place in (tmp_path / ".work/ppo").glob("*/checkpoints/step-*")]
    assert kept == ["step-2"]
    _, out, again = run(inputs, tmp_path, rewards=[function(tmp_path, good)], **rare)
    assert "resuming after iteration 2 of 3" in again.samples
    assert artifacts.content_hash(out) == artifacts.content_hash(whole)


@pytest.mark.parametrize("factor", [1e-5, 0.1, 100.0])
def test_a_reward_on_another_scale_than_the_dials_is_told_once(
    inputs: dict[str, Path], tmp_path: Path, factor: float
) -> None:
    named = function(tmp_path, f"return [{factor} * len(text) for text in responses]")
    *_, context = run(inputs, tmp_path, rewards=[named], iterations=1)
    told = [line for line in context.samples if "standard deviation" in line]
    assert len(told) == (factor != 0.1)
    for part in ("own.py:reward: ", "ppo.kl_coefficient", "ppo.value_clip", "ppo.missing_eos_penalty", "ppo.value_lr"):
        assert all(part in line for line in told)


def test_the_scales_that_are_told(context: StageContext) -> None:
    """Of two scores the standard deviation is half of what they are apart."""
    for apart in (0.11, 1.0, 39.0):
        ppo_setup.tell_scale([5.0, 5.0 + apart], "f.py:g", context)
    assert not context.samples
    for apart in (0.09, 41.0):
        ppo_setup.tell_scale([5.0, 5.0 + apart], "f.py:g", context)
    assert [line.split(". ppo")[0] for line in context.samples] == [
        f"f.py:g: the scores of the first batch have a standard deviation of {spread}" for spread in ("0.045", "20")
    ]


def test_a_file_that_the_reward_imports_is_told(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage finds modules of the folder it runs in, and DVC knows the named file alone."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "base_prefix", "/")  # as /usr is, of a folder such as /usr/src/app
    (tmp_path / "reward_function_words.py").write_text("LETTER = 'e'\n")
    named = function(tmp_path, "return [text.count(reward_function_words.LETTER) for text in responses]")
    (tmp_path / "own.py").write_text("import json, reward_function_words\n" + (tmp_path / "own.py").read_text())
    *_, context = run(inputs, tmp_path, rewards=[named], **SHORT)
    told = [line for line in context.samples if "imports" in line]
    assert len(told) == 1 and "own.py:reward imports reward_function_words.py: after a change" in told[0]
    sys.modules.pop("reward_function_words")


def test_an_ensemble_tells_how_far_its_members_are_apart(inputs: dict[str, Path], tmp_path: Path) -> None:
    """And a reward that is alone has no such column."""
    named = function(tmp_path, "return [float(len(text)) for text in responses]")
    body = "return [float(len(text)) + 3.0 for text in responses]"
    (tmp_path / "other.py").write_text(f"def reward(prompts, responses):\n    {body}\n")
    _, out, _ = run(inputs, tmp_path, rewards=[named, "other.py:reward"], iterations=2)
    history = pd.read_csv(out / "history.csv")
    for column in ("reward_spread", "plain_reward_spread"):
        assert history[column].dropna().tolist() == pytest.approx([1.5, 1.5])
    function(tmp_path / "alone", "return [float(len(text)) for text in responses]")
    _, out, _ = run(inputs, tmp_path / "alone", rewards=[named], iterations=1, **SHORT)
    assert "reward_spread" not in pd.read_csv(out / "history.csv").columns


def test_calls_of_a_reward_are_counted_over_both_runs(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Three iterations each; then it is asked about other answers, of which there are more."""
    for when, told in (("len(CALLS) == 5", "call 5: it"), ("len(responses) == 18", "answers to held-out prompts: it")):
        root = tmp_path / when.split("(")[1][:5]
        named = function(root, f"if {when}: raise RuntimeError('no')\nreturn [len(text) for text in responses]")
        with pytest.raises(DataError, match=f"reward `own.py:reward`, {told} raised RuntimeError: no"):
            run(inputs, root, rewards=[named])


def test_calls_are_counted_alike_where_the_second_run_begins_again(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first run began with is known to one process only."""
    told: list[int] = []

    def score(rewards: Any, rollout: Any, call: int) -> Scores:
        told.append(call)
        return Scores([float(len(text)) for said in rollout.responses for text in said], None)

    monkeypatch.setattr(ppo_setup, "score", score)
    body = "return [float(len(text)) for text in responses]"
    run(inputs, tmp_path / "once", rewards=[function(tmp_path / "once", body)])
    assert told == [1, 2, 3, 4, 5]
    monkeypatch.setattr(ppo_setup.Task, "__new__", lambda kind, *given: tuple.__new__(kind, (*given[:-1], Forgetful())))
    run(inputs, tmp_path / "again", rewards=[function(tmp_path / "again", body)])
    assert told[5:] == [1, 2, 3, 4, 4, 5]


def test_a_guard_stops_the_run_and_the_last_good_checkpoint_is_kept(inputs: dict[str, Path], tmp_path: Path) -> None:
    named = function(tmp_path, "return [float(len(text)) for text in responses]")
    hacked = {"iterations": 20, "batch_prompts": 8, "lr": 2e-2, "kl_coefficient": 0.0, "kl_ceiling": 0.3}
    context = StageContext(stage="ppo", root=tmp_path, fingerprint="f" * 64)
    with pytest.raises(ArtifactError, match=r"stopped after iteration \d+: KL .*ppo\.kl_ceiling") as raised:
        run(inputs, tmp_path, context, rewards=[named], **SHORT | hacked)
    after = int(str(raised.value).split("iteration ")[1].split(":")[0])
    kept = sorted((tmp_path / ".work/ppo").glob("*/checkpoints/step-*"), key=lambda place: int(place.name[5:]))
    state = torch.load(kept[-1] / "state.pt", weights_only=True)
    assert kept[-1].name == f"step-{state['iteration']}" and not (tmp_path / "out/model").exists()
    # An iteration samples before it updates: what KL the checkpoint's policy has is told by the next one's row.
    known = [row["kl"] for row in context.history]
    assert len(known) == after and known[state["iteration"]] <= 0.3 < known[after - 1]
    assert state["iteration"] == after - 2 > 0
    told = "the newest of models that no guard condemns, stays in .work/ppo/"
    assert f"the checkpoint after iteration {after - 2}, {told}" in str(raised.value)
    assert str(raised.value).endswith("The same params would come to the same end.")
    with pytest.raises(ArtifactError) as again:
        run(inputs, tmp_path, rewards=[named], **SHORT | hacked)
    assert str(again.value) == str(raised.value)


def test_no_checkpoint_stays_of_a_policy_that_a_guard_condemns(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first update has spoiled it."""
    monkeypatch.setattr(
        guards, "check", lambda limits, rows: guards.Fault("It is spoiled.") if len(rows) == 2 else None
    )
    with pytest.raises(guards.Fired) as raised:
        run(inputs, tmp_path, **SHORT)
    assert not list((tmp_path / ".work/ppo").glob("*/checkpoints/step-*"))
    told = "Nothing was published, and no checkpoint is left. The same params would come to the same end."
    assert str(raised.value) == f"ppo stopped after iteration 2: It is spoiled. {told}"


@pytest.mark.parametrize("what", ["guard", "divergence"])
def test_what_ends_the_run_to_compare_with_ends_that_run_alone(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The policy is published, the other's tax is told with where it was stopped, and compared with nothing."""
    check, take = guards.check, ppo_step.take

    def checked(limits: guards.Guards, rows: Sequence[guards.Row]) -> guards.Fault | None:
        large = len(rows) == 2 and "ptx_loss" not in rows[-1]
        return guards.Fault("KL is too large.") if large else check(limits, rows)

    def taken(*args: Any) -> Any:
        if args[3] is None and args[4] == 5:  # no pre-training gradient, the last step
            raise training.Diverged("training diverged in step 6: {'loss': nan}.")
        return take(*args)

    if what == "guard":
        monkeypatch.setattr(guards, "check", checked)
    else:
        monkeypatch.setattr(ppo_step, "take", taken)
    metrics, out, context = run(inputs, tmp_path, checkpoint_steps=2)
    assert ppo.METRICS <= set(metrics) <= ppo.METRICS | ppo.OPTIONAL
    assert metrics["without_ptx_stopped_after"] == 2.0 and "alignment_tax_bits_without_ptx_low" in metrics
    assert not any(key.startswith("ptx_repairs") for key in metrics)
    told = {"guard": "stopped after iteration 2: KL is too large.", "divergence": "training diverged in step 6"}[what]
    card = (out / "model/README.md").read_text()
    assert told in card and "when it was stopped, after iteration 2." in card and told in "".join(context.samples)
    hashed = artifacts.content_hash(out)
    assert artifacts.content_hash(run(inputs, tmp_path, checkpoint_steps=2)[1]) == hashed


def test_steps_that_were_not_made_are_noticed(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    with pytest.raises(AssertionError, match="optimizer steps were made, 6 were planned"):
        run(inputs, tmp_path, **SHORT)


def test_what_does_not_fit_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="model's context is 128"):
        run(inputs, tmp_path, max_new_tokens=100, max_prompt_tokens=64)
    with pytest.raises(ParamsError, match="ppo.ptx_length is 129"):
        run(inputs, tmp_path, ptx_length=129)
    run(inputs, tmp_path, ptx_length=129, iterations=1, **SHORT)  # which reads no such rows
    with pytest.raises(DataError, match="ppo.max_prompt_tokens"):
        run(inputs, tmp_path, max_prompt_tokens=4)
    empty = {**inputs, "data": tmp_path / "data"}
    shutil.copytree(inputs["data"], tmp_path / "data")
    table = tmp_path / "data/prompts/train.parquet"
    pd.read_parquet(table).head(0).to_parquet(table)
    with pytest.raises(DataError, match="prompts/train has no prompt; one at least is needed"):
        run(empty, tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_reward_model_that_cannot_read_so_much_is_refused(
    inputs: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    """Before anything runs; with EOS, which is read behind a response that did not end."""
    known = language_models.load_tokenizer(str(inputs["sft"] / "model"))
    model(known, architecture, depth=1, length=72).save_pretrained(tmp_path / "base")
    judge = reward_model.initial(tmp_path / "base", known, 3, torch.float32, "sdpa")
    reward_model.save(judge, known, tmp_path / "short", torch.float32)
    reward_model.save_constants(tmp_path / "short", judge, reward_model.Level(0.0, 1.0))
    context = StageContext(stage="ppo", root=tmp_path, fingerprint="f" * 64)
    told = r"with EOS, is 73 tokens; the context of the reward model short is 72: lower"
    with pytest.raises(ParamsError, match=told):
        run(inputs, tmp_path, context, rewards=["short"], **SHORT)
    assert not context.history
    run(inputs, tmp_path, rewards=["short"], max_prompt_tokens=63, iterations=1, **SHORT)


def test_the_adapter_of_another_sft_model_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(inputs["sft"], tmp_path / "sft")
    known = tokenizer()
    torch.manual_seed(5)
    other = model(known, depth=1, length=128)
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(0.1)
    other.save_pretrained(tmp_path / "sft/model")
    with pytest.raises(ArtifactError, match="another SFT model"):
        run({**inputs, "sft": tmp_path / "sft"}, tmp_path)
