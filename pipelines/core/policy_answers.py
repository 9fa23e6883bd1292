"""What a policy says to held-out prompts: sampled at temperature 1 with no token left out, and greedily.

Two models that are compared answer the same prompts with the same random numbers; the greedy answer shares its
prompt's encoding with the sampled ones. Answers are kept batch by batch, so
a stage that is killed while it samples loses one batch at most.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.core import artifacts, attention, chats, completions, judges, k_way, language_models, sampling, segments
from pipelines.core.completions import Prompt
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError, DataError
from pipelines.core.labelers import drawn

if TYPE_CHECKING:
    from pipelines.core.params.distill import DistillParams
    from pipelines.core.params.dpo import DpoParams
    from pipelines.core.params.ppo import PpoParams
    from pipelines.core.params.quantize import QuantizeParams

    Params = PpoParams | DpoParams | DistillParams | QuantizeParams

Scores = list[list[float]]  # of each prompt, of each answer
DRAWN, GREEDY = slice(-1), slice(-1, None)  # of a prompt's samples


class Answers(NamedTuple):
    """What a model said, [prompt][sample]."""

    texts: list[list[str]]
    ids: list[list[list[int]]]  # EOS included, where it came
    log_probabilities: Scores  # of the whole answer, in nats
    ended: list[list[bool]]  # whether EOS came before the limit


class Said(NamedTuple):
    """What a model said to the held-out prompts."""

    sampled: Answers  # `eval_samples` a prompt
    greedy: Answers  # one


def held_out(params: Params, data: Path, tokenizer: Any, context: StageContext) -> list[Prompt]:
    """Prompts of the test side: with references where the judge needs them and there are any. Never none. How many
    were too long is said.

    Raises:
        ArtifactError: the data have no prompts; a tokenizer that cannot put them to a model.
        DataError: there is none; one is too long; `judge: slots` and a prompt that lists no attributes.
    """
    if lacking := [part for part in ("chat_template", "eos_token", "pad_token") if not getattr(tokenizer, part)]:
        raise ArtifactError(
            f"{tokenizer.name_or_path}: its tokenizer has no {', no '.join(lacking)}, so the model can be asked "
            "nothing; set and save what is missing, or name another model"
        )
    limits = completions.Limits(context.stage, params.seed, params.max_prompt_tokens, params.too_long)
    found: list[Prompt] = []
    for with_reference in (True, False) if params.judge == "overlap" else (False,):
        if not found:
            found, dropped = completions.choose(limits, data, "test", params.eval_prompts, tokenizer, with_reference)
            completions.tell_dropped(dropped, len(found), limits, "test", context)
    if not found:
        raise DataError("prompts/test has no row; accepted: at least one. Add prompts, or raise data.test_share.")
    for prompt in found if params.judge == "slots" else ():
        judges.gold(params.judge, prompt.text, "", None)  # now, not after the training
    return found


def ask(
    params: Params,
    prompts: Sequence[Prompt],
    place: Path,
    what: str,
    context: StageContext,
    keep: str | None = None,
    load: Callable[[], Any] | None = None,
) -> Said:
    """What the model in a directory says, computed in the context's type.

    Args:
        what: whose answers these are, for whoever watches.
        keep: under which name batches are kept in the stage's scratch, and taken from it; None: they are not.
        load: gives the model, where the directory is not one that `language_models.load` reads.

    Raises:
        ArtifactError: prompt and answer do not fit the model's context.
        Stopped: a signal came; the batches so far are kept.
    """
    speaker = cache(partial(_speaker, params, place, load, context))
    found: dict[int, tuple[Any, ...]] = {}  # of each prompt, the fields of `Answers`
    # By length in the tokens of the prompts, not in the model's own: any two models get the same batches.
    for batch in completions.in_batches(prompts):
        first = len(found)
        texts = [prompts[number].text for number in batch]
        seed = int(drawn("evaluation", str(params.seed), str(first)) * 2**31)

        def tell(done: int, _: int, first: int = first) -> None:
            context.progress(first + done, len(prompts), sampling=f"answers of {what}")

        make = partial(_answers, params, speaker, texts, seed, context, tell)
        part = kept(context, f"{keep}-{first}", make) if keep else make()
        found |= zip(batch, zip(*part, strict=True), strict=True)
        context.stop_if_asked()
    fields: list[tuple[Any, ...]] = list(zip(*(found[number] for number in range(len(prompts))), strict=True))
    return Said(*(Answers(*([one[part] for one in field] for field in fields)) for part in (DRAWN, GREEDY)))


def _speaker(params: Params, place: Path, load: Callable[[], Any] | None, context: StageContext) -> tuple[Any, Any]:
    """Model and tokenizer of a directory."""
    tokenizer = language_models.load_tokenizer(str(place))
    if load is not None:
        return load(), tokenizer
    kind = attention.choose(context.device, params.max_prompt_tokens + params.max_new_tokens)
    return language_models.load(str(place), context.dtype, kind).to(context.device), tokenizer


def _answers(
    params: Params,
    speaker: Callable[[], tuple[Any, Any]],
    prompts: list[str],
    seed: int,
    context: StageContext,
    tell: k_way.Tell,
) -> list[Any]:
    """Fields of `Answers` to a batch of prompts, the greedy one being each prompt's last."""
    model, tokenizer = speaker()
    # With the model's own tokenizer and template: a champion may have others than today's.
    asked = [chats.encode_prompt(tokenizer, chats.messages_of(prompt)) for prompt in prompts]
    found = sampling.sample(
        model, asked, count=params.eval_samples, tokens=params.max_new_tokens, stops=[tokenizer.eos_token_id],
        pad=tokenizer.pad_token_id, temperature=1.0, seed=seed, precision=context.precision, tell=tell, greedy=True,
    )  # fmt: skip
    texts = [[chats.decode_response(tokenizer, ids) for ids in of_prompt] for of_prompt in found.ids]
    sums = [[sum(one) for one in of_prompt] for of_prompt in found.log_probabilities]
    return list(Answers(texts, found.ids, sums, found.ended))


def log_probabilities(place: Path, prompts: Sequence[Prompt], answers: Answers, context: StageContext) -> Scores:
    """What the model in a directory thinks of another's answers, as `Answers.log_probabilities`."""
    sequences = [segments.of_completions(one.ids, ids) for one, ids in zip(prompts, answers.ids, strict=True)]
    kind = k_way.kind(context.device, sequences)
    model = language_models.load(str(place), context.dtype, kind).to(context.device).eval()
    pad = language_models.load_tokenizer(str(place)).pad_token_id
    return k_way.log_probabilities(model, sequences, pad, context, k_way.teller(context, "KL to the SFT model"))


def kept(context: StageContext, name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives, or gave a run that was killed afterwards; as JSON holds it, whichever of the two it is."""
    place = context.work / "evaluation" / f"{name}.json"
    if not place.exists():
        artifacts.write_json(place, make())
    return json.loads(place.read_text(encoding="utf-8"))
