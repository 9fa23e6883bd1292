"""Searching: BM25 as bm25s computes it, exact and approximate neighbours, fusion, filters and damaged folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pytest
from test_embedding import tiny

from pipelines.core import fusion, indexing, lexical, nearest, retrieval, serving

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    {
        "id": "numpy.flip",
        "title": "numpy.flip",
        "text": "numpy.flip(m)\n\nReverse the order of elements.",
        "url": "n#L1",
    },
    {
        "id": "numpy.flipud",
        "title": "numpy.flipud",
        "text": "Turn an array upside down.",
        "url": "n#L9",
        "source": "np",
    },
    {"id": "pandas.read_csv", "title": "pandas.read_csv", "text": "Read a file of numbers into a DataFrame."},
    {"id": "korean", "title": "한국어", "text": "서울은 대한민국의 수도다. 부산은 항구 도시다."},
    {"id": "copy", "title": "other name", "text": "Turn an array upside down."},
    {"id": "sockets", "title": "socket", "text": "Open a socket.\n\n" + "Sort rows by key. " * 40},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("index")
    embedder = tiny(place / "embedder")
    reranker = tiny(place / "reranker", labels=1)
    made = indexing.Settings(embedder=str(embedder), reranker=str(reranker), size=40, embedded_chunks=1)
    indexing.build(DOCUMENTS, place / "index", made)
    return place / "index"


@pytest.fixture(scope="module")
def index(folder: Path) -> retrieval.Index:
    return retrieval.Index.open(folder)


def ids(passages: list[retrieval.Passage]) -> list[str]:
    return [passage.document for passage in passages]


def random_texts(count: int) -> list[str]:
    draw = np.random.default_rng(0)
    words = np.array([f"w{number}" for number in range(60)])
    weights = 1 / np.arange(1, 61)
    return [" ".join(draw.choice(words, draw.integers(1, 40), p=weights / weights.sum())) for _ in range(count)]


def test_terms_are_names_as_a_whole_and_in_parts_without_accents_and_plurals() -> None:
    assert lexical.terms("numpy.flip_lr") == ["numpy.flip_lr", "numpy", "flip_lr", "flip", "lr"]
    assert lexical.terms("read_csv DataFrame") == ["read_csv", "read", "csv", "dataframe", "data", "frame"]
    assert lexical.terms("HTTPServer __init__") == ["httpserver", "http", "server", "init"]
    assert lexical.terms("Arrays, queries; class this") == ["array", "query", "class", "this"]
    assert lexical.terms("café naïve") == ["cafe", "naive"]
    assert lexical.terms("서울은 東京タワー 🎉") == ["서울", "울은", "東京", "京タ", "タワ", "ワー", "🎉"]
    assert "".join(filter(lexical._VOWELED.match, map(chr, range(0x20000)))) == "".join(map(chr, lexical.VOWELS))
    assert lexical.terms("हिन्दी, भाषा_की।") == ["हिन्दी", "भाषा_की", "भाषा", "की"]
    assert lexical.terms("தமிழ் numpy.ภาษา") == ["தமிழ்", "numpy.", "ภา", "าษ", "ษา", "numpy", "ภา", "าษ", "ษา"]
    assert lexical.terms("مُحَمَّد مـحمد אָרוֹן") == ["محمد", "محمد", "ארון"]
    assert lexical.terms(" ... ") == []
    assert lexical.query_terms("how do I flip an array, flip?") == ["flip", "array"]
    assert lexical.query_terms("for not") == ["for", "not"]


def test_marks_without_end_take_no_more_than_their_length() -> None:
    few = "שָׁלוֹם e\u0323\u0301 " + "ạ́" * 100 + " e" + "\u0591\u05b0" * (lexical.MARKS // 2)
    whole = unicodedata.normalize("NFC", lexical._ACCENTS.sub("", unicodedata.normalize("NFKD", few)))
    assert lexical._words(few) == lexical._WORD.findall(whole)
    began = time.process_time()
    assert lexical.terms("a" + "\u0591\u05b2\u05b1\u05b0" * 20_000 + "b") == ["ab"]
    assert lexical.terms("e" + "\u0315\u0300\u0327" * 20_000 + "x — ✓✓ ... ") == ["ex", "✓", "✓"]
    assert time.process_time() - began < 3


def test_scores_are_those_of_bm25s_and_its_own_reader_opens_the_files(tmp_path: Path) -> None:
    texts = [*random_texts(400), ""]
    lexical.build(texts, tmp_path)
    peer = bm25s.BM25(k1=lexical.K1, b=lexical.B, method="lucene")
    peer.index([lexical.terms(text) for text in texts], show_progress=False)
    loaded = bm25s.BM25.load(tmp_path, mmap=True, show_progress=False)
    ours = lexical.Bm25(tmp_path, len(texts))
    for query in ("w0 w1 w5", "w59", "w3 w3 w40 unknown"):
        tokens = list(dict.fromkeys(term for term in lexical.terms(query) if term != "unknown"))
        expected = peer.get_scores(tokens)
        assert np.allclose(loaded.get_scores(tokens), expected, atol=1e-5)
        found, scores = ours.search(query, len(texts))
        assert np.allclose(scores, expected[found], atol=1e-5) and len(found) == int((expected > 0).sum())
        assert (np.diff(scores) <= 0).all()
    assert ours.search("unknown", 5)[0].size == 0


@pytest.mark.parametrize("count", [1, 10, 100])
def test_skipping_what_cannot_be_among_the_best_changes_nothing(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = random_texts(3000)
    lexical.build(texts, tmp_path)
    ours = lexical.Bm25(tmp_path, len(texts))
    allowed = np.random.default_rng(1).random(len(texts)) < 0.5
    skipped = 0
    for query in ("w50 w0 w1", "w9 w2 w0 w30", "w58 w57 w0 w1 w2 w3"):
        for mask in (None, allowed):
            monkeypatch.setattr(lexical, "LONG_LIST", sys.maxsize)
            whole = ours.search(query, count, mask)
            monkeypatch.setattr(lexical, "LONG_LIST", 0)
            with monkeypatch.context() as patch:
                seen: list[Any] = []
                look = lexical._promising
                patch.setattr(
                    lexical, "_promising", lambda *given, look=look, seen=seen: seen.append(look(*given)) or seen[-1]
                )
                quick = ours.search(query, count, mask)
            skipped += any(one is not None for one in seen)
            assert np.array_equal(whole[0], quick[0]) and np.allclose(whole[1], quick[1])
            assert mask is None or mask[quick[0]].all()
    assert skipped  # the quick way was taken


def test_neighbours_are_those_of_the_product_and_cells_find_nearly_all_of_them(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((40, 32))
    vectors = centres[draw.integers(0, 40, 4000)] + 0.5 * draw.standard_normal((4000, 32))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    exact = nearest.Nearest(tmp_path, vectors)
    nearest.build(vectors, tmp_path)
    first = (tmp_path / nearest.FILE).read_bytes()
    nearest.build(vectors, tmp_path)
    assert (tmp_path / nearest.FILE).read_bytes() == first
    cells = nearest.Nearest(tmp_path, vectors)
    assert exact.cells is None and cells.cells is not None
    some = draw.random(4000) < 0.5
    few = np.zeros(4000, bool)
    few[[5, 900, 3999]] = True
    hits = 0
    for query in vectors[:50].astype(np.float32):
        for allowed in (None, some, few):
            masked = np.where(True if allowed is None else allowed, vectors.astype(np.float32) @ query, -2)
            expected = np.lexsort((np.arange(4000), -masked))[:10]
            rows, cosines = exact.search(query, 10, allowed)
            assert np.allclose(cosines, masked[rows], atol=1e-3) and (np.diff(cosines) <= 0).all()
            assert np.allclose(masked[rows], masked[expected[: len(rows)]], atol=1e-3)
            assert len(rows) == (3 if allowed is few else 10)
            near, _ = cells.search(query, 10, allowed)
            assert allowed is None or allowed[near].all()
            hits += len(set(near.tolist()) & set(rows.tolist())) / len(rows)
    assert hits / 150 >= 0.98


def test_what_may_be_found_is_found_however_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filter by a topic, and a question about another one: no cell near the question holds what may be found."""
    draw = np.random.default_rng(0)
    topic = np.repeat(np.arange(10), 300)
    vectors = np.eye(10, 32)[topic] + 0.1 * draw.standard_normal((3000, 32))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    nearest.build(vectors, tmp_path)
    monkeypatch.setattr(nearest, "PROBED", 4)
    cells = nearest.Nearest(tmp_path, vectors)
    query = np.eye(1, 32, dtype=np.float32)[0]
    for allowed in (topic == 9, topic >= 8, np.arange(3000) < 299):
        assert allowed.mean() > nearest.FEW
        rows, _ = cells.search(query, 20, allowed)
        expected = np.lexsort((np.arange(3000), -np.where(allowed, vectors.astype(np.float32) @ query, -2)))[:20]
        assert allowed[rows].all() and len(rows) == 20
        assert len(set(rows.tolist()) & set(expected.tolist())) >= 18
    assert len(cells.search(query, 2500)[0]) == 2500


