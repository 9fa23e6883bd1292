"""The four roles of PPO: policy, reference, value and reward, on one backbone or as models of their own.

| role | trained | starts as |
| --- | --- | --- |
| policy | yes | the SFT model |
| reference | no | the SFT model, which the policy must not leave |
| value | yes | the reward model (InstructGPT, appendix C.4); without one, the SFT model and a head of zeros |
| reward | no | the reward model, where it is a role and not something else |

`shared`: one backbone, the SFT model's weights in the type to compute in, carries the roles as LoRA adapters, the
reference being the backbone with none; so four models take little more memory than one. `separate`: each role has
weights of its own, all of them are trained where the role is.

Nothing is ever in training mode: dropout would make the ratio of new to old probabilities other than 1.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from pipelines.core import (
    attention,
    k_way,
    language_models,
    losses,
    low_rank,
    reward_model,
    segments,
    training,
    tuning,
)
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError
from pipelines.core.params.tuning import Tuning

Role = Literal["policy", "reference", "value", "reward"]
LEARNERS: tuple[Role, ...] = ("policy", "value")
JUDGES: tuple[Role, ...] = ("reference", "reward")


class Actors:
    """The roles. `shared` and `separate` make them.

    What a role says is read from its last hidden states, which two on one backbone compute in one pass, side by side.
    `value_head` is fp32, its bias takes the mean of the demonstrations off as the reward does, so values and rewards
    have one scale.
    """

    def __init__(self, models: dict[str, Any], value_head: torch.nn.Linear, reward_head: torch.Tensor | None,
                 reward_mean: float, sft: Path, adapters: Tuning | None) -> None:  # fmt: skip
        self.models, self.value_head, self.reward_head, self.reward_mean = models, value_head, reward_head, reward_mean
        self.sft, self.adapters = sft, adapters
        for model in models.values():
            model.eval()
        self.side_by_side = self.shared and low_rank.fits_side_by_side(models["policy"])
        # Looked up once: a walk through the modules of 30 layers takes a hundredth of a second, a step makes many.
        self._named = {role: self._of(role) for role in ("policy", "value")}
        learned = {id(value) for named in self._named.values() for value in named.values()}
        every = {id(value): value for model in models.values() for value in model.parameters()}
        self._frozen = [value for number, value in every.items() if number not in learned]
        self._mark()

    @property
    def shared(self) -> bool:
        """Whether all roles are on one backbone."""
        return self.adapters is not None

    @contextmanager
    def using(self, role: Role) -> Iterator[Any]:
        """The role's model: a causal language model, or for `value` and `reward` what gives their hidden states.

        One role at a time: inside the block no other may be asked for. Gradients of one may be computed after it.
        """
        model = self.models[role]
        if not self.shared:
            yield model
        elif role == "reference":
            model.base_model.disable_adapter_layers()
            try:
                yield model
            finally:
                model.base_model.enable_adapter_layers()
                self._mark()
        else:
            if model.active_adapters != [role]:
                model.set_adapter(role)
                self._mark()
            yield model

    @contextmanager
    def sampling(self) -> Iterator[Any]:
        """The policy, to sample from: on a shared backbone with its adapter merged, as `save` writes it.

        A token costs a third of the products then. The backbone's own weights are put back as they were, to the bit.
        """
        with self.using("policy") as model, torch.no_grad():
            layers = [part for part in model.modules() if hasattr(part, "merged_adapters")] if self.shared else []
            kept = [layer.get_base_layer().weight.data for layer in layers]
            for layer, weights in zip(layers, kept, strict=True):
                layer.get_base_layer().weight.data = weights.clone()
                layer.merge(adapter_names=["policy"])
            try:
                yield model
            finally:
                for layer, weights in zip(layers, kept, strict=True):
                    layer.get_base_layer().weight.data = weights
                    layer.merged_adapters.clear()

    def groups(self, roles: Sequence[Role]) -> list[tuple[Role, ...]]:
        """Those of the roles that there are, as they pass through the model: side by side where they can.

        One alone passes beside itself: a forward pass over fewer rows may round otherwise, and the KL would not be 0.
        """
        there = tuple(role for role in roles if role in self.models)
        return [(there * 2)[:2]] if self.side_by_side else [(role,) for role in there]

    def micro_tokens(self, most: int) -> int:
        """Tokens of a batch of which a forward pass has `most` for all of its roles."""
        return max(1, most // 2) if self.side_by_side else most

    def hidden(self, roles: Sequence[Role], rows: segments.Rows, context: StageContext) -> list[torch.Tensor]:
        """Last hidden states (rows, length, width) of each role of a group, by one forward pass."""
        if len(roles) == 1:
            with self.using(roles[0]) as model:
                return [segments.hidden_states(model, rows, context)]
        adapters = [None if role == "reference" else role for role in roles]
        every = segments.Rows(*(part.repeat(len(roles), 1) for part in rows))
        active: Role = next((role for role in roles if role != "reference"), "reference")
        with self.using(active) as model, low_rank.side_by_side(adapters):
            return list(segments.hidden_states(model, every, context).chunk(len(roles)))

    def log_probabilities(
        self, role: Literal["policy", "reference"], batch: k_way.Responses, hidden: torch.Tensor, temperature: float,
        entropies: bool = False,
    ) -> losses.TokenScores:  # fmt: skip
        """Of the response tokens of a forward pass, (tokens,), in the order of its responses."""
        _, head = language_models.body_and_head(_inner(self.models[role]))
        labels = batch.rows.labels.to(hidden.device)
        said = labels != losses.IGNORE
        return losses.token_log_probabilities(hidden[said], head, labels[said], temperature, entropies)

    def values(self, batch: k_way.Responses, hidden: torch.Tensor) -> torch.Tensor:
        """What is expected before each response token, (tokens,) fp32."""
        said = batch.rows.labels.to(hidden.device) != losses.IGNORE
        found: torch.Tensor = self.value_head(hidden[said].float())[:, 0]
        return found

    def rescale_values(self, slope: float, intercept: float) -> None:
        """From now on values are slope x what they were + intercept."""
        with torch.no_grad():
            self.value_head.weight.mul_(slope)
            self.value_head.bias.mul_(slope).add_(intercept)

    def rewards(self, batch: k_way.Responses, hidden: torch.Tensor) -> torch.Tensor:
        """Reward of each response, read at its last token: (N,) fp32, demonstrations being 0 on average."""
        assert self.reward_head is not None, "there is no reward role"
        ends = hidden[batch.row.to(hidden.device), batch.column.to(hidden.device)]
        return (ends.float() @ self.reward_head.t())[:, 0] - self.reward_mean

    def trained(self, role: Literal["policy", "value"]) -> list[torch.nn.Parameter]:
        """The parameters that a role's optimizer updates."""
        return list(self._named[role].values())

    def report(self) -> tuning.Report:
        """How much the two optimizers update, and what share of all weights that is."""
        trained = sum(value.numel() for named in self._named.values() for value in named.values())
        return tuning.Report(trained, trained / (trained + sum(value.numel() for value in self._frozen)))

    def trained_state(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint holds of the weights; copies."""
        every = self._named["policy"] | self._named["value"]
        return {name: value.detach().clone() for name, value in every.items()}

    def load_trained_state(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `trained_state` gave."""
        with torch.no_grad():
            for name, value in (self._named["policy"] | self._named["value"]).items():
                value.copy_(state[name])

    def save(self, place: Path, tokenizer: Any, context: StageContext) -> int:
        """The policy as a plain model in the context's type, with its tokenizer; the actors stay as they are.

        Returns the number of its parameters.
        """
        if self.adapters is None:
            plain = copy.deepcopy(self.models["policy"])
        else:
            kind = _inner(self.models["policy"]).config._attn_implementation
            base = language_models.load(str(self.sft), context.dtype, kind)
            fresh = tuning.prepare(base, self.adapters, context)
            learned = self._named["policy"]
            state = {name.replace(".policy.", ".default."): value.data for name, value in learned.items()}
            training.load_trained_state(fresh, state)
            plain = fresh.merge_and_unload()
        plain.to(context.dtype).save_pretrained(place)
        tokenizer.save_pretrained(place)
        return sum(value.numel() for value in plain.parameters())

    def _of(self, role: str) -> dict[str, torch.nn.Parameter]:
        """The role's trained parameters by name."""
        model = self.models[role]
        if self.shared:
            ours = tuple(f".{part}.{role}." for part in ("lora_A", "lora_B", "lora_magnitude_vector"))
            found = {name: value for name, value in model.named_parameters() if any(part in name for part in ours)}
        else:
            part = model if role == "policy" else model.base_model  # a classifier's own head is not the value head
            found = {f"{role}.{name}": value for name, value in part.named_parameters()}
        if role == "value":
            found |= {f"value_head.{name}": value for name, value in self.value_head.named_parameters()}
        return found

    def _mark(self) -> None:
        """Say which parameters are trained: peft freezes the adapters that it switches off."""
        for value in self._frozen:
            value.requires_grad_(False)
        for named in self._named.values():
            for value in named.values():
                value.requires_grad_(True)


def shared(sft: Path, reward: Path | None, adapters: Tuning, longest: int, seed: int, context: StageContext) -> Actors:
    """All roles as adapters on the SFT model, which `adapters` describes where the reward model's are not taken.

    Args:
        reward: output of stage `reward`, with the adapter that it trained on this SFT model; None: no reward role.
        longest: tokens of the longest row.

    Raises:
        ArtifactError: the reward model's adapter is of another SFT model.
    """
    torch.manual_seed(seed)
    base = language_models.load(str(sft), context.dtype, attention.choose(context.device, longest))
    language_models.body_and_head(base)
    model = tuning.prepare(base, adapters, context, adapter="policy")
    models = dict.fromkeys(("policy", "reference", "value"), model)
    reward_head, mean = None, 0.0
    if reward is None:
        model.add_adapter("value", copy.deepcopy(model.peft_config["policy"]))
    else:
        reward_head, mean = reward_model.load_adapter(model, reward / "adapter", sft, "reward"), _mean(reward / "model")
        reward_model.load_adapter(model, reward / "adapter", sft, "value")
        models["reward"] = model
    low_rank.fuse(model)
    return _on_device(models, base.config.hidden_size, reward_head, mean, sft, adapters, context)


def separate(sft: Path, reward: Path | None, longest: int, seed: int, context: StageContext) -> Actors:
    """Each role with weights of its own. `reward`: a reward model's directory; None: no reward role."""
    torch.manual_seed(seed)
    kind = attention.choose(context.device, longest)
    policy = language_models.load(str(sft), torch.float32, kind)
    language_models.body_and_head(policy)
    models = {"policy": policy, "reference": copy.deepcopy(policy)}  # fp32 both: KL is 0 to the last bit at the start
    reward_head, mean, width = None, 0.0, policy.config.hidden_size
    if reward is None:
        models["value"] = copy.deepcopy(policy)
    else:
        models["reward"], _ = reward_model.load(reward, context, kind)
        models["value"] = copy.deepcopy(models["reward"]).float()
        reward_head, mean = getattr(models["reward"], reward_model.HEAD).weight.detach().float(), _mean(reward)
        width = reward_head.shape[1]
    return _on_device(models, width, reward_head, mean, sft, None, context)


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _on_device(
    models: dict[str, Any], width: int, reward_head: torch.Tensor | None, mean: float, sft: Path,
    adapters: Tuning | None, context: StageContext,
) -> Actors:  # fmt: skip
    """The actors, with a value head that says what the reward says: the reward's head less the mean, or 0."""
    head = torch.nn.Linear(width, 1)
    with torch.no_grad():
        # Without a reward model zeros, as in lm-human-preferences.
        head.weight.copy_(torch.zeros_like(head.weight) if reward_head is None else reward_head)
        head.bias.fill_(-mean)
    placed = {role: one.to(context.device) for role, one in models.items()}
    scorer = None if reward_head is None else reward_head.to(context.device)
    return Actors(placed, head.to(context.device), scorer, mean, sft, adapters)


def _mean(place: Path) -> float:
    """What demonstrations score on average, from a reward model's configuration.

    Raises:
        ArtifactError: it does not say.
    """
    found = json.loads((place / "config.json").read_text(encoding="utf-8")).get("reward_mean")
    if found is None:
        raise ArtifactError(f"{place}: config.json has no reward_mean: the model was not made by stage reward")
    return float(found)
