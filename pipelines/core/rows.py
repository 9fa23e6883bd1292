"""A raw record to the rows of a table: columns mapped, formats of the ecosystem understood, bad rows named.

In: a record and its source's `columns`. Out: one row (a long document: several) as `pipelines.core.tables`
stores it. The formats are TRL's (prompt + completion, messages, chosen + rejected, plain or conversational),
hh-rlhf's transcripts, and InstructGPT's K ranked responses (or their scores).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pipelines.core.comparisons import comparison
from pipelines.core.faults import BadRow, shown
from pipelines.core.fields import Fields, conversation, filled, prompt_of, whole
from pipelines.core.readers import Cells
from pipelines.core.transcripts import messages_of

Row = dict[str, Any]
SCORED = ("first", "second")  # the columns of a task whose labels may be real numbers
TASK_SHAPES = (("text",), ("premise", "hypothesis"), SCORED, ("context", "choices"))
PART_CHARACTERS = 16_000


def canonical(
    table: str, record: Mapping[str, Any], columns: Mapping[str, str | None], label_type: str = "class"
) -> list[Row]:
    """Rows of a table out of one raw record (without `id` and `group`, see `identify`).

    `label_type`, `class` or `score`, says what the labels of a task are.

    Raises:
        BadRow: what is wrong with it.
    """
    fields = Fields(record, columns)
    if table == "corpus":
        return [{"text": part} for part in cut(fields.text("text"))]
    if table == "demonstrations":
        return [{"kind": fields.optional("kind") or "demonstration", "messages": _demonstration(fields)}]
    if table == "prompts":
        prompt = prompt_of(fields.said("prompt"), fields.column("prompt"))
        return [{"prompt": prompt, "reference": fields.optional("reference")}]
    if table == "comparisons":
        return [comparison(fields)]
    if table == "knowledge":
        return [{"title": fields.text("title"), "text": fields.text("text"), "url": fields.optional("url")}]
    if table == "queries":
        return [_query(fields)]
    return [_scored(fields) if label_type == "score" else _example(fields)]


def identify(record: Mapping[str, Any], columns: Mapping[str, str | None], group: str | None) -> tuple[str | None, ...]:
    """`(id, group)` of a record, each None where it has none. `group` is the column that the source names.

    Raises:
        BadRow: one of them is there but is neither text nor a whole number.
    """
    fields = Fields(record, columns)
    own_id = fields.optional("id")
    if group:
        return own_id, Fields(record, {"group": group}).key("group")
    return own_id, fields.optional("group")


def cut(text: str, limit: int = PART_CHARACTERS) -> list[str]:
    """A long document in parts of at most `limit` characters, cut at the last paragraph end that fits.

    Where none fits, at a line end, then at a space, then anywhere. No part is blank.
    """
    parts, start = [], 0
    while len(text) - start > limit:  # a place in the text, not what is left of it, which would be copied for each part
        ends = (text.rfind(mark, start + 1, start + limit + 1) for mark in ("\n\n", "\n", " "))
        end = next((end for end in ends if end > start + limit // 4), start + limit)
        parts.append(text[start:end])
        start = end
        while text.startswith("\n", start):
            start += 1
    return [part for part in [*parts, text[start:]] if part.strip()]


def _demonstration(fields: Fields) -> list[dict[str, str]]:
    if fields.means(("messages",), ("prompt", "completion")):
        column = fields.column("messages")
        raw = fields.items("messages")
        messages = conversation(raw, column)
        _refuse_what_is_lost(raw, column)
        if messages[-1]["role"] != "assistant" or not _user_begins(messages):
            raise BadRow(column, _roles(messages), "a user's message first (but for system) and, last, the assistant's")
        return messages
    prompt, completion = fields.said("prompt"), fields.said("completion")
    column = fields.column("prompt")
    turns = conversation(prompt if isinstance(prompt, list) else messages_of(filled(prompt, column)), column)
    if isinstance(prompt, list):
        _refuse_what_is_lost(prompt, column)
    if not _user_begins(turns):
        raise BadRow(column, _roles(turns), "a user's message first (but for system)")
    if isinstance(completion, list):
        answer = conversation(completion, fields.column("completion"))
        if [message["role"] for message in answer] != ["assistant"]:
            raise BadRow(fields.column("completion"), shown(completion), "one message of the assistant")
        _refuse_what_is_lost(completion, fields.column("completion"))
        return [*turns, *answer]
    return [*turns, {"role": "assistant", "content": fields.text("completion")}]


def _refuse_what_is_lost(messages: list[dict[str, Any]], column: str) -> None:
    """Raise where a message says, beside its text, what training would go against: OpenAI's format can."""
    for place, message in enumerate(messages, 1):
        at = f"{column}, message {place}"
        if message["role"] == "assistant" and message.get("weight", 1) == 0:
            accepted = "answers that are all learned from: leave weight out, or leave the conversation out"
            raise BadRow(at, "weight 0, an answer that is not to be learned from", accepted)
        if call := message.get("tool_calls") or message.get("function_call"):
            raise BadRow(at, f"a call of a tool, {shown(call)}", "what is said as text alone")


