"""An assistant and an index behind MLflow, in another process and folder, say what they say here."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path

import assistants
import elsewhere
import pytest

from pipelines.core import assistant, retrieval, serving, versions
from pipelines.core.generate import Sampling


@pytest.mark.parametrize("packed", [False, True])
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
