"""What several test files share: a context to run a stage in, and a small repository of our own code."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.core import environment, graph
from pipelines.core.context import StageContext

ROOT = Path(__file__).parents[1]
COPIED = ("pipelines", "flows", "mlflow", "profiles", "dvc.yaml", "params.yaml", "constraints.txt", "pyproject.toml")


@pytest.fixture(autouse=True, scope="session")
def _settings() -> None:
    """Telemetry off and no hub; stores that a test needs are made below its own folder."""
    os.environ.update(environment.TELEMETRY_OFF)
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    """A context of a stage that computes in fp32 on one thread."""
    return StageContext(stage="test", root=tmp_path, fingerprint="0" * 64)


@pytest.fixture(scope="session")
def make_workspace(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Copies of this repository (git and DVC initialised, profile tiny applied), each in a folder of its own."""
    from flows import profiles

    first = tmp_path_factory.mktemp("workspace") / "first"
    first.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, first / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, first / name)
    (first / ".gitignore").write_text("/artifacts\n/reports\n.sluice\n.work\n")
    profiles.apply(first, "tiny")
    for command in (["git", "init", "-q"], ["git", "add", "-A"], ["git", *_WHO, "commit", "-qm", "start"]):
        subprocess.run(command, cwd=first, check=True)
    subprocess.run(["dvc", "init", "-q"], cwd=first, check=True)
    count = 0

    def make() -> Path:
        nonlocal count
        count += 1
        return Path(shutil.copytree(first, first.parent / f"copy-{count}", symlinks=True))

    return make


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test run, one for all of its workers."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@contextlib.contextmanager
def one_worker(place: Path) -> Iterator[None]:
    """Let the other workers wait who want to make, or to copy, what is at `place`."""
    with place.with_name(f"{place.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def prepared(make_workspace: Callable[[], Path], shared: Path) -> Path:
    """A workspace in which the tiny `data` and `tokenizer` stages have run. Copy it before you change it."""
    place, whole = shared / "prepared", shared / "prepared.whole"
    with one_worker(place):
        if not whole.exists():
            shutil.rmtree(place, ignore_errors=True)  # of a worker that failed
            shutil.copytree(make_workspace(), place, symlinks=True)
            for stage in ("data", "tokenizer"):
                run_stage(place, stage)
            at_rest(place)
            whole.touch()
    return place


@pytest.fixture(scope="session")
def chain(prepared: Path, shared: Path) -> Callable[[str, Path], Path]:
    """Copies a workspace to a place: one in which a stage has run, and all it needs; others may have."""
    place = shared / "chain"

    def copied(stage: str, to: Path) -> Path:
        with one_worker(place):
            if not place.exists():
                shutil.copytree(prepared, place, symlinks=True)
            for name in graph.load(place):
                if not (place / graph.stage(place, name).output).exists():
                    run_stage(place, name)
                if name == stage:
                    break
            at_rest(place)
            return Path(shutil.copytree(place, to, symlinks=True))

    return copied


_WHO = ("-c", "user.name=test", "-c", "user.email=test@example.org")


def own_environment() -> dict[str, str]:
    """The environment without the addresses of stores, so that a child finds those of its own folder."""
    ours = {"MLFLOW_TRACKING_URI", "PREFECT_HOME", "PREFECT_API_URL", "DVC_SITE_CACHE_DIR", "DVC_GLOBAL_CONFIG_DIR"}
    return {name: value for name, value in os.environ.items() if name not in ours}


def at_rest(root: Path) -> None:
    """Wait until nobody delivers what stages recorded: who copies the folder meanwhile meets files that come and go."""
    for _ in range(3):  # a stage's own courier may wait for that of the stage before
        with (root / environment.STATE / "locks" / "courier").open("a") as courier:
            fcntl.flock(courier, fcntl.LOCK_EX)
        time.sleep(0.2)


def run_stage(root: Path, stage: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m pipelines STAGE` in a workspace, as DVC calls it."""
    env = {**own_environment(), **variables}
    run = subprocess.run([sys.executable, "-m", "pipelines", stage], cwd=root, env=env, capture_output=True, text=True)
    assert not check or run.returncode == 0, run.stdout + run.stderr
    return run
