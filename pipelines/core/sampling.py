"""Samples from a causal language model: several completions of each prompt, with their log-probabilities.

Each prompt is encoded once for all its samples (`branch_cache`), logits exist for one token of each sample at a
time, and samples that have ended make room. A sample depends on the seed, its prompt, its prompt's place in the
list and its own number, not on what else is sampled with it (up to the rounding of sums in another order).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from pipelines.core import attention, context_window, few_rows, packing, training
from pipelines.core.branch_cache import BLOCK, SPARE, SPARE_SHARE, BranchCache, Layout, layout, widest
from pipelines.core.drawing import LARGEST, draw, room_to_draw
from pipelines.core.errors import ArtifactError, DataError
from pipelines.core.language_models import body_and_head

BRANCHES = 256  # samples that grow side by side
PROMPT_TOKENS = 1024  # padded tokens of prompts that are encoded side by side: more is not faster, but padded more
KEPT_TOKENS = 32_768  # tokens whose keys are kept at a time: 750 MB for SmolLM2-135M in bf16


class Samples(NamedTuple):
    """What was drawn, [prompt][sample]."""

    ids: list[list[list[int]]]  # new tokens, the one that ended the sample included
    log_probabilities: list[list[list[float]]]  # of each of them, in nats, under the distribution drawn from
    ended: list[list[bool]]  # whether one of `stops` came before the limit


class Decoder(NamedTuple):
    """The parts of a model that sampling uses, and room for all samples."""

    body: Any
    head: torch.Tensor  # (vocabulary, width), in the type to compute in
    logits: Callable[[torch.Tensor], torch.Tensor]  # of last hidden states (rows, width): their products with it
    room: torch.Tensor  # for `draw`


def sample(
    model: Any,
    prompts: list[list[int]],
    *,
    count: int,
    tokens: int,
    stops: list[int],
    pad: int,
    temperature: float,
    seed: int,
    precision: str,
    tell: Callable[[int, int], None],
    greedy: bool = False,
) -> Samples:
    """Draw `count` completions of each prompt from softmax(logits / temperature), no token left out.

    Args:
        model: a causal language model of transformers, wrapped by peft or not.
        prompts: token ids; none empty.
        count: samples of each prompt.
        tokens: the most new tokens of a sample.
        stops: tokens that end a sample.
        pad: any token; what fills rows of prompts is never seen.
        temperature: 0 takes the most likely token, with its log-probability at temperature 1.
        seed: of the random numbers; each sample has a stream of its own by (seed, prompt's place, sample's number).
        precision: `bf16` computes in bf16 whatever the weights' type, `fp32` in the weights' own type.
        tell: called with (done, total) prompts after each batch.
        greedy: one sample more of each prompt, its last, takes the most likely token throughout.

    Raises:
        ArtifactError: prompt and `tokens` exceed the model's context, or its architecture cannot be used.
        DataError: a prompt has no token.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    body, head = body_and_head(inner)
    _refuse(inner, [len(prompt) for prompt in prompts], tokens)
    every = count + greedy
    decoder = _decoder(body, head, max(every, min(BRANCHES, every * len(prompts))), precision)
    found = Samples([[] for _ in prompts], [[] for _ in prompts], [[] for _ in prompts])
    done = 0
    was_training = model.training
    model.eval()
    try:
        with (
            torch.inference_mode(),
            training.computing_in(precision, head.device.type, model),
            _quick_attention(inner),
            few_rows.quick(body, precision),
        ):
            for batch in _batches([len(prompt) for prompt in prompts], every, tokens):
                uniforms = np.full((len(batch), every, tokens), LARGEST, dtype=np.float32)
                for place, one in np.ndindex(len(batch), count):
                    stream = np.random.default_rng([seed, batch[place], one])
                    uniforms[place, one] = stream.random(tokens, dtype=np.float32)
                chosen = [prompts[number] for number in batch]
                ids, scores = _continue(decoder, chosen, uniforms.reshape(-1, tokens), stops, pad, temperature)
                for place, number in enumerate(batch):
                    for row in range(place * every, (place + 1) * every):
                        length = next((n + 1 for n, token in enumerate(ids[row]) if token in stops), tokens)
                        found.ids[number].append(ids[row][:length])
                        found.log_probabilities[number].append(scores[row][:length])
                        found.ended[number].append(ids[row][length - 1] in stops)
                done += len(batch)
                tell(done, len(prompts))
    finally:
        model.train(was_training)
    return found


