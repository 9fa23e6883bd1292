"""Packing loses no token, keeps documents apart, and gives what the documents give one by one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from data_folder import write_corpus
from models import TEXTS, model, tokenizer
from test_reward import write

from pipelines.core import attention, packing, scoring
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError, DataError
from pipelines.core.held_out import HeldOut
from pipelines.core.language_models import body_and_head


@pytest.fixture(scope="module")
def known() -> object:
    return tokenizer()


def rows_of(known: object, texts: list[str], place: Path, length: int, seed: int = 0) -> packing.PackedRows:
    packing.write_stream(known, texts, place, batch=7)
    return packing.PackedRows(place, length, packing.separator_id(known), seed)


def test_few_long_documents_are_enough(
    known: object, context: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share of them by hash would be none."""
    texts = [{"id": f"t{n}", "group": f"t{n}", "text": "Return the area of a shape.\n" * 9000} for n in range(3)]
    write(tmp_path / "corpus/train.parquet", texts)
    assert packing.of_corpus(tmp_path, known, 1000, 32, "ppo.ptx_length", 1, context).rows * 32 >= 1000
    monkeypatch.setattr(scoring, "PRIMER_BYTES", 1000)
    held_out = HeldOut(("a",), ("a",), ("Return the area of a shape.\n" * 9,))
    assert held_out.classical_bits(tmp_path, 1)[0] < 4 * held_out.sizes[0]


def test_no_token_is_lost(known: object, tmp_path: Path) -> None:
    count = packing.write_stream(known, TEXTS, tmp_path / "t", batch=7)
    stream = np.fromfile(tmp_path / "t", dtype=np.uint32)
    separator = packing.separator_id(known)
    expected = [token for ids in packing.encode(known, TEXTS) for token in (separator, *ids)] + [separator]
    assert count == len(stream) and stream.tolist() == expected


def test_an_epoch_holds_every_row_once_and_epochs_differ(known: object, tmp_path: Path) -> None:
    rows = rows_of(known, TEXTS, tmp_path / "t", 32)
    first, second = ([rows.batch(e * rows.rows + n, 1).ids[0].tolist() for n in range(rows.rows)] for e in (0, 1))
    assert sorted(first) == sorted(second) and first != second
    assert sorted(first) == sorted(rows.stream[: rows.rows * 32].reshape(-1, 32).tolist())


def test_labels_are_the_next_tokens_and_positions_restart(known: object, tmp_path: Path) -> None:
    batch = rows_of(known, TEXTS, tmp_path / "t", 64).batch(0, 4)
    assert torch.equal(batch.labels[:, :-1], batch.ids[:, 1:])
    opens = batch.ids == packing.separator_id(known)
    assert (batch.positions[opens] == 0).all() and opens.any()
    inside = ~opens[:, 1:]
    assert (batch.positions[:, 1:][inside] == batch.positions[:, :-1][inside] + 1).all()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_packed_row_equals_its_documents_one_by_one(known: object, tmp_path: Path, architecture: str) -> None:
    """The law that masks and positions exist for; also: documents before it change nothing."""
    lm = model(known, architecture, attention=attention.choose("cpu", 64))
    body, _ = body_and_head(lm)
    batch = rows_of(known, TEXTS, tmp_path / "t", 64).batch(0, 2)
    mask = packing.attention_mask(batch.documents, torch.float32)
    with torch.inference_mode():
        packed = body(input_ids=batch.ids, attention_mask=mask, position_ids=batch.positions).last_hidden_state
        for row in range(2):
            for document in batch.documents[row].unique():
                part = batch.documents[row] == document
                alone = body(input_ids=batch.ids[row][part][None]).last_hidden_state[0]
                torch.testing.assert_close(packed[row][part], alone, atol=1e-4, rtol=1e-4)


def test_causality(known: object) -> None:
    lm = model(known, attention=attention.choose("cpu", 64))
    body, _ = body_and_head(lm)
    ids = torch.randint(4, 300, (1, 20))
    changed = ids.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 296 + 4
    mask = packing.attention_mask(torch.zeros_like(ids), torch.float32)
    with torch.inference_mode():
        one, two = (body(input_ids=x, attention_mask=mask).last_hidden_state for x in (ids, changed))
    assert torch.equal(one[:, :12], two[:, :12]) and not torch.equal(one[:, 12:], two[:, 12:])


def test_grouped_attention_equals_torchs() -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 6, 10, 8, requires_grad=True)
    key, value = torch.randn(2, 2, 10, 8), torch.randn(2, 2, 10, 8)
    mask = packing.attention_mask(torch.tensor([[0] * 4 + [1] * 6, [0] * 10]), torch.float32)
    ours, _ = attention.grouped(torch.nn.Module().eval(), query, key, value, mask)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)


