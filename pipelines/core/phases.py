"""Where the time of PPO goes, and what share of the machine's own matrix-product rate each phase reaches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipelines.core import hardware, language_models
from pipelines.core.actors import Actors
from pipelines.core.context import StageContext
from pipelines.core.episodes import Episodes
from pipelines.core.params.ppo import PpoParams

NAMES = ("generate", "score", "update")


class Phases:
    """Seconds and floating-point operations of each phase, summed over iterations.

    A forward pass is 2 operations a parameter and token, a backward pass 4, whatever is trained (Chowdhery et al.,
    "PaLM", 2022, appendix B); attention, norms and activations are left out.
    """

    def __init__(
        self, actors: Actors, params: PpoParams, spent: dict[str, list[float]], context: StageContext, prefix: str = ""
    ) -> None:
        """`spent`: of a run that goes on. `prefix`: of the curves' names."""
        with actors.using("policy") as model:
            inner = model.get_base_model() if hasattr(model, "get_base_model") else model
            body, head = language_models.body_and_head(inner)
            looked_up = {id(layer.weight) for layer in body.modules() if isinstance(layer, torch.nn.Embedding)}
            matrices = (
                value
                for name, value in body.named_parameters()
                if value.dim() >= 2 and "lora_" not in name and id(value) not in looked_up
            )
            self.body = sum(value.numel() for value in matrices)
            self.head = head.numel()
        self.params, self.context, self.prefix = params, context, prefix
        self.spent = {name: list(spent.get(name, (0.0, 0.0))) for name in NAMES}
        self.last = dict.fromkeys(NAMES, 0.0)
        self.rates = hardware.Rates(context.device, context.precision, params.iterations, context.world.size)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """The time of a block belongs to a phase."""
        began = time.perf_counter()
        yield
        self.last[name] = time.perf_counter() - began

    def end(self, iteration: int, found: Episodes, pretraining: bool, ahead: int) -> None:
        """Add up an iteration, tell how long its phases took, and measure the machine now and then.

        Args:
            ahead: tokens whose forward pass the update took from scoring.
        """
        params = self.params
        prompts = sum(len(prompt.ids) for prompt in found.rollout.prompts)
        new = int(found.rollout.mask.sum())
        rows = sum(len(one.ids) for one in found.rollout.sequences)
        roles = 3 if found.external else 4
        text = params.ptx_rows * params.ptx_length * params.minibatches if pretraining else 0
        work = {
            "generate": 2.0 * (self.body * (prompts + new) + self.head * new),
            "score": 2.0 * (self.body * rows * roles + self.head * new * 2),
            "update": 6.0 * params.epochs * (self.body * (2 * rows + text) + self.head * (new + text))
            - 2.0 * self.body * ahead,
        }
        for name in NAMES:
            self.spent[name][0] += self.last[name]
            self.spent[name][1] += work[name]
        self.context.curve(iteration + 1, {f"{self.prefix}{name}_seconds": told for name, told in self.last.items()})
        self.rates.sample(iteration, sum(seconds for seconds, _ in self.spent.values()))

    def report(self) -> None:
        """Tell the context: seconds and share of each phase, episodes a second, memory."""
        params = self.params
        episodes = params.iterations * params.batch_prompts * params.samples_per_prompt
        self.context.measure(
            episodes_per_second=episodes / sum(seconds for seconds, _ in self.spent.values()),
            peak_memory_mb=hardware.peak_memory_bytes() / 2**20,
            **{f"{name}_seconds": seconds for name, (seconds, _) in self.spent.items()},
        )
        rate = self.rates.mean()
        if rate is not None:
            self.context.measure(
                matmul_gflops=rate / 1e9,
                **{f"{name}_matmul_share": work / seconds / rate for name, (seconds, work) in self.spent.items()},
            )
