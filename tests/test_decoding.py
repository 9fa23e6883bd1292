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


def test_greedy_text_is_that_of_transformers() -> None:
    model = tiny()
    theirs = model.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, IDS.shape[1] :].tolist()
    assert decoding.Decoder(model, 32).generate(IDS[0].tolist(), 12) == theirs


def test_samples_follow_the_distribution_and_the_seed() -> None:
    model = tiny()
    decoder = decoding.Decoder(model, 16)
    shares = torch.softmax(logits(model)[0, -1] / 0.5, dim=0)
    drawn = [decoder.generate(IDS[0].tolist(), 1, temperature=0.5, seed=seed)[0] for seed in range(300)]
    found = torch.bincount(torch.tensor(drawn), minlength=len(shares)) / len(drawn)
    assert float((found - shares).abs().sum()) / 2 < 0.35  # total variation of 300 draws over 96 near-equal tokens
    assert decoder.generate([1, 2], 6, temperature=1.0, seed=4) == decoder.generate([1, 2], 6, temperature=1.0, seed=4)


def test_a_stop_ends_it_and_is_the_last_token() -> None:
    model = tiny()
    decoder = decoding.Decoder(model, 32)
    whole = decoder.generate([1, 2, 3], 12)
    assert decoder.generate([1, 2, 3], 12, stops={whole[2]}) == whole[: whole.index(whole[2]) + 1]


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
