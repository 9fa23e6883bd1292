"""Comparisons a second in training a reward model at K = 4, beside TRL's `RewardTrainer`, and what each learned.

`python -m benchmarks.reward [--sft DIRECTORY] [--feedback DIRECTORY] [--rankings N] [--held-out N] [--rounds N]`.
Same base model, rankings, LoRA configuration, rate, bf16 and rankings a step, one epoch; TRL gets every pair as an
example of its own, as its data format asks, and 48 pairs (8 rankings) a step. Each round trains both from the start
on rankings of its own, in turns, and asks both about the same held-out pairs. Only training is timed. The last line
is one JSON document. TRL is not among the dependencies: `pip install --no-deps trl==1.16.0` in an environment of its
own that sees this one (`python -m venv --system-site-packages DIRECTORY`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from pipelines.core.preference_data import Ranking

K = 4
PAIRS_AT_ONCE = 8  # of a step's 48: what TRL passes through the model together
PARAMS: dict[str, Any] = {
    "seed": 1, "method": "lora", "lora_rank": 16, "rankings": None, "epochs": 1, "batch_prompts": 8,
    "micro_tokens": 2048, "max_length": 1024, "too_long": "drop", "lr": 3e-4, "warmup_share": 0.1, "weight_decay": 0.0,
    "clip_norm": 1.0, "held_out_labelers": 0, "eval_rankings": None, "calibration_demonstrations": 2,
    "checkpoint_steps": 10_000, "checkpoint_seconds": 1e9, "samples": 0,
}  # fmt: skip


def rankings(feedback: Path, split: str) -> list[Ranking]:
    """Those of four responses, longer ones cut to four, that decide every pair: both sides see as many."""
    from pipelines.core import preference_data

    found = []
    for one in preference_data.read(feedback, split):
        cut = one._replace(responses=one.responses[:K], ranks=one.ranks[:K])
        if len(cut.ranks) == K and len(cut.pairs) == K * (K - 1) // 2:
            found.append(cut)
    return found


def ours(sft: Path, train: list[Ranking], held_out: list[Ranking], seed: int) -> tuple[float, float]:
    """Seconds of training, and accuracy on the held-out pairs."""
    from pipelines import reward
    from pipelines.core import chats, k_way, language_models, preferences, reward_examples, reward_model
    from pipelines.core.checkpoint import Checkpoints
    from pipelines.core.context import StageContext
    from pipelines.core.params.reward import RewardParams

    params = RewardParams(**PARAMS | {"seed": seed})
    tokenizer = language_models.load_tokenizer(str(sft))
    with tempfile.TemporaryDirectory() as folder:
        context = StageContext("reward", Path(folder), "0" * 64, precision="bf16")
        checkpoints = Checkpoints(Path(folder) / "checkpoints", "", 10_000, 1e9)
        start = time.perf_counter()  # tokenization counts, as it does in TRL's constructor
        sequences = [k_way.encode(tokenizer, chats.messages_of(one.prompt), one.responses) for one in train]
        seconds = time.perf_counter() - start
        encoded = reward_examples.by_prompt(reward_examples.Encoded(train, sequences, 0))
        model = reward._model(params, sft, tokenizer, encoded, context)
        start = time.perf_counter()
        state = {"step": 0, "log_probabilities": []}
        reward._train(params, reward._plan(params, model, encoded), model, encoded, state, checkpoints, context)
        seconds += time.perf_counter() - start
        model.eval()
        asked = [k_way.encode(tokenizer, chats.messages_of(one.prompt), one.responses) for one in held_out]
        scores = reward_model.raw_scores(model, asked, context, lambda done, total: None)
    right = sum(preferences.right(score, one.pairs) for score, one in zip(scores, held_out, strict=True))
    return seconds, right / sum(len(one.pairs) for one in held_out)


def pairs(chosen: list[Ranking]) -> list[dict[str, Any]]:
    """TRL's conversational preference rows: one for each pair."""
    from pipelines.core import chats

    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    return [
        {
            "prompt": chats.messages_of(one.prompt),
            "chosen": said(one.responses[better]),
            "rejected": said(one.responses[worse]),
        }
        for one in chosen
        for better, worse in one.pairs
    ]


def theirs(sft: Path, train: list[Ranking], held_out: list[Ranking], seed: int) -> tuple[float, float]:
    """As `ours`, by TRL."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(sft, num_labels=1, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(sft)
    model.config.pad_token_id = tokenizer.pad_token_id
    with tempfile.TemporaryDirectory() as folder:
        settings = RewardConfig(
            output_dir=folder, use_cpu=True, bf16=True, num_train_epochs=1, seed=seed, learning_rate=PARAMS["lr"],
            lr_scheduler_type="cosine", warmup_steps=1, weight_decay=0.0, max_grad_norm=PARAMS["clip_norm"],
            adam_beta2=0.95, per_device_train_batch_size=PAIRS_AT_ONCE, per_device_eval_batch_size=PAIRS_AT_ONCE,
            gradient_accumulation_steps=PARAMS["batch_prompts"] * K * (K - 1) // 2 // PAIRS_AT_ONCE,
            gradient_checkpointing=False, max_length=PARAMS["max_length"], logging_strategy="no", save_strategy="no",
            report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        start = time.perf_counter()
        trainer = RewardTrainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_list(pairs(train)),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS"),
        )
        trainer.train()
        seconds = time.perf_counter() - start
        accuracy = trainer.evaluate(Dataset.from_list(pairs(held_out)))["eval_accuracy"]
    return seconds, float(accuracy)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sft", type=Path, default=Path("artifacts/sft/model"))
    parser.add_argument("--feedback", type=Path, default=Path("artifacts/feedback"))
    parser.add_argument("--rankings", type=int, default=40, help="a round")
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    try:
        import trl
    except ModuleNotFoundError:
        raise SystemExit(
            "trl is not installed: pip install --no-deps trl==1.16.0 (see this file's docstring)"
        ) from None
    train, held_out = rankings(options.feedback, "train"), rankings(options.feedback, "test")[: options.held_out]
    sides = {"ours": ours, "trl": theirs}
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    right: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(options.rounds):
        chosen = train[number * options.rankings :][: options.rankings]
        if len(chosen) < options.rankings:
            raise SystemExit(f"{len(train)} rankings of {K} are too few for {options.rounds} x {options.rankings}")
        for name, side in sides.items():
            seconds, accuracy = side(options.sft, chosen, held_out, number)
            speeds[name].append(sum(len(one.pairs) for one in chosen) / seconds)
            right[name].append(accuracy)
            print(
                f"round {number + 1}  {name:<5} {speeds[name][-1]:6.1f} comparisons/s  accuracy {accuracy:.3f}",
                flush=True,
            )
    ratios = [mine / other for mine, other in zip(speeds["ours"], speeds["trl"], strict=True)]
    for name in sides:
        low, middle, high = min(speeds[name]), statistics.median(speeds[name]), max(speeds[name])
        accuracy = statistics.mean(right[name])
        print(f"{name:<5} {low:.1f} / {middle:.1f} / {high:.1f} comparisons/s, accuracy {accuracy:.3f}")
    print(f"ratio {min(ratios):.2f} / {statistics.median(ratios):.2f} / {max(ratios):.2f}")
    told = {"comparisons_per_second": speeds, "accuracy": right, "ratio": ratios, "trl": trl.__version__}
    print(json.dumps(told | {"k": K, "rankings": options.rankings, "held_out": len(held_out)}))


if __name__ == "__main__":
    main()
