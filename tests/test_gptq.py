"""GPTQ: against rounding, by hand, against elimination of one column after another; through a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from test_int8 import IDS, logits, tiny

from pipelines.core import gptq, int4
from pipelines.core.errors import ArtifactError


def nothing(done: int, total: int) -> None:
    pass


def rounding_to(grids: dict[str, int4.Grid]) -> gptq.Rounding:
    """To int4, the grids to be found under the layers' names."""

    def rounding(weights: Mapping[str, torch.Tensor]) -> gptq.Round:
        here = {name: int4.grid(weight, 32) for name, weight in weights.items()}
        grids.update(here)
        scales, zeros = (torch.cat(parts) for parts in zip(*here.values(), strict=True))
        return gptq.of_grid(int4.Grid(scales, zeros), 32)

    return rounding


def test_with_equal_and_independent_inputs_rounds_to_the_nearest() -> None:
    torch.manual_seed(2)
    weight = torch.randn(24, 64)
    found = int4.grid(weight, 32)
    codes, exact = gptq.solve(weight, gptq.root(torch.eye(64)), gptq.of_grid(found, 32))
    assert torch.equal(codes, int4.to_int4(weight, found))
    assert torch.allclose(exact, int4.from_int4(codes, found), atol=1e-6)


def test_of_two_columns_by_hand() -> None:
    """H = [[2, 1], [1, 1]]: rounding w0 = 0.4 to 0 leaves an error that w1 takes up: w1 + 0.4 x H01 / H11."""
    weight = torch.tensor([[0.4, 0.2]])

    def whole(values: gptq.Vector, column: int) -> tuple[gptq.Vector, gptq.Vector]:
        return values.round(), values.round()

    square = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    _, exact = gptq.solve(weight, gptq.root(square), whole)
    assert exact.tolist() == [[0.0, 1.0]]  # 0.2 + 0.4 = 0.6 becomes 1, where the nearest would be 0
    errors = [float((weight - torch.tensor(one)) @ square @ (weight - torch.tensor(one)).T)
              for one in ([[0.0, 1.0]], [[0.0, 0.0]], [[1.0, 0.0]], [[1.0, 1.0]])]  # fmt: skip
    assert errors[0] == min(errors)


def by_elimination(weight: torch.Tensor, square: torch.Tensor, order: list[int], grid: int4.Grid) -> torch.Tensor:
    """Codes by the paper's equation 2: the inverse of what is left of H is computed anew for every column."""
    left, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.uint8)
    scales, zeros = (part.double().repeat_interleave(32, dim=1) for part in grid)
    for place, column in enumerate(order):
        values = zeros[:, column, None] + (torch.arange(16) - 8) * scales[:, column, None]
        codes[:, column] = (left[:, column, None] - values).abs().argmin(1)
        wrong = left[:, column] - values.gather(1, codes[:, column, None].long())[:, 0]
        rest = order[place:]
        inverse = torch.linalg.inv(square.double()[rest][:, rest])
        left[:, rest] -= wrong[:, None] / inverse[0, 0] * inverse[0]
    return codes


def test_gathered_updates_are_those_of_one_column_after_another() -> None:
    """160 columns are gathered five times."""
    torch.manual_seed(3)
    inputs = torch.randn(600, 160) * torch.logspace(-1, 1, 160)
    inputs = inputs + inputs.roll(1, 1)
    square = inputs.T @ inputs
    weight = torch.randn(6, 160)
    grid = int4.grid(weight, 32)
    found = gptq.root(square)
    damped = square + 0.01 * square.diagonal().mean() * torch.eye(160)
    expected = by_elimination(weight, damped, found.order.tolist(), grid)
    codes, _ = gptq.solve(weight, found, gptq.of_grid(grid, 32))
    assert torch.equal(codes, expected)
    assert (codes != int4.to_int4(weight, grid)).float().mean() > 0.1


@pytest.mark.parametrize("book", [False, True])
def test_keeps_outputs_better_than_rounding(book: bool) -> None:
    torch.manual_seed(4)
    inputs = torch.randn(400, 96) @ torch.randn(96, 96)
    weight = torch.randn(48, 96)
    if book:
        values = torch.linspace(-1, 1, 16)
        scales = weight.view(48, 3, 32).abs().amax(2)
        one = gptq.of_code_book(values, scales, 32)
        wide = scales.repeat_interleave(32, 1)
        nearest = values[torch.bucketize(weight / wide, (values[1:] + values[:-1]) / 2)] * wide
    else:
        found = int4.grid(weight, 32)
        one, nearest = gptq.of_grid(found, 32), int4.from_int4(int4.to_int4(weight, found), found)
    square = inputs.T @ inputs
    _, exact = gptq.solve(weight, gptq.root(square), one)
    wrong, rounded = ((inputs @ (weight - other).T).square().sum() for other in (exact, nearest))
    assert wrong < 0.5 * rounded


