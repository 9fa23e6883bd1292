"""Stage `answers` on models of two blocks: what it publishes and measures, where it goes on, what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from assistants import talkative
from models import NO_SYSTEM, tokenizer
from word_index import WordIndex

from pipelines import answers
from pipelines.core import (
    answers_generation,
    artifacts,
    assistant,
    citing,
    gates,
    grounding,
    int8,
    retrieval,
    sampling,
)
from pipelines.core.context import StageContext, Stopped
from pipelines.core.errors import ArtifactError, DataError, ParamsError
from pipelines.core.params.answers import AnswersParams
from pipelines.core.policy import ModelPolicy
from pipelines.tokenizer import CHAT_TEMPLATE

TINY: dict[str, Any] = {
    "seed": 1, "models": ["base", "sft", "student", "int8"], "style": "plain", "passages": 2, "budget": 240,
    "kinds": [], "questions": 6, "validation_questions": 3, "unanswerable": 3, "max_new_tokens": 8,
    "too_long": "refuse", "samples": 2,
}  # fmt: skip
SCHEMA = pa.schema([*((name, pa.string()) for name in ("id", "group", "kind", "query", "target")),
                    ("answers", pa.list_(pa.string()))])  # fmt: skip
FILES = {"assistant", "evaluation.parquet", "answers.parquet", "samples.md"}


def query(number: int, split: str, **changes: Any) -> dict[str, Any]:
    asked = f"what is shape number{number} of {split}?"
    row = {"id": f"{split}{number}", "group": f"g{number // 2}", "kind": "what", "query": asked}
    return {**row, "target": f"{split}-{number}", "answers": [f"area{number} of {split} rows"], **changes}


def document(number: int, split: str) -> dict[str, Any]:
    text = f"Return the area{number} of {split} rows for number{number}.\n\nIt is a shape, as others are."
    url = f"shapes/{split}.py#L{number + 10}"
    return {"id": f"{split}-{number}", "title": f"shapes.number{number} > Returns", "text": text, "url": url}


def write_queries(data: Path, split: str, rows: list[dict[str, Any]]) -> None:
    place = data / "queries" / f"{split}.parquet"
    place.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), place)


@pytest.fixture(autouse=True)
def _word_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "Index", WordIndex)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    known = tokenizer()
    known.chat_template = CHAT_TEMPLATE
    for stage, depth in (("pretrain", 2), ("sft", 2), ("ppo", 2), ("distill", 1)):
        talkative(known, depth).save_pretrained(root / stage / "model")
        known.save_pretrained(root / stage / "model")
    small = root / "quantize/models"
    int8.quantize(talkative(known, 2)).save_pretrained(small / "int8")
    known.save_pretrained(small / "int8")
    shutil.copytree(small / "int8", small / "reward-int8")
    config = json.loads((small / "int8/config.json").read_text())
    (small / "reward-int8/config.json").write_text(json.dumps(config | {"reward_mean": 0.5}))
    for split in ("validation", "test"):
        write_queries(root / "data", split, [query(number, split) for number in range(8)])
    every = [document(number, split) for split in ("validation", "test") for number in range(8)]
    artifacts.write_json(root / "rag/index/documents.json", every)
    artifacts.write_json(root / "rag/threshold.json", {"threshold": None})
    return {name: root / name for name in ("data", "rag", "pretrain", "sft", "ppo", "distill", "quantize")}


@pytest.fixture
def inputs(made: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Inputs whose data and index a test may change."""
    own = {name: Path(shutil.copytree(made[name], tmp_path / "in" / name)) for name in ("data", "rag")}
    return made | own


def run(
    inputs: dict[str, Path], root: Path, context: StageContext | None = None, **changes: Any
) -> tuple[dict[str, float], Path, StageContext]:
    out = root / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    context = context or StageContext(stage="answers", root=root, fingerprint="f" * 64)
    return answers.run(AnswersParams(**TINY | changes), inputs, out, context), out, context


