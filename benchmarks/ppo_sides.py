"""What `benchmarks.ppo` compares: this stage's PPO, and TRL 1.12's, made to do the same work.

Adapters (rank 16): ours are all on one backbone. TRL's reference is the policy without its adapters, its reward and
value models are models of their own; its value model has adapters too, or with `--trl-value full` trains all weights,
as TRL's example does. `--full` trains all weights on both sides. Both get the same optimizer, rates, prompts of each
batch, K responses a prompt, minibatches, and no rule for a response without EOS. The rest is each side's own: TRL clips
no gradients, takes scores and values as they come, and weighs the forward passes of a step alike.

TRL runs with transformers 5. To make it do the same work takes three things:

1. `bf16=True` changes nothing: transformers no longer tells the `Accelerator` that the trainer makes. Everything runs
   inside `torch.autocast`, its cache off: it would keep casts of weights from before an update.
2. `num_mini_batches` makes no more optimizer steps: they follow `gradient_accumulation_steps`, which is the whole
   batch's. It is set to a minibatch's after construction. Steps are counted on both sides, by hooks.
3. Its loader shuffles, and makes every forward pass of its last batch an optimizer step; a plain one takes its place.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

RATES = {"lora": (1.2e-3, 1e-3), "full": (1.2e-4, 1e-4)}  # of policy and value model
PARAMS: dict[str, Any] = {
    "lora_rank": 16, "rewards": (), "judge": "overlap", "minibatches": 2, "epochs": 1, "micro_tokens": 1024,
    "too_long": "drop", "temperature": 1.0, "kl_coefficient": 0.05, "kl_target": None, "kl_horizon": 10_000,
    "clip": 0.2, "value_clip": 0.2, "discount": 1.0, "trace": 0.95, "missing_eos_penalty": 0.0,
    "group_baseline": False, "warmup_iterations": 1, "weight_decay": 0.0, "clip_norm": 1.0, "ptx_coefficient": 0.0,
    "ptx_rows": 1, "ptx_length": 16, "without_ptx": False, "kl_ceiling": 1e6, "entropy_floor": 0.0,
    "cap_share": 1.0, "eval_prompts": 1, "eval_samples": 2, "eval_bytes": 1024, "checkpoint_steps": 10_000,
    "checkpoint_seconds": 1e9, "samples": 0,
}  # fmt: skip


def params_of(options: argparse.Namespace) -> Any:
    """The stage's params: both sides read theirs from them."""
    from pipelines.core.params.ppo import PpoParams

    method = "full" if options.full else "lora"
    given = {
        "seed": options.seed, "method": method, "iterations": options.iterations,
        "batch_prompts": options.prompts, "samples_per_prompt": options.samples, "max_new_tokens": options.tokens,
        "max_prompt_tokens": options.prompt_tokens, "lr": RATES[method][0], "value_lr": RATES[method][1],
    }  # fmt: skip
    return PpoParams.model_validate(PARAMS | given)


def count_steps() -> Counter[int]:
    """From now on, how many steps each optimizer of this process has made, by its id."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    made: Counter[int] = Counter()
    register_optimizer_step_post_hook(lambda optimizer, args, kwargs: made.update([id(optimizer)]))
    return made


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """The stage's own loop, without the pre-training gradient, from loaded models."""
    from functools import partial

    from pipelines import ppo
    from pipelines.core import hardware, language_models, ppo_setup, reward_functions
    from pipelines.core.context import StageContext

    params = params_of(options)
    inputs = {name: options.artifacts / name for name in ("data", "sft", "reward")}
    tokenizer = language_models.load_tokenizer(str(inputs["sft"] / "model"))
    made = count_steps()
    with tempfile.TemporaryDirectory() as folder:
        context = StageContext("ppo", Path(folder), "0" * 64, precision="bf16")
        actors = ppo_setup.roles(params, inputs, context)
        score = None
        if actors.reward_head is None:  # the reward model was trained whole: it is no adapter of the backbone
            names = (str(inputs["reward"] / "model"),)
            score = partial(ppo_setup.score, reward_functions.load(names, context.root, tokenizer, context))
        prompts = ppo_setup.prompts(params, inputs["data"], tokenizer, context)
        task = ppo_setup.Task(tokenizer, prompts, score, inputs["data"], {})
        plan = ppo_setup.plan(params, actors)
        loaded, start = hardware.peak_memory_bytes(), time.perf_counter()
        ppo._train(ppo.Arm("", 0.0), params, plan, actors, task, context)
        wall = time.perf_counter() - start
    return {
        "seconds": sum(context.measured[f"{name}_seconds"] for name in ("generate", "score", "update")),
        "wall": wall,
        "steps": sorted(made.values()),
        "loaded_mb": loaded / 2**20,
        "gold": context.history[-1].get("gold"),
        "response_tokens": statistics.mean(row["response_tokens"] for row in context.history),
    }