def test_what_grouped_attention_does_not_compute_is_refused() -> None:
    """Sinks were passed over: what was measured was not the model that others load."""
    whose = SimpleNamespace(config=SimpleNamespace(model_type="gpt_oss"), training=False)
    query = torch.randn(1, 2, 3, 4)
    with pytest.raises(ArtifactError, match="architecture gpt_oss: it has attention sinks, which are not computed"):
        attention.grouped(whose, query, query, query, None, s_aux=torch.zeros(2))
    with pytest.raises(ArtifactError, match="a cap on the scores"):
        attention.grouped(whose, query, query, query, None, softcap=50.0)


def test_special_tokens_spelled_in_text_stay_text(known: object) -> None:
    ids = packing.encode(known, ["a <|endoftext|> b"])[0]
    assert packing.separator_id(known) not in ids
    assert known.decode(ids) == "a <|endoftext|> b"  # type: ignore[attr-defined]


def test_a_special_token_that_nothing_writes_needs_no_row() -> None:
    """As Gemma 3's for images, in its models of text alone."""
    known: Any = tokenizer()
    rows = len(known)
    known.add_tokens(["<image>"], special_tokens=True)
    packing.check_rows(known, rows)
    told = rf"1 tokens of the tokenizer have no row .* {rows} rows, for example '<image>'"
    known.chat_template = "{{ '<image>' + messages[0]['content'] }}"
    with pytest.raises(ArtifactError, match=told):
        packing.check_rows(known, rows)
    known.chat_template, known.pad_token = None, "<image>"
    with pytest.raises(ArtifactError, match=told):
        packing.check_rows(known, rows)


def test_a_tokenizer_with_nothing_between_documents_is_refused() -> None:
    bare = SimpleNamespace(get_vocab=lambda: {"a": 0}, bos_token_id=None, eos_token_id=None)
    with pytest.raises(ArtifactError, match="neither <.endoftext.> nor BOS nor EOS"):
        packing.separator_id(bare)


def test_too_little_text_is_refused(known: object, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sequence_length = 4096"):
        rows_of(known, TEXTS[:2], tmp_path / "t", 4096)


def test_a_short_run_on_long_documents_finds_text(known: object, tmp_path: Path, context: StageContext) -> None:
    """Two rows want less than a tenth of one of these documents, and a tenth of a document would mostly be none."""
    data = write_corpus(tmp_path / "data", [f"{text} {n}\n" * 100 for n, text in enumerate(TEXTS)])
    for seed in range(3):
        context.fingerprint = str(seed)
        found = packing.of_corpus(data, known, 64, 32, "pretrain.sequence_length", seed, context)
        assert found.rows >= 2


def test_bits_equal_the_models_own_loss(known: object) -> None:
    """Windows of a long text score each token once; a short one equals transformers' loss."""
    lm = model(known, length=64)
    text = TEXTS[0][:40]
    ids = torch.tensor([[packing.separator_id(known), *packing.encode(known, [text])[0]]])
    with torch.inference_mode():
        nats = float(lm(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
    bits = scoring.model_bits(lm, known, [text, TEXTS[1] * 3], "fp32", lambda done, total: None)
    assert bits[0] == pytest.approx(nats / np.log(2), rel=1e-4)
    assert bits[1] > bits[0]


def test_no_text_is_scored_beyond_a_window_of_attention() -> None:
    known = tokenizer()
    config = model(known, "mistral", depth=1, length=64).config
    longest = {}
    for config.sliding_window in (None, 24):
        pieces = [piece for batch in scoring.batches(config, known, [TEXTS[1] * 9]) for piece in batch]
        longest[config.sliding_window] = max(len(piece.ids) for piece in pieces)
    assert longest[24] == 24 < longest[None]


@pytest.mark.parametrize(("tokens", "window"), [(2, 8), (8, 8), (9, 8), (10, 8), (40, 8), (41, 7), (5, 1)])
def test_windows_score_every_token_once(tokens: int, window: int) -> None:
    ids = list(range(tokens))
    seen = []
    for inputs, labels in scoring._windows(ids, window):
        assert len(inputs) == len(labels) <= window
        for token, label in zip(inputs, labels, strict=True):
            if label >= 0:
                assert label == token + 1
                seen.append(label)
    assert seen == ids[1:]


def test_a_compressor_knows_what_it_has_read() -> None:
    text = "Return the area of a shape, in square metres."
    fresh, primed = scoring.classical_bits([text], "")[0], scoring.classical_bits([text], text)[0]
    assert 0 < primed < fresh / 3
