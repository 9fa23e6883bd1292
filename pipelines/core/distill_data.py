"""What a student learns from: pieces of the corpus, and chats whose answers people or the teacher wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines.core import chats, demonstrations, packing, policy_answers, reading, sampling, segments
from pipelines.core.context import StageContext
from pipelines.core.errors import DataError
from pipelines.core.params.distill import DistillParams

PIECES = 4  # of one document at most: many documents teach more than one long one


def of_people(params: DistillParams, data: Path, tokenizer: Any) -> list[segments.Sequence]:
    """Pieces of training text and demonstrations; every token is a label, since a teacher says something of each.

    Raises:
        ArtifactError: the data have no corpus, or no demonstrations.
        DataError: the corpus is smaller than `texts` pieces; a chat that cannot be learned from, or is too long.
    """
    share = params.texts * params.max_length * packing.LONGEST_TOKEN / max(1, reading.corpus_bytes(data, "train"))
    found = list(_texts(params, data, tokenizer, share))
    while len(found) < params.texts and share < 1:  # long documents give few pieces for their bytes
        share *= 4
        found = list(_texts(params, data, tokenizer, share))
    if len(found) < params.texts:
        raise DataError(
            f"the training corpus has {len(found)} pieces of {params.max_length} tokens (distill.max_length), at most "
            f"{PIECES} of a document; distill.texts asks for {params.texts}: add text or lower it"
        )
    return found + [_whole(example.chat.ids) for example in chosen(params, data, tokenizer)]


def chosen(params: DistillParams, data: Path, tokenizer: Any) -> list[demonstrations.Demonstration]:
    """The demonstrations of a run."""
    limits = (params.examples, params.max_length, params.too_long, "distill")
    return demonstrations.choose(data, "train", tokenizer, (), *limits).kept


def prompts(
    params: DistillParams, data: Path, tokenizer: Any, longest: int, dials: str, context: StageContext
) -> list[list[int]]:
    """Tokens of what the demonstrations answer, up to where the answer begins; never a part of a prompt.

    Args:
        longest: tokens that are accepted; `dials` say it, for messages.

    Raises:
        DataError: one is longer (`too_long: refuse`), or all are.
    """
    every = [(one.id, chats.encode_prompt(tokenizer, one.prompt)) for one in chosen(params, data, tokenizer)]
    found = [ids for _, ids in every if len(ids) <= longest]
    long = [
        f"demonstrations/train.parquet, row {name}: its prompt has {len(ids)} tokens; {dials} accept {longest}"
        for name, ids in every
        if len(ids) > longest
    ]
    if long and (params.too_long == "refuse" or not found):
        raise DataError(
            f"{long[0]} ({len(long)} of {len(every)} are too long). Shorten it, change them, or set "
            "distill.too_long: drop"
        )
    if long:
        context.say(f"{len(long)} of {len(every)} prompts are not answered: {long[0]}")
    return found


def of_teacher(
    params: DistillParams, data: Path, tokenizer: Any, teacher: Any, context: StageContext
) -> list[segments.Sequence]:
    """The teacher's own answers to the prompts of the demonstrations: sequence-level distillation.

    One sample a prompt at temperature 1 (Kim and Rush, 2016, take the mode, found by beam search). Kept in the stage's
    scratch.

    Raises:
        ArtifactError: prompt and answer do not fit the teacher's context.
        DataError: as `prompts`.
    """
    longest = params.max_length - params.max_new_tokens
    asked = prompts(params, data, tokenizer, longest, "distill.max_length less distill.max_new_tokens", context)

    def make() -> list[list[int]]:
        found = sampling.sample(
            teacher, asked, count=1, tokens=params.max_new_tokens, stops=[tokenizer.eos_token_id],
            pad=tokenizer.pad_token_id, temperature=1.0, seed=params.seed, precision=context.precision,
            tell=lambda done, total: context.progress(done, total, sampling="the teacher's answers"),
        )  # fmt: skip
        return [one for (one,) in found.ids]

    answers: list[list[int]] = policy_answers.kept(context, "teacher-answers", make)
    return [_whole([*prompt, *answer]) for prompt, answer in zip(asked, answers, strict=True)]


def of_answer(prompt: Sequence[int], answer: Sequence[int]) -> segments.Sequence:
    """A prompt and what was answered, whose tokens are the labels; the last one predicts nothing and is left out."""
    labels = [segments.UNSUPERVISED] * (len(prompt) - 1) + list(answer)
    return segments.Sequence([*prompt, *answer[:-1]], labels, [0] * len(labels))


def _texts(params: DistillParams, data: Path, tokenizer: Any, share: float) -> Iterator[segments.Sequence]:
    """The first pieces of a share of the training documents, in the data's order, up to `texts` of them."""
    separator = packing.separator_id(tokenizer)
    left = params.texts
    for text in reading.sample(data, "train", share, params.seed) if left else ():
        (ids,) = packing.encode(tokenizer, [text])
        stream = [separator, *ids]
        for start in range(0, min(len(stream) - 1, PIECES * params.max_length), params.max_length):
            piece = stream[start : start + params.max_length + 1]
            if left == 0:
                return
            yield _whole(piece)
            left -= 1


def _whole(ids: list[int]) -> segments.Sequence:
    return segments.Sequence(ids[:-1], ids[1:], [0] * (len(ids) - 1))
