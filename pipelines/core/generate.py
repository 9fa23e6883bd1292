"""What a model says after a prompt, one sequence at a time: how a token is chosen, when to end, text as it comes.

Repetition penalty (Keskar et al. 2019, "CTRL", section 4.1), temperature, top-k (Fan et al. 2018, "Hierarchical Neural
Story Generation", section 5.4) and top-p (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration",
section 3.1) change the logits in this order, as in transformers; with the same seed the tokens are those of
transformers' `generate`. The logits come from `decoding.Decoder` where it knows the architecture, else from
transformers' forward pass.

This file imports nothing of the project but `decoding`: a registered model carries both along.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from math import isfinite
from typing import Any, cast

import torch

# In the project `pipelines.core.decoding`; beside a registered model `decoding`.
decoding: Any = import_module(f"{__package__}.decoding" if __package__ else "decoding")

CACHES = ("past_key_values", "cache_params")  # what architectures call what they keep of the tokens they have read
UNFINISHED = "\ufffd"  # what a tokenizer writes for bytes that are not, or not yet, a character


@dataclass(frozen=True)
class Sampling:
    """How a text is made.

    Raises:
        ValueError: a value that is not accepted; it is named.
    """

    max_new_tokens: int
    temperature: float = 0.0  # 0 takes the likeliest token, and top_k, top_p and seed change nothing
    top_k: int = 0  # draws among so many of the likeliest; 0: among all
    top_p: float = 1.0  # draws among the fewest tokens that have this probability together
    repetition_penalty: float = 1.0  # above 1: a token of prompt or text is less likely to come again
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good, accepted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature >= 0 and isfinite(self.temperature), "0 or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1 (off)"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0; 1 is off"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "texts that are not empty"),
            ("seed", 0 <= self.seed < 2**63, "0 to 2**63 - 1"),
        ):
            if not good:
                raise ValueError(f"{name}: {getattr(self, name)!r}; accepted: {accepted}")


class Forward:
    """Any causal language model of transformers, with its own forward pass and cache, in `decoding.Decoder`'s place.

    An architecture that keeps nothing of what it has read reads all of it again for every token.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        last = "logits_to_keep" in signature(model.forward).parameters
        self.options: dict[str, Any] = {"use_cache": True} | ({"logits_to_keep": 1} if last else {})

    def make_room(self, length: int) -> None:
        """Its cache grows by itself."""

    def prefill(self, ids: Sequence[int]) -> torch.Tensor:
        """Read a prompt from the start; logits (V,) in fp32 of what follows."""
        self.ids, self.cache = list(ids), dict[str, Any]()
        return self._read(self.ids)

    def step(self, token: int) -> torch.Tensor:
        """Append a token; logits (V,) in fp32 of what follows it."""
        self.ids.append(token)
        return self._read([token] if self.cache else self.ids)

    @torch.inference_mode()
    def _read(self, ids: list[int]) -> torch.Tensor:
        made = self.model(input_ids=torch.tensor([ids], device=self.model.device), **self.options, **self.cache)
        self.cache = {name: made[name] for name in CACHES if name in made}
        return cast("torch.Tensor", made.logits[0, -1].float().cpu())


def decoder(model: Any) -> Any:
    """What reads and continues with a transformers model, token by token; to be kept where more than one text is asked.

    Not thread-safe. It changes the model as `decoding.Decoder` says.
    """
    return decoding.Decoder(model, 1) if decoding.unsupported(model) is None else Forward(model)


