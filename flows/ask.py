"""`sluice ask QUESTION`: an answer, as it comes on a terminal, its sources with file and line, and the time it took."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from flows import assistants
from pipelines.core import terminal
from pipelines.core.errors import ParamsError, UserError


class Options(NamedTuple):
    """What can be typed beside the question."""

    model: str | None
    look_up: bool
    json: bool
    max_new_tokens: int | None  # None: the assistant's
    temperature: float
    top_p: float
    seed: int


def ask(root: Path, here: Path, question: str, options: Options, console: Console) -> None:
    """Answer one question on standard output.

    Raises:
        UserError: an empty question, one that does not fit the model's context, or no such model.
        ParamsError: an option that is not accepted.
        ArtifactError, StoreUnavailable: as `assistants.found` and `assistants.opened`.
    """
    assistants.checked(question)
    began = time.perf_counter()
    precision = assistants.prepare(root)
    what = assistants.found(root, here, options.model, options.look_up)
    _sampling(options, 1 if options.max_new_tokens is None else options.max_new_tokens)  # refused before the loading
    answering = assistants.opened(what, options.look_up, precision)
    assistant, loaded = answering.assistant, time.perf_counter() - began
    sampling = _sampling(options, options.max_new_tokens or assistant.settings.max_new_tokens)
    live = console.is_terminal and not options.json
    pieces: list[str] = []

    def say(piece: str) -> None:
        pieces.append(piece)
        print(terminal.clean(piece), end="", flush=True, file=console.file)

    try:
        reply = assistant.answer(question, sampling=sampling, look_up=options.look_up, say=say if live else None)
    except ValueError as error:
        raise UserError(str(error)) from None
    except KeyboardInterrupt:
        print(file=console.file)
        raise SystemExit(130) from None
    seconds = {"load": loaded, **reply.seconds}
    if options.json:
        told = {"question": question, "answer": reply.text, "sources": [one._asdict() for one in reply.sources]}
        told |= {"refused": reply.refused, "own_citations": reply.own, "model": answering.name, "seconds": seconds}
        print(assistants.as_json(told, spelled=not console.encoding.startswith("utf")), file=console.file)
        return
    lines = ["" if live else terminal.clean(reply.text), ""]
    if live and (again := assistants.numbered(reply, "".join(pieces))):
        lines += [*again, ""]
    lines += assistants.source_lines(reply)
    lines += [""] * bool(reply.sources) + [f"{answering.name}: {times(seconds)}"]
    print(*lines, sep="\n", file=console.file)  # a console would make an emoji of `[:key:]`, and blanks of a tab


def times(seconds: dict[str, float]) -> str:
    """How long it took, in words."""
    words = {"load": "loaded in", "search": "sources after", "first": "first word after", "all": "all after"}
    return ", ".join(f"{word} {seconds[name]:.2f} s" for name, word in words.items() if name in seconds)


def _sampling(options: Options, count: int) -> object:
    from pipelines.core.generate import Sampling

    try:
        return Sampling(count, temperature=options.temperature, top_p=options.top_p, seed=options.seed)
    except ValueError as error:
        name, _, why = str(error).partition(":")
        raise ParamsError(f"--{name.replace('_', '-')}:{why}") from None
