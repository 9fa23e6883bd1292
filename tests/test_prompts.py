"""Stage `prompts` on a two-layer model: what it writes, what it refuses, and where it goes on."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pandas as pd
import prompt_toys
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from models import NO_SYSTEM
from pydantic import ValidationError
from test_transfer import rows, write

from pipelines import prompts
from pipelines.core import artifacts, prompt_calls, prompt_files, prompts_card
from pipelines.core.context import StageContext, Stopped
from pipelines.core.errors import ArtifactError, DataError, ParamsError, UserError

FILES = Path(__file__).parents[1] / "mlflow/prompts"
EVERY = (
    "zero_shot", "few_shot", "few_shot_random", "few_shot_similar", "role", "chain_of_thought", "self_consistency"
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    for name in ("sft", "ppo"):
        prompt_toys.chat_model(root / name / "model", 512)
    for task in ("kind", "fits", "close", "pick"):
        write(root / "data", task, train=24, validation=8, test=12)
    for side in ("train", "validation", "test"):
        table = [
            {
                "id": f"{side}{n}",
                "group": f"{side}{n}",
                "prompt": f"What is area_{n}?",
                "reference": f"The area of {n}.",
            }
            for n in range(6)
        ]
        table[0]["reference"] = None  # type: ignore[assignment]
        (root / "data/prompts").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(table[::-1]), root / f"data/prompts/{side}.parquet")
    (root / "rag/index").mkdir(parents=True)
    return {
        "data": root / "data",
        "sft": root / "sft",
        "ppo": root / "ppo",
        "rag": root / "rag",
        "mlflow/prompts": FILES,
    }


def run(inputs: dict[str, Path], place: Path, context: StageContext, **changed: Any) -> dict[str, float]:
    place.mkdir(parents=True, exist_ok=True)
    return prompts.run(prompt_toys.params(**changed), inputs, place, context)


def context_at(root: Path) -> StageContext:
    return StageContext("prompts", root, "f" * 64)


def test_files_metrics_and_rows(inputs: dict[str, Path], tmp_path: Path, context: StageContext) -> None:
    asked = {"models": ("sft", "ppo"), "tasks": ("kind", "pick", "generation"), "strategies": EVERY, "eval_examples": 4}
    metrics = run(inputs, tmp_path / "out", context, **asked)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "models", "matrix.csv", "evaluation.parquet", "samples.md"
    }  # fmt: skip
    known = prompts.METRICS | prompts.OPTIONAL
    assert not [key for key in metrics if not any(fnmatchcase(key, one) for one in known)]
    for key in ("score", "score_low", "score_high", "tokens"):
        assert {f"kind/{name}/{key}" for name in EVERY} <= set(metrics)
        assert {f"kind/{name}/{who}/{key}" for name in EVERY for who in ("sft", "ppo")} <= set(metrics)
    assert metrics["kind/few_shot/examples"] == 2.0 and 0 <= metrics["kind/chain_of_thought/unparsed"] <= 1
    assert "generation/chain_of_thought/score" not in metrics and "generation/majority" not in metrics
    assert any("generation, self_consistency: no prompt" in one for one in context.samples)

    matrix = pd.read_csv(tmp_path / "out/matrix.csv")
    assert len(matrix) == 2 * (7 + 7 + 5) and matrix.groupby("task").chosen.sum().eq(1).all()
    first = matrix[(matrix.task == "kind") & (matrix.strategy == "role") & (matrix.model == "sft")].iloc[0]
    assert first.score == metrics["kind/role/score"] and first.questions == 4
    assert first.prompt_tokens + first.answer_tokens == pytest.approx(metrics["kind/role/tokens"])

    table = pq.read_table(tmp_path / "out/evaluation.parquet").to_pandas()
    assert len(table) == 8 + 8 + 5 and table.id.is_unique and table.filter(like="examples_").sum(axis=1).eq(1).all()
    for task in ("kind", "pick", "generation"):
        own = table[table[f"examples_{task}"] == 1]
        assert own.score.mean() == pytest.approx(metrics[f"{task}/chosen"])
        assert own.score_zero_shot.mean() == pytest.approx(metrics[f"{task}/chosen_zero_shot"])
        card = (tmp_path / "out/models" / task / "README.md").read_text()
        assert f"sluice-prompt-{task}" in card and f"{metrics[f'{task}/chosen']:.3f}" in card
    assert set(prompts.SCORES) - {"examples_*"} <= set(table)


def test_no_example_is_held_out_and_labels_are_balanced(
    inputs: dict[str, Path], tmp_path: Path, context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    original = prompt_calls.Speaker.prompt

    def prompt(self: Any, messages: Any) -> Any:
        seen.append(messages)
        return original(self, messages)

    monkeypatch.setattr(prompt_calls.Speaker, "prompt", prompt)
    run(inputs, tmp_path / "out", context, tasks=("fits",), strategies=EVERY[:4], examples=2)
    train = {(row["premise"], row["hypothesis"]) for row in rows("fits", "train", 24)}
    shown = [turn["content"] for turns in seen for turn in turns[:-1] if turn["role"] == "user"]
    assert len(shown) >= 2 * 3 * 6, "three strategies with two examples, six questions, and the test side"
    for text in shown:
        lines = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
        assert (lines["First"], lines["Second"]) in train
    for turns in seen:
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        assert sorted(answers) in ([], ["no", "yes"])


def test_killed_and_resumed_it_ends_with_the_same_bytes(inputs: dict[str, Path], tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "tasks": ("kind", "generation"),
        "strategies": ("zero_shot", "few_shot", "self_consistency"),
    }
    asked["search"] = {"budget": 80}
    run(inputs, tmp_path / "whole", context_at(tmp_path / "a"), **asked)
    stopped = context_at(tmp_path / "b")
    heard, left = stopped.stop_if_asked, iter(range(4, -1, -1))

    def stop() -> None:
        if next(left) == 0:
            stopped.signal_number = 15
        heard()

    stopped.stop_if_asked = stop  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        run(inputs, tmp_path / "out", stopped, **asked)
    calls = len(list(prompt_calls.calls(stopped).iterdir()))
    again = context_at(tmp_path / "b")
    run(inputs, tmp_path / "out", again, **asked)
    assert f"resuming after {calls} calls" in again.samples
    assert artifacts.content_hash(tmp_path / "out") == artifacts.content_hash(tmp_path / "whole")


def test_a_search_is_written_as_a_prompt_that_can_be_kept(
    inputs: dict[str, Path], tmp_path: Path, context: StageContext
) -> None:
    asked: dict[str, Any] = {"tasks": ("kind",), "search": {"budget": 100}}
    metrics = run(inputs, tmp_path / "out", context, **asked)
    assert metrics["kind/search_questions"] <= 94 and metrics["kind/search_candidates"] >= 4
    kept = tmp_path / "prompts"
    shutil.copytree(FILES, kept)
    shutil.copy(tmp_path / "out/found/kind-tuned.yaml", kept)
    again = run(
        inputs | {"mlflow/prompts": kept},
        tmp_path / "again",
        context,
        tasks=("kind",),
        strategies=("zero_shot", "tuned"),
    )
    assert again["kind/tuned/score"] == metrics["kind/search/score"]
    assert again["kind/tuned/tokens"] == metrics["kind/search/tokens"]
    lost = yaml.safe_load((kept / "kind-tuned.yaml").read_text()) | {"examples": ["validation0"]}
    (kept / "kind-tuned.yaml").write_text(yaml.safe_dump(lost))
    with pytest.raises(DataError, match="kind-tuned.yaml: examples: validation0 is none of the 16 training rows"):
        run(
            inputs | {"mlflow/prompts": kept},
            tmp_path / "held",
            context,
            tasks=("kind",),
            strategies=("zero_shot", "tuned"),
        )


def test_the_champion_is_measured_as_the_stage_measured_it(
    inputs: dict[str, Path], tmp_path: Path, context: StageContext
) -> None:
    asked: dict[str, Any] = {"tasks": ("kind", "pick"), "strategies": ("zero_shot", "few_shot_similar")}
    run(inputs, tmp_path / "out", context, **asked)
    for task in ("kind", "pick"):
        place = tmp_path / f"{task}.parquet"
        prompts.measure(prompt_toys.params(**asked), inputs, context, tmp_path / "out/models" / task, place)
        ours = pq.read_table(tmp_path / "out/evaluation.parquet").to_pandas()
        theirs = pq.read_table(place).to_pandas()
        own = ours[f"examples_{task}"] == 1
        assert theirs.id.equals(ours.id) and theirs.score[own].equals(ours.score[own])
    with pytest.raises(ArtifactError, match="no prompt that stage prompts chose"):
        prompts_card.read(tmp_path)
    told = prompt_toys.params(**{**asked, "tasks": ("pick",)})
    with pytest.raises(ArtifactError, match="none of today's"):
        prompts.measure(told, inputs, context, tmp_path / "out/models/kind", tmp_path / "x.parquet")


def test_a_champion_of_other_labels_is_calibrated_by_todays(
    inputs: dict[str, Path], tmp_path: Path, context: StageContext
) -> None:
    asked: dict[str, Any] = {"tasks": ("kind",), "strategies": ("zero_shot",)}
    run(inputs, tmp_path / "out", context, **asked)
    for side, count in (("train", 24), ("validation", 8), ("test", 12)):
        table = [row | {"label": row["label"] + 1} for row in rows("kind", side, count)]
        table.append(table[0] | {"id": f"{side} new", "group": "new", "label": 0, "label_text": "maybe"})
        for name, made in (("more", table), ("other", rows("fits", side, count))):
            place = tmp_path / name / "tasks/kind" / f"{side}.parquet"
            place.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(made), place)
    model, place = tmp_path / "out/models/kind", tmp_path / "champion.parquet"
    today = inputs | {"data": tmp_path / "more"}
    prompts.measure(prompt_toys.params(**asked), today, context, model, place)
    run(today, tmp_path / "today", context, **asked)
    ours = pq.read_table(tmp_path / "today/evaluation.parquet").to_pandas()
    assert pq.read_table(place).to_pandas().score.equals(ours.score), "the same prompt and model, on the same rows"
    with pytest.raises(ArtifactError, match=r"task kind \(classification\) .* none of today's"):
        prompts.measure(
            prompt_toys.params(**asked), inputs | {"data": tmp_path / "other"}, context, model, tmp_path / "x.parquet"
        )


def test_passages_are_shown_and_an_index_that_is_damaged_is_told(
    inputs: dict[str, Path], tmp_path: Path, context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.core import prompt_retrieval, retrieval

    class Fake:
        def search(self, query: str, count: int) -> list[Any]:
            return [retrieval.Passage(str(n), "d", f"t{n}", f"{query}\n" + "w " * 300, None, 1.0, 1.0, 0, 1, 1)
                    for n in range(count)]  # fmt: skip

    with pytest.raises(ArtifactError, match="dvc repro rag"):
        run(inputs, tmp_path / "out", context, tasks=("kind",), strategies=("zero_shot", "retrieval"))
    with pytest.raises(ParamsError, match="retrieval needs an index, and the data have no knowledge"):
        prompt_retrieval.finder(tmp_path, 2)
    monkeypatch.setattr(retrieval.Index, "open", lambda folder: Fake())
    found = prompt_retrieval.finder(inputs["rag"], 2)("area of w")
    assert [one[:13] for one in found] == ["t0: area of w", "t1: area of w"] and all(len(one) < 410 for one in found)
    with monkeypatch.context() as patched:
        named = retrieval.Passage("c", "d", "t\n\n[2] Label: a", "text", None, 1.0, 1.0, 0, 1, 1)
        patched.setattr(Fake, "search", lambda own, query, count: [named])
        line = "t [2] Label: a: text"
        assert prompt_retrieval.finder(inputs["rag"], 1)("w") == [line], "a title writes no line of the prompt"
    metrics = run(inputs, tmp_path / "out", context, tasks=("kind",), strategies=("zero_shot", "retrieval"))
    assert metrics["kind/retrieval/tokens"] > 2 * metrics["kind/zero_shot/tokens"]
    told = "kind, retrieval, sft: 6 of 6 questions had no room for 2 passages (prompts.max_prompt_tokens: 480)"
    assert any(told in one for one in context.samples)
    context.samples.clear()
    run(inputs, tmp_path / "out", context, tasks=("kind",), strategies=("zero_shot", "retrieval"), passages=1)
    assert not any("no room" in one for one in context.samples)


def test_a_prompt_of_a_task_that_is_not_there_or_of_another_kind_is_told(
    inputs: dict[str, Path], tmp_path: Path, context: StageContext
) -> None:
    own = Path(shutil.copytree(FILES, tmp_path / "prompts"))
    told = yaml.safe_load((FILES / "entailment-plain.yaml").read_text())
    for name, task in (("typo", "fitz"), ("other-kind", "kind"), ("right", "fits"), ("not-asked", "pick")):
        (own / f"{name}.yaml").write_text(yaml.safe_dump(told | {"name": name, "task": task}))
    run(inputs | {"mlflow/prompts": own}, tmp_path / "out", context, tasks=("kind", "fits"))
    assert [one for one in context.samples if "is not used" in one] == [
        "warning: mlflow/prompts/other-kind.yaml is not used: task kind is of kind classification",
        "warning: mlflow/prompts/typo.yaml is not used: the data have no task fitz",
    ]


def test_a_model_whose_template_takes_no_system_text_is_told_before_any_is_asked(
    inputs: dict[str, Path], tmp_path: Path, context: StageContext
) -> None:
    own = Path(shutil.copytree(inputs["sft"], tmp_path / "sft"))
    template = own / "model/chat_template.jinja"
    template.write_text(NO_SYSTEM + template.read_text())
    told = r"role: mlflow/prompts/classification-role\.yaml has a system text; model sft: .*role not supported"
    with pytest.raises(ParamsError, match=told):
        run(inputs | {"sft": own}, tmp_path / "out", context, tasks=("kind",), strategies=("zero_shot", "role"))
    assert not list(prompt_calls.calls(context).glob("*.json"))
    run(inputs | {"sft": own}, tmp_path / "out", context, tasks=("kind",))


def test_examples_that_do_not_fit_are_left_out_and_told(
    inputs: dict[str, Path], tmp_path: Path, context: StageContext
) -> None:
    asked: dict[str, Any] = {"tasks": ("kind",), "strategies": ("zero_shot", "few_shot")}
    metrics = run(inputs, tmp_path / "out", context, **asked, examples=9, max_prompt_tokens=200)
    assert 0 < metrics["kind/few_shot/examples"] < 9
    assert any("had no room for 9 examples" in one and "max_prompt_tokens: 200" in one for one in context.samples)
    with pytest.raises(DataError, match=r"row \w+: \d+ tokens without an example, and there is room for 16"):
        run(inputs, tmp_path / "out", context, **asked, max_prompt_tokens=16)


def test_rows_that_are_too_long_are_passed_over_and_told(
    inputs: dict[str, Path], tmp_path: Path, context: StageContext
) -> None:
    def longer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row | {"text": row["text"] + " area" * 200 * (number < 9)} for number, row in enumerate(rows)]

    long = changed_table(inputs, tmp_path / "a", "kind", "test", longer)
    asked: dict[str, Any] = {"tasks": ("kind",), "max_prompt_tokens": 150, "test_examples": 3}
    with pytest.raises(DataError, match="there is room for 150"):
        run(long, tmp_path / "out", context, **asked)
    run(long, tmp_path / "out", context, **asked, too_long="drop")
    table = pq.read_table(tmp_path / "out/evaluation.parquet").to_pandas()
    assert set(table.id) == {"kind:test9", "kind:test10", "kind:test11"}
    assert any("rows are longer than half of prompts.max_prompt_tokens" in one for one in context.samples)
    with pytest.raises(DataError, match="no validation rows to ask; all are longer than half"):
        run(long, tmp_path / "out", context, **asked | {"max_prompt_tokens": 16}, too_long="drop")


@pytest.mark.parametrize(
    ("changed", "kind", "told"),
    [
        ({"tasks": ("absent",)}, ParamsError, "absent: the data have no such task; there are: close, fits"),
        ({"strategies": ("zero_shots",)}, ValidationError, "Input should be 'zero_shot'"),
        ({"strategies": ("role",)}, ValidationError, "zero_shot is missing"),
        ({"strategies": ("zero_shot", "zero_shot")}, ValidationError, "named twice"),
        ({"search": {"budget": 20}}, ValidationError, "search.budget: 20; accepted: 0"),
        ({"models": ("dpo",)}, ValidationError, "Input should be 'sft' or 'ppo'"),
    ],
)
def test_dials(
    changed: dict[str, Any],
    kind: type[Exception],
    told: str,
    inputs: dict[str, Path],
    tmp_path: Path,
    context: StageContext,
) -> None:
    with pytest.raises(kind, match=told):
        run(inputs, tmp_path / "out", context, **changed)


def changed_table(inputs: dict[str, Path], place: Path, task: str, side: str, change: Any) -> dict[str, Path]:
    """The inputs with one table changed."""
    shutil.copytree(inputs["data"] / "tasks" / task, place / "tasks" / task)
    file = place / "tasks" / task / f"{side}.parquet"
    table = pq.read_table(file)
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), table.schema), file)
    return inputs | {"data": place}


def test_tables_that_cannot_be_asked(inputs: dict[str, Path], tmp_path: Path, context: StageContext) -> None:
    empty = changed_table(inputs, tmp_path / "a", "kind", "train", lambda rows: [])
    with pytest.raises(DataError, match="few_shot shows training rows; task kind has none"):
        run(empty, tmp_path / "out", context, strategies=("zero_shot", "few_shot"))
    assert run(empty, tmp_path / "out", context)["tasks"] == 1.0, "without examples no training row is needed"
    one = changed_table(
        inputs, tmp_path / "b", "pick", "test", lambda rows: [r | {"choices": ["a"], "label": 0} for r in rows]
    )
    with pytest.raises(DataError, match=r"pick/test.parquet, row test\d+ \(toy, row \d+\): 1 choices; accepted"):
        run(one, tmp_path / "out", context)
    none = changed_table(inputs, tmp_path / "c", "kind", "test", lambda rows: [])
    with pytest.raises(DataError, match="kind: no test rows"):
        run(none, tmp_path / "out", context)
    (tmp_path / "d").mkdir()
    assert run(inputs | {"data": tmp_path / "d"}, tmp_path / "nothing", context) == {"tasks": 0.0}
    (tmp_path / "e").mkdir()
    role = yaml.safe_load((FILES / "choice-role.yaml").read_text())
    (tmp_path / "e/choice-role.yaml").write_text(yaml.safe_dump(role))
    with pytest.raises(ParamsError, match="no prompt of kind classification or task kind has strategy zero_shot"):
        run(inputs | {"mlflow/prompts": tmp_path / "e"}, tmp_path / "out", context, tasks=("kind",))
    (tmp_path / "e/choice-role.yaml").write_text(
        yaml.safe_dump(role | {"template": "{{ context }} {{ options }} {{ x }}"})
    )
    with pytest.raises(UserError, match="choice-role.yaml: .*unknown variable {{ x }}"):
        prompt_files.load(tmp_path / "e")


def test_what_is_written_is_read_again(inputs: dict[str, Path], tmp_path: Path, context: StageContext) -> None:
    run(inputs, tmp_path / "out", context, tasks=("pick",), strategies=("zero_shot",))
    task, who, use, prior, labels = prompts_card.read(tmp_path / "out/models/pick")
    told = yaml.safe_load((tmp_path / "out/models/pick/prompt.yaml").read_text())
    assert (task, who, use.strategy, prior) == ("pick", "sft", "zero_shot", [])
    assert told["columns"] == ["context", "choices"] and told["labels"] == [] and labels == ()
    assert use.version == prompt_files.load(FILES)["choice-plain"].version and use.pool == ()
    assert json.dumps(told)  # plain values only
