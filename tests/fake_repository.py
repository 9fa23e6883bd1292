"""A small repository for the tests of `flows/`: real DVC, stages that do nothing but say so.

Each stage reads `behaviour/<stage>` (no dep of it): words that tell it to `sleep N`, `careful N` (a second to end when
it is asked to), `fail N`, or to `linger N CODE` when it is done.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

STAGE = """
import json, os, pathlib, signal, sys, time
name = sys.argv[1]
root = pathlib.Path.cwd()
live = root / ".sluice" / "live" / f"{name}.json"
live.parent.mkdir(parents=True, exist_ok=True)
def say(state, message=None, exit_code=None):
    live.write_text(json.dumps({"stage": name, "state": state, "step": 5, "total": 10, "shown": {"loss": 1.5},
        "started": time.time(), "updated": time.time(), "message": message, "exit_code": exit_code}))
with (root / "ran.txt").open("a") as file:
    file.write(name + "\\n")
say("running")
behaviour = root / "behaviour" / name
words = behaviour.read_text().split() if behaviour.exists() else []
print("hello from", name, flush=True)
if words[:1] == ["careful"]:
    def end(*_):
        with (root / f"{name}.terms").open("a") as file:
            file.write("TERM\\n")
        time.sleep(1)
        (root / f"{name}.saved").touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, end)
if words[:1] in (["sleep"], ["careful"]):
    (root / f"{name}.pid").write_text(str(os.getpid()))
    time.sleep(float(words[1]))
if words[:1] == ["fail"]:
    if words[2:] == ["once"]:
        behaviour.unlink()
    say("failed", f"bad thing in {name}", int(words[1]))
    sys.exit(int(words[1]))
out = root / "artifacts" / name
out.mkdir(parents=True)
(out / "made.txt").write_text(name)
metrics = root / "metrics" / f"{name}.json"
metrics.parent.mkdir(exist_ok=True)
metrics.write_text(json.dumps({"score": 0.25, "other": 3}) + "\\n")
say("done")
if words[:1] == ["linger"]:
    time.sleep(float(words[1]))
    sys.exit(int(words[2]))
"""

GRAPH = """
stages:
  data:
    cmd: python stage.py data
    meta: {shows: score}
    params: [data]
    deps:
    - stage.py
    # files named in params.yaml data.sources, kept by sluice run
    outs:
    - artifacts/data
    metrics:
    - metrics/data.json: {cache: false}
  left:
    cmd: python stage.py left
    deps: [artifacts/data]
    outs:
    - artifacts/left
    metrics:
    - metrics/left.json: {cache: false}
  right:
    cmd: python stage.py right
    deps: [artifacts/data]
    params: [pretrain]
    outs:
    - artifacts/right
    metrics:
    - metrics/right.json: {cache: false}
  report:
    cmd: python stage.py report
    deps: [artifacts/left, artifacts/right]
    outs:
    - reports: {cache: false}
    metrics:
    - metrics/report.json: {cache: false}
"""


def make(root: Path) -> Path:
    """A repository with four stages: data, then left and right, then report."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "stage.py").write_text(
        STAGE.replace('root / "artifacts" / name', 'root / ("reports" if name == "report" else f"artifacts/{name}")')
    )
    (root / "dvc.yaml").write_text(GRAPH)
    (root / "behaviour").mkdir()
    shutil.copy(ROOT / "params.yaml", root)
    shutil.copytree(ROOT / "profiles", root / "profiles")
    (root / "mlflow").mkdir()
    (root / "mlflow" / "registry.yaml").write_text("models: {}\n")
    (root / ".gitignore").write_text("/artifacts/\n/reports/\n.sluice/\n")
    subprocess.run(["git", "init", "-q", "."], cwd=root, check=True)
    dvc = [sys.executable, "-m", "dvc", "init", "-q"]
    subprocess.run(dvc, cwd=root, env=environment(root, root / ".sluice" / "prefect"), check=True)
    return root


def environment(root: Path, prefect_home: Path) -> dict[str, str]:
    """A child's environment in which every store lies in `root`, whatever the surrounding one says."""
    foreign = ("MLFLOW_", "PREFECT_", "DVC_", "PYTHONPATH", "HF_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    state = root / ".sluice"
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DVC_NO_ANALYTICS": "1",
        "DVC_GLOBAL_CONFIG_DIR": f"{state}/dvc/config",
        "DVC_SITE_CACHE_DIR": f"{state}/dvc/site",
        "MLFLOW_TRACKING_URI": f"sqlite:///{state}/mlflow/mlflow.db",
        "PREFECT_HOME": str(prefect_home),
        "COLUMNS": "160",
    }


def ran(root: Path) -> list[str]:
    """The stages that ran since the last call, sorted."""
    place = root / "ran.txt"
    names = sorted(place.read_text().split()) if place.exists() else []
    place.unlink(missing_ok=True)
    return names


def metrics(root: Path, stage: str) -> dict[str, float]:
    """What a stage wrote."""
    found: dict[str, float] = json.loads((root / "metrics" / f"{stage}.json").read_text())
    return found
