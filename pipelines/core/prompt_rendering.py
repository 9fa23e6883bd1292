"""A prompt as data, made into the messages of a chat: variables filled in, examples chosen, an answer taken out.

In: what a prompt file says (`core/prompt_files.py`), a question's columns, and examples. Out: messages. Variables are
MLflow's, `{{ name }}`, and are filled in one pass: what a question or a passage holds is text, whatever it looks like.
Examples are earlier turns of the chat, the answer as the assistant's (Brown et al., "Language Models are Few-Shot
Learners", 2020, section 2.1). They are:

* **fixed**: the same for every question, by hash of seed and text;
* **random**: others for each question, by hash of seed, question and text;
* **similar**: nearest by TF-IDF, the nearest last (Liu et al., "What Makes Good In-Context Examples for GPT-3?", 2022);
* **given**: those of a list, in its order.

Chosen ones are as many of one label as of another, in turns: a model repeats the answer it has seen most (Zhao et al.,
"Calibrate Before Use", 2021). A question is never its own example. A prompt of a generation that is a transcript is put
as its turns, as in training. This file imports nothing of the project but `transcripts`: a registered prompt carries
both along.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal, NamedTuple

# In the project `pipelines.core.transcripts`; beside a registered model `transcripts`.
transcripts: Any = import_module(f"{__package__}.transcripts" if __package__ else "transcripts")

How = Literal["none", "fixed", "random", "similar", "given"]
Message = dict[str, str]

COLUMNS: dict[str, tuple[str, ...]] = {  # of a question, by kind of task; each is a variable
    "classification": ("text",),
    "entailment": ("premise", "hypothesis"),
    "similarity": ("first", "second"),
    "choice": ("context",),
    "generation": ("prompt",),
}
NUMBERED = "choice"  # the kind whose options are candidates, so long that an answer may give the number
VARIABLE = re.compile(r"\{\{\s*([A-Za-z0-9_]+)\s*\}\}")
# Thai, Lao, Burmese, Khmer, kana and Han: written without spaces, each sign counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]{{2,}}")
_GOES_ON = re.compile(rf"[{_UNSPACED}\u3130-\u318f\uac00-\ud7af]\Z")  # behind it a word may go on, as in Korean


class Example(NamedTuple):
    """An answered question that may be shown."""

    id: str
    columns: dict[str, str]
    options: tuple[str, ...]
    label: int  # number of the right option; 0 where there are no options
    answer: str


def render(template: str, values: Mapping[str, str]) -> str:
    """The template with its variables filled in, once.

    Raises:
        ValueError: a variable has no value.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ValueError(f"variable {match[1]!r} has no value; given: {', '.join(sorted(values)) or 'none'}")
        return values[match[1]]

    return VARIABLE.sub(value, template).strip()


def messages(
    prompt: Mapping[str, Any],
    columns: Mapping[str, str],
    options: Sequence[str],
    shown: Sequence[Example] = (),
    passages: Sequence[str] = (),
) -> list[Message]:
    """The chat that waits for an answer.

    Args:
        prompt: `kind`, `template`, `system` (or None) and `instruction` (or None).
        columns: of the question, as `COLUMNS` names them.
        options: what may be answered; none for a generation.
        shown: examples, first to last.
        passages: texts that were found for the question, best first.

    Raises:
        ValueError: see `render`.
    """
    turns: list[Message] = []
    system = [prompt["system"].strip()] if prompt["system"] else []
    asked = [(one.columns, one.options, one.answer) for one in shown] + [(dict(columns), tuple(options), None)]
    for given, among, answer in asked:
        before, own = _conversation(prompt["kind"], given)
        if answer is None:
            system += [turn["content"] for turn in before if turn["role"] == "system"]
        turns += [turn for turn in before if turn["role"] != "system"]
        values = {**own, "options": listed(prompt["kind"], among), "instruction": (prompt["instruction"] or "").strip()}
        if passages:
            values["passages"] = "\n".join(f"[{number}] {text}" for number, text in enumerate(passages, 1))
        turns.append({"role": "user", "content": render(prompt["template"], values)})
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
    return [*([{"role": "system", "content": "\n\n".join(system)}] if system else []), *turns]


def _conversation(kind: str, columns: Mapping[str, str]) -> tuple[list[Message], dict[str, str]]:
    """The turns before the last of a prompt that is a conversation, and the columns with that one as the prompt."""
    if kind != "generation":
        return [], dict(columns)
    *before, last = transcripts.messages_of(columns["prompt"])
    return before, {**columns, "prompt": last["content"]}


def listed(kind: str, options: Sequence[str]) -> str:
    """The options as a prompt shows them."""
    if kind == NUMBERED:
        return "\n".join(f"{number}. {option}" for number, option in enumerate(options, 1))
    return ", ".join(options)


