"""A teacher's kept answers: those it would give, sequence by sequence, asked once."""

from __future__ import annotations

import pytest
import torch
from models import model, tokenizer

from pipelines.core import language_models, losses, segments, teacher_cache
from pipelines.core.context import StageContext, Stopped

NONE = segments.UNSUPERVISED
CHAT = segments.Sequence([5, 6, 7, 8, 9], [NONE, NONE, 8, 9, 1], [0] * 5)
TEXTS = [segments.Sequence([n, n + 1, n + 2], [n + 1, n + 2, n + 3], [0] * 3) for n in range(10, 80)]


def test_answers_are_the_teacher_s_own_whatever_rows_they_are_asked_in(context: StageContext) -> None:
    teacher = model(tokenizer(), depth=1)
    sequences = [CHAT, *TEXTS]
    cache = teacher_cache.of(teacher, sequences, 4, 64, 0, context)
    _, head = language_models.body_and_head(teacher)
    chosen = [40, 0, 3]  # in another order, in rows of other neighbours
    for rows, texts in segments.micro_batches([sequences[number] for number in chosen], 256, 0):
        kept = cache.rows([[chosen[text] for text in row] for row in texts], rows, "cpu")
        said = rows.labels != losses.IGNORE
        with torch.no_grad():
            asked = losses.linear_top_k(segments.hidden_states(teacher, rows, context)[said], head, 4)
        assert torch.equal(kept.ids, asked.ids)
        assert torch.allclose(kept.log_p.float(), asked.log_p.float(), atol=1e-3)
        assert torch.allclose(kept.rest, asked.rest, atol=1e-3)
    assert len(cache.answers[0].ids) == 3, "of a chat, the supervised tokens"


def test_a_killed_run_asks_only_for_what_is_missing(context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = model(tokenizer(), depth=1)
    whole = teacher_cache.of(teacher, TEXTS, 4, 64, 0, StageContext("test", context.root / "whole", "0" * 64))
    asked: list[int] = []
    ask = teacher_cache._ask

    def counted(*given: object) -> list[losses.TopK]:
        asked.append(len(given[1]))  # type: ignore[arg-type]
        if len(asked) == 2:
            context.signal_number = 15
        return ask(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(teacher_cache, "_ask", counted)
    with pytest.raises(Stopped):
        teacher_cache.of(teacher, TEXTS, 4, 64, 0, context)
    context.signal_number = 0
    found = teacher_cache.of(teacher, TEXTS, 4, 64, 0, context)
    assert asked == [32, 32, 6]
    for ours, theirs in zip(found.answers, whole.answers, strict=True):
        assert all(torch.equal(*both) for both in zip(ours, theirs, strict=True))
