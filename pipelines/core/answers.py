"""What a model answers to held-out prompts, and how well it foretells what people answered.

`bits` is what a model needs to say the reference, EOS included, given the prompt; per byte of the reference it
compares models with different tokenizers. Greedy answers are compared with the reference by chrF and ROUGE-L.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.core import chats, context_window, losses, sampling, segments, statistics, text_scores
from pipelines.core.context import StageContext
from pipelines.core.demonstrations import Demonstration
from pipelines.core.errors import DataError
from pipelines.core.language_models import body_and_head
from pipelines.core.packing import separator_id
from pipelines.core.reading import write_evaluation


class Answers(NamedTuple):
    """One greedy answer a prompt."""

    texts: list[str]
    tokens: list[int]  # new ones, EOS included
    ended: list[bool]  # whether EOS came before the limit


def reference_bits(
    model: Any, tokenizer: Any, examples: list[Demonstration], tokens: int, context: StageContext, what: str
) -> list[float]:
    """Bits of each example's last answer, EOS included, given all that came before it."""
    sequences = []
    for example in examples:
        prompt = chats.encode_prompt(tokenizer, example.prompt)
        response = chats.encode_response(tokenizer, example.reference)
        supervised = [False] * len(prompt) + [True] * len(response)
        sequences.append(segments.of_chat(chats.Chat(prompt + response, supervised)))
    nats = _nats(model, tokenizer, sequences, tokens, context, _tell(context, what))
    return [value / math.log(2) for value in nats]


def mean_loss(model: Any, tokenizer: Any, examples: list[Demonstration], tokens: int, context: StageContext) -> float:
    """Nats a supervised token, over all turns of the assistant. It is quick, and no signal interrupts it."""
    sequences = [segments.of_chat(example.chat) for example in examples]
    supervised = sum(sum(example.chat.supervised) for example in examples)
    return sum(_nats(model, tokenizer, sequences, tokens, context, lambda done, total: None)) / supervised


def _nats(
    model: Any,
    tokenizer: Any,
    sequences: list[segments.Sequence],
    tokens: int,
    context: StageContext,
    tell: Callable[[int, int], None],
) -> list[float]:
    """Sum of the losses of each sequence's labels, in nats."""
    import torch

    training_mode = model.training
    model.eval()
    _, head = body_and_head(model.get_base_model() if hasattr(model, "get_base_model") else model)
    found = [0.0] * len(sequences)
    batches = segments.micro_batches(sequences, tokens, tokenizer.pad_token_id)
    with torch.no_grad():
        for number, (rows, texts) in enumerate(batches, 1):
            labels = rows.labels.to(context.device)
            kept = labels != losses.IGNORE
            hidden = segments.hidden_states(model, rows, context)[kept]
            scores = losses.label_log_probabilities(hidden, head, labels[kept]).double().cpu()
            # One sum for each branch of each row.
            width = int(rows.branches.max()) + 1
            places = torch.arange(len(texts))[:, None] * width + rows.branches
            sums = torch.zeros(len(texts) * width, dtype=torch.double).index_add_(0, places[kept.cpu()], scores)
            for row, here in enumerate(texts):
                for branch, text in enumerate(here, 1):
                    found[text] = -float(sums[row * width + branch])
            tell(number, len(batches))
    model.train(training_mode)
    return found


def greedy(
    model: Any,
    tokenizer: Any,
    examples: list[Demonstration],
    limit: int,
    context: StageContext,
    what: str,
    shots: list[Demonstration],
) -> Answers:
    """The most likely answer to each example's prompt, `limit` tokens at most, after `shots` as earlier turns.

    Where the context is too short for all the shots, as many are given as fit, the last ones first.
    """
    room = context_window.length(model.config) or math.inf
    prompts = [_prompt(tokenizer, example, shots, room - limit) for example in examples]
    model.eval()
    samples = sampling.sample(
        model, prompts, count=1, tokens=limit, stops=sorted({tokenizer.eos_token_id, separator_id(tokenizer)}),
        pad=tokenizer.pad_token_id, temperature=0.0, seed=0, precision=context.precision, tell=_tell(context, what),
    )  # fmt: skip
    first = [ids[0] for ids in samples.ids]
    texts = [chats.decode_response(tokenizer, ids) for ids in first]
    return Answers(texts, [len(ids) for ids in first], [ended[0] for ended in samples.ended])


def _prompt(tokenizer: Any, example: Demonstration, shots: list[Demonstration], room: float) -> list[int]:
    """Tokens of a prompt after as many shots as there is room for; a shot's system message is left out.

    The shots stand between the system messages that the prompt begins with and the rest of it.
    """
    system = list(takewhile(lambda message: message["role"] == "system", example.prompt))
    turns = example.prompt[len(system) :]
    for first in range(len(shots) + 1):
        earlier = [message for shot in shots[first:] for message in shot.messages if message["role"] != "system"]
        ids = chats.encode_prompt(tokenizer, [*system, *earlier, *turns])
        if len(ids) <= room:
            return ids
    raise DataError(
        f"demonstration {example.id}: a prompt of {len(ids)} tokens leaves no room for an answer: {room:.0f} fit into "
        "the model's context beside sft.max_new_tokens. Lower it, or sft.max_length with sft.too_long: drop"
    )


def scores(name: str, answers: Answers, examples: list[Demonstration]) -> dict[str, list[float]]:
    """Columns `rouge_l<name>` and `chrf<name>`: each answer against its reference."""
    pairs = [(text, example.reference) for text, example in zip(answers.texts, examples, strict=True)]
    return {
        f"rouge_l{name}": [text_scores.rouge_l(*pair) for pair in pairs],
        f"chrf{name}": [text_scores.chrf(*pair) for pair in pairs],
    }


def write(place: Path, examples: list[Demonstration], columns: dict[str, list[float]]) -> None:
    """Write one row an example: id, group, bytes of the reference, and the scores."""
    known: dict[str, list[Any]] = {
        "id": [example.id for example in examples],
        "group": [example.group for example in examples],
        "bytes": [len(example.reference.encode()) for example in examples],
    }
    write_evaluation(place, {**known, **columns})


def metrics(examples: list[Demonstration], columns: dict[str, list[float]]) -> dict[str, float]:
    """Means over the examples, with 95 % intervals (groups drawn whole) where a gate or a reader needs them."""
    import numpy as np

    sizes = np.array([len(example.reference.encode()) for example in examples], dtype=float)
    groups = [example.group for example in examples]
    values = {name: np.array(column, dtype=float) for name, column in columns.items()}
    intervals = {
        "response_bits_per_byte": statistics.bootstrap(values["bits"], sizes, group=groups),
        "gain_response_bits_per_byte": statistics.paired_bootstrap(
            values["bits_before"], values["bits"], sizes, group=groups
        ),
        "rouge_l": statistics.bootstrap(values["rouge_l"], group=groups),
    }
    found = {"response_bits_per_byte_before": float(values["bits_before"].sum() / sizes.sum())}
    for name, interval in intervals.items():
        found |= {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
    plain = ("chrf", "rouge_l_zero_shot", "rouge_l_few_shot", "chrf_zero_shot", "chrf_few_shot")
    return found | {name: float(values[name].mean()) for name in plain}


def _tell(context: StageContext, what: str) -> Callable[[int, int], None]:
    def tell(done: int, total: int) -> None:
        context.progress(done, total, scoring=what)
        context.stop_if_asked()

    return tell