def _continue(
    decoder: Decoder,
    prompts: list[list[int]],
    uniforms: np.ndarray[Any, Any],
    stops: list[int],
    pad: int,
    temperature: float,
) -> tuple[list[list[int]], list[list[float]]]:
    """New tokens of each sample (prompt x count + sample), and their log-probabilities; `uniforms`: (samples, tokens).

    What stands behind a token of `stops` is without meaning.
    """
    device = decoder.head.device
    samples, tokens = uniforms.shape
    count = samples // len(prompts)
    luck = torch.from_numpy(uniforms).to(device)
    # One row more than samples: what unused branches write goes there (SPARE is -1, the last row).
    ids = torch.zeros(samples + 1, tokens, dtype=torch.long, device=device)
    scores = torch.zeros(samples + 1, tokens, device=device)
    endings = torch.tensor(stops, device=device)

    # 1. Each prompt once; all its samples draw their first token from what it says.
    cache, hidden = _encode(decoder, prompts, count, tokens, pad)
    places = torch.arange(samples, device=device).view(len(prompts), count)  # sample of each branch
    token, score = _next(decoder, hidden, luck[:, 0].view_as(places), temperature)
    for step in range(tokens):
        # 2. Note what was drawn; samples that it ended leave their branch.
        ids[places, step], scores[places, step] = token, score
        places = torch.where(torch.isin(token, endings), SPARE, places)
        going = places[places != SPARE].tolist()
        if not going or step + 1 == tokens:
            break

        # 3. When half the branches are free, or the room is full, the others move together.
        if step == cache.capacity or 2 * len(going) <= places.numel():
            capacity = min(step + BLOCK, tokens - 1) if step == cache.capacity else cache.capacity
            cache.rearrange(layout(going, count, widest(cache.prefix, capacity)), capacity)
            places = torch.tensor(cache.layout.branches, device=device)
            token = ids[places, step]

        # 4. One token further, all samples in one pass.
        mask, positions = cache.next_step()
        hidden = _states(decoder, token, positions, mask, cache).flatten(0, 1)
        drawn = _next(decoder, hidden, luck[places, step + 1].view(-1, 1), temperature)
        token, score = (part.view_as(places) for part in drawn)
    return ids.tolist(), scores.tolist()


