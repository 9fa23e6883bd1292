"""The stage on a two-layer model: what it writes, who ranks, that it resumes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from models import model, tokenizer, windowed

from pipelines import feedback
from pipelines.core import artifacts, completions, judges, ranking_tasks
from pipelines.core.context import StageContext, Stopped
from pipelines.core.errors import ArtifactError, DataError
from pipelines.core.params.feedback import FeedbackParams
from pipelines.tokenizer import CHAT_TEMPLATE

TINY: dict[str, Any] = {
    "seed": 1, "labeler": "reference", "judge": "overlap", "rankings": None, "labelers": ["ada", "ben", "eve"],
    "shared_share": 0.5, "prompts": 24, "test_prompts": 12, "completions": 4, "max_new_tokens": 6,
    "max_prompt_tokens": 64, "too_long": "refuse", "temperature": 1.0, "samples": 2,
}  # fmt: skip
SPLITS = ("train", "validation", "test")


def write_table(place: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), place)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    known = tokenizer()
    known.chat_template = CHAT_TEMPLATE
    for part in (known, model(known, depth=2, length=128)):
        part.save_pretrained(root / "sft/model")
    schema = pa.schema([(name, pa.string()) for name in ("id", "group", "prompt", "reference")])
    for split, count in zip(SPLITS, (40, 4, 16), strict=True):
        rows = [
            {"id": f"{split}{n}", "group": f"g{n // 2}", "prompt": f"area of {split} {n}?", "reference": f"w * h * {n}"}
            for n in range(count)
        ]
        write_table(root / f"data/prompts/{split}.parquet", rows, schema)
    return {"data": root / "data", "sft": root / "sft"}


def run(
    inputs: dict[str, Path], root: Path, context: StageContext | None = None, **changes: Any
) -> tuple[dict[str, float], Path, StageContext]:
    out = root / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    context = context or StageContext(stage="feedback", root=root, fingerprint="f" * 64)
    return feedback.run(FeedbackParams.model_validate(TINY | changes), inputs, out, context), out, context


def comparisons(out: Path, split: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(out / "comparisons" / f"{split}.parquet").to_pylist()
    return rows


def test_files_metrics_and_rankings(inputs: dict[str, Path], tmp_path: Path) -> None:
    metrics, out, context = run(inputs, tmp_path)
    assert set(metrics) == feedback.METRICS | feedback.OPTIONAL
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {
        *(f"comparisons/{split}.parquet" for split in SPLITS),
        *("samples/test.parquet", "tasks.jsonl", "evaluation.parquet", "samples.md"),
    }
    tasks = {one.id: one for one in ranking_tasks.read_tasks((out / "tasks.jsonl").read_text(), "tasks")}
    assert len(tasks) == 36
    seen: dict[str, set[str]] = {}
    for split in ("train", "test"):
        for row in comparisons(out, split):
            assert ranking_tasks.task(row["prompt"], row["responses"]).id in tasks
            assert row["id"].startswith(split) and row["id"].endswith(row["labeler"])
            assert len(row["responses"]) == len(row["ranks"]) == len(row["gold"]) == 4
            number = row["prompt"].removesuffix("?").split()[-1]
            gold = [judges.gold("overlap", row["prompt"], text, f"w * h * {number}") for text in row["responses"]]
            assert row["gold"] == gold
            seen.setdefault(row["prompt"], set()).add(row["labeler"])
    assert len(seen) == 36 and {len(names) for names in seen.values()} == {1, 3}
    assert comparisons(out, "validation") == []
    rows = pd.read_parquet(out / "evaluation.parquet")
    assert set(rows.columns) == {"id", "group"} | feedback.SCORES
    assert rows["pairs"].min() > 0, "a weight of a ratio"
    assert rows["pairs"].sum() == metrics["pairs_test"]
    assert rows["longer_wins"].sum() / rows["pairs"].sum() == pytest.approx(metrics["longer_wins"])
    samples = pq.read_table(out / "samples/test.parquet").to_pylist()
    assert len(samples) == 12 and all(row["id"].startswith("test") for row in samples)
    assert metrics["gold_mean"] == pytest.approx(sum(sum(row["gold"]) for row in samples) / 48)
    assert metrics["labelers"] == 3 and metrics["completions_per_prompt"] == 4 and 0 < metrics["ties_share"] < 1
    assert metrics["agreement_low"] <= metrics["agreement"] <= metrics["agreement_high"]
    assert "Ranked by" in (out / "samples.md").read_text() and context.samples[-1].startswith("# Rankings")
    text = "".join(path.read_text() for path in out.rglob("*") if path.suffix in (".md", ".jsonl"))
    assert str(tmp_path) not in text and "new_tokens_per_second" in context.measured


def test_same_seed_same_bytes_other_seed_other_answers(inputs: dict[str, Path], tmp_path: Path) -> None:
    hashes = [artifacts.content_hash(run(inputs, tmp_path / str(n), seed=seed)[1]) for n, seed in enumerate((1, 1, 2))]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_stopped_run_goes_on_after_its_last_batch(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions, "BATCH_PROMPTS", 8)
    _, undisturbed, _ = run(inputs, tmp_path / "whole")
    stopped = StageContext(stage="feedback", root=tmp_path / "cut", fingerprint="f" * 64)
    progress = stopped.progress

    def note(step: int, total: int | None = None, **shown: float | str) -> None:
        progress(step, total, **shown)
        stopped.signal_number = 15 if step >= 14 else 0

    monkeypatch.setattr(stopped, "progress", note)
    with pytest.raises(Stopped):
        run(inputs, tmp_path / "cut", stopped)
    assert not list((tmp_path / "cut/out").iterdir())
    loads = []
    monkeypatch.setattr(completions.artifacts, "write_json", counted(completions.artifacts.write_json, loads))
    _, out, context = run(inputs, tmp_path / "cut")
    assert "resuming after batch 2 of 5" in context.samples[0] and len(loads) == 3
    assert artifacts.content_hash(out) == artifacts.content_hash(undisturbed)


def test_answers_come_back_to_their_own_prompts(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are by length, prompts are not: here a prompt's answer is the prompt itself."""
    from pipelines.core import sampling

    def echo(_: Any, prompts: list[list[int]], *, count: int, **__: Any) -> sampling.Samples:
        return sampling.Samples([[prompt] * count for prompt in prompts], [], [[True] * count] * len(prompts))

    monkeypatch.setattr(sampling, "sample", echo)
    monkeypatch.setattr(completions, "BATCH_PROMPTS", 3)
    prompts = [completions.Prompt(f"p{n}", "g", "test", "t", None, [40 + n] * (1 + n * 7 % 11)) for n in range(10)]
    context = StageContext(stage="feedback", root=tmp_path, fingerprint="f" * 64)
    found = completions.complete(FeedbackParams.model_validate(TINY), prompts, inputs["sft"] / "model", context)
    assert [one.prompt for one in found] == prompts
    assert [one.tokens for one in found] == [[len(prompt.ids)] * 4 for prompt in prompts]
    known = tokenizer()
    assert [one.responses[0] for one in found] == [known.decode(prompt.ids).strip() for prompt in prompts]