def test_fusion_by_hand() -> None:
    document = np.array([0, 0, 1, 2])
    found, scores = fusion.fuse([np.array([1, 2, 0]), np.array([0, 3])], document, 10.0, (1.0, 1.5))
    # Document 0 is first in both, by chunk 1 and by chunk 0; chunk 0 has more places of its own: 1/12 + 1.5/11
    assert found.tolist() == [0, 3, 1, 2]
    assert np.allclose(scores, [1 / 11 + 1.5 / 11, 1.5 / 12, 1 / 11, 1 / 12])


def test_identifiers_are_found_by_their_parts_and_as_a_whole_and_korean_is_found(index: retrieval.Index) -> None:
    for query, document in (("read_csv", "pandas.read_csv"), ("csv", "pandas.read_csv"), ("numpy.flip", "numpy.flip"),
                            ("data frame", "pandas.read_csv"), ("서울", "korean"), ("항구", "korean")):  # fmt: skip
        assert ids(index.search(query, 1, method="bm25")) == [document], query
    assert index.search("nowhere🎉", method="bm25") == []
    assert len(index.search("nowhere🎉", 3)) == 3  # vectors always find something


def test_a_passage_says_where_it_stands(index: retrieval.Index) -> None:
    found = index.search("sort rows by key", 20, method="bm25", distinct=False)
    texts = {one["id"]: one["text"] for one in DOCUMENTS}
    assert any(passage.start > 0 for passage in found)
    for passage in found:
        text = texts[passage.document]
        assert text[passage.start : passage.end] == passage.text
        assert passage.line == text[: passage.start].count("\n") + 1
        assert passage.source == ("np" if passage.document == "numpy.flipud" else None)
    later = [passage for passage in found if not passage.chunk.endswith("#0")]
    assert later and all(np.isnan(passage.relevance) for passage in later)  # one chunk of a document has a vector
    best = index.search("turn an array upside down", 1, method="dense")[0]
    again = float(
        index.embedder.embed([f"{best.title}\n{best.text}"])[0] @ index.embedder.query("turn an array upside down")
    )
    assert best.relevance == pytest.approx(again, abs=1e-3) and best.score == pytest.approx(again, abs=2e-3)


