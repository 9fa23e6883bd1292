"""Where a model comes from, as tags: commit, inputs, params, packages, machine.

In: the repository, a stage's params and the run it made. Out: the `Record` that ends a run, whose tags
are copied to the model version. A stage that DVC restored from its cache ran elsewhere, at another time: what
can be said of it is in `dvc.lock`.
"""

from __future__ import annotations

import hashlib
import json
import platform
import posixpath
import re
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from pipelines.core import contents, graph
from pipelines.core.context import StageContext
from pipelines.core.params import whole
from pipelines.core.tracking import Record

PACKAGES = ("torch", "transformers", "peft", "mlflow")
CONTENT = "sluice.content_hash"
LARGEST_FILE = 8 * 2**20  # bytes; a larger file belongs to the model or to DVC, not to the record of a run
VALUE_LIMIT = 5000  # characters MLflow keeps of a tag or param
INPUT, DEP = "sluice.input.", "dvc."  # tags of what a stage read: content hash; hash of DVC
KEY_LIMIT = 250  # characters MLflow takes of a tag's name
LOOKS, PAUSE = 20, 0.2  # at a file that another process may write; seconds between two
REFUSED = re.compile(r"[^\w.\- :/]")  # what it does not take in one, and a file of a user's may have in its own


def record(
    root: Path, spec: graph.StageSpec, section: BaseModel, metrics: Mapping[str, float], run: StageContext
) -> Record:
    """The record of a stage that has just ended well and whose output stands.

    Args:
        section: the stage's params.
        metrics: what is in `metrics/<stage>.json`, `seconds` (wall time) among it.
        run: where it was computed, and the samples it showed.
    """
    tags = {
        "sluice.device": run.device,
        "sluice.precision": run.precision,
        "sluice.threads": str(run.threads),
        "sluice.fingerprint": run.fingerprint,
        "sluice.wall_seconds": str(metrics.get("seconds", "unknown")),
    }
    texts = {"samples.txt": "\n".join(run.samples) + "\n"} if run.samples else {}
    return _record(root, spec, as_texts(section.model_dump(mode="json")), metrics, tags, texts)


def restored(root: Path, stage: str) -> Record:
    """The record of an output that stands although no run of this machine made it."""
    spec = graph.stage(root, stage)
    text = _at_rest(root / "dvc.lock")
    entry = yaml.safe_load(text)["stages"].get(stage, {}) if text else {}
    params = as_texts({key: value for file in entry.get("params", {}).values() for key, value in file.items()})
    params = {key.removeprefix(f"{stage}."): value for key, value in params.items()}
    tags = {tag_name(DEP, dep["path"]): str(dep["md5"]) for dep in entry.get("deps", []) if "md5" in dep}
    tags["sluice.restored"] = "from DVC's cache" if entry else "output without an entry in dvc.lock"
    return _record(root, spec, params, read_metrics(root, spec), tags, {})


def _at_rest(place: Path) -> str:
    """A text that nobody is writing; empty where there is none. DVC writes `dvc.lock` in place, some .4 s long, and may
    do it now for another stage: by half of it nothing would be known of an output."""
    text, before = "", None
    for _ in range(LOOKS):
        text = place.read_text(encoding="utf-8") if place.exists() else ""
        if text == before:
            break
        before = text
        time.sleep(PAUSE)
    return text


def read_metrics(root: Path, spec: graph.StageSpec) -> dict[str, float]:
    """A stage's metrics file; empty when there is none."""
    path = root / spec.metrics
    metrics: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return metrics


def as_texts(nested: Mapping[str, Any]) -> dict[str, str]:
    """`{"a": {"b": 1}}` -> `{"a.b": "1"}`, as MLflow keeps params; lists are JSON."""
    return {
        key: (value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False))[:VALUE_LIMIT]
        for key, value in whole.flatten(nested).items()
    }


def tag_name(prefix: str, path: str) -> str:
    """A tag about a file or artifact, whatever it is called; a hash keeps apart what MLflow would take for one."""
    whole = prefix + path
    if not REFUSED.search(path) and len(whole) <= KEY_LIMIT and posixpath.normpath(whole) == whole:
        return whole
    mark = "-" + hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    plain = posixpath.normpath(REFUSED.sub("_", path)).replace("../", "__/")
    return prefix + plain[-(KEY_LIMIT - len(prefix + mark)) :] + mark


def package_versions() -> dict[str, str]:
    """Installed versions of what decides how a model computes. A build's local suffix is dropped."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _record(
    root: Path,
    spec: graph.StageSpec,
    params: dict[str, str],
    metrics: Mapping[str, float],
    tags: dict[str, str],
    texts: dict[str, str],
) -> Record:
    output = root / spec.output
    places = {name: root / path for name, path in (*spec.inputs.items(), *_wholes(root, spec))}
    inputs = {name: contents.content_hash(root, place) for name, place in places.items() if place.exists()}
    text = json.dumps(params, sort_keys=True)
    everything = {
        **tags,
        **_git(root),
        **{f"package.{name}": number for name, number in package_versions().items()},
        **{tag_name(INPUT, name): digest for name, digest in inputs.items()},
        "sluice.stage": spec.name,
        "sluice.params_hash": hashlib.sha256(text.encode()).hexdigest(),
        "sluice.data_hash": _data_hash(root, spec.name),
        CONTENT: contents.content_hash(root, output),
    }
    files = tuple(path for path in sorted(output.iterdir()) if path.is_file() and path.stat().st_size <= LARGEST_FILE)
    return Record(params, dict(metrics), everything, inputs, files, texts)


def _wholes(root: Path, spec: graph.StageSpec) -> list[tuple[str, str]]:
    """Outputs of stages, by name, of which the stage reads a part, as where a dial names `artifacts/dpo/model`.

    Runs and versions are found by the content of the whole.
    """
    stages = graph.load(root)
    outputs = [stages[parent].output for parent in spec.parents]
    return [
        (Path(out).name, out) for out in outputs if any(path.startswith(f"{out}/") for path in spec.inputs.values())
    ]


def _data_hash(root: Path, stage: str) -> str:
    """Hash of what the stages without parents made that this one descends from: its data."""
    stages = graph.load(root)
    ancestors, waiting = {stage}, [stage]
    while waiting:
        new = set(stages[waiting.pop()].parents) - ancestors
        ancestors |= new
        waiting += new
    places = [root / stages[name].output for name in sorted(ancestors) if not stages[name].parents]
    hashes = [contents.content_hash(root, place) for place in places if place.exists()]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _git(root: Path) -> dict[str, str]:
    """Commit, and whether the code differs from it. What runs write themselves does not make it dirty."""

    def git(*words: str) -> str | None:
        whole = ["git", "-C", str(root), *words]
        try:  # names of files may be anything
            done = subprocess.run(whole, capture_output=True, encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return {"git.commit": "none", "git.dirty": "unknown"}
    changes = git("status", "--porcelain", "--", ".", ":(exclude)metrics", ":(exclude)dvc.lock")
    return {"git.commit": commit, "git.dirty": str(bool(changes)).lower(), "mlflow.source.git.commit": commit}
