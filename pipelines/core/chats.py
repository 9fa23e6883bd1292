"""Chats to tokens and back: the tokenizer's own chat template, with what is learned marked token by token.

In: messages (`role`, `content`). Out: ids, and for each whether it is supervised: what an assistant says, up to
and including the EOS that ends it, and nothing else. A template is only ever rendered as a whole; the answers
are found because the template is asked, turn by turn, where an answer begins (`add_generation_prompt`), so any
template works that writes a chat from left to right.

A special token's spelling inside a message is text, not that token: before rendering it is put out of the
tokenizer's sight, and put back when the piece of plain text around it is encoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pipelines.core import packing
from pipelines.core.errors import ArtifactError, DataError
from pipelines.core.transcripts import ROLES
from pipelines.core.transcripts import Message as Message
from pipelines.core.transcripts import messages_of as messages_of

PRIVATE = range(0xF0000, 0xFFFFE)  # code points without a meaning: they stand for special tokens' spellings
PROBE: list[Message] = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First answer."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second answer."},
]


class Chat(NamedTuple):
    """Token by token: the id, and whether it is supervised."""

    ids: list[int]
    supervised: list[bool]


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse a tokenizer with which a model would not learn to answer, or not to stop.

    Raises:
        ArtifactError: no chat template; no pad token, or pad is EOS; a template that does not end an answer with
            EOS, rewrites earlier turns, or whose pieces are not tokenized as the whole is.
    """
    if not tokenizer.chat_template:
        raise ArtifactError("the tokenizer has no chat template: set tokenizer.chat_template (ChatML, for example)")
    if tokenizer.eos_token_id is None:
        raise ArtifactError("the tokenizer has no EOS token: set eos_token to what its chat template ends a turn with")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        found = "no pad token" if tokenizer.pad_token_id is None else f"{tokenizer.pad_token!r} as pad token and as EOS"
        raise ArtifactError(
            f"the tokenizer has {found}: padding is masked, so the model would never learn to stop. Use the "
            "tokenizer stage's output, which sets another one, or set pad_token to a special token nobody uses."
        )
    ours = encode(tokenizer, PROBE)
    whole = tokenizer.apply_chat_template(PROBE, tokenize=True, return_dict=False)
    if ours.ids != whole[: len(ours.ids)]:
        raise ArtifactError(
            "the tokenizer splits the pieces of a chat otherwise than the whole chat, so an answer would not be "
            "written in the tokens it was learned in: a byte-level tokenizer (as of GPT-2, Llama 3, Qwen) is needed"
        )


