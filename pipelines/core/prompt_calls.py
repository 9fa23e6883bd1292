"""What a model says to prompts: how likely it finds each option, or texts it writes; every call kept by its content.

Options share their prompt's forward pass, and questions what their prompts begin with (examples that are the same for
all). A pass, or a batch of samples, is kept in the stage's scratch under the hash of the model and of every token that
went in, so a stage that was killed asks nothing again, and a prompt that two strategies share is asked once. What goes
into a pass depends on the questions alone, never on what is kept: the same bytes, killed or not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.core import artifacts, attention, chats, context_window, k_way, language_models, sampling, segments
from pipelines.core.context import StageContext
from pipelines.core.prompt_rendering import Message
from pipelines.core.prompt_tasks import Question

ROW_LEAST = 128  # tokens that a row is filled up to beside what its questions share, where that is less
ROW_LIMIT = 384  # tokens of a row beside what its questions share: attention grows with its square
PASS_TOKENS = 2048  # of a forward pass, padding included: what a killed stage loses at most
BATCH = 32  # prompts that are sampled together


class Scored(NamedTuple):
    """Of one question: mean log-probability of each option's tokens, EOS included, in nats, and how many there are."""

    log_probabilities: list[float]
    tokens: list[int]


class Written(NamedTuple):
    """Of one question: sampled texts, and the tokens of each."""

    texts: list[str]
    tokens: list[int]


class Speaker:
    """A model's directory that answers. The model is loaded when something is asked that is not kept."""

    def __init__(self, name: str, place: Path, context: StageContext, most: int) -> None:
        """`most`: tokens of a prompt at most, whatever the model's context."""
        self.name, self.place, self.context = name, place, context
        self.tokenizer = language_models.load_tokenizer(str(place))
        chats.check_tokenizer(self.tokenizer)
        self.most = most
        self._responses: dict[str, list[int]] = {}

    @cached_property
    def content(self) -> str:
        """Hash of the directory."""
        return artifacts.content_hash(self.place)

    @cached_property
    def model(self) -> Any:
        """The model, in the context's type."""
        kind = attention.choose(self.context.device, ROW_LIMIT)
        return language_models.load(str(self.place), self.context.dtype, kind).to(self.context.device).eval()

    def room(self, answer: int) -> int:
        """Tokens that a prompt may have before an answer of so many."""
        from transformers import AutoConfig

        limit = context_window.length(AutoConfig.from_pretrained(self.place))
        return min(self.most, limit - answer) if limit else self.most

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a chat that waits for an answer."""
        return chats.encode_prompt(self.tokenizer, messages)

    def fits(self, question: Question) -> bool:
        """Whether a question, without instruction and examples, has at most half the tokens of a prompt."""
        text = "\n".join([*question.columns.values(), *question.options])
        return len(self.prompt([{"role": "user", "content": text}])) <= self.most // 2

    def response(self, text: str) -> list[int]:
        """Tokens of an answer, EOS last."""
        if text not in self._responses:
            self._responses[text] = chats.encode_response(self.tokenizer, text)
        return self._responses[text]

    def options(self, prompts: Sequence[list[int]], options: Sequence[Sequence[str]], what: str) -> list[Scored]:
        """How likely each prompt's options are, in the order of the prompts. `what`: for whoever watches.

        Raises:
            Stopped: a signal came; what is known is kept.
        """
        said = [[self.response(one) for one in among] for among in options]
        sequences = [segments.of_completions(ids, among) for ids, among in zip(prompts, said, strict=True)]
        shared = segments.shared_prefix(sequences) if len(sequences) > 1 else 0
        found: dict[int, list[float]] = {}
        for bins in passes([len(one.ids) for one in sequences], shared):
            order = [number for one in bins for number in one]
            key = [[sequences[number].ids, sequences[number].branches] for number in order] + [bins]

            def score(bins: list[list[int]] = bins) -> list[list[float]]:
                return self._score(sequences, bins, shared)

            found |= zip(order, self._kept("options", key, score), strict=True)
            self.context.progress(len(found), len(sequences), scoring=what)
            self.context.stop_if_asked()
        return [Scored(found[number], [len(one) for one in among]) for number, among in enumerate(said)]

    def texts(
        self, prompts: Sequence[list[int]], count: int, tokens: int, temperature: float, seed: int, what: str
    ) -> list[Written]:
        """`count` texts to each prompt, of `tokens` tokens at most, in the order of the prompts.

        Raises:
            Stopped: as `options`.
        """
        order = sorted(range(len(prompts)), key=lambda number: (len(prompts[number]), number))
        found: dict[int, Written] = {}
        for first in range(0, len(order), BATCH):
            batch = order[first : first + BATCH]
            asked = [prompts[number] for number in batch]

            def tell(done: int, _: int, first: int = first) -> None:
                self.context.progress(first + done, len(order), sampling=what)

            def write(asked: list[list[int]] = asked, first: int = first, tell: k_way.Tell = tell) -> Any:
                made = sampling.sample(
                    self.model, asked, count=count, tokens=tokens, stops=[self.tokenizer.eos_token_id],
                    pad=self.tokenizer.pad_token_id, temperature=temperature, seed=seed + first,
                    precision=self.context.precision, tell=tell,
                )  # fmt: skip
                return [
                    [[chats.decode_response(self.tokenizer, ids) for ids in one], [len(ids) for ids in one]]
                    for one in made.ids
                ]

            key = [asked, count, tokens, temperature, seed + first]
            found |= {n: Written(*part) for n, part in zip(batch, self._kept("texts", key, write), strict=True)}
            self.context.stop_if_asked()
        return [found[number] for number in range(len(prompts))]

    def _score(self, sequences: Sequence[segments.Sequence], bins: list[list[int]], shared: int) -> list[list[float]]:
        """One forward pass: of each sequence, in the order of the bins, the mean over each option's tokens."""
        import torch

        batch = k_way.of_bins(sequences, bins, self.tokenizer.pad_token_id, shared)
        with torch.inference_mode():
            each = k_way.token_log_probabilities(self.model, batch, self.context)
            mean = k_way.per_response(each, batch) / k_way.per_response(torch.ones_like(each), batch)
            return k_way.by_sequence(mean, batch)

    def _kept(self, kind: str, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, or gave a run that was killed; as JSON holds it, whichever of the two it is."""
        told = json.dumps([kind, self.content, self.context.precision, key])
        place = calls(self.context) / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.json"
        if not place.exists():
            artifacts.write_json(place, make())
        return json.loads(place.read_text(encoding="utf-8"))


def calls(context: StageContext) -> Path:
    """Where calls are kept."""
    return context.work / "calls"


def passes(lengths: Sequence[int], shared: int) -> list[list[list[int]]]:
    """Sequences of these lengths in rows, and rows in forward passes, after the first `shared` tokens of all.

    Beside what is shared a row has as much again, within bounds: less would compute the shared part too often.
    """
    rest = [length - shared for length in lengths]
    return k_way.passes(rest, min(max(ROW_LEAST, shared), ROW_LIMIT), shared, PASS_TOKENS)
