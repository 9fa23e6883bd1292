"""How many tokens a model can attend to, as its configuration says: its context.

A sliding window (Mistral's, Gemma's) bounds it as well: what is trained, scored and sampled here sees every earlier
token of its row, so a longer one would be computed otherwise than wherever the model is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.core.errors import ParamsError


def length(config: Any) -> int | None:
    """Tokens the model can attend to, prompt and completion together; None where the architecture sets no limit."""
    known = [getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")]
    return min((tokens for tokens in known if tokens), default=None)


def check(asked: Mapping[str, int], whose: str, *configs: Any) -> None:
    """See that what is to be read fits the context of models; `whose` it is, for the message.

    Args:
        asked: dials, and the tokens that they ask for.

    Raises:
        ParamsError: one asks for more than the shortest of them.
    """
    rooms = [room for config in configs if (room := length(config)) is not None]
    if rooms and max(asked.values()) > min(rooms):
        told = ", ".join(f"{dials} is {tokens}" for dials, tokens in asked.items())
        raise ParamsError(f"{told} tokens; {whose} is {min(rooms)}: lower them")
