"""What the runner adds to a stage: a no-op stage through `dvc repro`, beside one that runs `true`.

`python -m benchmarks.overhead [--runs N]`. Interleaved; minimum, median and maximum of each. The last line is one
JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

from benchmarks.workspace import environment, workspace

NOOP = '''"""A stage that does nothing."""

from pathlib import Path
from typing import Any

METRICS = frozenset({"done"})
SCORES: frozenset[str] = frozenset()


def run(params: Any, inputs: dict[str, Path], outputs: Path, context: Any) -> dict[str, float]:
    """Write one empty file."""
    (outputs / "nothing").touch()
    return {"done": 1.0}
'''
GRAPH = """stages:
  report:
    cmd: python -m pipelines report
    params: [report]
    deps: [pipelines/report.py]
    outs: [artifacts/report]
    metrics:
    - metrics/report.json: {cache: false}
  plain:
    cmd: mkdir -p artifacts/plain metrics && echo '{}' > metrics/plain.json
    outs: [artifacts/plain]
    metrics:
    - metrics/plain.json: {cache: false}
"""


def seconds(place: Path, stage: str) -> float:
    """Wall time of one forced `dvc repro` of a stage."""
    start = time.perf_counter()
    subprocess.run(
        ["dvc", "repro", "-q", "-s", "-f", stage], cwd=place, env=environment(), check=True, capture_output=True
    )
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    times: dict[str, list[float]] = {"report": [], "plain": []}
    with workspace() as place:
        # The no-op takes the place of a stage that has a section of params and no model.
        (place / "pipelines/report.py").write_text(NOOP, encoding="utf-8")
        (place / "dvc.yaml").write_text(GRAPH, encoding="utf-8")
        (place / "mlflow/registry.yaml").write_text("models: {}\n", encoding="utf-8")
        for _ in range(runs + 1):
            for stage, taken in times.items():
                taken.append(seconds(place, stage))
    told = {"report": "no-op stage of ours", "plain": "DVC alone"}
    for stage, taken in times.items():
        first, *warm = taken
        low, middle, high = min(warm), statistics.median(warm), max(warm)
        print(f"{told[stage]:<22} first {first:5.2f} s   then {low:5.2f} / {middle:5.2f} / {high:5.2f} s")
    print(json.dumps({"seconds": times}))


if __name__ == "__main__":
    main()
