"""Keys and values of prompts and of their samples, laid out so that one forward pass continues all samples.

A group is one row of the batch that the model sees: a prompt, and up to `width` of its samples as branches. The
prompt's keys are computed, stored and read once for all branches; a mask lets a branch see the prompt and its own
tokens only (the law of `segments.attention_mask`). So any architecture that takes such a mask and explicit
positions can be used as it is, with its own attention.

A group's keys stand side by side: the prompt's, padded on the right to `prefix`, then those of step 0 of every
branch, of step 1 of every branch, and so on. Room is made for `capacity` steps at a time: products over a whole
tensor are faster than over a slice of a longer one, and growing by one key a step would copy everything each time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache

SPARE = -1  # in a layout: a branch that nobody uses
ALL = -1  # in place of a prompt's number: what all prompts begin with
BLOCK = 32  # steps that room is made for at a time
SPARE_SHARE = 0.2  # of all branches, that may be unused for the sake of wider groups


class Layout(NamedTuple):
    """Who shares a prompt's keys. Samples are numbered prompt x count + sample."""

    owners: list[int]  # prompt of each group
    branches: list[list[int]]  # sample in each branch of each group, all of one width; SPARE where none


def layout(samples: list[int], count: int, widest: int) -> Layout:
    """Groups for the samples that go on: as wide as leaves at most `SPARE_SHARE` of the branches unused.

    A group is wider the more samples read one copy of their prompt's keys; but prompts of which few samples are
    left would fill wide groups with unused branches. Width 1, a copy of its own for each, leaves none.
    """
    waiting: dict[int, list[int]] = {}
    for number in sorted(samples):
        waiting.setdefault(number // count, []).append(number)
    for width in range(min(widest, max(len(group) for group in waiting.values())), 0, -1):
        branches = sum(-(-len(group) // width) for group in waiting.values()) * width
        if len(samples) >= (1 - SPARE_SHARE) * branches:
            break
    found = Layout([], [])
    for owner, group in waiting.items():
        for start in range(0, len(group), width):
            some = group[start : start + width]
            found.owners.append(owner)
            found.branches.append(some + [SPARE] * (width - len(some)))
    return found


def widest(prefix: int, capacity: int) -> int:
    """The most branches a group should have: a branch's query is multiplied with the keys of all of them.

    The bound, twice the keys that a branch would have alone, is a rule of thumb: near it sharing and a copy of the
    prompt for each were about as fast on a CPU, and far above it the products with others' keys are wasted.
    """
    return max(1, 2 * (prefix + capacity) // max(1, capacity))


class BranchCache(Cache):  # type: ignore[misc]
    """The cache to pass as `past_key_values`: with what all prompts begin with, as one row (`encoding` is ALL), then
    with what is left of the prompts, from number `encoding` on; and after each `next_step` with one token of every
    branch, as rows of `width` tokens.
    """

    def __init__(self, first: Layout, lengths: torch.Tensor, prefix: int, capacity: int, dtype: torch.dtype) -> None:
        """`lengths`: tokens of each prompt, int64 (prompts,); `first` has the prompts in their order, one group each.

        `dtype`: of keys and values, the type that attention computes in.
        """
        super().__init__(layers=[])
        self.lengths, self.prefix, self.dtype = lengths, prefix, dtype
        self.keys: list[
            torch.Tensor
        ] = []  # of each layer: (groups, key heads, prefix + capacity x width, width of a head)
        self.values: list[torch.Tensor] = []
        self.encoding = ALL  # the first of the prompts that are being encoded
        self.shared = 0  # tokens that all of them begin with, encoded before
        self.step = 0  # tokens that each branch has, the one being added included
        self._arrange(first, capacity)

    @property
    def width(self) -> int:
        """Branches of a group."""
        return len(self.layout.branches[0])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the attention layers: keep the new keys and values, return those that the queries may see."""
        if not self.step:  # prompts; they see one another as their mask says
            if layer_idx == len(self.keys):
                shape = (len(self.lengths), key_states.shape[1], self.prefix + self.capacity * self.width)
                self.keys.append(key_states.new_zeros((*shape, key_states.shape[3]), dtype=self.dtype))
                self.values.append(value_states.new_zeros((*shape, value_states.shape[3]), dtype=self.dtype))
            kept, new = (self.keys[layer_idx], self.values[layer_idx]), (key_states, value_states)
            length = new[0].shape[2]
            if self.encoding == ALL:
                for states, more in zip(kept, new, strict=True):
                    states[:, :, :length] = more
                return new
            some = slice(self.encoding, self.encoding + len(key_states))
            for states, more in zip(kept, new, strict=True):
                states[some, :, self.shared : self.shared + length] = more
            if not self.shared:
                return new
            seen = [
                torch.cat([states[some, :, : self.shared], more], 2) for states, more in zip(kept, new, strict=True)
            ]
            return seen[0], seen[1]
        place = self.prefix + (self.step - 1) * self.width
        self.keys[layer_idx][:, :, place : place + self.width] = key_states
        self.values[layer_idx][:, :, place : place + self.width] = value_states
        return self.keys[layer_idx], self.values[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens a branch has before the ones being added; models ask only where they are given no positions."""
        return self.prefix + self.step - 1 if self.step else 0

    def next_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Make ready for one more token in every branch.

        Returns:
            Their mask, additive, (groups, 1, width, prefix + capacity x width), and positions, int64 (groups, width).
        """
        place = self.prefix + self.step * self.width
        self.mask[:, 0, :, place : place + self.width].diagonal(dim1=1, dim2=2).zero_()
        self.step += 1
        return self.mask, self.starts + (self.step - 1)

    def rearrange(self, new: Layout, capacity: int) -> None:
        """Go on with these groups and room for `capacity` steps; what is not in the new layout is forgotten."""
        old, old_width, old_capacity = self.layout, self.width, self.capacity
        home = {owner: group for group, owner in enumerate(old.owners)}
        at = {sample: (group, place) for group, row in enumerate(old.branches) for place, sample in enumerate(row)}
        at[SPARE] = (0, 0)  # whatever stands there: finite numbers, and nobody looks
        device = self.lengths.device
        prompts = torch.tensor([home[owner] for owner in new.owners], device=device)
        sources = torch.tensor([[at[sample] for sample in row] for row in new.branches], device=device)
        groups, places = sources.unbind(-1)
        self._arrange(new, capacity)
        for kept in (self.keys, self.values):
            for layer, states in enumerate(kept):
                heads, size = states.shape[1], states.shape[3]
                fresh = states.new_zeros(len(new.owners), heads, self.prefix + capacity * self.width, size)
                fresh[:, :, : self.prefix] = states[prompts, :, : self.prefix]
                own = states[:, :, self.prefix :].view(-1, heads, old_capacity, old_width, size)
                moved = own[groups, :, : self.step, places]  # (groups, width, heads, steps, size)
                room = fresh[:, :, self.prefix :].view(-1, heads, capacity, self.width, size)
                room[:, :, : self.step] = moved.permute(0, 2, 3, 1, 4)
                kept[layer] = fresh

    def _arrange(self, new: Layout, capacity: int) -> None:
        """Take over a layout: what follows from it besides the keys and values themselves."""
        self.layout, self.capacity = new, capacity
        device = self.lengths.device
        lengths = self.lengths[torch.tensor(new.owners, device=device)][:, None]
        self.starts = lengths.expand(-1, self.width)
        of_prompt = torch.arange(self.prefix, device=device) < lengths  # (groups, prefix)
        written = torch.arange(capacity, device=device)[:, None] < self.step
        own = torch.eye(self.width, dtype=torch.bool, device=device)[:, None, :] & written  # (width, capacity, width)
        halves = of_prompt[:, None, :].expand(-1, self.width, -1), own.flatten(1).expand(len(lengths), -1, -1)
        seen = torch.cat(halves, dim=2)
        low = torch.finfo(self.dtype).min
        self.mask = torch.zeros(seen.shape, dtype=self.dtype, device=device).masked_fill_(~seen, low)[:, None]
