"""Rollouts made by hand, actors that have learned something, and what each of them says by a plain forward pass."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
from models import LORA
from test_ppo_params import PLAIN
from test_reward_adapter import disturb

from pipelines.core import actors, episodes, k_way, segments
from pipelines.core.actors import Actors, Role
from pipelines.core.completions import Prompt
from pipelines.core.context import StageContext
from pipelines.core.params.ppo import PpoParams

METHODS = ("shared", "separate")
PARAMS = PpoParams.model_validate(
    PLAIN
    | {
        "batch_prompts": 6,
        "samples_per_prompt": 3,
        "max_new_tokens": 8,
        "micro_tokens": 64,
        "missing_eos_penalty": 0.0,
        "group_baseline": False,
    }
    | {"ptx_rows": 3, "ptx_length": 32}
)
COOL = PARAMS.model_copy(update={"temperature": 0.7})


class Case(NamedTuple):
    """A rollout made by hand, and its episodes one by one."""

    rollout: episodes.Rollout
    said: list[tuple[list[int], list[int]]]  # (prompt, response) of each episode

    def ragged(self, rows: list[torch.Tensor]) -> torch.Tensor:
        """A vector for each episode as a table (N, T)."""
        table = torch.zeros(self.rollout.mask.shape)
        for number, row in enumerate(rows):
            table[number, : len(row)] = row
        return table


def case(seed: int = 0, prompts: int = 6, samples: int = 3) -> Case:
    """Prompts that begin alike, with responses of 1 to 7 random tokens."""
    draw = random.Random(seed)
    asked, said = [], []
    for number in range(prompts):
        ids = [5, 6, 7, *draw.choices(range(10, 290), k=draw.randint(1, 9))]
        asked.append(Prompt(str(number), str(number), "train", f"prompt {number}", None, ids))
        said.append([draw.choices(range(10, 290), k=draw.randint(1, 7)) for _ in range(samples)])
    flat = [(prompt.ids, one) for prompt, of_prompt in zip(asked, said, strict=True) for one in of_prompt]
    longest = max(len(one) for _, one in flat)
    mask = torch.tensor([[place < len(one) for place in range(longest)] for _, one in flat])
    sequences = [segments.of_completions(prompt.ids, one) for prompt, one in zip(asked, said, strict=True)]
    texts = [[f"{number}.{k}" for k in range(samples)] for number in range(prompts)]
    ended = [[draw.random() < 0.5 for _ in range(samples)] for _ in range(prompts)]
    return Case(episodes.Rollout(asked, sequences, texts, ended, torch.zeros(mask.shape), mask), flat)


def roles(root: Path, method: str, context: StageContext, reward: bool = True) -> Actors:
    """Actors whose policy has left the SFT model, and whose value model the reward model."""
    if method == "shared":
        made = actors.shared(root / "sft", root / "reward" if reward else None, LORA, 64, 7, context)
    else:
        made = actors.separate(root / "sft", root / "reward/model" if reward else None, 64, 7, context)
    torch.manual_seed(11)
    for role in ("policy", "value"):
        disturb(made._named[role].items(), scale=0.02)
    return made


def states(made: Actors, role: Role, batch: k_way.Responses, context: StageContext) -> torch.Tensor:
    """Hidden states of a role that passes alone."""
    (hidden,) = made.hidden((role,), batch.rows, context)
    return hidden


def plain_logits(made: Actors, role: Any, prompt: list[int], said: list[int], temperature: float) -> torch.Tensor:
    """(tokens, vocabulary): what each token of a response is drawn from, by transformers, with nothing beside it."""
    with made.using(role) as lm:
        logits: torch.Tensor = lm(input_ids=torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, dim=1)


def plain_scores(made: Actors, role: Any, prompt: list[int], said: list[int], temperature: float) -> torch.Tensor:
    return plain_logits(made, role, prompt, said, temperature)[range(len(said)), said]


def plain_hidden(made: Actors, role: Any, prompt: list[int], said: list[int]) -> torch.Tensor:
    """(prompt + response, width)."""
    with made.using(role) as model:
        body = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
        hidden: torch.Tensor = body(input_ids=torch.tensor([prompt + said])).last_hidden_state[0]
    return hidden


def plain_values(made: Actors, prompt: list[int], said: list[int]) -> torch.Tensor:
    hidden = plain_hidden(made, "value", prompt, said)[len(prompt) - 1 : -1]
    return hidden @ made.value_head.weight[0] + made.value_head.bias
