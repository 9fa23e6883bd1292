"""What the models of stage `answers` are, and what each says: greedily, batch by batch.

Every batch is written to the stage's scratch when it is done, so a killed stage goes on after the last one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.core import (
    artifacts,
    assistant,
    attention,
    chats,
    context_window,
    cpu,
    generate,
    grounding,
    language_models,
    sampling,
    variants,
)
from pipelines.core.answers_questions import Question
from pipelines.core.context import StageContext
from pipelines.core.errors import DataError, ParamsError
from pipelines.core.params.answers import AnswersParams

BATCH = 64  # questions answered together, and what a killed run loses at most
STAGES = {"base": "pretrain", "sft": "sft", "ppo": "ppo", "student": "distill"}  # all others are quantize's


class Speaker(NamedTuple):
    """A model to be asked; it is loaded when it speaks."""

    name: str
    place: Path
    tokenizer: Any
    context: int | None  # tokens it can attend to


def speakers(params: AnswersParams, inputs: dict[str, Path]) -> list[Speaker]:
    """The models that `answers.models` names.

    Raises:
        ParamsError: there is no such model, or one whose chat template has no place for the style's system text.
    """
    small = {
        place.parent.name: place.parent
        for place in sorted((inputs["quantize"] / "models").glob("*/config.json"))
        if "reward_mean" not in json.loads(place.read_text(encoding="utf-8"))
    }
    known = {name: inputs[stage] / "model" for name, stage in STAGES.items()} | small
    unknown = [name for name in params.models if name not in known]
    if unknown:
        raise ParamsError(
            f"answers.models: no model {', '.join(unknown)}; there are: {', '.join(known)}. A variant that "
            "quantize.variants names and this machine cannot run was skipped: artifacts/quantize/samples.md says so"
        )
    found = [speaker(name, known[name]) for name in params.models]
    empty = grounding.build("", [], grounding.TEMPLATES[params.style], 0, len).messages
    for one in found:
        try:
            grounding.encode(one.tokenizer, empty)
        except ValueError as error:
            raise ParamsError(
                f"answers.models: {one.name}: {error}; its passages need a system text before the question. Leave it "
                "out, or give its tokenizer a chat template that takes one"
            ) from None
    return found


def speaker(name: str, place: Path) -> Speaker:
    """A model of a directory."""
    from transformers import AutoConfig

    room = context_window.length(AutoConfig.from_pretrained(place))
    return Speaker(name, place, language_models.load_tokenizer(str(place)), room)


def problem(question: str, speakers: Sequence[Speaker], settings: assistant.Settings) -> str | None:
    """Why a question cannot be asked of all models with a passage; nothing where it can."""
    for one in speakers:
        try:
            assistant.room(question, settings, one.tokenizer, one.context)
        except assistant.NoRoom as error:
            return f"model {one.name}: {error} Lower answers.max_new_tokens, or leave the model out of answers.models."
    return None


def put(question: Question, passages: Sequence[Any], one: Speaker, settings: assistant.Settings) -> assistant.Put:
    """A question with passages, or alone, as the assistant would put it to this model.

    Raises:
        DataError: it does not fit into the model's context.
    """
    try:
        return assistant.put(question.text, passages, settings, one.tokenizer, one.context)
    except assistant.NoRoom as error:
        raise DataError(f"queries, id {question.id}, model {one.name}: {error}") from None


def say(one: Speaker, asked: Sequence[list[int]], tokens: int, keep: str | None, context: StageContext) -> list[str]:
    """The likeliest answer to each prompt.

    Args:
        asked: token ids.
        keep: under which name batches are kept in the stage's scratch, and taken from it; null: they are not.

    Raises:
        ArtifactError: an architecture that cannot be sampled from.
        Stopped: a signal came; the batches so far are kept.
    """
    order = sorted(range(len(asked)), key=lambda number: (-len(asked[number]), number))
    batches = [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
    files = [context.work / "answers" / f"{keep}-{number}.json" for number in range(len(batches))]
    known = [json.loads(file.read_text(encoding="utf-8")) for file in files if keep and file.exists()]
    if known:
        context.say(f"resuming after batch {len(known)} of {len(batches)} of {keep}")
    left = batches[len(known) :]
    model = _load(one, max(map(len, asked), default=0) + tokens, context) if left else None
    for number, batch in enumerate(left, len(known)):

        def tell(now: int, _: int, before: int = number * BATCH) -> None:
            context.progress(before + now, len(asked), answering=one.name)

        found = sampling.sample(
            model, [asked[place] for place in batch], count=1, tokens=tokens, temperature=0.0, seed=0,
            stops=sorted(generate.endings(model, one.tokenizer)), pad=one.tokenizer.pad_token_id,
            precision=_precision(model, context), tell=tell,
        )  # fmt: skip
        known.append([chats.decode_response(one.tokenizer, ids[0]) for ids in found.ids])
        if keep:
            artifacts.write_json(files[number], known[-1])
        context.stop_if_asked()
    texts = [""] * len(asked)
    for batch, answers in zip(batches, known, strict=True):
        for place, text in zip(batch, answers, strict=True):
            texts[place] = text
    return texts


def _precision(model: Any, context: StageContext) -> str:
    """That of the stage, unless the model has stayed on a CPU that it is not for."""
    return cpu.precision(context.precision) if model.device.type == "cpu" else context.precision


def _load(one: Speaker, length: int, context: StageContext) -> Any:
    """The model, packed layers made dense: that is what many rows at a time need."""
    method = cpu.method(one.place)
    if method.startswith("sluice-"):
        kind = method.removeprefix("sluice-")
        return variants.dense(variants.load(one.place, kind), kind).to(context.device)
    if method:  # bitsandbytes' kinds are loaded alike
        return variants.load(one.place, variants.BNB[0])
    kind = attention.choose(context.device, length)
    return language_models.load(str(one.place), context.dtype, kind).to(context.device).eval()
