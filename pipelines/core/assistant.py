"""An assistant's folder, opened: a question in, an answer with its sources out.

    index/           what it knows (`retrieval.Index`)
    model/           what answers (a Hugging Face directory)
    assistant.json   how a question is put: template, passages, budget, threshold (`Settings`)

Stage `answers` makes the folder; what it measures goes through `put` and `grounding`, as an answer here does.

Flat-importable, as a registered model carries it along: of the project it imports `grounding`, `citing`, `retrieval`
and `generate` with what these import, and the packed layers that the model has.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

FILE = "assistant.json"
VERSION = 1
LEAST_BUDGET = 32  # tokens: a title and a line
JUDGED = 5  # as many passages as stage `rag` calibrates by


def _ours(name: str) -> Any:
    """A module of ours: in the project `pipelines.core.NAME`, beside a registered model `NAME`."""
    return import_module(f"{__package__}.{name}" if __package__ else name)


grounding: Any = _ours("grounding")
citing: Any = _ours("citing")


class AssistantDamaged(ValueError):
    """An assistant's folder is not what stage `answers` makes."""


class NoRoom(ValueError):
    """Question, passages and answer do not fit into the model's context."""


class Settings(NamedTuple):
    """How a question is put: what `assistant.json` holds."""

    template: Any  # grounding.Template
    passages: int  # how many may stand in the prompt
    budget: int  # tokens of all of them
    threshold: float | None  # least relevance of the best one; null: every question is answered
    max_new_tokens: int
    embedder: str  # that the index was made with
    judged: int = JUDGED  # how many are held against the threshold, however many stand in the prompt


class Put(NamedTuple):
    """A question as the model gets it."""

    ids: list[int]
    passages: list[Any]  # those in the prompt; the first is [1]


class Source(NamedTuple):
    """A passage that the model read."""

    number: int
    title: str
    url: str | None
    line: int  # in the file of the url where that names one (`#L12`), else in the document's text
    text: str
    relevance: float | None  # cosine of question and passage; null: it has no vector
    cited: bool
    source: str | None = None  # of the data, that the document came from: a file, as a rule


class Reply(NamedTuple):
    """An answer."""

    text: str  # with marks [n]
    sources: list[Source]
    refused: bool  # nothing relevant was found, or the model said that it does not know
    own: bool  # whether the model wrote the marks; else they are attributions (`citing`)
    dropped: int  # marks of the model's that named no source
    seconds: dict[str, float]  # until the passages were found, the first piece came, and all was said


