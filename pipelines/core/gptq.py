"""Codes of low-bit weights chosen so that a layer's outputs stay, not its weights: GPTQ.

Papers: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2023),
algorithm 1. With H = X^T X over the inputs X of a layer on calibration rows, columns are rounded one after another, and
what rounding a column did to the outputs is made up for in the columns that are left. Block by block through the model,
each seeing what the smaller blocks before it give. Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for
Asymmetric Calibration" (2025): the outputs to keep are those of the exact model, whose inputs of the layer are others.
As there: H is damped by a hundredth of its mean diagonal, updates of later columns are gathered in blocks, a quarter
of what the inputs have drifted is made up for. Departures: scales are those of the weights before the columns' updates
(so a format whose scales are given, such as NF4's, is served too), columns are taken by descending diagonal of H, which
GPTQ's code has as an option, and the drift changes the weight at once (the square completed), not column by column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.core import blockwise, int4, int8
from pipelines.core.errors import ArtifactError

DAMPING = 0.01  # of the mean diagonal
DRIFT_SHARE = 0.25  # of the drift; all of it fits the calibration rows and nothing else
LAZY = 32  # columns after which the others are updated

Vector = NDArray[np.float32]
# Values (out,) of column j of a layer -> codes (out,) and what they stand for (out,)
Round = Callable[[Vector, int], tuple[NDArray[Any], Vector]]
# Weights (out, in) by name of layers that read the same -> how a column of all of them, one below the other, is rounded
Rounding = Callable[[Mapping[str, torch.Tensor]], Round]


@torch.no_grad()
def calibrate(
    model: Any,
    ids: torch.Tensor,
    wanted: Callable[[str], bool],
    rounding: Rounding,
    tell: Callable[[int, int], None],
) -> dict[str, torch.Tensor]:
    """Codes (out, in) uint8 of the blocks' linear layers, by name; the model's weights become what they stand for.

    Args:
        model: a decoder-only model; changed.
        ids: calibration rows (rows, length), without padding.
        wanted: whether a layer is made smaller, by name.
        tell: called with (done, total) blocks.

    Raises:
        ArtifactError: no list of blocks is known, or a layer's inputs are not finite.
    """
    stack = blockwise.stack(model)
    prefix = next(name for name, module in model.named_modules() if module is stack)
    exact_hidden = hidden = blockwise.first_inputs(model, stack[0], ids)
    found: dict[str, torch.Tensor] = {}
    for number, (block, options) in enumerate(zip(stack, blockwise.options(model, stack, ids[:1]), strict=True)):
        linear = {f"{prefix}.{number}.{name}": layer for name, layer in blockwise.linear(block).items()}
        exact, exact_hidden = blockwise.inputs(block, linear, exact_hidden, options)
        smaller, _ = blockwise.inputs(block, linear, hidden, options)
        for names in _together(filter(wanted, linear), smaller):
            weights = [int8.rows_of(linear[name]) for name in names]
            rows = [len(weight) for weight in weights]
            inputs = seen(exact[names[0]], smaller[names[0]], names[0])
            whole = restored(torch.cat([weight.float() for weight in weights]), inputs)
            codes, values = solve(whole, inputs.root, rounding(dict(zip(names, torch.split(whole, rows), strict=True))))
            found |= zip(names, torch.split(codes, rows), strict=True)
            for weight, value in zip(weights, torch.split(values, rows), strict=True):
                weight.copy_(value.to(weight.dtype))
        hidden = blockwise.output(block(hidden, **options))
        tell(number + 1, len(stack))
    return found


def _together(names: Iterable[str], inputs: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Layers that read the very same tensor (query, key and value; gate and up) side by side: their columns are rounded
    in the same order, and one step of many rows costs little more than one of few."""
    found: dict[int, list[str]] = {}
    for name in names:
        found.setdefault(id(inputs[name]), []).append(name)
    return list(found.values())


class Root(NamedTuple):
    """What the inputs of a layer ask of the order and of the errors of its columns."""

    order: torch.Tensor  # columns, the one with the largest inputs first
    inverse: torch.Tensor  # (in, in), in that order: H^-1
    upper: torch.Tensor  # U with U^T U = H^-1


class Seen(NamedTuple):
    """What a layer reads on the calibration rows."""

    root: Root  # of X'^T X', X' (tokens, in) as the smaller blocks before it give
    drift: torch.Tensor  # (X - X')^T X', (in, in) fp32, X as the exact blocks do


