"""New tokens a second when sampling K completions a prompt, beside transformers' `generate`.

`python -m benchmarks.sampling [--model DIRECTORY] [--prompts N] [--length N] [--count K] [--tokens N] [--rounds N]
[--attention sdpa|eager] [--ends]`.
Same model, prompts, precision and limits on both sides: temperature 1, nothing cut off the distribution, no end-of-text
token, so that both draw as many. Interleaved; minimum, median and maximum of the rounds, and of the ratio of each
round. `--ends` lets samples end where the model ends them: each side counts the tokens it drew up to there. The last
line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def some_prompts(tokenizer: Any, number: int, length: int) -> list[list[int]]:
    """Chats of about `length` tokens (three quarters to five quarters) about this repository's own text."""
    text = tokenizer((ROOT / "README.md").read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    draw = random.Random(1)
    found = []
    for _ in range(number):
        size = draw.randint(length * 3 // 4, length * 5 // 4)
        start = draw.randrange(max(1, len(text) - size))
        found.append(text[start : start + size])
    return found


def ours(model: Any, prompts: list[list[int]], options: argparse.Namespace, stops: list[int], seed: int) -> int:
    """Tokens drawn by `pipelines.core.sampling`."""
    from pipelines.core import sampling

    found = sampling.sample(
        model,
        prompts,
        count=options.count,
        tokens=options.tokens,
        stops=stops,
        pad=0,
        temperature=1.0,
        seed=seed,
        precision=options.precision,
        tell=lambda done, total: None,
    )
    return sum(len(ids) for one in found.ids for ids in one)


def theirs(model: Any, prompts: list[list[int]], options: argparse.Namespace, stops: list[int], seed: int) -> int:
    """Tokens drawn by transformers' `generate`, prompts padded on the left in one batch."""
    import torch

    torch.manual_seed(seed)
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=options.count,
            max_new_tokens=options.tokens,
            eos_token_id=stops or None,
            pad_token_id=0,
        )
    drawn = 0
    for row in out[:, longest:].tolist():
        drawn += next((n + 1 for n, token in enumerate(row) if token in stops), len(row))
    return drawn


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="artifacts/pretrain/model")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=100, help="of a prompt, tokens")
    parser.add_argument("--count", type=int, default=4, help="completions a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="of a completion")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa", help="of transformers' side")
    parser.add_argument("--ends", action="store_true", help="samples may end before their limit")
    options = parser.parse_args()

    import torch
    import transformers

    torch.set_num_threads(2)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    # Ours chooses its attention itself, whatever the model was loaded with.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.model, dtype=dtype, attn_implementation=options.attention
    ).eval()
    model.generation_config.eos_token_id = None
    prompts = some_prompts(tokenizer, options.prompts, options.length)
    stops = [tokenizer.eos_token_id] if options.ends else []
    speeds: dict[str, list[float]] = {"ours": [], "generate": []}
    for number in range(options.rounds + 1):  # the first warms up
        for name, draw in (("ours", ours), ("generate", theirs)):
            start = time.perf_counter()
            drawn = draw(model, prompts, options, stops, number)
            if number:
                speeds[name].append(drawn / (time.perf_counter() - start))
    speeds["ratio"] = [a / b for a, b in zip(speeds["ours"], speeds["generate"], strict=True)]
    print(
        f"{options.prompts} prompts of about {options.length} tokens, K = {options.count}, {options.tokens} new tokens"
    )
    for name, values in speeds.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        unit = "" if name == "ratio" else " new tokens/s"
        print(f"{name:<10}{low:9.2f} / {middle:.2f} / {high:.2f}{unit}")
    print(json.dumps({"settings": vars(options), "speeds": speeds}))


if __name__ == "__main__":
    main()