def read(folder: Path) -> Settings:
    """The settings of an assistant's folder.

    Raises:
        AssistantDamaged: no `assistant.json`, or not one of this version.
    """
    place = folder / FILE
    try:
        raw = json.loads(place.read_text(encoding="utf-8"))
        if raw["version"] != VERSION:
            raise AssistantDamaged(f"{place}: version {raw['version']!r}; this program reads version {VERSION}")
        given = {*raw, *(name for name in Settings._fields if name not in Settings._field_defaults)}
        known = {name: raw[name] for name in Settings._fields if name in given}
        return Settings(**{**known, "template": grounding.Template(**known["template"])})
    except FileNotFoundError:
        raise AssistantDamaged(
            f"{place}: no such file; an assistant's folder as stage answers makes it has one"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise AssistantDamaged(f"{place} is damaged ({type(error).__name__}: {error}); make it again") from None


def written(settings: Settings) -> dict[str, Any]:
    """The settings as JSON values, which `read` reads."""
    return {"version": VERSION, **settings._asdict(), "template": settings.template._asdict()}


def searched(settings: Settings) -> int:
    """How many passages are looked up: those for the prompt, and those that the threshold is about."""
    return settings.passages if settings.threshold is None else max(settings.passages, settings.judged)


def irrelevant(found: Sequence[Any], settings: Settings) -> bool:
    """Whether nothing that was found is about the question."""
    refused: bool = grounding.irrelevant(found[: settings.judged], settings.threshold)
    return refused


def put(
    question: str,
    passages: Sequence[Any],
    settings: Settings,
    tokenizer: Any,
    context: int | None,
    history: Sequence[Mapping[str, str]] = (),
) -> Put:
    """A question with passages, or, where there are none, alone, as tokens.

    Args:
        passages: best first; as many of them are used as the settings say.
        context: tokens that the model can attend to; null: no limit.
        history: earlier messages.

    Raises:
        NoRoom: question and answer leave no room for a passage, or do not fit themselves.
    """
    if not passages:
        ids = grounding.encode(tokenizer, [*history, {"role": "user", "content": question.strip()}])
        _check(len(ids), settings, context, 0)
        return Put(ids, [])
    passages = passages[: settings.passages]
    left = room(question, settings, tokenizer, context, history)

    def count(text: str) -> int:
        return len(grounding.plain(tokenizer, text))

    budget = settings.budget if left is None else min(settings.budget, left)
    while True:
        try:
            prompted = grounding.build(question, passages, settings.template, budget, count, history)
        except ValueError as error:
            raise NoRoom(str(error)) from None
        ids = grounding.encode(tokenizer, prompted.messages)
        # What joins passages and question was in neither count.
        over = 0 if context is None else len(ids) + settings.max_new_tokens - context
        if over <= 0:
            return Put(ids, [passages[place] for place in prompted.used])
        budget -= over


def room(
    question: str,
    settings: Settings,
    tokenizer: Any,
    context: int | None,
    history: Sequence[Mapping[str, str]] = (),
) -> int | None:
    """Tokens that a question leaves for passages; null: as many as one likes.

    Raises:
        NoRoom: not enough for one.
    """
    prompted = grounding.build(question, [], settings.template, 0, len, history)
    return _check(len(grounding.encode(tokenizer, prompted.messages)), settings, context, LEAST_BUDGET)


def _check(tokens: int, settings: Settings, context: int | None, least: int) -> int | None:
    """What is left of a context beside a prompt and the answer, at least `least`."""
    if context is None:
        return None
    left = context - tokens - settings.max_new_tokens
    if left < least:
        raise NoRoom(
            f"the question takes {tokens} tokens{' with its instructions' if least else ''} and the answer up to "
            f"{settings.max_new_tokens}: of the model's context of {context} that leaves {left}"
            + (f", and a passage needs {least}" if least else "")
            + ". Ask in fewer words, or take a model with a longer context."
        )
    return left


def told(passage: Any) -> str:
    """What a citation of a passage is held against: its title and its text."""
    return f"{passage.title}\n{passage.text}"


def line_of(passage: Any) -> int:
    """The line of a passage: of its file where the url names one (`#L12`), else of the document's text."""
    _, found, number = (passage.url or "").rpartition("#L")
    return int(number) if found and number.isdecimal() else int(passage.line)


class Assistant:
    """An assistant, ready to be asked. Safe in several threads, which take turns."""

    def __init__(self, index: Any, model: Any, tokenizer: Any, settings: Settings) -> None:
        self.index, self.tokenizer, self.settings = index, tokenizer, settings
        self.generate = _ours("generate")
        self.context = getattr(model.config, "max_position_embeddings", None)
        self.decoder, self.free = self.generate.decoder(model), threading.Lock()

    @classmethod
    def open(cls, folder: Path, model: Path | None = None) -> Assistant:
        """Open an assistant's folder; `model`: another directory than its own that shall answer.

        Raises:
            AssistantDamaged: the folder is not what stage `answers` makes.
            ValueError: the index is damaged, or was made with another embedder (`retrieval.Index.open`).
        """
        from transformers import AutoTokenizer

        settings = read(folder)
        place = folder / "model" if model is None else model
        if not (place / "config.json").is_file():
            raise AssistantDamaged(f"{place} is no Hugging Face model: it has no config.json")
        index = _ours("retrieval").Index.open(folder / "index", embedder=settings.embedder)
        return cls(index, load(place), AutoTokenizer.from_pretrained(place), settings)

    def answer(
        self,
        question: str,
        *,
        sampling: Any = None,
        history: Sequence[Mapping[str, str]] = (),
        look_up: bool = True,
        say: Callable[[str], None] | None = None,
    ) -> Reply:
        """Answer a question.

        Args:
            sampling: a `generate.Sampling`; null: the likeliest text of the settings' length.
            history: earlier messages (role, content), the oldest first.
            look_up: false: without passages, from what the model remembers.
            say: called with each piece of the text as it comes, without marks that are put in afterwards.

        Raises:
            ValueError: an empty question; a chat that the model's template refuses. `NoRoom`: one that does not fit.
        """
        if not question.strip():
            raise ValueError("the question is empty: ask something")
        sampling = sampling or self.generate.Sampling(max_new_tokens=self.settings.max_new_tokens)
        settings = self.settings._replace(max_new_tokens=sampling.max_new_tokens)
        began, seconds = time.perf_counter(), dict[str, float]()
        with self.free:
            found = self.index.search(question, searched(settings)) if look_up else []
            seconds["search"] = time.perf_counter() - began
            refused = look_up and irrelevant(found, settings)
            asked = Put([], found) if refused else put(question, found, settings, self.tokenizer, self.context, history)
            pieces = [] if refused else self.generate.stream(self.decoder, self.tokenizer, asked.ids, sampling)
            said = ""
            for piece in [grounding.REFUSAL] if refused else pieces:
                seconds.setdefault("first", time.perf_counter() - began)
                said += piece
                if say is not None:
                    say(piece)
        seconds["all"] = time.perf_counter() - began
        cited = citing.cite(said, [] if refused else [told(passage) for passage in asked.passages])
        sources = [] if refused else [_source(n, one, n in cited.numbers) for n, one in enumerate(asked.passages, 1)]
        return Reply(cited.text, sources, refused or citing.unknowing(said), cited.own, cited.dropped, seconds)


def _source(number: int, passage: Any, cited: bool) -> Source:
    known = passage.relevance == passage.relevance  # NaN: no vector
    return Source(
        number, passage.title, passage.url, line_of(passage), passage.text,
        float(passage.relevance) if known else None, cited, passage.source,
    )  # fmt: skip


def load(place: Path) -> Any:
    """A model of a directory, its layers packed or not, on the CPU."""
    from transformers import AutoModelForCausalLM

    return _ours("cpu").load(place, AutoModelForCausalLM)
