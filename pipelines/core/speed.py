"""How fast, and in how much memory, model directories answer on this machine: each in a process of its own, in turns.

A process is forked from a server that has imported all that loading the models needs and has computed nothing
(`speed_server`), so that what a model adds to memory is the model's, and so is the time it takes to load. All are
loaded first; then they are asked in turns, since a neighbour's load comes and goes and would otherwise fall on one of
them. Turns are short and many, and two models are compared turn by turn (`ratio`): 12 turns of half a second gave
ratios of 1.52 to 1.94; a slow model's turn ends after fewer tokens. One token at a time runs through `decoding.Decoder`
where it supports the architecture, else through transformers' `generate` (`Speed.by_decoder`).
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from pipelines.core import decoding, speed_server, variants
from pipelines.core.errors import ArtifactError

ROUNDS = 16
PREFILL_ROUNDS = 4  # of them: a prompt takes as long as many tokens
PREFILL_TOKENS, DECODE_TOKENS = 128, 12
TURN = 0.25  # seconds after which a turn of decoding ends, however few tokens it had
READ, GO_ON, END = "read", "go on", "end"  # what a process is asked
READ_BYTES = 256 * 2**20  # of an array that is summed to measure memory's rate: more than any cache


class Speed(NamedTuple):
    """Of one model; medians over the rounds."""

    rounds: tuple[float, ...]  # tokens a second of decoding, round by round
    prefill: float  # tokens a second
    load_seconds: float
    memory_mb: float  # resident at the most, less what the process had before the model
    by_decoder: bool  # False: through transformers' `generate`

    @property
    def decode(self) -> float:
        """Tokens a second."""
        return median(self.rounds)


def ratio(one: Speed, other: Speed) -> tuple[float, float, float]:
    """How many times as fast one decodes as the other: median over the rounds, lowest, highest."""
    found = [ours / theirs for ours, theirs in zip(one.rounds, other.rounds, strict=True)]
    return median(found), min(found), max(found)


def measure(
    models: Mapping[str, tuple[Path, str]], threads: int, tell: Callable[[int, int], None], rounds: int = ROUNDS
) -> dict[str, Speed]:
    """Load every model, ask all in turns, `rounds` times.

    Args:
        models: directory and kind (`variants.load`) by name.
        threads: of each process; only one works at a time.
        tell: called with (done, total) rounds.

    Raises:
        ArtifactError: a process has died; its model is named.
    """
    server = speed_server.start(models.values())
    asked: dict[str, tuple[Any, Connection]] = {}
    loaded = {}
    try:
        for name, (place, kind) in models.items():
            ours, theirs = server.Pipe()
            process = server.Process(target=_serve, args=(theirs, str(place), kind, threads), daemon=True)
            process.start()
            theirs.close()
            asked[name] = (process, ours)
            loaded[name] = _receive(name, ours)  # before the next one starts: each has the machine for itself
        found: dict[str, list[tuple[float, float | None]]] = {name: [] for name in models}
        for number in range(rounds + 1):  # the first is a warm-up
            for name, (_, ours) in asked.items():
                ours.send(READ if number <= PREFILL_ROUNDS else GO_ON)
                found[name].append(_receive(name, ours))
            tell(number, rounds)
        ended = {}
        for name, (_, ours) in asked.items():
            ours.send(END)
            ended[name] = _receive(name, ours)
    finally:
        for process, ours in asked.values():
            ours.close()
            process.join(5)
            process.kill()
    result = {}
    for name in models:
        measured = found[name][1:]
        prefill = median(read for _, read in measured if read is not None)
        seconds, quick = loaded[name]
        result[name] = Speed(tuple(decode for decode, _ in measured), prefill, seconds, ended[name], quick)
    return result


def bandwidth(threads: int) -> float:
    """Bytes a second that this machine reads from memory, the best of five sums over a large array."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        array = torch.ones(READ_BYTES // 4)
        best = 0.0
        for _ in range(5):
            start = time.perf_counter()
            array.sum()
            best = max(best, READ_BYTES / (time.perf_counter() - start))
    finally:
        torch.set_num_threads(before)
    return best


def _serve(pipe: Connection, place: str, kind: str, threads: int) -> None:
    """One model: load it, answer rounds, tell its memory."""
    torch.set_num_threads(threads)
    before = _resident()
    start = time.perf_counter()
    model = variants.load(Path(place), kind)
    seconds = time.perf_counter() - start
    quick = decoding.unsupported(model) is None
    decoder = decoding.Decoder(model, PREFILL_TOKENS + DECODE_TOKENS + 1) if quick else None
    pipe.send((seconds, quick))
    room = getattr(model.config, "max_position_embeddings", None) or PREFILL_TOKENS + DECODE_TOKENS + 1
    length = max(1, min(PREFILL_TOKENS, room - DECODE_TOKENS - 1))
    ids = np.random.default_rng(17).integers(0, model.config.vocab_size, length).tolist()
    while (asked := pipe.recv()) != END:
        pipe.send(_round(model, decoder, ids, asked == READ))
    pipe.send(max(0.0, _resident() - before) / 2**20)


def _round(model: Any, decoder: decoding.Decoder | None, ids: list[int], read: bool) -> tuple[float, float | None]:
    """Tokens a second of decoding, and of reading a prompt if asked."""
    if decoder is None:
        return _generate(model, ids)
    prefill = None
    if read:
        start = time.perf_counter()
        decoder.prefill(ids)
        prefill = len(ids) / (time.perf_counter() - start)
    decoder.count = len(ids)  # forgets what came after the prompt
    start, said, spent = time.perf_counter(), 0, 0.0
    while said < DECODE_TOKENS and spent <= TURN:
        decoder.step(ids[said % len(ids)])
        said, spent = said + 1, time.perf_counter() - start
    return said / spent, prefill


@torch.inference_mode()
def _generate(model: Any, ids: list[int]) -> tuple[float, float]:
    """The same through transformers: what `generate` takes longer than reading the prompt."""
    prompt = torch.tensor([ids])
    start = time.perf_counter()
    model(input_ids=prompt, logits_to_keep=1)
    read = time.perf_counter() - start
    start = time.perf_counter()
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
        max_new_tokens=DECODE_TOKENS + 1, min_new_tokens=DECODE_TOKENS + 1, pad_token_id=0,  # reading gives the first
    )  # fmt: skip
    return DECODE_TOKENS / max(1e-9, time.perf_counter() - start - read), len(ids) / read


def _resident() -> float:
    """Bytes resident at the most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _receive(name: str, pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise ArtifactError(f"{name}: the process that measures its speed has died; it may be out of memory") from None