def _user_begins(messages: list[dict[str, str]]) -> bool:
    """Whether the user speaks before the assistant: an answer must answer something."""
    return next((message["role"] for message in messages if message["role"] != "system"), None) == "user"


def _roles(messages: list[dict[str, str]]) -> str:
    return f"the roles {', '.join(message['role'] for message in messages)}"


def _query(fields: Fields) -> Row:
    """A question with the id of the document that answers it; no target: nothing in the knowledge does."""
    row: Row = {"kind": fields.optional("kind") or "question", "query": fields.text("query")}
    target, answers = fields.optional("target"), fields.texts("answers")
    if answers is not None and target is None:
        accepted = "answers only beside a target, the id of the knowledge row that they come from"
        raise BadRow(fields.column("answers"), shown(answers), accepted)
    return row | {"target": target, "answers": answers, "referrer": fields.optional("referrer")}


def _example(fields: Fields) -> Row:
    """One labelled example of a task: its text columns, `label` (a class, or the right choice from 0)."""
    # What is mapped is meant; the file may have more, such as a column text beside two sentences.
    shapes = [shape for shape in TASK_SHAPES if fields.maps(*shape)]
    shapes = shapes or [shape for shape in TASK_SHAPES if all(fields.has(name) for name in shape)]
    if not shapes:
        there = ", ".join(map(str, fields.record)) or "none"
        accepted = "; ".join(" + ".join(shape) for shape in TASK_SHAPES) + "; map them under columns:"
        raise BadRow("text", f"none of the tasks' columns (there are: {there})", accepted)
    if len(shapes) > 1:
        told = f"the columns of several kinds of task: {'; '.join(' + '.join(shape) for shape in shapes)}"
        raise BadRow("(row)", told, "one; map the columns of it, and no others, under columns:")
    shape = shapes[0]
    row: Row = {name: fields.text(name) for name in shape if name != "choices"}
    label, column = fields.value("label"), fields.column("label")
    if "choices" in shape:
        row["choices"] = [filled(item, fields.column("choices")) for item in fields.items("choices")]
        if len(row["choices"]) < 2:
            raise BadRow(fields.column("choices"), shown(row["choices"]), "a list of at least two choices")
        if isinstance(fields.record, Cells) and label.isdecimal():
            label = int(label)
        if not whole(label, 0) or label >= len(row["choices"]):
            raise BadRow(column, shown(label), f"the right choice's number, 0 to {len(row['choices']) - 1}")
        return row | {"label": label, "label_text": row["choices"][label]}
    if isinstance(label, str):
        return row | {"label": None, "label_text": filled(label, column)}
    if not whole(label, 0):
        score = "; real numbers with label_type: score in the source" if shape == SCORED else ""
        raise BadRow(column, shown(label), f"the class as text or as a whole number from 0{score}")
    return row | {"label": label, "label_text": fields.optional("label_text") or str(label)}


def _scored(fields: Fields) -> Row:
    """Two texts with a real number, for example how alike they are: `label` (finite, any sign), no `label_text`."""
    row: Row = {name: fields.text(name) for name in SCORED}
    label, column = fields.value("label"), fields.column("label")
    cell = isinstance(fields.record, Cells)  # in a CSV file every value is text
    try:
        if isinstance(label, bool) or not (cell or isinstance(label, int | float)):
            raise ValueError
        score = float(label)
    except (ValueError, OverflowError):
        raise BadRow(column, shown(label), "a number, since the source says label_type: score") from None
    if not math.isfinite(score):
        raise BadRow(column, f"the number {score}", "a finite number")
    return row | {"label": score, "label_text": None}
