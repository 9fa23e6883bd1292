"""A model's blocks one after another, over rows of tokens without padding: what each reads, is told and gives.

For what fits a block's weights to its inputs, such as `gptq` and `block_fit`: all rows go through one block before the
next one is looked at, so that only their states are in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from inspect import signature
from typing import Any, NamedTuple, cast

import torch
from transformers.pytorch_utils import Conv1D

from pipelines.core import tuning
from pipelines.core.errors import ArtifactError


class _Given(NamedTuple):
    """What a model gives a block."""

    hidden: torch.Tensor
    options: dict[str, Any]


class _Caught(Exception):
    """The first block has been reached."""


def equal_rows(rows: Sequence[list[int]], longest: int) -> torch.Tensor:
    """Rows (rows, length) of equal length, which need no padding; each begins where one of those given begins.

    A row that is shorter is filled up with those that follow, the last of them cut; what fills no row is left out.

    Args:
        rows: token ids of texts and chats.
        longest: the length, where there are as many tokens.
    """
    length = min(longest, sum(map(len, rows)))
    found: list[list[int]] = []
    short: list[int] = []
    for row in rows:
        if len(row) >= length:
            found.append(row[:length])
            continue
        short += row
        if len(short) >= length:
            found.append(short[:length])
            short = []
    return torch.tensor(found)


def stack(model: Any) -> torch.nn.ModuleList:
    """The module that holds the blocks.

    Raises:
        ArtifactError: no list of blocks is known in the architecture.
    """
    found = tuning.stack(model)
    if found is None:
        raise ArtifactError(f"architecture {model.config.model_type}: no list of blocks is known in it")
    return found


def linear(block: Any) -> dict[str, Any]:
    """A block's linear layers, by their names in it."""
    return {name: part for name, part in block.named_modules() if isinstance(part, torch.nn.Linear | Conv1D)}


def first_inputs(model: Any, first: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the model gives its first block for some rows."""
    caught: list[_Given] = []

    def hook(block: Any, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        caught.append(_named(block, given, options))
        raise _Caught

    placed = first.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model.base_model(input_ids=ids, use_cache=False)
    except _Caught:
        return caught[0].hidden
    finally:
        placed.remove()
    raise ArtifactError(f"architecture {model.config.model_type}: its first block is not called by its body")


def options(model: Any, stack: Any, row: torch.Tensor) -> list[dict[str, Any]]:
    """What the model tells each block beside what it is to read: blocks of several kinds have masks and rotations of
    their own. Of one row (1, length); they are those of any other."""
    found: list[dict[str, Any]] = []

    def hook(block: Any, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.append(_named(block, given, options).options)

    with ExitStack() as placed:
        for block in stack:
            placed.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
        model.base_model(input_ids=row, use_cache=False)
    return found


def inputs(
    block: Any, linear: Mapping[str, Any], hidden: torch.Tensor, options: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What each layer of a block reads, the same tensor where they read the same; and what the block gives."""
    found: dict[str, torch.Tensor] = {}

    def look(name: str) -> Any:
        def hook(_: Any, given: tuple[torch.Tensor, ...]) -> None:
            found[name] = given[0]

        return hook

    with ExitStack() as placed:
        for name, module in linear.items():
            placed.callback(module.register_forward_pre_hook(look(name)).remove)
        return found, output(block(hidden, **options))


def output(given: Any) -> torch.Tensor:
    """The states among what a block gives."""
    return cast("torch.Tensor", given[0] if isinstance(given, tuple) else given)


def _named(block: Any, given: tuple[Any, ...], options: dict[str, Any]) -> _Given:
    """A call of a block, all but its input by name: GPT-2's blocks get their mask without."""
    names = list(signature(block.forward).parameters)
    told = dict(zip(names, given, strict=False)) | options
    return _Given(told.pop(names[0]), told)
