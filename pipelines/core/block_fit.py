"""A student's blocks that make up for those left out between them: by least squares, before anything is trained.

Shopkhoev et al., "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization" (2025),
section 3: blocks left out are replaced by a linear map of what the last kept one's MLP gives, in closed form, merged
into its down projection. Departures:

1. The down projection as a whole is fitted, (D, F) numbers instead of the (D, D) of a map behind it.
2. Block after block: each reads what the student's blocks before it give, and is to give what the teacher's next kept
   block reads, so that what is left of one block's error is the next one's to mend.
3. A token's error is divided by the size of the teacher's state: the first one of a text has states a hundred times the
   others' size. The ridge draws towards the teacher's weight, not towards 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from pipelines.core import blockwise, int8, tuning
from pipelines.core.errors import ArtifactError

ROWS = 8  # that go through a block at a time
CLOSE = 0.02  # what a state may be off by in bf16
TINY = 1e-30  # in place of a ridge over inputs that are all 0


class Fitted(NamedTuple):
    """The layer of a student's block that was fitted."""

    layer: str  # its name in the block
    weight: torch.Tensor  # (D, F), fp32
    before: float  # mean squared error of a state's entry, in squares of the size of the teacher's
    after: float


@torch.no_grad()
def fit(
    teacher: Any, kept: Sequence[int], ids: torch.Tensor, ridge: float, tell: Callable[[int, int], None]
) -> list[Fitted]:
    """For each of a student's blocks, the last layer's weight that makes its outputs the teacher's states.

    With inputs h (tokens, F) of the layer, what is missing R (tokens, D) and weights w of the tokens, the change of the
    weight is (R^T w^2 h)(h^T w^2 h + ridge m I)^-1, m the mean of the first matrix's diagonal.

    Args:
        teacher: a decoder-only model; it stays as it is.
        kept: the blocks that the student has, ascending.
        ids: (rows, length), without padding.
        ridge: above 0.
        tell: called with (done, total) blocks.

    Raises:
        ArtifactError: states that are not finite; no list of blocks is known; a block's output is not the sum of what
            its last layer gives and of other things.
    """
    stack = tuning.stack(teacher)
    if stack is None:
        raise ArtifactError(f"architecture {teacher.config.model_type}: no list of blocks is known in it")
    options = blockwise.options(teacher, stack, ids[:1])
    theirs = ours = blockwise.first_inputs(teacher, stack[0], ids)
    found, reached = [], 0
    for number, origin in enumerate(kept):
        until = kept[number + 1] if number + 1 < len(kept) else len(stack)
        for place in range(reached, until):
            theirs = _through(stack[place], theirs, options[place])
        reached = until
        name, layer = _last_layer(teacher, stack[origin], ours[:1], options[origin])
        try:
            one, ours = _fitted(stack[origin], name, layer, ours, theirs, options[origin], ridge)
        except ValueError as error:
            raise ArtifactError(f"block {origin} of the teacher: {error}") from None
        found.append(one)
        tell(number + 1, len(kept))
    return found


@torch.no_grad()
def put(student: Any, found: Sequence[Fitted]) -> None:
    """Give the student's blocks their fitted weights."""
    for block, one in zip(tuning.blocks(student), found, strict=True):
        weight = int8.rows_of(block.get_submodule(one.layer))
        weight.copy_(one.weight.to(weight.dtype))


def _through(block: Any, hidden: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    return torch.cat([blockwise.output(block(part, **options)) for part in torch.split(hidden, ROWS)])


def _last_layer(teacher: Any, block: Any, hidden: torch.Tensor, options: dict[str, Any]) -> tuple[str, Any]:
    """The linear layer that a block ends with, and its name in it.

    Raises:
        ArtifactError: what it gives is not simply added: a norm comes behind it, or a factor.
    """
    linear = {name: part for name, part in block.named_modules() if isinstance(part, torch.nn.Linear | Conv1D)}
    read, given = blockwise.inputs(block, linear, hidden, options)
    name = list(read)[-1]  # the one that was asked last
    placed = linear[name].register_forward_hook(lambda layer, asked, answer: answer + given)
    try:
        more = blockwise.output(block(hidden, **options))
    finally:
        placed.remove()
    if float((more - 2 * given).float().norm()) > CLOSE * float((2 * given).float().norm()):
        raise ArtifactError(
            f"architecture {teacher.config.model_type}: its blocks do not simply add what their last layer, {name}, "
            "gives, so it cannot be fitted to make up for other blocks; accepted: distill.fit: null"
        )
    return name, linear[name]


def _fitted(
    block: Any, name: str, layer: Any, ours: torch.Tensor, theirs: torch.Tensor, options: dict[str, Any], ridge: float
) -> tuple[Fitted, torch.Tensor]:
    """The layer's new weight, and what the block gives with it.

    Raises:
        ValueError: the sums are not finite.
    """
    width, inputs = int8.rows_of(layer).shape
    square, product = (torch.zeros(rows, inputs, device=ours.device) for rows in (inputs, width))
    before, after, parts = 0.0, 0.0, []
    for here, wanted in zip(torch.split(ours, ROWS), torch.split(theirs, ROWS), strict=True):
        read, given = blockwise.inputs(block, {name: layer}, here, options)
        size = wanted.float().square().mean(-1, keepdim=True).clamp_min(TINY).rsqrt()
        entries = (read[name].float() * size).flatten(0, 1)
        missing = ((wanted.float() - given.float()) * size).flatten(0, 1)
        with blockwise.sums_at_the_rate_of(ours.dtype):
            square += entries.t() @ entries
            product += missing.t() @ entries
        before += float(missing.square().sum())
        parts.append((read[name], given, wanted, size))
    if not bool(torch.isfinite(square).all() and torch.isfinite(product).all()):
        raise ValueError("its states on the training rows are not finite")
    square.diagonal().add_(max(ridge * float(square.diagonal().mean()), TINY))
    change = torch.cholesky_solve(product.t(), torch.linalg.cholesky(square)).t()
    moved = []
    for entries, given, wanted, size in parts:
        now = (given.float() + entries.float() @ change.t()).to(ours.dtype)
        after += float(((wanted.float() - now.float()) * size).square().sum())
        moved.append(now)
    found = Fitted(name, int8.rows_of(layer).float() + change, before / theirs.numel(), after / theirs.numel())
    return found, torch.cat(moved)