def counted(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        calls.append(arguments[0])
        return function(*arguments)

    return call


def test_people_rank_what_was_exported(inputs: dict[str, Path], tmp_path: Path) -> None:
    given: dict[str, Any] = {"labeler": "file", "rankings": "ranked.jsonl", "labelers": []}
    with pytest.raises(
        DataError, match=r"ranked\.jsonl: no such file yet .* 36 tasks to rank are in .*tasks\.jsonl"
    ) as caught:
        run(inputs, tmp_path, **given)
    assert not list((tmp_path / "out").iterdir()), "nothing half-written"
    documents = tmp_path / ".sluice/documents/feedback"
    assert str(documents) in str(caught.value)
    fields = list(json.loads((documents / "argilla.json").read_text())[0]["fields"])
    assert f"text fields {fields[0]} and {fields[1]} to {fields[-1]}, and a ranking question" in str(caught.value)
    tasks = ranking_tasks.read_tasks((documents / "tasks.jsonl").read_text(), "t")
    for name in ("label-studio.json", "argilla.json"):
        assert len(json.loads((documents / name).read_text())) == len(tasks) == 36
    lines = [
        {"task": one.id, "labeler": who, "scores": [len(text) for text in one.responses]}
        for one in tasks[:20]
        for who in ("Ada", "Ben")
    ]
    place = tmp_path / "ranked.jsonl"
    place.write_text("".join(json.dumps(line) + "\n" for line in lines))
    edited = StageContext(stage="feedback", root=tmp_path, fingerprint="a" * 64)  # the file is an input now
    metrics, out, context = run(inputs, tmp_path, edited, **given)
    assert context.samples[0] == "36 prompts: the answers that were sampled for the tasks", "what people ranked"
    assert "40 rankings of 20 of 36 tasks" in context.samples
    assert metrics["comparisons_train"] + metrics["comparisons_test"] == 40 and metrics["labelers"] == 2
    assert metrics["longer_wins"] == metrics["agreement"] == metrics["length_only_accuracy"] == 1.0
    row = comparisons(out, "train")[0]
    assert row["labeler"] in ("Ada", "Ben") and row["gold"] is not None

    for changed, told in (
        ([line | {"scores": [1, 1, 1, 1]} for line in lines], "all of them ties; accepted: at least one pair"),
        ([line for line in lines if line["task"] == tasks[0].id], "accepted: at least one of each"),
        ([*lines, lines[3]], "line 41, task .* second ranking by Ben; .* first is .*ranked.jsonl, line 4"),
    ):
        place.write_text("".join(json.dumps(line) + "\n" for line in changed))
        with pytest.raises(DataError, match=told):
            run(inputs, tmp_path, **given)
    place.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=r"\d+ of 40 rankings are of other answers .*seed"):
        run(inputs, tmp_path / "other", **given | {"rankings": str(place), "seed": 2})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[\n\xff]", r"ranked\.json, line 2: found byte 0xff; accepted: UTF-8"),
        (b"\xef\xbb\xbf[]", "0 rankings of training prompts"),  # a byte order mark is no part of the text
    ],
)
def test_encodings_of_rankings(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "ranked.json").write_bytes(content)
    given = FeedbackParams.model_validate(TINY | {"labeler": "file", "rankings": "ranked.json", "labelers": []})
    context = StageContext(stage="feedback", root=tmp_path, fingerprint="f" * 64)
    with pytest.raises(DataError, match=told):
        list(feedback._people(given, [], context))


