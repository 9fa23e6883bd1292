"""An assistant and an index behind MLflow, in another process and folder, say what they say here."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import assistants
import elsewhere
import pandas as pd
import pytest

from pipelines.core import (
    assistant,
    generate,
    retrieval,
    serving,
    serving_cells,
    serving_rag,
    serving_retriever,
    versions,
)
from pipelines.core.generate import Sampling


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_assistants_answers(packed: bool, tmp_path: Path) -> None:
    place = assistants.folder(tmp_path / "assistant", packed)
    questions = ["What is the area of shape 3?", "도형의 넓이는?"]
    asked = [{"question": question} for question in questions]
    said = elsewhere.ask(place, tmp_path, asked, [asked[0], {"question": " "}], {"temperature": 2.0, "seed": 5})
    opened = assistant.Assistant.open(place)
    for row, question in zip(said.rows, questions, strict=True):
        reply = opened.answer(question, sampling=Sampling(max_new_tokens=12, temperature=2.0, seed=5))
        assert row["answer"] == reply.text and row["refused"] is reply.refused
        assert json.loads(row["sources"]) == [pytest.approx(source._asdict()) for source in reply.sources]
    assert "row 1: the question is empty" in said.told


def test_an_indexs_passages(tmp_path: Path) -> None:
    place = assistants.folder(tmp_path / "assistant") / "index"
    asked = {"query": "area of shape 3"}
    said = elsewhere.ask(place, tmp_path, [asked], [asked, {"query": " "}], {"count": 3, "method": "bm25"})
    expected = retrieval.Index.open(place).search("area of shape 3", 3, method="bm25")
    found = json.loads(said.rows[0]["passages"])
    assert [one["chunk"] for one in found] == [one.chunk for one in expected] and len(found) == 3
    assert found[0] == pytest.approx(expected[0]._asdict())
    assert "row 1: the query is empty" in said.told


@pytest.mark.parametrize("empty", [None, float("nan")])
def test_an_empty_cell_is_no_text(empty: object) -> None:
    """MLflow lets one through; it must not be asked as "None" or "nan"."""
    answering, finding = serving_rag.RagModel(), serving_retriever.RetrieverModel()
    answering.cells = finding.cells = serving_cells
    reply = assistant.Reply("an answer", [], False, False, 0, {})
    answering.assistant = SimpleNamespace(
        settings=SimpleNamespace(max_new_tokens=1), generate=generate, answer=lambda question, sampling: reply
    )
    with pytest.raises(ValueError, match="row 1: column question holds (None|nan); accepted: a text"):
        answering.predict(None, pd.DataFrame({"question": ["what is w?", empty]}))
    finding.retrieval, finding.index = retrieval, SimpleNamespace(search=lambda query, count, method: [])
    with pytest.raises(ValueError, match="row 1: column query holds (None|nan); accepted: a text"):
        finding.predict(None, pd.DataFrame({"query": ["what is w?", empty]}))


def test_half_a_character_is_no_text() -> None:
    """JSON can spell it, no tokenizer reads it."""
    assert serving_cells.text("배열 🙂", 0, "question") == "배열 🙂"
    with pytest.raises(ValueError, match=r"row 3: column question holds '\\ud83d', half a character"):
        serving_cells.text(json.loads('"a \\ud83d"'), 3, "question")
    with pytest.raises(ValueError, match="row 2: column choices holds"):
        serving_cells.texts(["a", "\udc00"], 2, "choices")


def test_all_that_is_imported_by_name_lies_beside() -> None:
    """Also what the queries of the tests above do not reach."""
    beside = {Path(place).stem for place in serving.RETRIEVING}
    for place in serving.RETRIEVING:
        assert set(re.findall(r'_ours\("(\w+)"\)', Path(place).read_text())) <= beside, place


def test_what_they_need_is_pinned(tmp_path: Path) -> None:
    place = assistants.folder(tmp_path / "assistant")
    assert serving.known(place) and serving.known(place / "index") and not serving.known(tmp_path)
    for folder in (place, place / "index"):
        assert f"faiss-cpu=={version('faiss-cpu')}" in versions.requirements(serving.of(folder).needs)
    assert serving.of(place / "model").needs == ()
