"""Peak memory of `data` and `pretrain` on a corpus and on one ten times as large: `python -m benchmarks.memory`.

`--corpus FILE` takes a text file (or .gz) in place of made-up prose. The larger corpus is the same text ten times with
about a third of its longer words altered in each copy, so that nothing is dropped as a duplicate.
The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.workspace import environment, set_params, workspace

COPIES = (1, 10)
STAGES = ("data", "tokenizer", "pretrain")


def prose(size: int, seed: int) -> str:
    """Made-up paragraphs of about `size` characters."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 11))) for _ in range(20_000)]
    paragraphs = []
    while size > 0:
        paragraph = " ".join(draw.choices(words, k=draw.randint(30, 120)))
        paragraphs.append(paragraph.capitalize() + ".")
        size -= len(paragraph)
    return "\n\n".join(paragraphs)


def altered(text: str, copy: int) -> str:
    """The text with about a third of its longer words changed, in another way for each copy."""
    draw = random.Random(copy)
    return re.sub(r"\w{5,}", lambda word: f"{word[0]}{copy}" if draw.random() < 0.35 else word[0], text)


def peak(place: Path, stage: str) -> float:
    """MB of the largest resident set of a stage's process; children of `data` are counted each for itself."""
    command = [sys.executable, "-m", "pipelines", stage]
    process = subprocess.Popen(command, cwd=place, env=environment(), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"stage {stage} failed in {place}")
    return usage.ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--characters", type=int, default=10_000_000, help="of the made-up corpus")
    options = parser.parse_args()
    if options.corpus:
        raw = options.corpus.read_bytes()
        text = (gzip.decompress(raw) if options.corpus.suffix == ".gz" else raw).decode()
    else:
        text = prose(options.characters, seed=1)
    peaks: dict[str, dict[int, float]] = {stage: {} for stage in STAGES}
    for copies in COPIES:
        with workspace() as place:
            with (place / "corpus.txt").open("w", encoding="utf-8") as file:
                for copy in range(copies):
                    file.write(text if copy == 0 else altered(text, copy))
                    file.write("\n\n")
            source = {"path": "corpus.txt", "table": "corpus", "sample_by": "paragraph"}
            # Not `auto`: the first stage of a new workspace, `data`, would import torch to measure what is faster.
            set_params(place, compute={"precision": "fp32"}, data={"sources": [source]})
            deps = (
                (place / "dvc.yaml")
                .read_text(encoding="utf-8")
                .replace("    - constraints.txt\n", "    - corpus.txt\n", 1)
            )
            (place / "dvc.yaml").write_text(deps, encoding="utf-8")
            for stage in STAGES:
                peaks[stage][copies] = peak(place, stage)
    print(f"{'stage':<12}{'MB at 1x':>10}{'MB at 10x':>11}{'ratio':>8}")
    for stage, found in peaks.items():
        print(f"{stage:<12}{found[1]:>10.0f}{found[10]:>11.0f}{found[10] / found[1]:>8.2f}")
    print(json.dumps({"characters": len(text), "peak_mb": peaks}))


if __name__ == "__main__":
    main()
