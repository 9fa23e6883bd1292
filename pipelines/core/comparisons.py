"""Comparisons: K ranked or scored responses (InstructGPT), or TRL's and hh-rlhf's chosen and rejected.

In: a record. Out: `prompt`, `responses`, dense `ranks` (1 is best, ties share a rank), `labeler`, `votes`. Pairs
without any prompt are accepted only where `columns: {prompt: null}` says so.
"""

from __future__ import annotations

import os
from typing import Any

from pipelines.core.faults import BadRow, shown
from pipelines.core.fields import Fields, conversation, counted, filled, one_name, prompt_of, transcript, whole
from pipelines.core.readers import Cells
from pipelines.core.transcripts import ANSWER, SPEAKER, messages_of


def comparison(fields: Fields) -> dict[str, Any]:
    """K ranked responses; a pair is K = 2. Ranks are stored dense: 1 is best, ties share a rank."""
    if fields.means(("responses", "ranks", "scores"), ("chosen", "rejected")):
        responses = [filled(item, fields.column("responses")) for item in fields.items("responses")]
        prompt = _prompt_of_comparison(fields)
        ranks = _order(fields, responses)
        votes = None
    elif fields.has("chosen") or fields.has("rejected"):
        prompt, chosen, rejected = _pair(fields)
        responses, ranks, votes = [chosen, rejected], [1, 2], _votes(fields)
    else:
        there = ", ".join(map(str, fields.record)) or "none"
        accepted = "responses with ranks or scores, or chosen with rejected; map them under columns:"
        raise BadRow("responses", f"no such column (there are: {there})", accepted)
    labeler = fields.optional("labeler")
    who = None if labeler is None else one_name(labeler)
    return {"prompt": prompt, "responses": responses, "ranks": ranks, "labeler": who, "votes": votes}


def _prompt_of_comparison(fields: Fields) -> str:
    if "prompt" in fields.columns and fields.columns["prompt"] is None:
        return ""
    column = fields.column("prompt")
    try:
        fields.value("prompt")
    except BadRow:
        accepted = "a prompt, columns: {prompt: COLUMN}, or columns: {prompt: null} if there are none"
        raise BadRow(column, f"no such column (there are: {', '.join(map(str, fields.record))})", accepted) from None
    return prompt_of(fields.said("prompt"), column)


def _order(fields: Fields, responses: list[str]) -> list[int]:
    """Dense ranks out of `ranks` or `scores`. Of a table with both columns the one that is mapped counts, or the one
    that is not null; else they must say the same.
    """
    named = [name for name in ("ranks", "scores") if fields.columns.get(name)] or ["ranks", "scores"]
    given = [name for name in named if fields.known(name) not in (None, "")] or named[:1]
    found = [(_ranks if name == "ranks" else _scores)(fields, responses) for name in given]
    if found[0] != found[-1]:
        column, scores = fields.column("scores"), fields.value("scores")
        raise BadRow(
            column,
            f"{shown(scores)}, another order than {fields.column('ranks')}'s",
            "columns: {ranks: COLUMN} or {scores: COLUMN}, which says what counts",
        )
    return found[0]


def _ranks(fields: Fields, responses: list[str]) -> list[int]:
    ranks, column = fields.items("ranks"), fields.column("ranks")
    _same_length(column, ranks, responses)
    return dense_ranks(ranks, column)


def dense_ranks(ranks: list[Any], column: str) -> list[int]:
    """Ranks as they are stored: 1 is best, ties share a rank, no rank is left out.

    Raises:
        BadRow: they are no ranking.
    """
    ranks = [counted(rank) for rank in ranks]  # 1.5, the mean of tied places, is no rank
    dense = _dense(ranks) if all(whole(rank, 1) for rank in ranks) else None
    competition = [1 + sum(other < rank for other in ranks) for rank in ranks] if dense else None
    if dense is None or ranks not in (dense, competition):
        accepted = (
            "a ranking: 1 is best, ties share a rank, and the next rank is 2 or counts the tied (1,2,2,3 or 1,2,2,4)"
        )
        raise BadRow(column, shown(ranks), accepted)
    return dense


def _scores(fields: Fields, responses: list[str]) -> list[int]:
    scores, column = fields.items("scores"), fields.column("scores")
    _same_length(column, scores, responses)
    return ranks_of_scores(scores, column)


def ranks_of_scores(scores: list[Any], column: str) -> list[int]:
    """Dense ranks of scores, higher is better, equal scores share a rank.

    Raises:
        BadRow: one of them is no number.
    """
    if not all(isinstance(score, int | float) and not isinstance(score, bool) and score == score for score in scores):
        raise BadRow(column, shown(scores), "numbers, higher is better")
    return _dense([-score for score in scores])


