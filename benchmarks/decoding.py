"""Tokens a second at batch 1: transformers' `generate`, `decoding.Decoder`, and llama.cpp where it is installed.

    python -m benchmarks.decoding --model artifacts/ppo/model --variants artifacts/quantize/models

Every round asks all of them, one after another; medians with the lowest and the highest round. The decoder's models are
loaded anew each round, in processes of their own, whose threads spin between two products (`pipelines/core/speed.py`).
llama.cpp is asked if `llama_cpp` (the package llama-cpp-python) can be imported, on the same weights as f16 and q8_0.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from pipelines.core import environment, gguf_export, speed, variants

Run = Callable[[], float]  # tokens a second of one round
PROMPT = "The history of the Python language begins with"
TOKENS = 64
LLAMA = """
import sys, time
from llama_cpp import Llama
file, threads, tokens, prompt = sys.argv[1:]
model = Llama(file, n_ctx=512, n_threads=int(threads), verbose=False)
for _ in range(2):  # the first is a warm-up
    model.reset()
    model.eval(model.tokenize(prompt.encode()))
    start = time.perf_counter()
    for _ in range(int(tokens)):
        model.eval([model.sample(temp=0.0)])
    speed = int(tokens) / (time.perf_counter() - start)
print(speed)
"""


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
    others = {"generate, bf16": generate(asked.model, asked.threads)}
    with tempfile.TemporaryDirectory() as folder:
        if importlib.util.find_spec("llama_cpp") is not None:
            for kind in ("f16", "q8_0"):
                others[f"llama.cpp, {kind}"] = llama(asked.model, kind, asked.threads, Path(folder))
        rows = defaultdict(list)
        for _ in range(asked.rounds):
            for name, one in speed.measure(models, asked.threads, lambda done, total: None, 4).items():
                rows[f"decoder, {name}"].append(one.decode)
            for name, run in others.items():
                rows[name].append(run())
    print("| path | tokens a second | lowest | highest |\n| --- | --- | --- | --- |")
    for name, found in rows.items():
        print(f"| {name} | {median(found):.1f} | {min(found):.1f} | {max(found):.1f} |")


def generate(place: Path, threads: int) -> Run:
    """transformers' own loop, in bf16."""
    from transformers import AutoTokenizer

    torch.set_num_threads(threads)
    model, tokenizer = variants.load(place, variants.PLAIN), AutoTokenizer.from_pretrained(place)
    ids = tokenizer(PROMPT, return_tensors="pt")

    def run() -> float:
        start = time.perf_counter()
        model.generate(**ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        return TOKENS / (time.perf_counter() - start)

    run()
    return run


def llama(place: Path, kind: gguf_export.Kind, threads: int, folder: Path) -> Run:
    """llama.cpp on the same weights, in a process without torch, whose OpenMP would be its own too."""
    file = folder / f"{kind}.gguf"
    gguf_export.export(place, file, kind)
    spinning = {**os.environ, "GOMP_SPINCOUNT": environment.SPIN_ALONE}

    def run() -> float:
        command = [sys.executable, "-c", LLAMA, str(file), str(threads), str(TOKENS), PROMPT]
        found = subprocess.run(command, env=spinning, check=True, capture_output=True, text=True)
        return float(found.stdout)

    return run


if __name__ == "__main__":
    main()
