"""A model's blocks one after another: the rows that go through them, and what each is given."""

from __future__ import annotations

import pytest
import torch
from test_int8 import IDS, tiny

from pipelines.core import attention, blockwise, tuning


def test_rows_are_equal_and_begin_where_one_of_those_given_begins() -> None:
    long, short = list(range(100, 130)), [[1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 15, 16], [21, 22, 23, 24, 25, 26]]
    found = blockwise.equal_rows([short[0], long, short[1], long[1:], short[2], short[0]], 16)
    assert found.tolist() == [long[:16], long[1:17], [*short[0], *short[1], *short[2][:4]]]
    assert blockwise.equal_rows([[1, 2], [3]], 16).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {}),
        ("gpt2", {}),  # its blocks get their mask without its name; without it they would see what comes later
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}),
    ],
)
def test_blocks_are_given_all_that_their_model_gives_them(kind: str, more: dict[str, object]) -> None:
    model = tiny(kind, **more)
    model.set_attn_implementation(attention.choose("cpu", IDS.shape[1]))
    ids = torch.cat([IDS, IDS.flip(1)])
    with torch.inference_mode():
        wanted = model.base_model(ids).last_hidden_state
        stack = tuning.stack(model)
        hidden = blockwise.first_inputs(model, stack[0], ids)
        for block, options in zip(stack, blockwise.options(model, stack, ids[:1]), strict=True):
            hidden = blockwise.output(block(hidden, **options))
        found = (model.base_model.ln_f if kind == "gpt2" else model.base_model.norm)(hidden)
    assert torch.allclose(found, wanted, atol=1e-6)
