"""Tokens come as often as the softmax says."""

from __future__ import annotations

import torch

from pipelines.core.drawing import LARGEST, draw, room_to_draw

CPU = torch.device("cpu")


def test_frequencies_are_the_softmax() -> None:
    """Chi-square of 40,000 draws over a small vocabulary, with a token of probability 0 that never comes."""
    logits = torch.tensor([[1.0, -0.5, 0.3, float("-inf"), 2.0, -1.2]])
    uniforms = torch.rand(1, 40_000, generator=torch.Generator().manual_seed(3))
    for temperature in (0.6, 1.0, 1.7):
        tokens, log_probabilities = draw(logits, uniforms, temperature, room_to_draw(1, 6, CPU))
        wanted = torch.softmax(logits[0] / temperature, dim=0)
        counts = torch.bincount(tokens[0], minlength=6)
        assert counts[3] == 0
        kept = wanted > 0
        chi_square = ((counts - 40_000 * wanted)[kept] ** 2 / (40_000 * wanted[kept])).sum()
        assert chi_square < 18.5, (temperature, counts, wanted)  # 0.999 quantile, 4 degrees of freedom: 18.47
        torch.testing.assert_close(log_probabilities[0].exp(), wanted[tokens[0]])


def test_draws_in_a_large_vocabulary_are_the_inverse_of_its_cumulative_distribution() -> None:
    """Against cumulative sums in fp64; a vocabulary that is not a whole number of blocks, in several types."""
    generator = torch.Generator().manual_seed(4)
    logits = 4 * torch.randn(7, 5000, generator=generator)
    uniforms = torch.rand(7, 300, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        given = logits.to(dtype)
        before = given.clone()
        tokens, log_probabilities = draw(given, uniforms, 0.8, room_to_draw(9, 5000, CPU))
        wanted = torch.log_softmax(given.double() / 0.8, dim=1)
        ends = wanted.exp().cumsum(dim=1)
        starts = ends - wanted.exp()
        assert (starts.gather(1, tokens) < uniforms + 1e-6).all() and (ends.gather(1, tokens) > uniforms - 1e-6).all()
        torch.testing.assert_close(log_probabilities.double(), wanted.gather(1, tokens), atol=1e-5, rtol=0)
        assert torch.equal(given, before), "the logits are the caller's"


def test_the_ends_of_the_unit_interval_are_tokens() -> None:
    last = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    edge = torch.stack([torch.tensor(0.0), last]).expand(500, 2)
    logits = torch.randn(500, 1000, generator=torch.Generator().manual_seed(2))
    logits[:, :300] = logits[:, 255:260] = logits[:, -1] = float("-inf")
    tokens, log_probabilities = draw(logits, edge, 1.0, room_to_draw(500, 1000, CPU))
    assert (tokens[:, 0] == 300).all() and (tokens[:, 1] > 990).all() and log_probabilities.isfinite().all()


def test_the_largest_beside_drawn_ones() -> None:
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(2))
    uniforms = torch.rand(6, 3, generator=torch.Generator().manual_seed(3))
    alone, _ = draw(logits, uniforms, 1.0, room_to_draw(6, 1000, CPU))
    uniforms[1:4, 2] = LARGEST
    tokens, log_probabilities = draw(logits, uniforms, 1.0, room_to_draw(6, 1000, CPU))
    assert torch.equal(tokens[1:4, 2], logits.argmax(dim=1)[1:4]) and not torch.equal(tokens, alone)
    alone[1:4, 2] = tokens[1:4, 2]
    assert torch.equal(tokens, alone)
    torch.testing.assert_close(log_probabilities, torch.log_softmax(logits, dim=1).gather(1, tokens))
