"""Answers of the SFT model to stored prompts: which prompts, and K samples of each, batch by batch.

Every batch is written to the stage's scratch when it is done, so a killed stage goes on after the last one. Prompts
are put into batches by length, and the answers back into the order of the prompts.
"""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pipelines.core import artifacts, chats, reading
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError, DataError
from pipelines.core.labelers import drawn

if TYPE_CHECKING:
    from pipelines.core.params.feedback import FeedbackParams

BATCH_PROMPTS = 64  # at most, sampled together: what a killed run loses
CANDIDATES = 4  # for each prompt wanted, how many are held at first, in case that some are too long


class Prompt(NamedTuple):
    """A stored prompt and its tokens, up to where the answer begins."""

    id: str
    group: str
    split: str
    text: str
    reference: str | None
    ids: list[int]


class Limits(NamedTuple):
    """Which prompts a stage takes, from its params."""

    section: str  # of `params.yaml`, for messages
    seed: int
    max_prompt_tokens: int
    too_long: Literal["refuse", "drop"]


class Completed(NamedTuple):
    """A prompt and K sampled answers."""

    prompt: Prompt
    responses: list[str]
    tokens: list[int]  # length of each, EOS included
    ended: list[bool]  # whether EOS came before the limit


def choose(
    limits: Limits, data: Path, split: str, count: int, tokenizer: Any, with_reference: bool
) -> tuple[list[Prompt], int]:
    """`count` prompts of one side, or as many as there are, by hash of seed and id; and how many were too long.

    Raises:
        ArtifactError: the data have no prompts.
        DataError: a prompt is too long (`too_long: refuse`), or all are; one is no chat for the template.
    """
    found: list[Prompt] = []
    dropped: list[str] = []
    for row in _by_hash(limits.seed, data, split, count, with_reference):
        if len(found) == count:
            break
        try:
            ids = chats.encode_prompt(tokenizer, chats.messages_of(row["prompt"]))
        except DataError as error:
            raise DataError(f"prompts/{split}, id {row['id']}: {error}") from None
        if len(ids) <= limits.max_prompt_tokens:
            found.append(Prompt(row["id"], row["group"], split, row["prompt"], row["reference"], ids))
            continue
        told = f"prompts/{split}, id {row['id']}: {len(ids)} tokens; {limits.section}.max_prompt_tokens accepts "
        dropped.append(f"{told}{limits.max_prompt_tokens}")
        if limits.too_long == "refuse":
            raise DataError(f"{dropped[0]}. Raise it, or set {limits.section}.too_long: drop.")
    if dropped and not found:
        raise DataError(f"every prompt is too long, first {dropped[0]}")
    return found, len(dropped)


def _by_hash(seed: int, data: Path, split: str, count: int, with_reference: bool) -> Iterator[dict[str, Any]]:
    """Rows of one side by hash of seed and id: `CANDIDATES` times `count` are held, then four times as many, and so on.

    Few are too long as a rule, so that the first are enough; for more the table is read again.
    """
    seen, held = 0, CANDIDATES * count
    while True:
        rows = reading.rows(data, "prompts", split, ["id", "group", "prompt", "reference"])
        fit = (row for row in rows if row["reference"] is not None or not with_reference)
        best = heapq.nsmallest(held, fit, key=lambda row: (drawn(str(seed), row["id"]), row["id"]))
        yield from best[seen:]
        if len(best) < held:
            return
        seen, held = held, 4 * held