def copying(monkeypatch: pytest.MonkeyPatch, clever: str = "sft", mark: str = "") -> None:
    """One model says the first sentence of the first passage that it is shown; all others, and it alone, say `rows`."""

    def say(one: answers_generation.Speaker, asked: list[list[int]], *_: Any) -> list[str]:
        texts = [one.tokenizer.decode(ids) for ids in asked]
        return [
            citing.sentences(text.partition("\n> ")[2])[0] + mark if one.name == clever and "\n> " in text else "rows"
            for text in texts
        ]

    monkeypatch.setattr(answers_generation, "say", say)


def test_it_publishes_an_assistant_that_says_what_was_measured(made: dict[str, Path], tmp_path: Path) -> None:
    metrics, out, context = run(made, tmp_path)
    assert {place.name for place in out.iterdir()} == FILES
    assert {place.name for place in (out / "assistant").iterdir()} == {"index", "model", "assistant.json", "README.md"}
    assert set(metrics) >= answers.METRICS | {"int8/answer_score_oracle", "student/citation_recall"}
    always = {key for key in answers.OPTIONAL if "*" not in key and not key.endswith("_own")}
    assert set(metrics) >= always, "what a gate may ask for is measured wherever there is an index"
    assert all(any(fnmatchcase(key, one) for one in answers.METRICS | answers.OPTIONAL) for key in metrics)
    rows = pd.read_parquet(out / "evaluation.parquet")
    assert set(rows.columns) == answers.SCORES | {"id", "group"}
    assert rows["answerable"].tolist() == [1.0] * 6 + [0.0] * 3
    assert metrics["answer_score"] == pytest.approx(rows["answer"].sum() / 6)
    table = pd.read_parquet(out / "answers.parquet")
    assert len(table) == 4 * 3 * 6
    card = (out / "assistant/README.md").read_text()
    assert "the best of base, sft, student, int8 on 3 questions" in card and "No threshold" in card

    chosen = card.partition("with the model `")[2].partition("`")[0]
    opened = assistant.Assistant.open(out / "assistant")
    asked = {row["id"]: row for row in pq.read_table(made["data"] / "queries/test.parquet").to_pylist()}
    for row in table[(table["model"] == chosen) & (table["way"] == "retrieval")].to_dict("records"):
        reply = opened.answer(asked[row["id"]]["query"])
        assert reply.text == row["answer"] and reply.refused == row["refused"]
        assert [source.number for source in reply.sources] == [1, 2]
        number = int(row["id"].removeprefix("test"))
        assert (reply.sources[0].url, reply.sources[0].line) == (f"shapes/test.py#L{number + 10}", number + 10)
    page = (out / "samples.md").read_text()
    assert page.count("**Question:**") == page.count("**Question that nothing answers:**") == 2
    assert "`shapes.number" in page and page in context.samples


def test_the_same_bytes_however_often_it_is_killed(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_generation, "BATCH", 16)
    _, whole, _ = run(made, tmp_path / "a")
    real, calls = sampling.sample, 0
    context = StageContext(stage="answers", root=tmp_path / "b", fingerprint="f" * 64)

    def counted(*given: Any, **how: Any) -> sampling.Samples:
        nonlocal calls
        calls += 1
        context.signal_number = signal.SIGTERM if calls in (3, 9) else 0
        return real(*given, **how)

    monkeypatch.setattr(sampling, "sample", counted)
    for _ in range(2):
        with pytest.raises(Stopped):
            run(made, tmp_path / "b", context)
    context.signal_number = 0
    _, again, _ = run(made, tmp_path / "b", context)
    assert artifacts.content_hash(again) == artifacts.content_hash(whole)
    # A model's 21 prompts are two batches, and what nothing answers is one.
    assert calls == 4 * 2 + 1, "a batch that was finished is not answered again"
    assert "resuming after batch 1 of 2 of sft" in context.samples


