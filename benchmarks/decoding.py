"""Tokens a second at batch 1: transformers' `generate`, `decoding.Decoder`, and llama.cpp where it is installed.

    python -m benchmarks.decoding --model artifacts/ppo/model --variants artifacts/quantize/models

All are asked in turns, each in a process of its own; medians with the lowest and the highest round. llama.cpp is asked
if `llama_cpp` (the package llama-cpp-python) can be imported, on the same weights exported as f16 and q8_0.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from pipelines.core import gguf_export, speed, variants

PROMPT = "The history of the Python language begins with"
TOKENS = 64


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("artifacts/ppo/model"))
    parser.add_argument("--variants", type=Path, default=Path("artifacts/quantize/models"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    models = {"bf16": (asked.model, variants.PLAIN)}
    for name in ("int8", "int4", "nf4"):
        if (asked.variants / name).is_dir():
            models[name] = (asked.variants / name, name)
    found = speed.measure(models, asked.threads, lambda done, total: None, asked.rounds)
    rows = {f"decoder, {name}": (one.decode, one.decode_low, one.decode_high) for name, one in found.items()}
    rows["generate, bf16"] = generate(asked.model, asked.rounds, asked.threads)
    if importlib.util.find_spec("llama_cpp") is not None:
        for kind in ("f16", "q8_0"):
            rows[f"llama.cpp, {kind}"] = llama(asked.model, kind, asked.rounds, asked.threads)
    print("| path | tokens a second | lowest | highest |\n| --- | --- | --- | --- |")
    for name, (middle, low, high) in rows.items():
        print(f"| {name} | {middle:.1f} | {low:.1f} | {high:.1f} |")


def generate(place: Path, rounds: int, threads: int) -> tuple[float, float, float]:
    """transformers' own loop, in bf16."""
    from transformers import AutoTokenizer

    torch.set_num_threads(threads)
    model, tokenizer = variants.load(place, variants.PLAIN), AutoTokenizer.from_pretrained(place)
    ids = tokenizer(PROMPT, return_tensors="pt")
    speeds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        model.generate(**ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        speeds.append(TOKENS / (time.perf_counter() - start))
    return median(speeds[1:]), min(speeds[1:]), max(speeds[1:])


def llama(place: Path, kind: gguf_export.Kind, rounds: int, threads: int) -> tuple[float, float, float]:
    """llama.cpp on the same weights."""
    from llama_cpp import Llama  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        gguf_export.export(place, file, kind)
        model = Llama(str(file), n_ctx=512, n_threads=threads, verbose=False)
        prompt = model.tokenize(PROMPT.encode())
        speeds = []
        for _ in range(rounds + 1):
            model.reset()
            model.eval(prompt)
            start = time.perf_counter()
            for _ in range(TOKENS):
                model.eval([model.sample(temp=0.0)])
            speeds.append(TOKENS / (time.perf_counter() - start))
    return median(speeds[1:]), min(speeds[1:]), max(speeds[1:])


if __name__ == "__main__":
    main()