def seen(exact: torch.Tensor, smaller: torch.Tensor, name: str) -> Seen:
    """Of a layer's inputs (.., in) in the exact model and in the smaller one.

    Raises:
        ArtifactError: they are not finite; the layer is named.
    """
    inputs, wanted = smaller.flatten(0, -2).float(), exact.flatten(0, -2).float()
    with _sums_at_the_rate_of(torch.promote_types(exact.dtype, smaller.dtype)):
        square, product = inputs.t() @ inputs, wanted.t() @ inputs
    if not bool(torch.isfinite(square).all()):
        raise ArtifactError(f"layer {name}: its inputs on the calibration rows are not finite")
    return Seen(root(square), product - square)


@contextmanager
def _sums_at_the_rate_of(dtype: torch.dtype) -> Iterator[None]:
    """Inside, fp32 products of numbers that came in bf16 cost oneDNN what bf16 ones do: they are exact in fp32, where
    their sums are formed."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if dtype == torch.bfloat16 else before
    try:
        yield
    finally:
        matmul.fp32_precision = before


def restored(weight: torch.Tensor, found: Seen) -> torch.Tensor:
    """The weight (out, in) that makes up, on the smaller model's inputs, for a share of their drift.

    ||X W^T - X' V^T|| is least for V = W + W (X - X')^T X' H^-1; what rounding V costs adds to that.
    """
    missing = (weight @ found.drift)[:, found.root.order] @ found.root.inverse
    return weight.index_add(1, found.root.order, missing, alpha=DRIFT_SHARE)


def root(square: torch.Tensor) -> Root:
    """Of X^T X, (in, in) fp32, damped. An input that is always 0 has no part in the errors of others."""
    order = torch.argsort(square.diagonal(), descending=True, stable=True)
    damped = square[order][:, order]
    diagonal = damped.diagonal()
    damping = DAMPING * diagonal.mean()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return Root(order, inverse, torch.linalg.cholesky(inverse, upper=True))


def solve(weight: torch.Tensor, found: Root, one: Round) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (out, in) uint8 of a weight (out, in) in fp32, and what they stand for; `one` rounds a column."""
    order, upper = found.order, found.upper
    left = weight.t()[order].clone()  # a column of the weight is a row here, whose entries lie side by side
    wrong = torch.empty(LAZY, left.shape[1])
    # Columns are short: numpy calls, on the same memory, take a third of the time that torch's do.
    values, errors, factors = left.numpy(), wrong.numpy(), upper.numpy()
    codes, exact = np.empty(values.shape, dtype=np.uint8), np.empty_like(values)
    for start in range(0, len(left), LAZY):
        end = min(start + LAZY, len(left))
        for place, column in zip(range(start, end), order[start:end].tolist(), strict=True):
            codes[column], exact[column] = one(values[place], column)
            error = np.subtract(values[place], exact[column], out=errors[place - start])
            error /= factors[place, place]
            values[place + 1 : end] -= factors[place, place + 1 : end, None] * error
        left[end:].addmm_(upper[start:end, end:].t(), wrong[: end - start], alpha=-1)
    return torch.from_numpy(codes.T.copy()), torch.from_numpy(exact.T.copy())


def of_grid(found: int4.Grid, group: int) -> Round:
    """Rounding onto a grid of `int4`."""
    scales, zeros = (part.float().t().contiguous().numpy() for part in found)

    def one(values: Vector, column: int) -> tuple[NDArray[Any], Vector]:
        scale, zero = scales[column // group], zeros[column // group]
        codes = values - zero
        codes /= scale
        np.rint(codes, out=codes)
        np.clip(codes, -int4.MIDDLE, int4.LEVELS - int4.MIDDLE, out=codes)
        exact = codes * scale
        exact += zero
        return codes + np.float32(int4.MIDDLE), exact

    return one


def of_code_book(book: torch.Tensor, scales: torch.Tensor, group: int) -> Round:
    """Rounding to the nearest of a code book's values (ascending) times a scale (out, in / group)."""
    values_of = book.float().numpy()
    middles = (values_of[1:] + values_of[:-1]) / 2
    columns = scales.float().t().contiguous().numpy()
    divisors = np.where(columns != 0, columns, np.float32(1.0))

    def one(values: Vector, column: int) -> tuple[NDArray[Any], Vector]:
        codes = np.searchsorted(middles, values / divisors[column // group])
        return codes, values_of[codes] * columns[column // group]

    return one