def test_figures_of_a_model_that_copies_what_it_reads(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying(monkeypatch)
    metrics, out, _ = run(made, tmp_path)
    assert json.loads((out / "assistant/assistant.json").read_text())["passages"] == 2
    assert "with the model `sft`" in (out / "assistant/README.md").read_text()
    # "Return the area3 of test rows for number3." against "area3 of test rows": 4 shared words of 7 and 4.
    for key in ("answer_score", "sft/answer_score", "sft/answer_score_validation", "answer_score_oracle_high"):
        assert metrics[key] == pytest.approx(2 * 4 / 11)
    for key in ("answer_score_closed_book", "base/answer_score", "int8/answer_score_oracle"):
        assert metrics[key] == pytest.approx(2 * 1 / 5)
    assert metrics["gain_over_closed_book"] == pytest.approx(8 / 11 - 2 / 5)
    assert metrics["gain_over_closed_book_low"] < 0, "so few questions show nothing"
    assert metrics["citation_precision"] == metrics["citation_recall"] == metrics["groundedness"] == 1.0
    assert metrics["own_citations"] == metrics["dropped_citations"] == metrics["false_refusal_rate"] == 0.0
    assert "citation_precision_own" not in metrics
    assert metrics["refusal_j"] == 0.0
    assert metrics["false_answer_rate"] == 1.0, "without a threshold everything is answered"


def test_marks_of_the_models_own_are_told_apart(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying(monkeypatch, mark=" [2, 5]")
    metrics, out, _ = run(made, tmp_path)
    assert metrics["own_citations"] == metrics["dropped_citations"] == 1.0
    assert metrics["citation_precision"] == metrics["citation_recall_own"] == 0.0, "passage 2 is another document"
    assert metrics["answer_score"] == pytest.approx(2 * 4 / 11), "marks are not scored"
    said = pd.read_parquet(out / "answers.parquet").query("model == 'sft' and way == 'retrieval'")
    assert all(text.endswith(". [2]") for text in said.answer)


def test_below_the_threshold_it_refuses(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question shares all its words but `what` with its own document, and one less with any other."""
    copying(monkeypatch)
    artifacts.write_json(inputs["rag"] / "threshold.json", {"threshold": 0.75})
    metrics, out, _ = run(inputs, tmp_path)
    assert metrics["false_refusal_rate"] == metrics["false_answer_rate"] == 0.0 and metrics["refusal_j"] == 1.0
    assert metrics["answer_score"] == pytest.approx(2 * 4 / 11)
    assert f"`{grounding.REFUSAL}`" in (out / "samples.md").read_text()
    assert "cosine of 0.750" in (out / "assistant/README.md").read_text()
    artifacts.write_json(inputs["rag"] / "threshold.json", {"threshold": 2.0})
    metrics, _, _ = run(inputs, tmp_path)
    assert metrics["false_refusal_rate"] == 1.0 and metrics["answer_score"] == metrics["citation_recall"] == 0.0
    assert metrics["sft/answer_score_oracle"] > 0.5, "the right document is shown whatever its relevance"


def test_questions_that_nothing_answers(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's own first; without them a hidden document, unless another spells the answer."""
    copying(monkeypatch)
    rows = [query(number, "test") for number in range(3)]
    rows[1]["answers"] = ["A shape, as others are"]  # every document says so
    write_queries(inputs["data"], "test", rows)
    _, out, _ = run(inputs, tmp_path)
    assert set(pd.read_parquet(out / "evaluation.parquet").id[3:]) == {"test0:hidden", "test2:hidden"}
    own = query(9, "test", id="mine", target=None, answers=None)
    write_queries(inputs["data"], "test", [*rows, own])
    _, out, _ = run(inputs, tmp_path)
    assert pd.read_parquet(out / "evaluation.parquet").id[3:].tolist() == ["mine"]


def test_a_champion_is_measured_on_the_same_questions(
    made: dict[str, Path], inputs: dict[str, Path], tmp_path: Path
) -> None:
    """With its own index, even where that has other documents than today's."""
    _, out, context = run(inputs, tmp_path)
    ours = pd.read_parquet(out / "evaluation.parquet")
    champion = out / "assistant"
    policy = ModelPolicy.model_validate({
        "stage": "answers", "model": "assistant", "promote": "auto",
        "gate": [{"score": "answer", "per": "answerable", "lower_is_better": False, "not_worse_than": "champion",
                  "margin": 0.1}],
    })  # fmt: skip
    for documents in (None, [document(number, "test") for number in range(2)]):
        if documents is not None:
            artifacts.write_json(champion / "index/documents.json", documents)
        answers.measure(AnswersParams(**TINY), inputs, context, champion, tmp_path / "rows.parquet")
        theirs = pd.read_parquet(tmp_path / "rows.parquet")
        same = [
            gates.rows_hash(place, policy, answers.SCORES)
            for place in (out / "evaluation.parquet", tmp_path / "rows.parquet")
        ]
        assert same[0] == same[1]
        assert (theirs["answer"].tolist() == ours["answer"].tolist()) or documents is not None


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({"models": ["sft", "int4"]}, ParamsError, "no model int4; there are: base, sft, ppo, student, int8"),
        ({"models": ["reward-int8"]}, ParamsError, "no model reward-int8"),
        (
            {"kinds": ["which"]},
            DataError,
            "no question of kind which with accepted answers; there are answers for kind what",
        ),
        ({"max_new_tokens": 500}, DataError, "queries, id validation.*model base: .*leaves .*a passage needs 32"),
    ],
)
def test_what_is_refused(
    made: dict[str, Path], tmp_path: Path, changes: dict[str, Any], kind: type[Exception], told: str
) -> None:
    with pytest.raises(kind, match=told):
        run(made, tmp_path, **changes)


def test_a_model_without_a_place_for_a_system_text_is_refused_by_name(made: dict[str, Path], tmp_path: Path) -> None:
    own = Path(shutil.copytree(made["sft"], tmp_path / "sft"))
    (own / "model/chat_template.jinja").write_text(NO_SYSTEM + CHAT_TEMPLATE)
    told = r"answers\.models: sft: the tokenizer's chat template refuses this chat: System role not supported"
    with pytest.raises(ParamsError, match=told):
        run(made | {"sft": own}, tmp_path)


def test_data_and_index_that_do_not_serve(inputs: dict[str, Path], tmp_path: Path) -> None:
    artifacts.write_json(inputs["rag"] / "index/documents.json", [document(1, "validation")])
    with pytest.raises(DataError, match=r"id validation\d: its target 'validation-\d' is not in the index"):
        run(inputs, tmp_path)
    (inputs["rag"] / "threshold.json").unlink()
    with pytest.raises(ArtifactError, match="rag/threshold.json cannot be read"):
        run(inputs, tmp_path)
    write_queries(inputs["data"], "validation", [query(1, "validation", answers=None)])
    artifacts.write_json(inputs["rag"] / "threshold.json", {"threshold": None})
    with pytest.raises(
        DataError, match="queries/validation has no question with accepted answers. Give some: .*answers"
    ):
        run(inputs, tmp_path)
    shutil.rmtree(inputs["data"] / "queries")
    with pytest.raises(ArtifactError, match="the data have no table queries"):
        run(inputs, tmp_path)


def test_questions_that_are_too_long_are_dropped_where_that_is_asked(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying(monkeypatch)
    long = query(9, "test", query="what is shape " * 200)
    write_queries(inputs["data"], "test", [long, *(query(number, "test") for number in range(2))])
    _, out, _ = run(inputs, tmp_path, too_long="drop")
    assert set(pd.read_parquet(out / "evaluation.parquet").id[:2]) == {"test0", "test1"}
    with pytest.raises(DataError, match="queries, id test9, model base: the question takes"):
        run(inputs, tmp_path)
    write_queries(inputs["data"], "test", [long])
    with pytest.raises(DataError, match="queries, id test9"):
        run(inputs, tmp_path, too_long="drop")


def test_without_knowledge_there_is_no_assistant(inputs: dict[str, Path], tmp_path: Path) -> None:
    shutil.rmtree(inputs["rag"] / "index")
    metrics, out, _ = run(inputs, tmp_path)
    assert metrics == dict.fromkeys(answers.METRICS, 0.0)
    assert [place.name for place in out.iterdir()] == ["README.md"]
    assert "the data have no knowledge" in (out / "README.md").read_text()


def test_models_are_named_once() -> None:
    with pytest.raises(ValueError, match="each model once"):
        AnswersParams(**TINY | {"models": ["sft", "sft"]})