def tokens(model: Any, ids: Sequence[int], sampling: Sampling, stops: Collection[int] = ()) -> Iterator[int]:
    """New tokens after a prompt, as they are chosen; one of `stops` ends it and is the last.

    Args:
        model: of transformers, or what `decoder` made of it.
        ids: the prompt.
        sampling: its `stop` is `stream`'s concern. A full context ends a text earlier than `max_new_tokens`.

    Raises:
        ValueError: an empty prompt, one that leaves no room in the model's context, or logits that are NaN.
    """
    maker = model if hasattr(model, "prefill") else decoder(model)
    room = getattr(maker.model.config, "max_position_embeddings", None)
    if not ids or (room is not None and len(ids) >= room):
        accepted = f"1 to {room - 1}, since the model's context is {room}" if room else "1 or more"
        raise ValueError(f"a prompt of {len(ids)} tokens; accepted: {accepted}")
    count = sampling.max_new_tokens if room is None else min(sampling.max_new_tokens, room - len(ids))
    maker.make_room(len(ids) + count)
    chance = torch.Generator().manual_seed(sampling.seed)
    logits = maker.prefill(ids)
    said = torch.zeros(len(logits), dtype=torch.bool)
    said[[token for token in ids if token < len(said)]] = True  # a head may have fewer rows than the embedding
    while True:
        token = choose(logits, said, sampling, chance)
        yield token
        count -= 1
        if token in stops or not count:
            return
        said[token] = True
        logits = maker.step(token)


def choose(logits: torch.Tensor, said: torch.Tensor, sampling: Sampling, chance: torch.Generator) -> int:
    """The next token.

    Args:
        logits: (V,) in fp32.
        said: (V,) bool, the tokens that `repetition_penalty` is about.
        chance: draws once, where the temperature is above 0.

    Raises:
        ValueError: a logit is NaN.
    """
    if bool(torch.isnan(logits).any()):
        raise ValueError("the model's logits are NaN: its weights are damaged, or the number type is too narrow for it")
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        logits = torch.where(said, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits / sampling.temperature
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        rising, order = logits.sort()
        out = rising.softmax(0).cumsum(0) <= 1 - sampling.top_p
        out[-1] = False  # the likeliest stays, whatever top_p
        logits = logits.masked_fill(out.scatter(0, order, out), -torch.inf)
    return int(torch.multinomial(logits.softmax(0), 1, generator=chance))


def endings(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a text: those of the model's generation config, else the tokenizer's EOS, if there is one."""
    found = getattr(model, "generation_config", None) and model.generation_config.eos_token_id
    if found is None:
        found = tokenizer.eos_token_id
    return set(found) if isinstance(found, list) else {found} - {None}


def stream(model: Any, tokenizer: Any, ids: Sequence[int], sampling: Sampling) -> Iterator[str]:
    """The text after a prompt in pieces, each final: together they are the text, without EOS and special tokens.

    What could be the beginning of a stop string, or of a character, is held back until more is known. The tokens that
    are read end where one of `stop` is complete.

    Args:
        model: of transformers, or what `decoder` made of it.

    Raises:
        ValueError: as `tokens`.
    """
    maker = model if hasattr(model, "prefill") else decoder(model)
    stops, pieces, held = endings(maker.model, tokenizer), Pieces(tokenizer), ""
    for token in tokens(maker, ids, sampling, stops):
        if token in stops:
            break
        held += pieces.add(token)
        place = _first(held, sampling.stop)
        ready = held[: len(held) - _begun(held, sampling.stop) if place is None else place]
        if ready:
            yield ready
        if place is not None:
            return
        held = held[len(ready) :]
    held += pieces.end()
    if ready := held[: _first(held, sampling.stop)]:
        yield ready


class Pieces:
    """Token by token, the text that each adds to those before it (`add`), and in the end what is left (`end`).

    A token's text depends on its neighbours: bytes of one character, a space that the first token of a text loses.
    So a piece is what the tokens since the last piece but one say more than those up to the last one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.ids = tokenizer, list[int]()
        self.start = self.told = 0  # tokens before the last piece, and up to its end

    def add(self, token: int) -> str:
        """What can be told now; empty while a character is not complete."""
        self.ids.append(token)
        text = self._more()
        if text.endswith(UNFINISHED):
            return ""
        self.start, self.told = self.told, len(self.ids)
        return text

    def end(self) -> str:
        """What is left: broken characters."""
        return self._more()

    def _more(self) -> str:
        before, whole = self._text(self.ids[self.start : self.told]), self._text(self.ids[self.start :])
        if whole.startswith(before):
            return whole[len(before) :]
        # Some tokenizers take back a whole run of bytes if its last one is wrong. What was told stays told.
        return self._text(self.ids[self.told :])

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _first(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string in a text begins."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


def _begun(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text could be the beginning of a stop string."""
    longest = max(map(len, stops), default=1) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in stops)), 0)
