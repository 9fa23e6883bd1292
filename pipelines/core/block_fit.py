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

from pipelines.core import blockwise, int8, tuning
from pipelines.core.errors import ArtifactError

CLOSE = 0.02  # of what is added, which may be lost in bf16
TINY = 1e-30  # in place of a ridge over inputs that are all 0


class Fitted(NamedTuple):
    """The layer of a student's block that was fitted."""

    layer: str  # its name in the block
    weight: torch.Tensor  # (D, F), fp32
    before: float  # mean squared error of a state's entry, in squares of the size of the teacher's
    after: float


@torch.no_grad()
def fit(
    teacher: Any, kept: Sequence[int], ids: torch.Tensor, ridge: float, rows: int, tell: Callable[[int, int], None]
) -> list[Fitted]:
    """For each of a student's blocks, the last layer's weight that makes its outputs the teacher's states.

    With inputs h (tokens, F) of the layer, what is missing R (tokens, D) and weights w of the tokens, the change of the
    weight is (R^T w^2 h)(h^T w^2 h + ridge m I)^-1, m the mean of the first matrix's diagonal.

    Args:
        teacher: a decoder-only model; it stays as it is.
        kept: the blocks that the student has, ascending.
        ids: (rows, length), without padding.
        ridge: above 0.
        rows: that go through a block at a time.
        tell: called with (done, total) blocks after each time.

    Raises:
        ArtifactError: states that are not finite; no list of blocks is known; a block's output is not the sum of what
            its last linear layer gives and of other things; the ridge is too small.
    """
    stack = blockwise.stack(teacher)
    options = blockwise.options(teacher, stack, ids[:1])
    theirs = ours = list(torch.split(blockwise.first_inputs(teacher, stack[0], ids), rows))
    found: list[Fitted] = []

    def look() -> None:
        tell(len(found), len(kept))

    reached = 0
    for origin, until in zip(kept, [*kept[1:], len(stack)], strict=True):  # the last one's states go to the final norm
        for place in range(reached, until):
            theirs = [_through(stack[place], part, options[place], look) for part in theirs]
        reached = until
        name, layer = _last_layer(teacher, stack[origin], ours[0][:1], options[origin])
        try:
            one, ours = _fitted(stack[origin], name, layer, ours, theirs, options[origin], ridge, look)
        except ValueError as error:
            raise ArtifactError(f"block {origin} of the teacher: {error}") from None
        found.append(one)
        look()
    return found


@torch.no_grad()
def put(student: Any, found: Sequence[Fitted]) -> None:
    """Give the student's blocks their fitted weights."""
    for block, one in zip(tuning.blocks(student), found, strict=True):
        weight = int8.rows_of(block.get_submodule(one.layer))
        weight.copy_(one.weight.to(weight.dtype))


def _through(block: Any, hidden: torch.Tensor, options: dict[str, Any], look: Callable[[], None]) -> torch.Tensor:
    look()
    return blockwise.output(block(hidden, **options))


def _last_layer(teacher: Any, block: Any, hidden: torch.Tensor, options: dict[str, Any]) -> tuple[str, Any]:
    """The linear layer that a block ends with, and its name in it.

    Raises:
        ArtifactError: what it gives is not simply added: a norm comes behind it, a factor, or other layers.
    """
    linear = blockwise.linear(block)
    read, given = blockwise.inputs(block, linear, hidden, options)
    name = list(read)[-1] if read else "none"  # the one that was asked last
    if name in linear:
        noise = torch.randn(given.shape, generator=torch.Generator().manual_seed(0)).to(given)
        noise *= given.square().mean(-1, keepdim=True).sqrt()
        placed = linear[name].register_forward_hook(lambda layer, asked, told: told + noise.view_as(told))
        try:
            more = blockwise.output(block(hidden, **options))
        finally:
            placed.remove()
        off = (more.float() - given.float() - noise.float()).norm(dim=-1) / noise.float().norm(dim=-1).clamp_min(TINY)
        if float(off.max()) <= CLOSE:
            return name, linear[name]
    raise ArtifactError(
        f"architecture {teacher.config.model_type}: its blocks do not simply add what their last linear layer ({name}) "
        "gives, so it cannot be fitted to make up for other blocks; accepted: distill.fit: null"
    )


def _fitted(
    block: Any,
    name: str,
    layer: Any,
    ours: Sequence[torch.Tensor],
    theirs: Sequence[torch.Tensor],
    options: dict[str, Any],
    ridge: float,
    look: Callable[[], None],
) -> tuple[Fitted, list[torch.Tensor]]:
    """The layer's new weight, and what the block gives with it.

    Raises:
        ValueError: the sums are not finite, or have no inverse.
    """
    width, inputs = int8.rows_of(layer).shape
    square, product = (torch.zeros(rows, inputs, device=ours[0].device) for rows in (inputs, width))
    before, after, parts = 0.0, 0.0, []
    for here, wanted in zip(ours, theirs, strict=True):
        read, given = blockwise.inputs(block, {name: layer}, here, options)
        size = wanted.float().flatten(0, 1).square().mean(-1, keepdim=True).clamp_min(TINY).rsqrt()
        entries = read[name].flatten(0, -2).float() * size
        missing = (wanted.float() - given.float()).flatten(0, 1) * size
        square += entries.t() @ entries
        product += missing.t() @ entries
        before += float(missing.square().sum())
        parts.append((read[name].flatten(0, -2), given, size))
        look()
    if not bool(torch.isfinite(square).all() and torch.isfinite(product).all()):
        raise ValueError("its states on the training rows are not finite")
    square.diagonal().add_(max(ridge * float(square.diagonal().mean()), TINY))
    root, wrong = torch.linalg.cholesky_ex(square)
    if int(wrong):
        raise ValueError(f"least squares on so few tokens have no solution with the ridge {ridge:g}; raise distill.fit")
    change = torch.cholesky_solve(product.t(), root).t()
    moved = []
    for (entries, given, size), wanted in zip(parts, theirs, strict=True):
        now = (given.float() + (entries.float() @ change.t()).view_as(given)).to(given.dtype)
        after += float(((wanted.float() - now.float()).flatten(0, 1) * size).square().sum())
        moved.append(now)
        look()
    numbers = sum(part.numel() for part in theirs)
    return Fitted(name, int8.rows_of(layer).float() + change, before / numbers, after / numbers), moved