def encode(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> Chat:
    """A chat that ends with the assistant, up to its last EOS; each of the assistant's turns is supervised.

    Raises:
        DataError: no messages, an unknown role, a chat that ends with somebody else, a blank answer, a chat the
            template refuses.
        ArtifactError: the template rewrites earlier turns when later ones are added, or does not end an answer
            with EOS.
    """
    _check_roles(messages)
    if messages[-1]["role"] != "assistant":
        raise DataError(f"the chat ends with the {messages[-1]['role']}: nothing to learn; it must end with assistant")
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    blank = [number for number in turns if not messages[number]["content"].strip()]
    if turns[0] == 0 or blank:
        problem = f"message {blank[0] + 1} is an empty answer" if blank else "the chat begins with an answer"
        raise DataError(f"{problem}; every message of the assistant must answer something")
    text = _Text(tokenizer, messages)
    whole = text.render(len(messages), opening=False)
    chat, done = Chat([], []), 0
    for number in turns:
        opening = text.render(number, opening=True)
        end = text.end_of_answer(whole, opening, done)
        for part, supervised in ((whole[done : len(opening)], False), (whole[len(opening) : end], True)):
            ids = text.tokens(part)
            chat.ids.extend(ids)
            chat.supervised.extend([supervised] * len(ids))
        done = end
    return chat


def encode_prompt(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Tokens of a chat that waits for an answer, up to and including the assistant's opening.

    Raises:
        DataError: as in `encode`.
    """
    _check_roles(messages)
    text = _Text(tokenizer, messages)
    return text.tokens(text.render(len(messages), opening=True))


def encode_response(tokenizer: Any, response: str) -> list[int]:
    """The tokens of an answer, as they follow `encode_prompt`, EOS last.

    Raises:
        ArtifactError: as in `encode`.
    """
    text = _Text(tokenizer, [PROBE[0], {"role": "assistant", "content": response}])
    whole, opening = text.render(2, opening=False), text.render(1, opening=True)
    return text.tokens(whole[len(opening) : text.end_of_answer(whole, opening, 0)])


def decode_response(tokenizer: Any, ids: list[int]) -> str:
    """The text of sampled tokens: EOS and other special tokens dropped, white space at the ends stripped."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.strip()


class _Text:
    """A chat as the template renders it, with the special tokens that people spelled out of sight."""

    def __init__(self, tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> None:
        self.tokenizer = tokenizer
        special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.ids = {token.content: tokenizer.convert_tokens_to_ids(token.content) for token in special}
        # As the tokenizer finds them: the longest first, with the white space that some of them swallow.
        spelled = sorted(special, key=lambda token: -len(token.content))
        self.special = re.compile(
            "|".join(r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip for token in spelled)
        )
        said = "".join(message["content"] for message in messages)
        unused = (chr(code) for code in PRIVATE if chr(code) not in said)
        self.hidden = {content: next(unused) for content in self.ids if content in said}
        self.messages = [{**message, "content": self._swap(message["content"], self.hidden)} for message in messages]

    def render(self, count: int, opening: bool) -> str:
        """The first `count` messages as text; `opening`: with what opens the assistant's answer."""
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                self.messages[:count], tokenize=False, add_generation_prompt=opening
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses this chat: {error}") from None
        return text

    def end_of_answer(self, whole: str, opening: str, done: int) -> int:
        """Where the answer after `opening` ends in the text of the whole chat, EOS included."""
        if not whole.startswith(opening):
            raise ArtifactError(
                "the chat template does not write a chat from left to right: with an answer added, what came before "
                f"it changes (…{opening[-60:]!r} is no beginning of the chat). Use a template that keeps earlier turns."
            )
        eos = self.tokenizer.eos_token
        if len(opening) < done:
            raise ArtifactError(
                f"the chat template ends a chat with EOS ({eos!r}), but not each answer in it: none comes before "
                f"…{opening[-60:]!r}. Set eos_token to the token that ends a turn, or mend the template."
            )
        place = whole.find(eos, len(opening))
        if place < 0:
            raise ArtifactError(
                f"the chat template does not end an answer with EOS ({eos!r}) but with {whole[-20:]!r}: the model "
                "would never learn to stop. Set eos_token to the token that ends a turn, or mend the template."
            )
        return place + len(eos)

    def tokens(self, part: str) -> list[int]:
        """Token ids of a part of the text: special tokens where the template wrote them, plain text between."""
        shown = {stand_in: content for content, stand_in in self.hidden.items()}
        pieces = list(self._pieces(part))
        plain = iter(
            packing.encode(self.tokenizer, [self._swap(text, shown) for text, special in pieces if not special])
        )
        return [id_ for text, special in pieces for id_ in ([self.ids[text]] if special else next(plain))]

    def _pieces(self, part: str) -> Iterator[tuple[str, bool]]:
        """The special tokens and the plain texts between them, in order."""
        done = 0
        for match in self.special.finditer(part):
            if match.start() > done:
                yield part[done : match.start()], False
            yield match.group().strip(), True
            done = match.end()
        if done < len(part):
            yield part[done:], False

    @staticmethod
    def _swap(text: str, other: dict[str, str]) -> str:
        """`text` with each key of `other` replaced by its value, the longest first."""
        if not other:
            return text
        found = re.compile("|".join(re.escape(key) for key in sorted(other, key=len, reverse=True)))
        return found.sub(lambda match: other[match.group()], text)


def _check_roles(messages: Sequence[Mapping[str, str]]) -> None:
    """Raise where there is no message, or one of an unknown role."""
    if not messages:
        raise DataError("a chat without messages; at least a user's is needed")
    for number, message in enumerate(messages, 1):
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise DataError(
                f"message {number} has role {message.get('role')!r} and content {message.get('content')!r}; accepted: "
                f"a role of {', '.join(ROLES)}, and text"
            )
