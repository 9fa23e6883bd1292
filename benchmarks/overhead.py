"""What Prefect, DVC and MLflow add to the stages.

    python -m benchmarks.overhead stage [--runs N]   a no-op stage through `dvc repro`, beside one that runs `true`
    python -m benchmarks.overhead chain [--runs N]   `sluice run` over the whole graph, beside the recorded stages

`stage` takes turns and prints minimum, median and maximum of each. `chain` runs the default profile in a copy of the
repository whose stages copy what a real run left in `artifacts/`: what `sluice run` takes beyond the copying (hashing,
DVC's cache, registration, verdicts, promotion, Prefect's own) is added to every real run, whose stages took what
`metrics/` says. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import time
from pathlib import Path

from benchmarks.workspace import ROOT, environment, workspace
from pipelines.core import graph

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
# What `make setup` does, beside git and DVC, in a new workspace
DATABASE = ["prefect", "server", "database", "upgrade", "-y"]
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
REPLAY = '''

def run(params, inputs, outputs, context):  # noqa: F811
    """Copy what a real run made."""
    import json
    import shutil
    from fnmatch import fnmatchcase

    shutil.copytree({made!r}, outputs, dirs_exist_ok=True)
    with open({metrics!r}, encoding="utf-8") as file:
        found = json.load(file)
    known = METRICS | globals().get("OPTIONAL", frozenset())
    returned = {{key: value for key, value in found.items() if any(fnmatchcase(key, one) for one in known)}}
    context.measure(**{{key: value for key, value in found.items() if key not in returned}})
    return returned
'''


def seconds(place: Path, stage: str) -> float:
    """Wall time of one forced `dvc repro` of a stage."""
    start = time.perf_counter()
    subprocess.run(
        ["dvc", "repro", "-q", "-s", "-f", stage], cwd=place, env=environment(), check=True, capture_output=True
    )
    return time.perf_counter() - start


def stages(runs: int) -> dict[str, list[float]]:
    """Seconds of both stages, round by round; the first round also fills caches."""
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
    return times


def chain(runs: int) -> dict[str, list[float]]:
    """Seconds of whole runs, of copying inside them, and of the real stages."""
    specs = graph.load(ROOT)
    real = sum(json.loads((ROOT / spec.metrics).read_text(encoding="utf-8"))["seconds"] for spec in specs.values())
    times: dict[str, list[float]] = {"run": [], "copying": [], "stages": [real]}
    for _ in range(runs):
        with workspace("default") as place:
            shutil.copy(ROOT / "dvc.lock", place)  # as in a clone: DVC reads and writes all of it after each stage
            for name, spec in specs.items():
                with (place / f"pipelines/{name}.py").open("a", encoding="utf-8") as file:
                    file.write(REPLAY.format(made=str(ROOT / spec.output), metrics=str(ROOT / spec.metrics)))
            subprocess.run(
                DATABASE, cwd=place, env=environment(), check=True, capture_output=True
            )  # as `make setup` does
            start = time.perf_counter()
            subprocess.run(["sluice", "run"], cwd=place, env=environment(), check=True, stdout=subprocess.DEVNULL)
            times["run"].append(time.perf_counter() - start)
            copied = [
                json.loads((place / spec.metrics).read_text(encoding="utf-8"))["seconds"] for spec in specs.values()
            ]
            times["copying"].append(sum(copied))
        added = times["run"][-1] - times["copying"][-1]
        print(f"added {added:.1f} s to {real:.0f} s of stages: {100 * added / real:.1f} %")
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["stage", "chain"])
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    print(json.dumps({"seconds": (stages if asked.what == "stage" else chain)(asked.runs)}))


if __name__ == "__main__":
    main()
