"""A teacher is asked once a batch; its answers come back as they were, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch

from pipelines.core import losses, segments, teacher_cache
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError
from pipelines.core.losses import TopK


def answers(tokens: int = 5, k: int = 3) -> TopK:
    torch.manual_seed(0)
    return losses.top_k(torch.randn(tokens, 20), k)


def never() -> TopK:
    raise AssertionError("the teacher was asked again")


def test_answers_come_back_to_the_last_bit_and_are_made_once(tmp_path: Path) -> None:
    first = teacher_cache.kept(tmp_path, 7, 5, 3, answers)
    again = teacher_cache.kept(tmp_path, 7, 5, 3, never)
    for made, one, other in zip(answers(), first, again, strict=True):
        assert made.dtype == one.dtype == other.dtype
        assert torch.equal(made, one) and torch.equal(made, other)
    with pytest.raises(AssertionError, match="again"):
        teacher_cache.kept(tmp_path, 8, 5, 3, never)


def test_a_write_that_is_cut_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(tensors: dict[str, torch.Tensor], file: Path) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("safetensors.torch.save_file", cut)
        teacher_cache.kept(tmp_path, 0, 5, 3, answers)
    assert not teacher_cache.shard(tmp_path, 0).exists()
    assert torch.equal(teacher_cache.kept(tmp_path, 0, 5, 3, answers).ids, answers().ids)


@pytest.mark.parametrize("tokens, k", [(6, 3), (5, 2)])
def test_answers_to_something_else_are_refused(tmp_path: Path, tokens: int, k: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        teacher_cache.kept(tmp_path, 0, tokens, k, answers)
    teacher_cache.write(tmp_path, 0, answers())
    with pytest.raises(ArtifactError, match=r"\(5, 3\).*Remove"):
        teacher_cache.kept(tmp_path, 0, tokens, k, never)


@pytest.mark.parametrize("damage", ["truncate", "empty", "gone"])
def test_damaged_answers_are_refused(tmp_path: Path, damage: str) -> None:
    teacher_cache.write(tmp_path, 0, answers())
    file = teacher_cache.shard(tmp_path, 0) / teacher_cache.FILE
    data = file.read_bytes()
    file.unlink() if damage == "gone" else file.write_bytes(data[: len(data) - 3] if damage == "truncate" else b"")
    with pytest.raises(ArtifactError, match="cannot be read.*Remove"):
        teacher_cache.kept(tmp_path, 0, 5, 3, never)


def test_the_teacher_is_asked_at_the_supervised_tokens(tmp_path: Path) -> None:
    known = models.tokenizer()
    teacher = models.model(known)
    texts = [list(range(5, 5 + length)) for length in (9, 4, 12)]
    sequences = [
        segments.Sequence(ids, [segments.UNSUPERVISED] * 2 + [token + 1 for token in ids[2:]], [0] * len(ids))
        for ids in texts
    ]
    rows = segments.rows(sequences, [[0, 1], [2]], known.pad_token_id or 0)
    context = StageContext(stage="test", root=tmp_path, fingerprint="0" * 64)
    found = teacher_cache.ask(teacher, rows, 4, context)
    expected = []
    for ids in texts:  # each text alone
        with torch.no_grad():
            expected.append(teacher(torch.tensor([ids])).logits[0, 2:])
    whole = losses.top_k(torch.cat(expected), 4)
    assert torch.equal(found.ids, whole.ids)
    torch.testing.assert_close(found.log_p, whole.log_p, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(found.rest, whole.rest, rtol=1e-4, atol=1e-4)
    student = models.model(known, depth=1)
    hidden = segments.hidden_states(student, rows, context)[rows.labels != losses.IGNORE]
    loss = losses.linear_divergence_to_top_k(hidden, student.get_output_embeddings().weight, found, "forward")
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.get_output_embeddings().weight.grad.abs().sum() > 0
