"""Sequences that share a row, and branches that share a prefix, are computed as if each were alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from models import model, tokenizer

from pipelines.core import attention, losses, segments
from pipelines.core.chats import Chat
from pipelines.core.context import StageContext
from pipelines.core.language_models import body_and_head

ARCHITECTURES = ["llama", "gpt2", "qwen3", "gpt_neox"]


@pytest.fixture(scope="module")
def known() -> Any:
    return tokenizer()


def some(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(10, 290), k=length)


def plain(ids: list[int]) -> segments.Sequence:
    return segments.Sequence(ids, [*ids[1:], segments.UNSUPERVISED], [0] * len(ids))


def alone(lm: Any, ids: list[int]) -> torch.Tensor:
    """Hidden states (length, width) of one text by transformers' own forward, positions and mask its own."""
    return lm.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]


def test_bins_hold_everything_once_within_the_budget() -> None:
    for seed in range(50):
        draw = random.Random(seed)
        lengths = [draw.randint(1, 80) for _ in range(draw.randint(1, 40))]
        found = segments.bins(lengths, 64)
        assert sorted(number for one in found for number in one) == list(range(len(lengths)))
        sizes = [sum(lengths[number] for number in one) for one in found]
        assert all(size <= 64 or len(one) == 1 for size, one in zip(sizes, found, strict=True))
        fitting = [size for size in sizes if size <= 64]
        assert len(fitting) < 2 or sum(sorted(fitting)[:2]) > 64, "two rows that would fit into one"


def test_best_fit_decreasing_by_hand() -> None:
    assert segments.bins([3, 7, 5, 2, 4, 6], 10) == [[1, 0], [5, 4], [2, 3]]
    assert segments.bins([12, 3], 10) == [[0], [1]]
    assert segments.bins([5, 5, 5], 10) == [[0, 1], [2]]


def test_rows_by_hand() -> None:
    first = segments.Sequence([1, 2, 3, 4, 5], [-100, 3, -100, 5, -100], [0, 0, 1, 2, 2])
    rows = segments.rows([first, plain([6, 7])], [[0, 1], [1]], pad_id=9)
    assert rows.ids.tolist() == [[1, 2, 3, 4, 5, 6, 7], [6, 7, 9, 9, 9, 9, 9]]
    assert rows.labels.tolist() == [[-100, 3, -100, 5, -100, 7, -100], [7, *[-100] * 6]]
    assert rows.positions.tolist() == [[0, 1, 2, 2, 3, 0, 1], [0, 1, 0, 0, 0, 0, 0]]
    assert rows.documents.tolist() == [[0, 0, 0, 0, 0, 1, 1], [0, 0, -1, -1, -1, -1, -1]]
    assert rows.branches.tolist() == [[0, 0, 1, 2, 2, 0, 0], [0] * 7]


