"""A token out of a distribution over the vocabulary, and its log-probability."""

from __future__ import annotations

import torch

SEARCHED = 256  # entries of the vocabulary that are searched as one
LARGEST = -1.0  # in place of a random number


def draw(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, room: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens by the inverse of the cumulative distribution: one random number a token, not one a vocabulary entry.

    The place in the vocabulary is found in two steps, the block of `SEARCHED` entries and the entry in it, so that
    only sums of blocks and one block are accumulated.

    Args:
        logits: (rows, vocabulary), any type; computed with in fp32.
        uniforms: (rows, draws) fp32 in [0, 1); several draws from one row are independent if these are. `LARGEST`
            takes the largest logit.
        temperature: 0 takes it everywhere.
        room: what `room_to_draw` gave for at least as many rows; overwritten.

    Returns:
        Tokens, int64 (rows, draws), and their log-probabilities under softmax(logits / temperature), fp32 of the same
        shape; with temperature 0 under softmax(logits).
    """
    top = logits.amax(dim=1, keepdim=True)
    weights = room[: len(logits)]
    seen = weights[:, : logits.shape[1]]
    torch.sub(logits, top.float(), out=seen)  # fp32, in one pass over the vocabulary
    if temperature not in (0, 1):
        seen /= temperature
    seen.exp_()
    blocks = weights.view(len(weights), -1, SEARCHED)
    ends = blocks.sum(dim=2).cumsum(dim=1)  # (rows, blocks)
    total = ends[:, -1:]
    if not temperature:
        token = logits.argmax(dim=1, keepdim=True).expand(uniforms.shape)
        return token, weights.gather(1, token).log() - total.log()
    # A product with the largest fp32 below 1 is less than the other factor: a search for it ends within the bounds,
    # at an entry above 0.
    wanted = uniforms.clamp(min=0) * total
    block = torch.searchsorted(ends, wanted, right=True)  # (rows, draws)
    starts = torch.nn.functional.pad(ends, (1, 0))
    before, after = starts.gather(1, block), ends.gather(1, block)
    share = ((wanted - before) / (after - before)).clamp(max=1 - 2**-24)
    inside = blocks[torch.arange(len(weights), device=weights.device)[:, None], block].cumsum(dim=2)
    place = torch.searchsorted(inside, (share[:, :, None] * inside[:, :, -1:]), right=True)[:, :, 0]
    token = block * SEARCHED + place
    if len(rows := (uniforms == LARGEST).any(dim=1).nonzero()[:, 0]):
        largest = logits[rows].argmax(dim=1, keepdim=True)
        token[rows] = torch.where(uniforms[rows] == LARGEST, largest, token[rows])
    return token, weights.gather(1, token).log() - total.log()


def room_to_draw(rows: int, vocabulary: int, device: torch.device) -> torch.Tensor:
    """Room for `draw`, (rows, vocabulary up to whole blocks) fp32, used again and again: fresh pages cost as much."""
    return torch.zeros(rows, -(-vocabulary // SEARCHED) * SEARCHED, device=device)