def chooser(pool: Sequence[Example], how: How, count: int, seed: int) -> Callable[[Mapping[str, str]], list[Example]]:
    """What chooses the examples of a question, given its columns: `count` of them, or as many as there are."""
    texts = [_text(one.columns) for one in pool]
    near = tf_idf(texts) if how == "similar" else None

    def choose(columns: Mapping[str, str]) -> list[Example]:
        own = _text(columns)
        if how == "none":
            return []
        if how == "given":
            return list(pool)
        if near is not None:
            scores = near(own)
            rank = [(-score, hashed(seed, text)) for score, text in zip(scores, texts, strict=True)]
        else:
            rank = [(0.0, hashed(seed, own if how == "random" else "", text)) for text in texts]
        order = sorted((number for number in range(len(pool)) if texts[number] != own), key=lambda n: (rank[n], n))
        return [pool[number] for number in reversed(balanced(order, [one.label for one in pool], count))]

    return choose


def balanced(order: Sequence[int], labels: Sequence[int], count: int) -> list[int]:
    """The first `count` of an order, taken from the labels in turns; the label that comes first begins."""
    queues: dict[int, list[int]] = {}
    for number in order:
        queues.setdefault(labels[number], []).append(number)
    found: list[int] = []
    while len(found) < count and any(queues.values()):
        found += [queue.pop(0) for queue in queues.values() if queue][: count - len(found)]
    return found


def tf_idf(texts: Sequence[str]) -> Callable[[str], list[float]]:
    """What gives the cosine of a text with each of `texts`: term counts x (ln((1 + n) / (1 + df)) + 1)."""
    counts = [Counter(_WORD.findall(text.lower())) for text in texts]
    seen = Counter(word for one in counts for word in one)
    idf = {word: math.log((1 + len(texts)) / (1 + known)) + 1 for word, known in seen.items()}

    def vector(words: Mapping[str, int]) -> dict[str, float]:
        weighed = {word: number * idf[word] for word, number in words.items() if word in idf}
        length = math.sqrt(sum(value * value for value in weighed.values())) or 1.0
        return {word: value / length for word, value in weighed.items()}

    vectors = [vector(one) for one in counts]

    def cosines(text: str) -> list[float]:
        own = vector(Counter(_WORD.findall(text.lower())))
        return [sum(value * one[word] for word, value in own.items() if word in one) for one in vectors]

    return cosines


def extract(pattern: str, text: str, kind: str, options: Sequence[str]) -> int | None:
    """Number of the option that an answer gives, from 0; None where it gives none, or more than one.

    Group 1 of the last match of `pattern` is read: where options are numbered a number, before what that option or
    another one says; else an option's name; or the one option whose name occurs
    in it, other than as part of a longer name.
    """
    found = list(re.finditer(pattern, text, re.IGNORECASE))
    if not found:
        return None
    said = _plain(found[-1][1] or "")
    names = [_plain(option) for option in options]
    numbered = re.match(r"\(?(\d{1,4})\b", said) if kind == NUMBERED else None
    number = int(numbered[1]) - 1 if numbered and 1 <= int(numbered[1]) <= len(options) else None
    if number is not None and re.fullmatch(r"\(?\d+\)?", said):  # also where the options are numbers themselves
        return number
    if said in names:
        return names.index(said)
    if number is not None:
        return number
    longest = sorted({*names} - {""}, key=len, reverse=True)  # `very good` is not `good`
    ends = (re.escape(name) + ("" if _GOES_ON.search(name) else r"(?!\w)") for name in longest)
    told = set(re.findall(rf"(?<!\w)(?:{'|'.join(ends)})", said)) if longest else set()
    within = [place for place, name in enumerate(names) if name in told]
    return within[0] if len(within) == 1 else None


def vote(answers: Sequence[int | None]) -> tuple[int | None, bool]:
    """The most frequent answer, and whether another one was as frequent: then the one that was given first counts.

    Answers without an option have no vote (Wang et al., "Self-Consistency Improves Chain of Thought Reasoning", 2023).
    """
    votes = Counter(one for one in answers if one is not None)  # keeps the order in which they were given first
    if not votes:
        return None, False
    (best, most), *others = votes.most_common()
    return best, any(number == most for _, number in others)


def hashed(*key: object) -> str:
    """A place in an order that belongs to a key."""
    return hashlib.blake2b("\0".join(map(str, key)).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _text(columns: Mapping[str, str]) -> str:
    return "\n".join(columns[name] for name in sorted(columns))


def _plain(text: str) -> str:
    """Without case, and without the marks around a name."""
    return text.strip().strip("\"'`*.,:;!? ").lower()
