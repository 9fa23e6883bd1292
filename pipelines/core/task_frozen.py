"""What a frozen part of a model gives, computed once: every epoch runs only what is trained.

`head` keeps the last hidden state of each sequence: a step is then one product with W_y. `last_n` keeps what goes
into the lowest trained block, for every token. The first epoch costs as much as without; those after it cost the
share of the blocks that is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from pipelines.core import k_way, segments, tuning
from pipelines.core.context import StageContext
from pipelines.core.task_model import TaskModel, at_extract


class Frozen(NamedTuple):
    """Examples as the trained part sees them."""

    sequences: list[segments.Sequence]  # for `head`: one token a sequence, `extract`
    states: list[torch.Tensor]  # (tokens of the sequence, width) of each, on the CPU in the compute type
    blocks: int  # how many frozen blocks they stand for; for `head` all, and the final norm
    tuples: bool  # whether the architecture's blocks return tuples

    @property
    def bytes(self) -> int:
        """Memory that the states take."""
        return sum(one.numel() * one.element_size() for one in self.states)


def can(model: TaskModel) -> bool:
    """Whether the method leaves a frozen part below the trained one."""
    return model.method in ("head", "last_n")


@torch.no_grad()
def frozen_states(
    model: TaskModel, sequences: Sequence[segments.Sequence], context: StageContext, tell: k_way.Tell
) -> Frozen:
    """What the frozen part gives for each example (`task_model.encode`), in any order of forward passes.

    `tell(done, total)` is called after each pass, in examples. The model is left in evaluation mode.
    """
    model.eval()
    every = tuning.blocks(model.lm)
    trained = sum(any(value.requires_grad for value in block.parameters()) for block in every)
    number = len(every) - trained
    found: dict[int, torch.Tensor] = {}
    tuples = False
    for batch in k_way.batches(sequences, k_way.SCORED_TOKENS, model.pad):
        if model.method == "head":
            hidden = at_extract(segments.hidden_states(model.lm, batch.rows, context), batch)
            sizes = batch.sizes
        else:
            with _caught(every[number], every[0]) as caught:
                segments.hidden_states(model.lm, batch.rows, context)
            tuples = caught["tuples"]
            hidden = caught["hidden"].to(context.dtype)[_filled(batch).to(context.device)]
            sizes = [len(sequences[place].ids) for place in batch.numbers]
        parts = torch.split(hidden.cpu(), sizes)
        found |= {place: part.clone() for place, part in zip(batch.numbers, parts, strict=True)}
        tell(len(found), len(sequences))
    states = [found[place] for place in range(len(sequences))]
    if model.method == "head":
        return Frozen([_ends(one) for one in sequences], states, len(every), tuples)
    return Frozen(list(sequences), states, number, tuples)


def forward_from(model: TaskModel, batch: k_way.Responses, frozen: Frozen, context: StageContext) -> torch.Tensor:
    """Last hidden states (rows, length, width) of a forward pass of `frozen.sequences`, from where its states are.

    Equal to the whole forward of the same rows. `batch.numbers` count within `frozen.sequences`.
    """
    filled = _filled(batch)
    states = torch.cat([frozen.states[place] for place in batch.numbers])
    hidden = states.new_zeros(*filled.shape, states.shape[1])
    hidden[filled] = states
    hidden = hidden.to(context.device)
    if model.method == "head":
        return hidden
    with _replayed(tuning.blocks(model.lm), frozen, hidden):
        return segments.hidden_states(model.lm, batch.rows, context)


def _filled(batch: k_way.Responses) -> torch.Tensor:
    """Which tokens of the rows are not padding: (rows, length). Row by row they are the sequences, in their order."""
    return batch.rows.documents != segments.PADDING


def _ends(sequence: segments.Sequence) -> segments.Sequence:
    """The last token of each branch, as branches of one token."""
    last = {branch: place for place, branch in enumerate(sequence.branches) if branch}
    ids = [sequence.ids[last[branch]] for branch in sorted(last)]
    # Labelled, since `k_way.batches` would encode an unlabelled common beginning only once.
    return segments.Sequence(ids, list(ids), sorted(last))


@contextmanager
def _caught(block: Any, first: Any) -> Iterator[dict[str, Any]]:
    """Notes what goes into a block, and whether `first` returns a tuple."""
    caught: dict[str, Any] = {}

    def enters(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught["hidden"] = args[0] if args else kwargs["hidden_states"]

    def leaves(_: Any, __: Any, output: Any) -> None:
        caught["tuples"] = isinstance(output, tuple)

    hooks = [block.register_forward_pre_hook(enters, with_kwargs=True), first.register_forward_hook(leaves)]
    try:
        yield caught
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _replayed(every: list[Any], frozen: Frozen, hidden: torch.Tensor) -> Iterator[None]:
    """Within it the frozen blocks pass on what they are given, and the first trained one is given `hidden`."""

    def skip(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given,) if frozen.tuples else given

    def enters(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    hook = every[frozen.blocks].register_forward_pre_hook(enters, with_kwargs=True)
    for block in every[: frozen.blocks]:
        block.forward = skip  # of the instance: hides the class's method
    try:
        yield
    finally:
        hook.remove()
        for block in every[: frozen.blocks]:
            del block.forward