def complete(params: FeedbackParams, prompts: Sequence[Prompt], place: Path, context: StageContext) -> list[Completed]:
    """K answers to each prompt, in the order of the prompts. `place` is the model's directory.

    Raises:
        ArtifactError: prompt and answer do not fit the model's context.
        Stopped: a signal came; the batches so far are written.
    """
    batches = in_batches(prompts, least=2)
    files = [context.work / "samples" / f"batch-{number}.json" for number in range(len(batches))]
    done = next((number for number, file in enumerate(files) if not file.exists()), len(files))
    if done:
        context.say(f"resuming after batch {done} of {len(batches)}")
    if done < len(batches):
        _sample(params, [[prompts[number] for number in batch] for batch in batches], files, done, place, context)
    found: dict[int, Completed] = {}
    for batch, file in zip(batches, files, strict=True):
        answers = json.loads(file.read_text(encoding="utf-8"))
        found |= {number: Completed(prompts[number], **one) for number, one in zip(batch, answers, strict=True)}
    return [found[number] for number in range(len(prompts))]


def tell_dropped(dropped: int, found: int, limits: Limits, split: str, context: StageContext) -> None:
    """Say how many prompts of a side were too long, if any were."""
    if dropped:
        context.say(
            f"prompts/{split}: {dropped} were longer than {limits.section}.max_prompt_tokens "
            f"({limits.max_prompt_tokens}) and left out, {found} are taken"
        )


def in_batches(prompts: Sequence[Prompt], least: int = 1) -> list[list[int]]:
    """Numbers of the prompts, by length, in batches of nearly equal size: as few as can be, and at least `least`."""
    order = sorted(range(len(prompts)), key=lambda number: (len(prompts[number].ids), number))
    count = min(max(least, -(-len(order) // BATCH_PROMPTS)), len(order))
    edges = [len(order) * number // count for number in range(count + 1)] if count else []
    return [order[start:end] for start, end in pairwise(edges)]


def _sample(
    params: FeedbackParams,
    batches: list[list[Prompt]],
    files: list[Path],
    done: int,
    place: Path,
    context: StageContext,
) -> None:
    """Sample and write the batches from number `done` on."""
    from transformers import AutoTokenizer

    from pipelines.core import attention, context_window, language_models, sampling

    tokenizer = AutoTokenizer.from_pretrained(place)
    room = params.max_prompt_tokens + params.max_new_tokens
    model = language_models.load(str(place), context.dtype, attention.choose(context.device, room)).to(context.device)
    model.eval()
    limit = context_window.length(model.config) or room
    if max(len(prompt.ids) for batch in batches for prompt in batch) + params.max_new_tokens > limit:
        raise ArtifactError(
            f"feedback.max_prompt_tokens ({params.max_prompt_tokens}) + max_new_tokens ({params.max_new_tokens}) do "
            f"not fit the SFT model's context of {limit} tokens: lower one of them"
        )
    total, before = sum(map(len, batches)), sum(map(len, batches[:done]))
    began, new_tokens = time.perf_counter(), 0
    for number in range(done, len(batches)):
        prompts = batches[number]
        drawn_samples = sampling.sample(
            model,
            [prompt.ids for prompt in prompts],
            count=params.completions,
            tokens=params.max_new_tokens,
            stops=[tokenizer.eos_token_id],
            pad=tokenizer.pad_token_id,
            temperature=params.temperature,
            seed=int(drawn("batch", str(params.seed), str(number)) * 2**31),
            precision=context.precision,
            tell=partial(_tell, context, before, total),
        )
        answers: list[dict[str, Any]] = [
            {
                "responses": [chats.decode_response(tokenizer, ids) for ids in of_prompt],
                "tokens": [len(ids) for ids in of_prompt],
                "ended": ended,
            }
            for of_prompt, ended in zip(drawn_samples.ids, drawn_samples.ended, strict=True)
        ]
        artifacts.write_json(files[number], answers)
        before += len(prompts)
        new_tokens += sum(sum(one["tokens"]) for one in answers)
        context.progress(before, total, sampling="answers")
        context.stop_if_asked()
    context.measure(new_tokens_per_second=new_tokens / (time.perf_counter() - began))


def _tell(context: StageContext, before: int, total: int, now: int, _: int) -> None:
    """Progress within a batch, in prompts."""
    context.progress(before + now, total, sampling="answers")