def models(options: argparse.Namespace, params: Any) -> dict[str, Any]:
    """TRL's `model`, `value_model` and `reward_model`: what is trained whole in fp32, all else in bf16."""
    import torch
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    def load(kind: Any, stage: str, whole: bool) -> Any:
        dtype = torch.float32 if whole else torch.bfloat16
        return kind.from_pretrained(options.artifacts / stage / "model", dtype=dtype)

    policy = load(AutoModelForCausalLM, "sft", options.full)
    value = load(AutoModelForSequenceClassification, "reward", options.trl_value == "full")
    reward = load(AutoModelForSequenceClassification, "reward", False)
    lora: dict[str, Any] = {"r": params.lora_rank, "lora_alpha": 2 * params.lora_rank, "target_modules": "all-linear"}
    if not options.full:
        policy = get_peft_model(policy, LoraConfig(**lora, task_type="CAUSAL_LM"))
    if options.trl_value == "lora":  # in place, since TRL looks for the body by the model's own name for it
        inject_adapter_in_model(LoraConfig(**lora, exclude_modules=["score"]), value)
        for name, weight in value.named_parameters():
            if "lora_" in name:
                weight.data = weight.data.float()
        value.score.float().requires_grad_(True)
    return {"model": policy, "value_model": value, "reward_model": reward}


def trainer_of(options: argparse.Namespace, params: Any, tokenizer: Any, rows: Any, folder: str) -> Any:
    """TRL's trainer on rows of prompts in the order of the batches, told what the list above says."""
    import torch
    from torch.utils.data import DataLoader
    from transformers.trainer_callback import PrinterCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from pipelines import ppo
    from pipelines.core import training

    torch.manual_seed(params.seed)
    roles = models(options, params)
    roles["model"].generation_config.pad_token_id = tokenizer.pad_token_id
    rates = {"model": params.lr, "value_model": RATES[options.trl_value][1]}
    groups = [
        group
        for name, lr in rates.items()
        for group in training.adamw(roles[name].parameters(), lr, params.weight_decay, ppo.ADAM_EPS).param_groups
    ]
    optimizer = torch.optim.AdamW(groups)
    settings = PPOConfig(
        output_dir=folder, use_cpu=True, bf16=True, gradient_checkpointing=False, seed=params.seed,
        per_device_train_batch_size=options.micro, gradient_accumulation_steps=params.episodes // options.micro,
        num_mini_batches=params.minibatches, num_ppo_epochs=params.epochs, total_episodes=len(rows),
        local_rollout_forward_batch_size=params.episodes, response_length=params.max_new_tokens, stop_token="eos",
        temperature=params.temperature, kl_coef=params.kl_coefficient, cliprange=params.clip, vf_coef=1.0,
        cliprange_value=params.value_clip, gamma=params.discount, lam=params.trace, num_sample_generations=0,
        save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    warming_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1.0 if done else ppo.START)
    trainer = PPOTrainer(
        settings, tokenizer, ref_model=None, train_dataset=rows, optimizers=(optimizer, warming_up), **roles
    )
    trainer.remove_callback(PrinterCallback)
    trainer.accelerator.gradient_accumulation_steps = params.episodes // params.minibatches // options.micro
    trainer.dataloader = DataLoader(rows, params.episodes, collate_fn=trainer.data_collator)
    return trainer


def theirs(options: argparse.Namespace) -> dict[str, Any]:
    """As `ours`, by TRL."""
    import torch
    from datasets import Dataset
    from trl.experimental.ppo import ppo_trainer

    from pipelines.core import chats, episodes, hardware, judges, language_models, ppo_setup
    from pipelines.core.context import StageContext

    params = params_of(options)
    tokenizer = language_models.load_tokenizer(str(options.artifacts / "sft/model"))
    tokenizer.padding_side = "left"
    context = StageContext("ppo", options.artifacts, "0" * 64)  # for what is said alone
    prompts = ppo_setup.prompts(params, options.artifacts / "data", tokenizer, context)
    asked = [
        prompts[number]
        for iteration in range(params.iterations)
        for number in episodes.prompts_of(params.seed, iteration, params.batch_prompts, len(prompts))
        for _ in range(params.samples_per_prompt)
    ]
    rows = Dataset.from_list([{"input_ids": prompt.ids} for prompt in asked])
    said: list[list[int]] = []
    generated = ppo_trainer.batch_generation

    def noted(model: Any, queries: Any, *rest: Any) -> Any:
        answers, logits = generated(model, queries, *rest)
        for row in answers[:, queries.shape[1] :].tolist():
            said.append(row[: [*row, tokenizer.eos_token_id].index(tokenizer.eos_token_id) + 1])
        return answers, logits

    ppo_trainer.batch_generation = noted
    made = count_steps()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(options, params, tokenizer, rows, folder)
        loaded, start = hardware.peak_memory_bytes(), time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            trainer.train()
        seconds = time.perf_counter() - start
    last = [
        judges.gold(params.judge, prompt.text, chats.decode_response(tokenizer, ids), prompt.reference)
        for prompt, ids in list(zip(asked, said, strict=True))[-params.episodes :]
        if prompt.reference is not None
    ]
    return {
        "seconds": seconds,
        "steps": sorted(made.values()),
        "loaded_mb": loaded / 2**20,
        "gold": statistics.mean(last) if last else None,
        "response_tokens": statistics.mean(map(len, said)),
    }


SIDES = {"ours": ours, "trl": theirs}
