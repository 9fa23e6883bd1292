"""Pieces every training loop uses: the schedule, the optimizer's groups, what is trained, what a step costs."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from pipelines.core import distributed, hardware, losses, packing, tuning
from pipelines.core.context import StageContext
from pipelines.core.distributed import World
from pipelines.core.errors import ArtifactError
from pipelines.core.language_models import body_and_head
from pipelines.core.params.tuning import Tuning

BETAS = (0.9, 0.95)  # InstructGPT, appendix C; GPT-3, appendix B
FLOOR = 0.1  # of the peak rate, where the cosine ends


def cosine_with_warmup(step: int, steps: int, warmup_share: float) -> float:
    """Factor on the peak learning rate in step 0..steps-1: linear warm-up, then a cosine down to `FLOOR`."""
    warmup = max(1, round(steps * warmup_share)) if warmup_share > 0 else 0
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))


def adamw(parameters: Iterable[torch.Tensor], lr: float, weight_decay: float, eps: float = 1e-8) -> torch.optim.AdamW:
    """AdamW over those that are trained; matrices decay, gains and biases do not (GPT-1, section 4.1)."""
    return torch.optim.AdamW(tuning.decayed(parameters, weight_decay), lr=lr, betas=BETAS, eps=eps, fused=True)


def optimizer(
    model: Any, params: Tuning, lr: float, weight_decay: float, betas: tuple[float, float] = BETAS
) -> torch.optim.Optimizer:
    """AdamW over what the model trains, at the rates that `params.tuning` gives; its moments paged and in 8 bits
    under `optimizer: adamw8bit` (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022).
    """
    groups = tuning.groups(model, weight_decay, params.tuning.layer_decay or 1.0)
    if params.tuning.optimizer == "adamw8bit":
        from bitsandbytes.optim import PagedAdamW8bit

        paged: torch.optim.Optimizer = PagedAdamW8bit(groups, lr=lr, betas=betas)
        return paged
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def update(
    parameters: Iterable[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    lr: float,
    clip_norm: float,
    loss: float,
    step: int,
    world: World,
) -> tuple[float, float]:
    """One optimizer step from the gradients that are there: averaged over the processes, clipped, then cleared.

    A group of the optimizer may have a `factor` on the rate.

    Returns the loss, as the mean over the processes, and the gradient's norm before clipping.

    Raises:
        Diverged: the loss or the gradient is not finite; nothing was updated.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    distributed.average_gradients(trained, world)
    kinds = distributed.by_kind(trained)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in same if p.grad is not None]) for same in kinds]
    norm = torch.stack([distributed.whole(part) for part in norms]).norm()
    loss = distributed.mean_of(world, loss)
    refuse_nan(step, loss=loss, grad_norm=float(norm))
    for same in kinds:
        torch.nn.utils.clip_grads_with_norm_(same, clip_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, float(norm)


@contextmanager
def computing_in(precision: str, device: str, model: Any) -> Iterator[None]:
    """bf16 arithmetic over weights of any type; peft must not turn activations into the adapters' fp32 first."""
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"), _as_given(model):
        yield


def _as_given(model: Any) -> AbstractContextManager[None]:
    """No casts of inputs by peft, which is imported, in seconds and with bitsandbytes, where a model has adapters."""
    if "peft" not in sys.modules:
        return nullcontext()
    from peft.helpers import disable_input_dtype_casting

    casting: AbstractContextManager[None] = disable_input_dtype_casting(model)
    return casting


def language_model_loss(model: Any, batch: packing.Batch, context: StageContext) -> torch.Tensor:
    """Mean next-token cross-entropy in nats over packed rows; documents do not see one another."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    body, head = body_and_head(inner)
    ids, labels, positions, documents = (part.to(context.device) for part in batch)
    mask = packing.attention_mask(documents, context.dtype)
    with computing_in(context.precision, context.device, model):
        states = body(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    hidden = states.last_hidden_state.to(context.dtype)
    return losses.linear_cross_entropy(hidden.flatten(0, 1), head, labels.flatten())


class Diverged(ArtifactError):
    """A loss or a gradient is not finite."""


def refuse_nan(step: int, **values: float) -> None:
    """Stop a run that has diverged, before it spoils a checkpoint.

    Raises:
        Diverged: one of the values is not finite.
    """
    wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
    if wrong:
        raise Diverged(f"training diverged in step {step + 1}: {wrong}. Lower lr or raise warmup_share.")


def random_state() -> dict[str, Any]:
    """States of torch's random generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def trained_state(model: Any) -> dict[str, torch.Tensor]:
    """What is trained, by name, whole: all a checkpoint needs of the weights. Every process must ask."""
    return {name: distributed.whole(value.detach()) for name, value in model.named_parameters() if value.requires_grad}


def load_trained_state(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Put back what `trained_state` gave.

    Raises:
        KeyError: the model trains something the state does not hold.
    """
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                value.copy_(distributed.like(state[name], value))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state, whole. Every process must ask."""
    state = optimizer.state_dict()
    moments = {
        number: {key: distributed.whole(value) for key, value in one.items()} for number, one in state["state"].items()
    }
    return {**state, "state": moments}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put back what `optimizer_state` gave."""
    every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {key: distributed.like(value, every[number]) for key, value in one.items()}
        for number, one in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


class Flops(NamedTuple):
    """Floating-point operations that one training token stands for."""

    model: float  # every matrix 6: PaLM's convention, whatever is trained
    executed: float  # 4 for a frozen matrix, whose own gradient nobody computes; 2 below all that is trained


def flops_per_token(model: Any, length: int) -> Flops:
    """Arithmetic of a training token: matrices, and attention over half of `length` keys on average.

    A matrix parameter costs 2 in the forward pass, 2 for the gradient of its input and 2 for its own (Chowdhery
    et al., "PaLM", 2022, appendix B). Norms, activations and look-ups are left out.
    """
    frozen = trained = untouched = 0
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    _, head = body_and_head(inner)
    looked_up = {id(layer.weight) for layer in inner.modules() if isinstance(layer, torch.nn.Embedding)} - {id(head)}
    below = _below_what_is_trained(inner)
    for value in model.parameters():
        if value.dim() >= 2 and id(value) not in looked_up:
            trained += value.numel() * value.requires_grad
            frozen += value.numel() * (not value.requires_grad)
            untouched += value.numel() * (id(value) in below)
    config = model.config
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 3 * 2 * 2 * config.num_hidden_layers * config.num_attention_heads * width * (length / 2)
    executed = 4.0 * frozen + 6.0 * trained - 2.0 * untouched + attention
    return Flops(6.0 * (frozen + trained) + attention, executed)


def _below_what_is_trained(model: Any) -> set[int]:
    """Parameters of the blocks that no gradient passes through: below the lowest one that trains something."""
    depths = tuning.by_depth(model)
    below: set[int] = set()
    if not any(value.requires_grad for value in depths.below):
        for block in reversed(depths.blocks):
            if any(value.requires_grad for value in block):
                break
            below |= {id(value) for value in block}
    return below


class Pace:
    """How fast training goes, beside what this machine can do."""

    def __init__(self, context: StageContext, steps: int, seconds: float) -> None:
        self.context, self.seconds = context, seconds
        self.rates = hardware.Rates(context.device, context.precision, steps, context.world.size)
        self.started = 0.0

    def start(self, step: int) -> None:
        """A step begins."""
        self.rates.sample(step, self.seconds)
        self.started = time.perf_counter()

    def stop(self) -> None:
        """It has ended."""
        self.seconds += time.perf_counter() - self.started

    def report(self, tokens: int, flops: Flops) -> None:
        """Tell the context: tokens a second, and the share of the machine's matrix-product rate they come to."""
        speed = tokens / self.seconds
        self.context.measure(tokens_per_second=speed, peak_memory_mb=hardware.peak_memory_bytes() / 2**20)
        rate = self.rates.mean()
        if rate is not None:
            self.context.measure(
                matmul_gflops=rate / 1e9,
                matmul_share=speed * flops.model / rate,
                matmul_share_executed=speed * flops.executed / rate,
            )
