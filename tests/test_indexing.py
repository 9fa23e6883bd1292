"""Index folders: the same bytes, the same as a rebuild after an update, and refusals that name what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from test_embedding import WORDS, tiny

from pipelines.core import embedding, indexing, near_chunks, nearest, retrieval
from pipelines.core.artifacts import content_hash
from pipelines.core.errors import DataError, ParamsError


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny(tmp_path_factory.mktemp("embedder") / "tiny"))


def documents(count: int = 60) -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    made = []
    for number in range(count):
        parts = [" ".join(draw.choice(WORDS, draw.integers(4, 30))) + "." for _ in range(3)]
        text = "\n\n".join(f"# part {at}\n\n{part}" for at, part in enumerate(parts))
        made.append({"id": f"d{number:03}", "title": f"title {number}", "text": text, "url": f"file.py#L{number}"})
    return made


def build(rows: list[dict[str, Any]], folder: Path, embedder: str, cache: Path | None = None, **more: Any) -> Any:
    settings = indexing.Settings(embedder=embedder, **{"size": 30, **more})
    return indexing.build(rows, folder, settings, cache=cache)


def test_the_folder_holds_what_it_says_and_verifies(embedder: str, tmp_path: Path) -> None:
    rows = documents()
    counts = build(rows, tmp_path / "a", embedder)
    manifest = retrieval.read_manifest(tmp_path / "a")
    assert counts.documents == 60 and counts.chunks > 60 and counts.vectors == counts.chunks == counts.embedded
    assert manifest["counts"] == {"documents": 60, "chunks": counts.chunks, "vectors": counts.chunks,
                                  "near_duplicates": counts.near_duplicates}  # fmt: skip
    assert manifest["embedder"]["name"] == "tiny"  # no path of this machine
    assert {path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*") if path.is_file()} == {
        "manifest.json", *manifest["files"]
    }  # fmt: skip
    found = pq.read_table(tmp_path / "a" / "chunks.parquet").to_pylist()
    texts = {row["id"]: row["text"] for row in rows}
    assert all(texts[chunk["document"]][chunk["start"] : chunk["end"]] == chunk["text"] for chunk in found)
    vectors = np.load(tmp_path / "a" / "vectors.npy")
    assert vectors.dtype == np.float16
    again = embedding.Embedder(Path(embedder)).embed([f"{found[7]['title']}\n{found[7]['text']}"])
    assert np.array_equal(vectors[found[7]["vector"]], again[0].astype(np.float16))
    indexing.verify(tmp_path / "a")


def test_the_same_documents_give_the_same_bytes_in_any_order(embedder: str, tmp_path: Path) -> None:
    rows = documents()
    build(rows, tmp_path / "a", embedder)
    build(rows[::-1], tmp_path / "b", embedder, tmp_path / "cache")
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")


def test_an_update_embeds_what_changed_and_equals_a_rebuild(embedder: str, tmp_path: Path) -> None:
    rows = documents()
    cache = tmp_path / "cache"
    build(rows, tmp_path / "a", embedder, cache)
    changed = [*rows[:20], {**rows[20], "text": rows[20]["text"] + "\n\nopen the socket"}, *rows[22:]]
    changed.append({"id": "new", "title": "new", "text": "sort numbers"})
    update = build(changed, tmp_path / "b", embedder, cache)
    rebuild = build(changed, tmp_path / "c", embedder)
    assert 2 <= update.embedded <= 4 and rebuild.embedded > 100
    assert content_hash(tmp_path / "b") == content_hash(tmp_path / "c")
    assert build(rows, tmp_path / "d", embedder, cache).embedded <= 4  # what an update left over is still known
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "d")


def test_a_killed_build_goes_on_and_a_broken_cache_is_made_anew(
    embedder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, cache = documents(), tmp_path / "cache"
    monkeypatch.setattr(indexing, "BATCH", 16)
    whole = build(rows, tmp_path / "a", embedder)

    def stop(done: int, total: int) -> None:
        if done >= 48:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        settings = indexing.Settings(embedder=embedder, size=30)
        indexing.build(rows, tmp_path / "b", settings, cache=cache, tell=stop)
    first, second, *_ = sorted(cache.rglob("*.npy"))
    first.write_bytes(first.read_bytes()[:-7])
    second.write_bytes(second.read_bytes().replace(b"), }", b")( }", 1))
    for path in cache.glob("spans-*.json"):
        path.write_text('{"half')
    resumed = build(rows, tmp_path / "b", embedder, cache)
    assert resumed.embedded == whole.embedded - 16
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")


def test_a_dial_leaves_later_chunks_without_vectors_but_not_without_words(embedder: str, tmp_path: Path) -> None:
    counts = build(documents(), tmp_path / "a", embedder, embedded_chunks=1)
    assert counts.vectors == 60 < counts.chunks
    table = pq.read_table(tmp_path / "a" / "chunks.parquet")
    assert [part == 0 for part in table["part"].to_pylist()] == [row >= 0 for row in table["vector"].to_pylist()]


@pytest.mark.parametrize("most", [1, None])
def test_vectors_are_of_what_a_document_says_not_of_its_signature(
    embedder: str, tmp_path: Path, most: int | None
) -> None:
    """A signature of several chunks, a short one before prose in the same chunk, and one that is all there is."""
    said = " ".join(WORDS[:6])
    many = ", ".join(f"{word}={number}" for number, word in enumerate(WORDS * 3))
    rows = [
        {"id": "a", "title": "m.long", "text": f"m.long({many})\n\n{said}"},
        {"id": "b", "title": "m.short", "text": f"m.short(x)\n\n{said}"},
        {"id": "c", "title": "m.bare", "text": "m.bare(x)"},
    ]
    build(rows, tmp_path / "a", embedder, embedded_chunks=most)
    table = pq.read_table(tmp_path / "a" / "chunks.parquet").to_pylist()
    held = {row["document"]: row for row in table if row["vector"] >= 0}
    assert len([row for row in table if row["vector"] >= 0]) == 3 < len(table)
    assert held["a"]["part"] > 1 and held["a"]["text"].endswith(said)
    wanted = embedding.Embedder(Path(embedder)).embed([f"m.long\n{said}", f"m.short\n{said}", "m.bare\nm.bare(x)"])
    vectors = np.load(tmp_path / "a" / "vectors.npy")
    for row, one in zip("abc", wanted, strict=True):
        np.testing.assert_allclose(vectors[held[row]["vector"]], one, atol=2e-3)


def test_beyond_a_number_of_vectors_an_approximate_index_is_made(embedder: str, tmp_path: Path) -> None:
    rows = documents()
    build(rows, tmp_path / "a", embedder)
    build(rows, tmp_path / "b", embedder, exact_chunks=50)
    assert not (tmp_path / "a" / nearest.FILE).exists() and (tmp_path / "b" / nearest.FILE).exists()
    exact, cells = (retrieval.Index.open(tmp_path / name) for name in "ab")
    for query in ("flip an array", "sort rows by key"):
        expected = [one.chunk for one in exact.search(query, 10, method="dense")]
        assert [one.chunk for one in cells.search(query, 10, method="dense")] == expected
    build(rows, tmp_path / "b", embedder)
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")  # the file of before is gone


def test_fusion_can_be_set_and_a_changed_byte_is_found(embedder: str, tmp_path: Path) -> None:
    build(documents(5), tmp_path / "a", embedder)
    indexing.set_fusion(tmp_path / "a", 60.0, 0.5)
    assert retrieval.Index.open(tmp_path / "a").fusion_k == 60.0
    indexing.verify(tmp_path / "a")
    copy = Path(shutil.copytree(tmp_path / "a", tmp_path / "b"))
    place = copy / "vectors.npy"
    place.write_bytes(place.read_bytes()[:-1] + b"\x7f")
    retrieval.Index.open(copy)  # sizes are as they were
    with pytest.raises(retrieval.IndexDamaged, match=r"vectors\.npy: its SHA-256 is"):
        indexing.verify(copy)


def test_chunks_that_nearly_repeat_an_earlier_one_are_found() -> None:
    long = [f"word{number} " for number in range(100)]
    texts = ["".join(long), "another text", "".join([*long[:99], "other"]), "Another  TEXT", "".join(long[:50]), "x",
             "".join(["first ", *long[1:99], "other"])]  # fmt: skip
    assert near_chunks.first_of_kind(texts).tolist() == [0, 1, 0, 1, 4, 5, 0]
    many = ["".join([*long, f"end{number}"]) for number in range(300)]
    assert near_chunks.first_of_kind(many).tolist() == [0] * 300


def test_titles_without_a_text_do_not_repeat_each_other(embedder: str, tmp_path: Path) -> None:
    documents = [{"id": name, "title": f"about {name}", "text": ""} for name in ("rain", "snow", "wind")]
    assert indexing.build(documents, tmp_path, indexing.Settings(embedder=embedder, size=40)).near_duplicates == 0
    assert len(retrieval.Index.open(tmp_path).search("about snow", 3)) == 3


def test_blanks_without_end_are_no_passage(embedder: str, tmp_path: Path) -> None:
    """In code, where lines stay whole, they could fill a chunk, which was found by its title and said nothing."""
    code = "```\n" + "x" * 236 + "\n\n\n" + " " * 500 + "\n" + "y" * 30 + "\n```\n"
    build([{"id": "a", "title": "code", "text": code}], tmp_path / "a", embedder)
    found = pq.read_table(tmp_path / "a" / "chunks.parquet").to_pylist()
    assert len(found) > 1 and all(row["text"].strip() for row in found)


def test_bad_knowledge_and_dials_are_refused_by_name(embedder: str, tmp_path: Path) -> None:
    for rows in ([], [{"id": "a", "title": "", "text": " \n"}]):
        with pytest.raises(DataError, match="knowledge has no document with a text; accepted: at least one"):
            build(rows, tmp_path / "a", embedder)
    with pytest.raises(DataError, match="row 2: id 'a' is an earlier row's"):
        build([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], tmp_path / "a", embedder)
    with pytest.raises(DataError, match="row 1: id is None"):
        build([{"id": None, "text": "x"}], tmp_path / "a", embedder)
    with pytest.raises(DataError, match="id a: text is None"):
        build([{"id": "a", "text": None}], tmp_path / "a", embedder)
    with pytest.raises(ParamsError, match=r"rag\.embedder: embedder 'missing' is neither"):
        build(documents(1), tmp_path / "a", "missing")
    with pytest.raises(ParamsError, match=r"rag\.chunk_tokens: 63; accepted: at most 62"):
        build(documents(1), tmp_path / "a", embedder, size=63)
    with pytest.raises(ParamsError, match=r"rag\.reranker: .*2 labels; accepted: 1"):
        build(documents(1), tmp_path / "a", embedder, reranker=str(tiny(tmp_path / "two", labels=2)))


def test_a_re_ranker_that_would_not_work_in_the_folder_is_refused_before_anything_is_embedded(
    embedder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding.Embedder, "embed", lambda *given: pytest.fail("vectors were made"))
    pickled = tiny(tmp_path / "pickled", labels=1)
    weights = load_file(pickled / "model.safetensors")
    torch.save(weights, pickled / "pytorch_model.bin")  # transformers reads it, the index does not carry it along
    (pickled / "model.safetensors").unlink()
    unpadded = tiny(tmp_path / "unpadded", labels=1)
    known = json.loads((unpadded / "tokenizer_config.json").read_text())
    (unpadded / "tokenizer_config.json").write_text(json.dumps(known | {"pad_token": None}))
    for name, told in (
        (str(pickled), r"re-ranker .*pickled: the directory has no model\.safetensors"),
        (str(unpadded), "padding token"),
        ("nowhere", r"re-ranker 'nowhere' is neither a directory, nor a hub id"),
    ):
        with pytest.raises(ParamsError, match=rf"^rag\.reranker: .*{told}"):
            build(documents(1), tmp_path / "a", embedder, reranker=name)
