"""One token at a time gives what transformers gives for the whole sequence."""

from __future__ import annotations

import pytest
import torch
from test_int8 import IDS, logits, tiny

from pipelines.core import decoding, int8

MODELS = [("llama", {}), ("llama", {"tied": False}), ("mistral", {"sliding_window": 4}), ("qwen2", {}), ("qwen3", {})]


@pytest.mark.parametrize(("kind", "more"), MODELS)
def test_every_step_gives_the_logits_of_the_whole(kind: str, more: dict[str, object]) -> None:
    model = tiny(kind, **more)  # type: ignore[arg-type]
    exact = logits(model)[0]
    decoder = decoding.Decoder(model, 16)
    ids = IDS[0].tolist()
    for read in (1, 3, 6):  # the rest token by token
        got = [decoder.prefill(ids[:read])] + [decoder.step(token) for token in ids[read:]]
        assert torch.allclose(torch.stack(got), exact[read - 1 :], atol=1e-4), read
    assert torch.allclose(logits(model)[0], exact, atol=1e-5)  # the model itself is as it was


def test_more_room_is_made_where_it_is_asked_for() -> None:
    model, ids = tiny(), IDS[0].tolist()
    decoder = decoding.Decoder(model, 4)
    decoder.prefill(ids[:3])
    decoder.make_room(3)
    decoder.step(ids[3])  # what was there and has places enough stays as it is
    decoder.make_room(8)
    got = torch.stack([decoder.prefill(ids[:1])] + [decoder.step(token) for token in ids[1:]])
    assert torch.allclose(got, logits(model)[0], atol=1e-4)


def test_int8_layers_are_joined_and_stay_the_model_s_own() -> None:
    model = int8.quantize(tiny())
    before = logits(model)
    decoder = decoding.Decoder(model, 16)
    assert torch.equal(logits(model), before)
    query = model.get_submodule("model.layers.0.self_attn.q_proj")
    key = model.get_submodule("model.layers.0.self_attn.k_proj")
    assert query.weight.data_ptr() + query.weight.numel() == key.weight.data_ptr()  # one product reads both
    ids = IDS[0].tolist()
    got = torch.stack([decoder.prefill(ids[:1])] + [decoder.step(token) for token in ids[1:]])
    assert (got - before[0]).norm() / before.norm() < 0.02


def test_int8_layers_that_no_kernel_multiplies_with_are_joined_too() -> None:
    """Rows of 40 weights are no multiple of what the packed kernel reads at a time."""
    model = int8.quantize(tiny(hidden_size=40))
    before = logits(model)[0]
    decoder = decoding.Decoder(model, 16)
    ids = IDS[0].tolist()
    got = torch.stack([decoder.prefill(ids[:1])] + [decoder.step(token) for token in ids[1:]])
    assert (got - before).norm() / before.norm() < 0.02


def test_no_room_and_other_architectures_are_refused() -> None:
    model = tiny()
    decoder = decoding.Decoder(model, 4)
    with pytest.raises(ValueError, match="a prompt of 4 tokens; accepted: 1 to 3"):
        decoder.prefill([1, 2, 3, 4])
    with pytest.raises(ValueError, match="a prompt of 0 tokens"):
        decoder.prefill([])
    decoder.prefill([1, 2, 3])
    decoder.step(1)
    with pytest.raises(ValueError, match="all 4 places are taken"):
        decoder.step(1)
    with pytest.raises(ValueError, match="architecture gpt2; supported: llama"):
        decoding.Decoder(tiny("gpt2"), 4)