def _encode(
    decoder: Decoder, prompts: list[list[int]], count: int, tokens: int, pad: int
) -> tuple[BranchCache, torch.Tensor]:
    """The prompts' keys and values, with room for their samples; last hidden states (prompts, width) of each.

    The longest prompt comes first. What all of them begin with, such as a system's message, is encoded once; the rest
    a few prompts at a time, each few padded to the longest of them.
    """
    device, dtype = decoder.head.device, decoder.head.dtype
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    first = Layout(list(range(len(prompts))), [list(range(n * count, (n + 1) * count)) for n in range(len(prompts))])
    cache = BranchCache(first, lengths, len(prompts[0]), min(BLOCK, tokens - 1), dtype)
    shared = _common(prompts)
    if shared:
        ids = torch.tensor([prompts[0][:shared]], device=device)
        mask = packing.attention_mask(torch.zeros_like(ids), dtype)
        _states(decoder, ids, torch.arange(shared, device=device)[None], mask, cache)
        cache.shared = shared
    last: list[torch.Tensor] = []
    while len(last) < len(prompts):
        longest = len(prompts[len(last)]) - shared
        some = [prompt[shared:] for prompt in prompts[len(last) :][: max(1, PROMPT_TOKENS // longest)]]
        # Padded on the right: no token of a prompt sees what comes after it.
        ids = torch.tensor([prompt + [pad] * (longest - len(prompt)) for prompt in some], device=device)
        positions = torch.arange(shared, shared + longest, device=device).expand_as(ids)
        mask = packing.attention_mask(torch.zeros_like(ids), dtype)
        mask = torch.cat([mask.new_zeros(*mask.shape[:3], shared), mask], dim=3)
        cache.encoding = len(last)
        hidden = _states(decoder, ids, positions, mask, cache)
        last += [hidden[place, len(prompt) - 1] for place, prompt in enumerate(some)]
    return cache, torch.stack(last)


def _common(prompts: list[list[int]]) -> int:
    """How many tokens all the prompts begin with; of each at least one is left."""
    if len(prompts) == 1:
        return 0
    low, high = min(prompts), max(prompts)  # what these two begin with, all between them begin with
    most = min(len(prompt) for prompt in prompts) - 1
    return next((place for place in range(most) if low[place] != high[place]), most)


def _states(
    decoder: Decoder, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache: BranchCache
) -> torch.Tensor:
    """Last hidden states (rows, length, width) in the type to compute in."""
    states = decoder.body(
        input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
    )
    hidden: torch.Tensor = states.last_hidden_state.to(decoder.head.dtype)
    return hidden


def _next(
    decoder: Decoder, hidden: torch.Tensor, uniforms: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row of hidden states (rows, width), by `draw`."""
    return draw(decoder.logits(hidden), uniforms, temperature, decoder.room)


def _decoder(body: Any, head: torch.Tensor, samples: int, precision: str) -> Decoder:
    """Made ready for as many samples at a time, and the branches that a layout may leave unused."""
    head = head.detach().to(torch.bfloat16 if precision == "bf16" else head.dtype)
    room = room_to_draw(math.ceil(samples / (1 - SPARE_SHARE)), len(head), head.device)
    return Decoder(body, head, few_rows.product(head, None, precision), room)


def _batches(lengths: list[int], count: int, tokens: int) -> Iterator[list[int]]:
    """Prompts that are continued side by side: of like length, the longest first, within the two bounds above."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        longest = lengths[batch[0]] if batch else 0
        size = len(batch) + 1
        kept = size * (longest + count * tokens)
        if batch and (size * count > BRANCHES or kept > KEPT_TOKENS):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


@contextmanager
def _quick_attention(model: Any) -> Iterator[None]:
    """Grouped products in place of torch's fused CPU kernel, which takes several times as long for a few queries."""
    before = model.config._attn_implementation
    if model.device.type == "cpu":
        model.config._attn_implementation = attention.choose("cpu", 1)
    try:
        yield
    finally:
        model.config._attn_implementation = before


def check(model: Any) -> None:
    """Refuse an architecture that `sample` cannot use, before the work on a model that is sampled from at its end.

    Raises:
        ArtifactError: its layers keep something else than keys and values, or make masks of their own.
    """
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds or not model._supports_attention_backend:
        raise ArtifactError(
            f"architecture {config.model_type} cannot be sampled from: "
            + (f"it has layers of {', '.join(sorted(kinds))}" if kinds else "its attention makes masks of its own")
            + "; choose another, for example llama, gpt2, qwen3, gpt_neox, mistral"
        )


def _refuse(model: Any, lengths: list[int], tokens: int) -> None:
    """Say what cannot be sampled, before anything is computed."""
    empty = [number for number, length in enumerate(lengths) if not length]
    if empty:
        raise DataError(f"prompt {empty[0]} of {len(lengths)} has no token: there is nothing to continue")
    check(model)
    need, room = max(lengths, default=0) + tokens, context_window.length(model.config)
    if room and need > room:
        raise ArtifactError(
            f"the longest prompt has {max(lengths)} tokens; with {tokens} new ones that is {need}, but the model's "
            f"context is {room} tokens: shorten the prompts or sample fewer tokens"
        )