def write_comparisons(data: Path) -> None:
    schema = pa.schema(
        [(name, pa.string()) for name in ("id", "group", "prompt", "labeler")]
        + [("responses", pa.list_(pa.string())), ("ranks", pa.list_(pa.int32())), ("votes", pa.list_(pa.int32()))]
    )
    for split, count in zip(SPLITS, (9, 2, 5), strict=True):
        rows = [
            {
                "id": f"{split}{n}", "group": f"g{n}", "prompt": f"{split} {n}", "labeler": None if n else "ada",
                "responses": ["longer", "b", "c"][: 2 + n % 2], "ranks": [1, 2, 2][: 2 + n % 2],
                "votes": [3, 0] if n % 2 == 0 else None,
            }
            for n in range(count)
        ]  # fmt: skip
        write_table(data / f"comparisons/{split}.parquet", rows, schema)


def test_given_comparisons_are_taken_as_they_are(inputs: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(inputs["data"], data)
    write_comparisons(data)
    metrics, out, _ = run({**inputs, "data": data}, tmp_path, labeler="data")
    for split in SPLITS:
        stored = pq.read_table(data / f"comparisons/{split}.parquet").to_pylist()
        assert comparisons(out, split) == [row | {"gold": None} for row in stored]
    assert metrics["comparisons_train"] == 9 and metrics["pairs_test"] == 3 + 2 * 2
    assert metrics["longer_wins"] == 1.0 and metrics["labelers"] == 1 and not {"agreement"} & set(metrics)
    assert len(pq.read_table(out / "samples/test.parquet")) == 12 and 0 <= metrics["gold_mean"] <= 1
    assert not (out / "tasks.jsonl").exists()

    _, _, context = run({**inputs, "data": data}, tmp_path / "dial")
    assert "warning: the comparisons that data.sources give are not read" in context.samples[0], "a dial forgotten"

    # Without prompts nothing is sampled, and no model is needed.
    shutil.rmtree(data / "prompts")
    metrics, out, _ = run({"data": data, "sft": tmp_path / "nowhere"}, tmp_path, labeler="data")
    assert set(metrics) == feedback.METRICS
    assert not (out / "samples").exists()
    shutil.rmtree(data / "comparisons")
    with pytest.raises(ArtifactError, match="no table comparisons"):
        run({**inputs, "data": data}, tmp_path, labeler="data")


def test_too_long_prompts_and_prompts_without_reference(inputs: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(inputs["data"], data)
    place = data / "prompts/train.parquet"
    rows = pq.read_table(place).to_pylist()
    schema = pq.read_schema(place)
    rows[5]["prompt"] *= 20
    write_table(place, rows, schema)
    own = {**inputs, "data": data}
    everyone = {"prompts": 40}
    with pytest.raises(
        DataError, match=r"prompts/train, id train5: \d+ tokens; feedback.max_prompt_tokens accepts 64\. Raise"
    ):
        run(own, tmp_path, **everyone)
    metrics, out, context = run(own, tmp_path, **everyone, too_long="drop")
    told = "prompts/train: 1 were longer than feedback.max_prompt_tokens (64) and left out"
    assert metrics["dropped_too_long"] == 1 and told in context.samples[0]
    assert "train5" not in {row["id"].split("#")[0] for row in comparisons(out, "train")}
    with pytest.raises(DataError, match="every prompt is too long, first prompts/train, id train"):
        run(own, tmp_path, too_long="drop", max_prompt_tokens=3)
    with pytest.raises(ArtifactError, match="do not fit the SFT model's context of 128 tokens"):
        run(inputs, tmp_path / "long", max_new_tokens=120)
    windowed(inputs["sft"] / "model", tmp_path / "base/model", 30)
    with pytest.raises(ArtifactError, match=r"feedback.max_prompt_tokens .* do not fit the SFT model's context of 30"):
        run(inputs | {"sft": tmp_path / "base"}, tmp_path / "window", max_new_tokens=29)
    write_table(place, [row | {"reference": None} for row in rows], schema)
    with pytest.raises(DataError, match="prompts/train has no prompt with a reference, which judge: overlap needs"):
        run(own, tmp_path, too_long="drop")


def test_slots_need_no_reference(inputs: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "data"
    for split, count in zip(SPLITS, (24, 4, 12), strict=True):
        schema = pq.read_schema(inputs["data"] / f"prompts/{split}.parquet")
        rows = [
            {"id": f"{split}{n}", "group": f"g{n}", "prompt": f"name[h], near[w], food[{split} {n}]", "reference": None}
            for n in range(count)
        ]
        write_table(data / f"prompts/{split}.parquet", rows, schema)
    metrics, out, _ = run({**inputs, "data": data}, tmp_path, judge="slots")
    gold = [score for row in pq.read_table(out / "samples/test.parquet").to_pylist() for score in row["gold"]]
    assert set(gold) <= {0.0, 1 / 3, 2 / 3, 1.0} and metrics["gold_mean"] == pytest.approx(sum(gold) / len(gold))
    with pytest.raises(DataError, match="slots needs prompts that list attributes"):
        run(inputs, tmp_path / "plain", judge="slots")
    assert not list((tmp_path / "plain").rglob("batch-*.json")), "told before the first answer is sampled"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"labeler": "file"}, "labeler: file needs rankings: PATH"),
        ({"rankings": "a.jsonl"}, "no other labeler has one"),
        ({"labelers": []}, "at least one name in labelers"),
        ({"labelers": ["ada", "ada"]}, "must be different names"),
        ({"completions": 1}, "completions"),
        ({"completions": 10}, "completions"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_params_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        FeedbackParams.model_validate(TINY | changes)