def test_filters_and_near_duplicates(index: retrieval.Index) -> None:
    query = "turn an array upside down"
    for method in ("bm25", "dense", "hybrid", "reranked"):
        both = ids(index.search(query, 10, method=method, distinct=False))
        one = ids(index.search(query, 10, method=method))
        assert {"numpy.flipud", "copy"} <= set(both) and len({"numpy.flipud", "copy"} & set(one)) == 1
        assert "numpy.flipud" not in ids(index.search(query, 10, method=method, exclude=["numpy.flipud"]))
        chosen = index.search(query, 10, method=method, where=lambda row: row["source"] == "np")
        assert ids(chosen) == ["numpy.flipud"]
    assert ids(index.search(query, 10, where=lambda row: row["title"] == "socket", distinct=False))[0] == "sockets"
    assert index.duplicates("copy") == ["numpy.flipud"] and index.duplicates("korean") == []
    assert index.search(query, exclude=[one["id"] for one in DOCUMENTS]) == []


def test_many_documents_that_say_the_same_leave_room_for_others(tmp_path: Path) -> None:
    same = "Get the routing of this object."
    documents = [{"id": f"a{n:03}", "title": "routing", "text": same} for n in range(2 * retrieval.DEPTH + 20)]
    documents += [{"id": f"b{n}", "title": f"x{n}", "text": f"An object of {n} things on the way."} for n in range(4)]
    made = indexing.Settings(embedder=str(tiny(tmp_path / "embedder")), size=60)
    indexing.build(documents, tmp_path / "index", made)
    index = retrieval.Index.open(tmp_path / "index")
    assert ids(index.search("routing of this object", 3, method="bm25")) == ["a000", "b0", "b1"]
    for method in ("bm25", "dense", "hybrid"):
        assert len(index.search("routing of this object", 9, method=method)) == 5, "there are no more"