def test_who_sees_whom_by_hand() -> None:
    """Prefix a b, branches c and d e, then another document f."""
    mask = segments.attention_mask(
        torch.tensor([[0, 0, 0, 0, 0, 1]]), torch.tensor([[0, 0, 1, 2, 2, 0]]), torch.float32
    )
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1],
    ]  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_and_padded_equals_alone(known: Any, context: StageContext, architecture: str) -> None:
    lm = model(known, architecture, attention=attention.choose("cpu", 64))
    texts = [some(length, length) for length in (17, 9, 30, 5)]
    rows = segments.rows([plain(text) for text in texts], segments.bins([len(t) for t in texts], 40), pad_id=0)
    with torch.inference_mode():
        hidden = segments.hidden_states(lm, rows, context)
        for row, one in enumerate(segments.bins([len(t) for t in texts], 40)):
            for document, number in enumerate(one):
                got = hidden[row][rows.documents[row] == document]
                torch.testing.assert_close(got, alone(lm, texts[number]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_branches_equal_separate_texts(known: Any, context: StageContext, architecture: str) -> None:
    """Also the log-probabilities of every token of every response, the first included."""
    lm = model(known, architecture, attention=attention.choose("cpu", 64))
    prompt, responses = some(11, 1), [some(6, 2), some(1, 3), some(9, 4)]
    other = plain(some(7, 5))
    shared = segments.of_completions(prompt, responses)
    rows = segments.rows([other, shared], [[0, 1]], pad_id=0)
    _, head = body_and_head(lm)
    with torch.inference_mode():
        hidden = segments.hidden_states(lm, rows, context)[0]
        scores = losses.label_log_probabilities(hidden, head, rows.labels[0])
        ours = rows.documents[0] == 1
        for number, response in enumerate(responses, 1):
            states = alone(lm, prompt + response)
            branch = ours & (rows.branches[0] == number)
            torch.testing.assert_close(hidden[branch], states[len(prompt) - 1 :], atol=1e-5, rtol=1e-4)
            expected = torch.log_softmax(states @ head.T, dim=-1)[len(prompt) - 1 : -1]
            expected = expected.gather(1, torch.tensor(response)[:, None])[:, 0]
            torch.testing.assert_close(scores[branch][:-1], expected, atol=1e-5, rtol=1e-4)
        prefix = ours & (rows.branches[0] == 0)
        assert (rows.labels[0][prefix] == segments.UNSUPERVISED).all() and scores[prefix].abs().sum() == 0


def test_a_chat_learns_what_follows() -> None:
    chat = Chat([1, 2, 3, 4, 5, 6], [False, False, True, True, False, True])
    assert segments.of_chat(chat) == segments.Sequence([1, 2, 3, 4, 5], [-100, 3, 4, -100, 6], [0] * 5)


def chat(prompt: list[int], answer: list[int]) -> segments.Sequence:
    return segments.of_chat(Chat(prompt + answer, [False] * len(prompt) + [True] * len(answer)))


def test_micro_batches_hold_everything_and_share_the_beginning() -> None:
    header = some(12, 1)
    chats = [chat(header + some(5 + n % 9, n + 2), some(3, n)) for n in range(60)]
    batches = segments.micro_batches(chats, 512, pad_id=0)
    assert sorted(text for _, texts in batches for row in texts for text in row) == list(range(60))
    for rows, texts in batches:
        assert rows.ids.numel() <= 512 and len(texts) == len(rows.ids)
        assert (rows.ids[:, :12] == torch.tensor(header)).all() and (rows.branches[:, :12] == 0).all()
        for row, here in enumerate(texts):
            for branch, text in enumerate(here, 1):
                assert rows.ids[row][rows.branches[row] == branch].tolist() == chats[text].ids[12:]
                assert rows.labels[row][rows.branches[row] == branch].tolist() == chats[text].labels[12:]
    assert sum(int((rows.documents >= 0).sum()) for rows, _ in batches) < sum(len(one.ids) for one in chats)


@pytest.mark.parametrize("header", [0, 12])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_micro_batches_equal_texts_alone(known: Any, context: StageContext, architecture: str, header: int) -> None:
    lm = model(known, architecture, length=512, attention=attention.choose("cpu", 512))
    chats = [chat(some(header, 1) + some(5 + n, n + 2), some(3 + n, n)) for n in range(7)]
    with torch.inference_mode():
        for rows, texts in segments.micro_batches(chats, 128, pad_id=0):
            hidden = segments.hidden_states(lm, rows, context)
            for row, here in enumerate(texts):
                for branch, text in enumerate(here, 1):
                    got = hidden[row][rows.branches[row] == branch]
                    torch.testing.assert_close(got, alone(lm, chats[text].ids)[-len(got) :], atol=1e-5, rtol=1e-4)


def test_the_shared_beginning_ends_where_something_is_learned() -> None:
    same = chat(some(6, 1), some(4, 2))
    ((rows, texts),) = segments.micro_batches([same, same], 64, pad_id=0)
    assert texts == [[0, 1]] and int((rows.branches == 0).sum()) == 5
    assert int((rows.labels != segments.UNSUPERVISED).sum()) == 8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_all_sequences_begin_with_opens_the_row_once(known: Any, architecture: str, context: StageContext) -> None:
    lm = model(known, architecture, length=128).eval()
    beginning = some(9, 1)
    prompts = [beginning + some(length, seed) for seed, length in ((2, 4), (3, 7), (4, 1))]
    responses = [[some(3, 10 * n + k) for k in range(2)] for n in range(3)]
    sequences = [segments.of_completions(prompt, said) for prompt, said in zip(prompts, responses, strict=True)]
    shared = segments.shared_prefix(sequences)
    assert shared == 9
    rows = segments.rows(sequences, [[0, 2], [1]], pad_id=3, shared=shared)
    assert rows.ids.shape == (2, 9 + sum(len(sequences[n].ids) - 9 for n in (0, 2)))
    with torch.no_grad():
        hidden = segments.hidden_states(lm, rows, context)
    for row, numbers in enumerate([[0, 2], [1]]):
        start = shared
        for number in numbers:
            end = start + len(sequences[number].ids) - shared
            said = rows.labels[row, start:end] != segments.UNSUPERVISED
            ours = hidden[row, start:end][said]
            texts = [prompts[number] + response for response in responses[number]]
            theirs = torch.cat([alone(lm, text)[len(prompts[number]) - 1 : -1] for text in texts])
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
            start = end
