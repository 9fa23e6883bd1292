"""The product of a LoRA layer added to its matrix's where that lies, for one adapter or for several side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch

# Adapters of the parts of a batch; (): one adapter, peft's active one, for all of it
_BESIDE: ContextVar[tuple[str | None, ...]] = ContextVar("beside", default=())


def fuse(model: Any) -> None:
    """Let each plain adapter of a model add its product in place; what it computes stays W x + s B A x.

    peft multiplies B A x by s and adds it: at width 1536 the two passes take as long as half the product with W.
    Adapters of another kind (DoRA), or on weights packed by bitsandbytes, stay as they are.
    """
    from peft.tuners.lora.layer import Linear

    for layer in model.modules():
        if isinstance(layer, Linear):
            for name in layer.lora_A:
                layer.lora_variant.setdefault(name, _variant())


def fits_side_by_side(model: Any) -> bool:
    """Whether `side_by_side` may be used: adapters are fused, on the same layers, and those keep a batch's order."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    fused = type(_variant())
    # Experts get the tokens that were sent to them, of whatever rows
    return (
        len({frozenset(layer.lora_A) for layer in layers}) == 1
        and all(isinstance(layer.lora_variant.get(name), fused) for layer in layers for name in layer.lora_A)
        and not any("expert" in name.lower() for name, _ in model.named_modules())
    )


@contextmanager
def side_by_side(names: Sequence[str | None]) -> Iterator[None]:
    """Inside, a batch is as many parts of equally many rows, each of which passes through one adapter, or none.

    The products with the model's own matrices are computed for all of them at once. An adapter must be active.
    """
    token = _BESIDE.set(tuple(names))
    try:
        yield
    finally:
        _BESIDE.reset(token)


class _Added(torch.autograd.Function):
    """result + s B A x, in place; of parts of the rows with weights (A, B) of their own, or None."""

    @staticmethod
    def forward(
        ctx: Any, result: torch.Tensor, x: torch.Tensor, factors: list[float], *weights: torch.Tensor | None
    ) -> torch.Tensor:
        flat, rows = result.view(-1, result.shape[-1]), x.reshape(-1, x.shape[-1])
        lows: list[torch.Tensor | None] = []
        for part, a, b, factor in _parts(len(rows), factors, weights):
            lows.append(None)
            if a is not None and b is not None:
                lows[-1] = low = rows[part] @ a.t()
                flat[part].addmm_(low, b.t(), alpha=factor)
        ctx.mark_dirty(result)
        ctx.save_for_backward(x, *lows, *weights)
        ctx.factors = factors
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        count = len(ctx.factors)
        lows, weights = saved[:count], saved[count:]
        rows, flat = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        to_x = torch.empty_like(rows) if ctx.needs_input_grad[1] else None
        found: list[torch.Tensor | None] = []
        for (part, a, b, factor), low in zip(_parts(len(rows), ctx.factors, weights), lows, strict=True):
            if a is None or b is None:
                found += [None, None]
                if to_x is not None:
                    to_x[part] = 0
                continue
            own = flat[part]
            back = (own @ b).mul_(factor)
            if to_x is not None:
                torch.mm(back, a, out=to_x[part])
            found += [back.t() @ rows[part], (own.t() @ low).mul_(factor)]
        return grads[0], None if to_x is None else to_x.view_as(x), None, *found


def _parts(
    rows: int, factors: Sequence[float], weights: Sequence[torch.Tensor | None]
) -> Iterator[tuple[slice, torch.Tensor | None, torch.Tensor | None, float]]:
    """Rows, A, B and s of each part."""
    assert rows % len(factors) == 0, f"{rows} rows are not {len(factors)} equal parts"
    size = rows // len(factors)
    for number, factor in enumerate(factors):
        yield slice(number * size, (number + 1) * size), weights[2 * number], weights[2 * number + 1], factor


@cache
def _variant() -> Any:
    """peft's way to put another computation in the place of its own; peft takes seconds to import."""
    from peft.tuners.lora.layer import LoraVariant

    class Fused(LoraVariant):  # type: ignore[misc]
        @staticmethod
        def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)
            return found

        @staticmethod
        def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
            wide = orig_weight.data.float() + module.get_delta_weight(active_adapter)  # += between types is slow
            orig_weight.data.copy_(wide)

        @staticmethod
        def unmerge(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)
            return found

        @staticmethod
        def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
            names, read = _BESIDE.get() or (active_adapter,), module.lora_dropout[active_adapter](x).to(result.dtype)
            weights = [
                None if name is None else table[name].weight.to(result.dtype)
                for name in names
                for table in (module.lora_A, module.lora_B)
            ]
            factors = [0.0 if name is None else module.scaling[name] for name in names]
            added: torch.Tensor = _Added.apply(result, read, factors, *weights)  # type: ignore[no-untyped-call]
            return added

    return Fused()