def _dense(values: list[Any]) -> list[int]:
    """Ranks 1, 2, ... by ascending value; equal values share a rank."""
    place = {value: rank for rank, value in enumerate(sorted(set(values)), 1)}
    return [place[value] for value in values]


def _same_length(column: str, values: list[Any], responses: list[str]) -> None:
    if len(responses) < 2:
        raise BadRow("responses", f"{len(responses)} responses", "at least 2")
    if len(values) != len(responses):
        raise BadRow(column, f"{len(values)} values {shown(values)}", f"one for each of the {len(responses)} responses")


def _pair(fields: Fields) -> tuple[str, str, str]:
    """Prompt, chosen and rejected as text, from TRL's plain or conversational form or hh-rlhf's transcripts.

    Where those hold what came before the answers, all of it is the prompt, also beside a column that has a part of it.
    """
    chosen, rejected = fields.said("chosen"), fields.said("rejected")
    column = fields.column("chosen")
    if isinstance(chosen, list) and isinstance(rejected, list):
        sides = [conversation(chosen, column), conversation(rejected, fields.column("rejected"))]
        if any(side[-1]["role"] != "assistant" for side in sides) or sides[0][:-1] != sides[1][:-1]:
            raise BadRow(column, shown(chosen), "the rejected one's messages, but for the assistant's last")
        return _prompt_of_turns(fields, sides[0][:-1]), sides[0][-1]["content"], sides[1][-1]["content"]
    better, worse = filled(chosen, column), filled(rejected, fields.column("rejected"))
    prompted = fields.has("prompt") or "prompt" in fields.columns
    shared = os.path.commonprefix([better, worse])
    end = shared.rfind(ANSWER) + len(ANSWER) if ANSWER in shared else 0
    if ANSWER in better and ANSWER in worse and SPEAKER.match(shared):
        if not end or SPEAKER.search(better, end) or SPEAKER.search(worse, end):
            found = f"a conversation that goes on after it parts from the rejected one: {shown(better)}"
            raise BadRow(column, found, "transcripts that are the same up to the last Assistant: turn of both")
    elif prompted:
        return _prompt_of_comparison(fields), better, worse
    elif not end:
        accepted = "a prompt, transcripts that share one up to an Assistant: turn, or columns: {prompt: null}"
        raise BadRow(fields.column("prompt"), f"no such column (there are: {', '.join(fields.record)})", accepted)
    return shared[:end], filled(better[end:].strip(), column), filled(worse[end:].strip(), fields.column("rejected"))


def _prompt_of_turns(fields: Fields, turns: list[dict[str, str]]) -> str:
    """The messages before the answers as text; those of the column `prompt` are before them, or among them."""
    given = fields.said("prompt") if fields.has("prompt") else None
    if given is None or not turns:
        return transcript(turns, fields.column("chosen")) if turns else _prompt_of_comparison(fields)
    column = fields.column("prompt")
    before = conversation(given, column) if isinstance(given, list) else messages_of(prompt_of(given, column))
    if turns[0]["role"] == "assistant":
        return transcript(before + turns, column)
    asked, said = ([message["content"].strip() for message in messages] for messages in (before, turns))
    among = any(said[start : start + len(asked)] == asked for start in range(len(said)))
    if not among:
        accepted = "what the messages before the answer say, or columns: {prompt: null}: they are the prompt"
        raise BadRow(column, shown(given), accepted)
    return transcript(turns, fields.column("chosen"))


def _votes(fields: Fields) -> list[int] | None:
    """Votes for the chosen and for the rejected one; a single number counts for the chosen one."""
    if not fields.given("votes"):
        return None
    value = counted(fields.value("votes"))
    if isinstance(fields.record, Cells) and value.removesuffix(".0").isdecimal() and len(value) < 13:
        value = int(value.removesuffix(".0"))
    votes = [counted(vote) for vote in ([value, 0] if isinstance(value, int) else fields.items("votes"))]
    if len(votes) != 2 or not all(whole(vote, 0) for vote in votes):
        raise BadRow(fields.column("votes"), shown(value), "a number, or two: for the chosen, for the rejected")
    if votes[0] < votes[1]:
        found = f"{votes[0]} for the chosen and {votes[1]} for the rejected one"
        accepted = "no fewer for the chosen; if columns: has the two the wrong way round, swap them"
        raise BadRow(
            fields.column("votes"), found, f"{accepted}; if votes are of no account here, columns: {{votes: null}}"
        )
    return votes
