"""Vectors: those of a plain forward pass and of sentence-transformers, whatever else is embedded with a text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from pipelines.core import embedding, reranking

WORDS = ("flip", "an", "array", "upside", "down", "read", "the", "file", "of", "numbers", "into", "a", "frame", "sort")
WORDS += ("rows", "by", "key", "open", "socket")
TEXTS = [
    "flip an array",
    "read the file of numbers into a frame",
    "",
    "sort rows by key " * 30,
    "flip",
    "open socket x9",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """Words of `WORDS` as they are, others letter by letter."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789._#"
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters), *WORDS]
    known = {name: number for number, name in enumerate(dict.fromkeys(names))}
    made = Tokenizer(models.WordPiece(known, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def sizes(kind: str) -> dict[str, Any]:
    if kind == "distilbert":
        return {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
    return {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny(
    place: Path, kind: str = "bert", pooling: str = "mean", window: int = 64, seed: int = 0, labels: int = 0
) -> Path:
    """A sentence-transformers directory with random weights; with `labels`, a classifier's."""
    torch.manual_seed(seed)
    known = tokenizer()
    config = AutoConfig.for_model(
        kind, vocab_size=len(known), max_position_embeddings=80, pad_token_id=0, initializer_range=0.3,
        **sizes(kind), **({"num_labels": labels} if labels else {}),
    )  # fmt: skip
    auto = AutoModelForSequenceClassification if labels else AutoModel
    auto.from_config(config).save_pretrained(place)
    known.save_pretrained(place)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    listed = [
        {"idx": at, "name": str(at), "path": path, "type": f"x.{name}"} for at, (path, name) in enumerate(modules)
    ]
    (place / "modules.json").write_text(json.dumps(listed))
    (place / "1_Pooling").mkdir()
    names = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens"}
    modes = {name: key == pooling for key, name in names.items()}
    (place / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **modes}))
    (place / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": window}))
    return place


def alone(place: Path, text: str, pooling: str) -> np.ndarray:
    """The vector by transformers' own forward pass, text by text."""
    model, known = AutoModel.from_pretrained(place).eval(), tokenizer()
    with torch.inference_mode():
        read = known(text, truncation=True, max_length=64, return_tensors="pt")
        states = model(input_ids=read["input_ids"]).last_hidden_state[0]
    pooled = states.mean(0) if pooling == "mean" else states[0]
    return (pooled / pooled.norm()).numpy()


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_are_those_of_transformers_own_forward_pass(kind: str, pooling: str, tmp_path: Path) -> None:
    place = tiny(tmp_path / "m", kind, pooling)
    embedder = embedding.Embedder(place)
    assert (embedder.packed is None) == (kind == "distilbert")
    expected = np.stack([alone(place, text, pooling) for text in TEXTS])
    found = embedder.embed(TEXTS)
    assert np.allclose(found, expected, atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 0.01  # the model does tell texts apart
    assert np.allclose(np.stack([embedder.query(text) for text in TEXTS]), expected, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_vector_is_the_same_to_the_bit_whatever_is_embedded_with_it(precision: str, tmp_path: Path) -> None:
    embedder = embedding.Embedder(tiny(tmp_path / "m"), embedding.dtype(precision))
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, draw.integers(1, 60))) for _ in range(90)]
    whole = embedder.embed(texts)
    assert np.array_equal(embedder.embed(texts[::-1])[::-1], whole)
    assert np.array_equal(embedder.embed(texts[7:8]), whole[7:8])
    assert np.array_equal(embedder.embed(texts[40:]), whole[40:])


def test_the_default_embedder_agrees_with_sentence_transformers() -> None:
    library = pytest.importorskip("sentence_transformers")
    place = embedding.find("minilm-l6-v2")
    texts = ["How do I flip an array?", "def read_csv(path): ...", "서울은 수도다", "long " * 400]
    expected = library.SentenceTransformer(str(place), device="cpu").encode(texts, normalize_embeddings=True)
    found = embedding.Embedder(place).embed(texts)
    assert (found * expected).sum(1).min() > 0.9999


def test_tokens_begin_where_they_stand_in_the_text(tmp_path: Path) -> None:
    embedder = embedding.Embedder(tiny(tmp_path / "m"))
    first, second = embedder.offsets(["flip  an xy", "array " * 200])
    assert first.tolist() == [0, 6, 9, 10]
    assert len(second) == 200  # nothing is cut off at the window


def test_prompts_and_the_smallest_window_count(tmp_path: Path) -> None:
    place = tiny(tmp_path / "m", window=16)
    prompts = {"query": "sort ", "passage": "read "}
    (place / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    embedder = embedding.Embedder(place)
    assert embedder.settings == embedding.Settings("mean", 16, "sort ", "read ")
    plain = embedding.Embedder(tiny(tmp_path / "n", window=16))
    assert np.allclose(embedder.query("rows"), plain.query("sort rows"), atol=1e-6)
    assert np.allclose(embedder.embed(["rows"]), plain.embed(["read rows"]), atol=1e-6)
    assert np.allclose(plain.query("rows " * 14), plain.query("rows " * 9000), atol=1e-6)


def test_a_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    place = tiny(tmp_path / "m")
    copy = Path(shutil.copytree(place, tmp_path / "elsewhere"))
    (copy / "README.md").write_text("no part of it")
    assert embedding.fingerprint(copy) == embedding.fingerprint(place)
    assert embedding.fingerprint(tiny(tmp_path / "n", seed=1)) != embedding.fingerprint(place)


def test_a_directory_may_be_named_from_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a base may; it was taken for a name on the hub."""
    monkeypatch.setenv("HOME", str(tmp_path))
    place = tiny(tmp_path / "m")
    assert embedding.find("~/m") == place
    for name in ("~/none", "~nobody-of-this-name/m"):
        with pytest.raises(embedding.EmbedderUnusable, match=f"re-ranker '{name}' is neither a directory, nor a hub"):
            embedding.find(name, "re-ranker")


def test_what_cannot_embed_is_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(embedding.EmbedderUnusable, match=r"'nothing' is neither one of .*minilm-l6-v2.* nor a hub id"):
        embedding.find("nothing")
    with pytest.raises(embedding.EmbedderUnusable, match=r"has no config\.json"):
        embedding.find(str(tmp_path))
    monkeypatch.setattr(embedding, "PACKAGES", {"minilm-l6-v2": "no_such_package"})
    with pytest.raises(embedding.EmbedderUnusable, match="pip install no-such-package"):
        embedding.find("minilm-l6-v2")
    with pytest.raises(embedding.EmbedderUnusable, match=r"pooling \['pooling_mode_max_tokens'\]; supported are mean"):
        embedding.settings(tiny(tmp_path / "max", pooling="max"))
    place = tiny(tmp_path / "m")
    listed = json.loads((place / "modules.json").read_text())
    (place / "modules.json").write_text(json.dumps([*listed, {"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(embedding.EmbedderUnusable, match=r"modules\.json asks for Dense"):
        embedding.settings(place)
    (place / "modules.json").write_text("[")
    with pytest.raises(embedding.EmbedderUnusable, match=r"embedder m: modules\.json is damaged"):
        embedding.settings(place)
    (place / "modules.json").write_text(json.dumps(listed))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (place / "model.safetensors").write_text(pointer)
    with pytest.raises(embedding.EmbedderUnusable, match="embedder m: transformers cannot load it"):
        embedding.Embedder(place)
    bare = tiny(tmp_path / "bare")
    (bare / "tokenizer.json").write_text("{}")
    with pytest.raises(embedding.EmbedderUnusable, match="embedder bare: transformers cannot load it"):
        embedding.Embedder(bare)
    later = tiny(tmp_path / "later")
    split = b'"pre_tokenizer": {'
    unknown = (later / "tokenizer.json").read_bytes().replace(split, split + b'"type": "Later"}, "other": {')
    (later / "tokenizer.json").write_bytes(unknown)  # as of a later library
    with pytest.raises(embedding.EmbedderUnusable, match="embedder later: transformers cannot load it"):
        embedding.Embedder(later)
    cross = tiny(tmp_path / "cross", labels=1)
    whole = (cross / "tokenizer.json").read_bytes()
    (cross / "tokenizer.json").write_bytes(unknown)
    with pytest.raises(ValueError, match="re-ranker .*cross: transformers cannot load it"):
        reranking.Reranker(cross)
    (cross / "tokenizer.json").write_bytes(whole)
    (cross / "model.safetensors").write_text(pointer)
    with pytest.raises(ValueError, match="re-ranker .*cross: transformers cannot load it"):
        reranking.Reranker(cross)
    (place / "model.safetensors").unlink()
    with pytest.raises(embedding.EmbedderUnusable, match=r"no model\.safetensors"):
        embedding.settings(place)


def test_params_know_the_same_names() -> None:
    from pipelines.core.params.rag import EMBEDDERS

    assert set(EMBEDDERS) == set(embedding.PACKAGES)
