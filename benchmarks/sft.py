"""Supervised fine-tuning beside TRL's `SFTTrainer`: tokens a second on the same model, data, precision and batch.

`python -m benchmarks.sft MODEL DATA [--rounds N] [--steps N] [--batch N] [--micro N] [--sampling NAME]`, where MODEL
is a Hugging Face directory and DATA the output of stage `data`. TRL is not among our dependencies: `pip install
--no-deps trl==1.16.0`, in an environment that sees ours. Both train the same adapters from the same values on the same
examples in the same steps; rounds take turns. A token is one of a chat, padding not counted; loading, tokenizing and
evaluation are not timed. The loss after training is measured for both by the same code on the same held-out chats.
The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

RANK = 16
LR = 3.4e-4
TOKENS = 1024  # of a forward pass of ours
HELD_OUT = 48


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="examples an optimizer step")
    parser.add_argument("--micro", type=int, default=16, help="examples of a forward pass of TRL's")
    parser.add_argument("--sampling", default="sequential", help="TRL's train_sampling_strategy")
    options = parser.parse_args()
    os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

    from pipelines.core import answers, chats, demonstrations, language_models
    from pipelines.core.context import StageContext

    machine = StageContext("benchmark", Path(), "0" * 64, precision="bf16")
    tokenizer = language_models.load_tokenizer(str(options.model))
    chats.check_tokenizer(tokenizer)
    count = options.steps * options.batch
    chosen, held_out = (
        demonstrations.choose(options.data, split, tokenizer, (), number, 512, "drop").kept
        for split, number in (("train", count * 2), ("test", HELD_OUT))
    )
    chosen = chosen[:count]
    tokens = sum(len(example.chat.ids) for example in chosen)
    start = adapted(options.model, machine)
    before = answers.mean_loss(start, tokenizer, held_out, TOKENS, machine)
    speeds: dict[str, list[float]] = {"ours": [], "trl": []}
    losses: dict[str, list[float]] = {"ours": [], "trl": []}
    for round_ in range(options.rounds):
        for name, train in (("ours", ours), ("trl", theirs)):
            model = adapted(options.model, machine)
            seconds = train(model, tokenizer, chosen, options, machine)
            speeds[name].append(tokens / seconds)
            losses[name].append(answers.mean_loss(model, tokenizer, held_out, TOKENS, machine))
            print(
                f"round {round_ + 1} {name}: {speeds[name][-1]:.0f} tokens/s, loss {losses[name][-1]:.4f}", flush=True
            )
    ratios = [mine / other for mine, other in zip(speeds["ours"], speeds["trl"], strict=True)]
    print(f"{tokens} tokens in {count} chats; held-out loss before {before:.4f}")
    for name in speeds:
        print(f"{name:<6}{statistics.median(speeds[name]):8.0f} tokens/s   loss {statistics.median(losses[name]):.4f}")
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(json.dumps({"tokens": tokens, "before": before, "speeds": speeds, "losses": losses, "ratios": ratios}))


def adapted(place: Path, machine: Any) -> Any:
    """The model with fresh adapters, the same each time."""
    import torch

    from pipelines.core import fine_tuning
    from pipelines.core.params.tuning import Tuning

    torch.manual_seed(0)
    return fine_tuning.load(place, Tuning(method="lora", lora_rank=RANK), 512, machine)


def ours(model: Any, tokenizer: Any, chosen: list[Any], options: argparse.Namespace, machine: Any) -> float:
    """Seconds of our steps: as in stage `sft`, at a constant rate."""
    import torch

    from pipelines import sft
    from pipelines.core import segments, training

    optimizer = training.adamw(model.parameters(), LR, 0.0)
    model.train()
    start = time.perf_counter()
    for step in range(options.steps):
        part = chosen[step * options.batch : (step + 1) * options.batch]
        sequences = [segments.of_chat(example.chat) for example in part]
        sft.backward(model, sequences, TOKENS, tokenizer.pad_token_id, machine)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def theirs(model: Any, tokenizer: Any, chosen: list[Any], options: argparse.Namespace, machine: Any) -> float:
    """Seconds of TRL's `train()`, with the settings that make it fastest here."""
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": example.prompt, "completion": example.messages[-1:]} for example in chosen]
    with TemporaryDirectory() as place:
        config = SFTConfig(
            output_dir=place, max_length=512, per_device_train_batch_size=options.micro,
            gradient_accumulation_steps=options.batch // options.micro, max_steps=options.steps, learning_rate=LR,
            lr_scheduler_type="constant", weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.95, max_grad_norm=1.0,
            optim="adamw_torch_fused", bf16=True, use_cpu=True, gradient_checkpointing=False, report_to="none",
            save_strategy="no", logging_steps=1000, disable_tqdm=True, dataloader_num_workers=0,
            train_sampling_strategy=options.sampling, seed=0,
        )  # fmt: skip
        trainer = SFTTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