def test_few_long_documents_are_not_ranked_to_their_last_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are never as many documents as a ranking would reach; whoever asks for all of their chunks gets them."""
    texts = random_texts(400)
    documents = [{"id": f"d{n}", "title": "", "text": ".\n\n".join(texts[n::3])} for n in range(3)]
    made = indexing.Settings(embedder=str(tiny(tmp_path / "embedder")), size=40, overlap=0.0)
    chunks = indexing.build(documents, tmp_path / "index", made).chunks
    index, asked = retrieval.Index.open(tmp_path / "index"), list[int]()
    monkeypatch.setattr(retrieval, "DEPTH", 4)
    for part in (index._bm25, index._nearest):

        def noting(query: Any, count: int, allowed: Any, search: Any = part.search) -> Any:
            asked.append(count)
            return search(query, count, allowed)

        monkeypatch.setattr(part, "search", noting)
    assert len(index.search("w1 w2", 2, distinct=False)) == 2
    assert max(asked) == 4 * retrieval.DEEPEST < chunks
    for method in ("dense", "hybrid"):
        found = index.search("w1 w2", 1000, method=method, distinct=False)
        assert len({one.chunk for one in found}) == len(found) == chunks


def test_more_passages_than_a_cross_encoder_reads_by_default_are_all_read(tmp_path: Path) -> None:
    """Thirty came, whatever was asked for."""
    documents = [{"id": f"d{n}", "title": f"x{n}", "text": text} for n, text in enumerate(random_texts(45))]
    embedder, reranker = tiny(tmp_path / "embedder"), tiny(tmp_path / "reranker", labels=1)
    made = indexing.Settings(embedder=str(embedder), reranker=str(reranker), size=60)
    indexing.build(documents, tmp_path / "index", made)
    found = retrieval.Index.open(tmp_path / "index").search("w1 w2", 40, method="reranked", distinct=False)
    assert len(found) == 40 > retrieval.RERANKED
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)


@pytest.mark.parametrize("method", ["bm25", "dense", "hybrid", "reranked"])
def test_rankings_name_each_document_once_and_those_of_the_pool_alone(index: retrieval.Index, method: str) -> None:
    queries = ["sort rows by key", "numpy flip array"]
    whole = index.rankings(queries, method, 10)
    for ranking in whole:
        assert len(ranking) == len(set(ranking)) and ranking
    pool = ["numpy.flip", "sockets", "korean", "not there"]
    assert index.rankings(queries, method, 10, pool)[0] and set(index.rankings(queries, method, 10, pool)[0]) <= set(
        pool
    )
    assert [len(ranking) for ranking in index.rankings(queries, method, 1)] == [1, 1]
    passages = index.search(queries[0], 20, method=method, distinct=False)
    assert list(dict.fromkeys(ids(passages))) == whole[0]  # what is measured is what is shown


def test_a_bad_query_is_refused_and_a_long_one_answered_quickly(index: retrieval.Index) -> None:
    for query in ("", " \n"):
        with pytest.raises(ValueError, match="the query is empty"):
            index.search(query)
    with pytest.raises(ValueError, match="method 'cosine'; accepted: bm25, dense, hybrid, reranked"):
        index.search("flip", method="cosine")
    start = time.process_time()
    found = index.search("turn an array upside down " + " ".join(f"word{number}" for number in range(10_000)), 3)
    assert "numpy.flipud" in ids(found) and time.process_time() - start < 3


def test_another_embedder_is_refused_with_both_names(folder: Path, tmp_path: Path) -> None:
    manifest = retrieval.read_manifest(folder)
    retrieval.Index.open(folder, manifest["embedder"]["sha256"])
    retrieval.Index.open(folder, str(folder.parent / "embedder"))
    other = tiny(tmp_path / "another", seed=5)
    with pytest.raises(retrieval.EmbedderMismatch, match=r"made with embedder embedder .*asked for is .*another"):
        retrieval.Index.open(folder, str(other))


@pytest.mark.parametrize(
    "name", ["chunks.parquet", "vectors.npy", "bm25/data.csc.index.npy", "bm25/vocab.index.json", "manifest.json"]
)
def test_a_damaged_file_is_named(folder: Path, name: str, tmp_path: Path) -> None:
    for spoil in (lambda path: path.write_bytes(path.read_bytes()[:-5]), lambda path: path.unlink()):
        copy = Path(shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True))
        spoil(copy / name)
        with pytest.raises(retrieval.IndexDamaged, match=name.replace(".", r"\.")):
            retrieval.Index.open(copy)
        if name.endswith(".npy"):  # as long as it was
            (copy / name).write_bytes((folder / name).read_bytes().replace(b"), }", b")( }", 1))
            with pytest.raises(retrieval.IndexDamaged, match="a file cannot be read"):
                retrieval.Index.open(copy)
    (copy / "manifest.json").write_text('{"format": 99, "files": {}}')
    with pytest.raises(retrieval.IndexDamaged, match="format 99; accepted: 1"):
        retrieval.Index.open(copy)
    (copy / "manifest.json").write_text('{"format": 1, "files": {}}')
    with pytest.raises(retrieval.IndexDamaged, match="no embedder, no fusion, no bm25, no row_group"):
        retrieval.Index.open(copy)
    told = retrieval.read_manifest(folder)
    (copy / "manifest.json").write_text(json.dumps(told | {"files": {}, "bm25": told["bm25"] | {"version": 99}}))
    with pytest.raises(retrieval.IndexDamaged, match=r"bm25\.version 99; accepted: 2; build the index again"):
        retrieval.Index.open(copy)


def test_the_files_a_registered_model_carries_need_nothing_else(folder: Path, tmp_path: Path) -> None:
    for place in serving.RETRIEVING:
        shutil.copy(place, tmp_path)
    code = (
        "import sys; from pathlib import Path; import retrieval; index = retrieval.Index.open(Path(sys.argv[1]))\n"
        "for method in retrieval.METHODS: print(index.search('read_csv', 1, method=method)[0].document)\n"
        "assert 'pipelines' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0] == "pandas.read_csv"


def test_several_threads_read_one_index(folder: Path) -> None:
    """In a process of its own, which two threads in one ParquetFile would end."""
    code = (
        "import sys; from concurrent.futures import ThreadPoolExecutor; from pathlib import Path\n"
        "from pipelines.core import retrieval\n"
        "index = retrieval.Index.open(Path(sys.argv[1])); index.search('flip')\n"
        "asked = ['flip an array', 'read_csv', 'sockets', 'turn upside down'] * 300\n"
        "alone = {query: repr(index.search(query)) for query in set(asked)}\n"
        "with ThreadPoolExecutor(4) as pool: found = [*pool.map(lambda query: repr(index.search(query)), asked)]\n"
        "assert found == [alone[query] for query in asked]"
    )
    run = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
