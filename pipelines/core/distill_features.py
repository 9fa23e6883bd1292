"""What is matched inside the blocks: hidden states and attention, of pairs of a student's and a teacher's block.

Papers: Jiao et al., "TinyBERT" (2020), section 3: equations 7 (attention) and 8 (hidden states, through a learned
projection where the widths differ); Sanh et al., "DistilBERT" (2019), section 3: the angle between states.
Departures: attention is matched after the softmax, since scores that the mask hides have no value; and a pair's squared
error is divided by the mean square of the teacher's states, whose size differs by orders of magnitude from block to
block in decoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pipelines.core import feature_losses, segments, training
from pipelines.core.context import StageContext
from pipelines.core.params.distill import Terms


class States(NamedTuple):
    """What a body says of rows."""

    last: torch.Tensor  # (rows, length, D), normed: what the head reads
    hidden: tuple[torch.Tensor, ...]  # after each block; empty where they are not asked for
    attention: tuple[torch.Tensor, ...]  # (rows, heads, length, length) of each block; likewise


def states(model: torch.nn.Module, rows: segments.Rows, weights: Terms, context: StageContext) -> States:
    """Run a body over rows; with what the weights ask for. Attention needs a model loaded with `eager` attention."""
    body = model.base_model
    ids, positions, documents, branches = (
        part.to(context.device) for part in (rows.ids, rows.positions, rows.documents, rows.branches)
    )
    mask = segments.attention_mask(documents, branches, context.dtype)
    wanted = {"output_hidden_states": weights.hidden + weights.cosine > 0, "output_attentions": weights.attention > 0}
    with training.computing_in(context.precision, context.device, model):
        found = body(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **wanted
        )
    hidden = found.hidden_states[1:] if wanted["output_hidden_states"] else ()
    return States(found.last_hidden_state.to(context.dtype), hidden, found.attentions if weights.attention > 0 else ())


class Matching(torch.nn.Module):
    """The terms `hidden`, `cosine` and `attention`, and the projection from the student's width to the teacher's.

    Args:
        widths: of student and teacher; where they are equal nothing is learned.
        pairs: matched blocks, of the teacher and of the student.
    """

    def __init__(self, widths: tuple[int, int], pairs: Sequence[tuple[int, int]], seed: int) -> None:
        super().__init__()
        self.pairs = list(pairs)
        self.projection = None
        if widths[0] != widths[1]:
            generator = torch.Generator().manual_seed(seed)
            self.projection = torch.nn.Linear(*widths, bias=False)
            torch.nn.init.normal_(self.projection.weight, std=widths[0] ** -0.5, generator=generator)

    def forward(
        self, student: States, teacher: States, documents: torch.Tensor, weights: Terms
    ) -> dict[str, torch.Tensor]:
        """Each term as the mean over the pairs, over the tokens that are no padding."""
        real = documents != segments.PADDING
        found: dict[str, torch.Tensor] = {}
        # The last block's state comes normed from transformers, which the head's terms match already.
        inner = [(theirs, ours) for theirs, ours in self.pairs if ours + 1 < len(student.hidden)] or self.pairs
        if weights.hidden or weights.cosine:
            states = [(student.hidden[ours][real], teacher.hidden[theirs][real]) for theirs, ours in inner]
        if weights.hidden:
            errors = [feature_losses.hidden_loss(*both, self.projection) / _size(both[1]) for both in states]
            found["hidden"] = torch.stack(errors).mean()
        if weights.cosine:
            turned = [feature_losses.cosine_loss(*both, self.projection) for both in states]
            found["cosine"] = torch.stack(turned).mean()
        if weights.attention:
            seen = segments.attention_mask(documents, torch.zeros_like(documents), torch.float32)[:, 0] == 0
            seen &= real[:, :, None]
            maps = [(student.attention[ours], teacher.attention[theirs]) for theirs, ours in self.pairs]
            found["attention"] = torch.stack([feature_losses.attention_loss(*both, seen) for both in maps]).mean()
        return found


def _size(states: torch.Tensor) -> torch.Tensor:
    return states.detach().float().square().mean()
