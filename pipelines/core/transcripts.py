"""Conversations as one text, in hh-rlhf's form: `\\n\\nHuman: ...\\n\\nAssistant: ...`, and back to messages."""

from __future__ import annotations

import re

Message = dict[str, str]

ROLES = ("system", "user", "assistant")
SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}
SPEAKER = re.compile(r"(?:^|\n\n)(System|Human|Assistant):")
ANSWER = "\n\nAssistant:"
_ROLE_OF = {speaker: role for role, speaker in SPEAKERS.items()}


def with_our_line_ends(text: str) -> str:
    """A transcript without the carriage returns of Windows, between which no turn is found; other text as it is."""
    plain = text.replace("\r\n", "\n")
    return plain if SPEAKER.match(plain) and ANSWER in plain else text


def messages_of(prompt: str) -> list[Message]:
    """A stored prompt as messages: one user message, or the turns of an hh-rlhf transcript.

    A transcript begins with a speaker (`Human:`) and ends with `\\n\\nAssistant:`, which waits for the answer; files
    often have a blank behind it.
    """
    said = prompt.rstrip()
    if not (SPEAKER.match(said) and said.endswith(ANSWER)):
        return [{"role": "user", "content": prompt}]
    pieces = SPEAKER.split(said.removesuffix(ANSWER))[1:]  # speaker, text, speaker, text, ...
    return [
        {"role": _ROLE_OF[speaker], "content": text.strip()}
        for speaker, text in zip(pieces[::2], pieces[1::2], strict=True)
    ]
