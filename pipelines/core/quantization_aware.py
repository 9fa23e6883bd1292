"""Fine-tuning a model while its weights are rounded, for when rounding a trained model costs too much.

The forward pass sees rounded weights; gradients go to the exact ones as if nothing had been rounded (straight-through:
Bengio et al., 2013; Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", 2018). What is learned is to say what the model said before: KL(original || rounded) of the next token, so
that no label, and nothing beyond the calibration rows, is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from pipelines.core import artifacts, int4, int8, language_models, losses, segments, training, tuning
from pipelines.core.checkpoint import Checkpoints
from pipelines.core.context import StageContext
from pipelines.core.errors import ParamsError
from pipelines.core.params.quantize import QuantizeParams

CHECKPOINT_STEPS, CHECKPOINT_SECONDS = 50, 60.0


class Rounded(torch.nn.Module):
    """A weight as its format would keep it; the gradient passes as if it were the weight itself."""

    def __init__(self, rounding: Callable[[torch.Tensor], torch.Tensor], turned: bool = False) -> None:
        super().__init__()
        self.rounding, self.turned = rounding, turned

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """weight (out, in), or (in, out) where it is `turned` -> the same, rounded."""
        with torch.no_grad():
            rounded = self.rounding(weight.t().contiguous()).t() if self.turned else self.rounding(weight)
            gap = rounded - weight
        return weight + gap


def rounding(variant: str, group: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a format makes of a weight (out, in): rounded to the nearest, in fp32."""

    def eight(weight: torch.Tensor) -> torch.Tensor:
        codes, scale = int8.to_int8(weight)
        return codes.float() * scale.float()[:, None]

    def four(weight: torch.Tensor) -> torch.Tensor:
        found = int4.grid(weight, group)
        return int4.from_int4(int4.to_int4(weight, found), found)

    def normal_float(weight: torch.Tensor) -> torch.Tensor:
        from bitsandbytes import functional

        codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        exact: torch.Tensor = functional.dequantize_4bit(codes, state)
        return exact

    return {"int8": eight, "int4": four, "nf4": normal_float}[variant]


def fine_tuned(
    place: Path, variant: str, rows: Sequence[list[int]], params: QuantizeParams, context: StageContext
) -> Path:
    """A directory of the model, fine-tuned for a variant; taken from the scratch where a killed run has finished it.

    Raises:
        ParamsError: no layer is left to fine-tune.
        ValueError: a weight that the format cannot hold; the layer is named.
        ArtifactError: the loss or a gradient is not finite.
        Stopped: a signal came; the checkpoint is written.
    """
    target = context.work / "aware" / variant
    if not target.exists():
        original = language_models.load(str(place), context.dtype, "sdpa").to(context.device).eval()
        model = copy.deepcopy(original).float()
        _train(model, original, variant, rows, params, context)
        with artifacts.published(target) as draft:
            model.to(context.dtype).save_pretrained(draft)
            language_models.load_tokenizer(str(place)).save_pretrained(draft)
    return target


def _train(
    model: Any, original: Any, variant: str, rows: Sequence[list[int]], params: QuantizeParams, context: StageContext
) -> None:
    """Train the blocks' linear layers in place."""
    aware, keep = params.aware, params.keep_in_high_precision
    inside = {id(part) for block in tuning.blocks(model) for part in block.modules()}
    layers: dict[str, Any] = {
        name: part for name, part in int8.convertible(model) if id(part) in inside and not int8.kept(name, keep)
    }
    if not layers:
        raise ParamsError(
            f"quantize.aware: keep_in_high_precision ({', '.join(keep)}) leaves no layer of the blocks to fine-tune; "
            "keep fewer, or set aware: {}"
        )
    model.requires_grad_(False)
    weights = [part.weight.requires_grad_() for part in layers.values()]
    optimizer = training.adamw(weights, aware.lr, weight_decay=0.0)
    checkpoints = Checkpoints(
        context.work / f"aware-{variant}-checkpoints", context.fingerprint, CHECKPOINT_STEPS, CHECKPOINT_SECONDS
    )
    state = checkpoints.newest() or {"step": 0}
    if state["step"]:
        context.say(f"resuming {variant} after step {state['step']} of {aware.steps}")
        for weight, value in zip(weights, state["weights"], strict=True):
            weight.data.copy_(value)
        training.load_optimizer_state(optimizer, state["optimizer"])
    sequences = [segments.Sequence(row[:-1], row[1:], [0] * (len(row) - 1)) for row in rows if len(row) > 1]
    for name, part in layers.items():
        rounded = Rounded(rounding(variant, params.group_size), isinstance(part, Conv1D))
        try:
            parametrize.register_parametrization(part, "weight", rounded)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None
    heads = [language_models.body_and_head(one)[1].detach() for one in (model, original)]
    for step in range(state["step"], aware.steps):
        first = step * aware.batch_size
        chosen = [sequences[(first + number) % len(sequences)] for number in range(aware.batch_size)]
        batch = segments.rows(chosen, [[number] for number in range(len(chosen))], 0)
        kept = batch.labels != losses.IGNORE
        with torch.no_grad():
            theirs = segments.hidden_states(original, batch, context)[kept]
        ours = segments.hidden_states(model, batch, context)[kept]
        loss = losses.linear_divergence(ours, heads[0], theirs, heads[1], "forward")
        loss.backward()  # type: ignore[no-untyped-call]
        lr = aware.lr * training.cosine_with_warmup(step, aware.steps, aware.warmup_share)
        told = training.update(weights, optimizer, lr, aware.clip_norm, float(loss.detach()), step, context.world)
        context.progress(step + 1, aware.steps, loss=told[0], fine_tuning=variant)
        due, stop = context.after_step(checkpoints.due(step + 1) or step + 1 == aware.steps)
        if due:
            now = {"weights": [weight.detach() for weight in weights], "step": step + 1}
            checkpoints.save(step + 1, now | {"optimizer": training.optimizer_state(optimizer)})
        if stop:
            context.stop_if_asked()
    for part in layers.values():
        parametrize.remove_parametrizations(part, "weight", leave_parametrized=False)