def test_of_inputs_that_are_always_zero_and_of_a_layer_of_zeros() -> None:
    torch.manual_seed(5)
    inputs = torch.randn(100, 64)
    inputs[:, 7] = 0
    weight = torch.randn(8, 64)
    found = int4.grid(weight, 32)
    codes, exact = gptq.solve(weight, gptq.root(inputs.T @ inputs), gptq.of_grid(found, 32))
    assert torch.equal(codes[:, 7], int4.to_int4(weight, found)[:, 7])
    assert torch.isfinite(exact).all()
    empty = torch.zeros(8, 64)
    _, exact = gptq.solve(empty, gptq.root(inputs.T @ inputs), gptq.of_grid(int4.grid(empty, 32), 32))
    assert torch.equal(exact, empty)


def test_layers_that_read_the_same_are_solved_side_by_side() -> None:
    """As many solutions as inputs, each that of its layers one after another."""
    torch.manual_seed(8)
    weights = {"q": torch.randn(24, 64), "k": torch.randn(8, 64)}
    found = gptq.root(torch.cov(torch.randn(64, 300)))
    both, _ = gptq.solve(torch.cat([*weights.values()]), found, rounding_to({})(weights))
    alone = [gptq.solve(weight, found, rounding_to({})({name: weight}))[0] for name, weight in weights.items()]
    assert torch.equal(both, torch.cat(alone))
    asked: list[list[str]] = []
    grids = rounding_to({})
    gptq.calibrate(
        tiny(), IDS, lambda name: "layers.0" in name and "k_proj" not in name,
        lambda weights: asked.append([name.split(".")[-1] for name in weights]) or grids(weights), nothing,
    )  # fmt: skip
    assert asked == [["q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_sums_of_bf16_inputs_are_those_of_fp32() -> None:
    """Formed by the product for bf16, they are as exact as fp32's own; the setting for others stays what it was."""
    torch.manual_seed(3)
    exact, smaller = torch.randn(2, 300, 48).bfloat16().unbind()
    setting = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    found = gptq.seen(exact, smaller, "layer")
    assert torch.backends.mkldnn.matmul.fp32_precision == setting  # type: ignore[attr-defined]
    drift = (exact.double() - smaller.double()).t() @ smaller.double()
    torch.testing.assert_close(found.drift.double(), drift, rtol=1e-5, atol=1e-3)
    square = smaller.double().t() @ smaller.double()
    order, upper = found.root.order, found.root.upper
    damped = square + gptq.DAMPING * square.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    inverse = torch.linalg.inv(damped)[order][:, order]
    torch.testing.assert_close((upper.t() @ upper).double(), inverse, rtol=1e-4, atol=1e-7)


def test_what_inputs_have_drifted_is_made_up_for_as_least_squares_do(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    exact = torch.randn(2, 200, 48)
    smaller = exact + 0.3 * torch.randn(2, 200, 48) * torch.logspace(-1, 1, 48)
    weight = torch.randn(8, 48)
    monkeypatch.setattr(gptq, "DAMPING", 0.0)
    assert torch.equal(gptq.restored(weight, gptq.seen(exact, exact, "m")), weight)
    wanted = exact.flatten(0, 1) @ weight.T
    best = torch.linalg.lstsq(smaller.flatten(0, 1), wanted).solution.T
    for share in (1.0, 0.25):
        monkeypatch.setattr(gptq, "DRIFT_SHARE", share)
        found = gptq.restored(weight, gptq.seen(exact, smaller, "m"))
        assert torch.allclose(found, weight + share * (best - weight), atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_calibration_goes_through_every_block_and_helps(kind: str) -> None:
    model = tiny(kind)
    torch.manual_seed(6)
    ids = torch.randint(1, 96, (16, 24))
    exact = logits(model, ids)
    grids: dict[str, int4.Grid] = {}

    def wanted(name: str) -> bool:
        return not name.endswith(("down_proj", "mlp.c_proj"))

    changed = copy.deepcopy(model)
    codes = gptq.calibrate(changed, ids, wanted, rounding_to(grids), nothing)
    assert codes.keys() == grids.keys() and len(codes) == (2 * 6 if kind == "llama" else 2 * 3)
    chosen = int4.quantize(
        copy.deepcopy(model), 32, ["down_proj", "mlp.c_proj"], {n: (c, grids[n]) for n, c in codes.items()}
    )
    nearest = int4.quantize(copy.deepcopy(model), 32, ["down_proj", "mlp.c_proj"])
    errors = [(logits(one, ids) - exact).norm() for one in (chosen, nearest)]
    assert errors[0] < 0.95 * errors[1]
    assert torch.allclose(logits(changed, ids), logits(int4.dense(chosen), ids), atol=0.1)


def test_calibration_refuses_inputs_that_are_no_numbers() -> None:
    model = tiny()
    model.get_input_embeddings().weight.data[5] = float("nan")
    with pytest.raises(ArtifactError, match=r"layer model\.layers\.0\.self_attn\.q_proj: its inputs"):
        gptq.calibrate(model, IDS, lambda name: True, rounding_to({}), nothing)
