"""A small repository with an MLflow store, for the tests of tracking, registry and promotion."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydantic import BaseModel

from pipelines.core import context, environment, graph, lineage, tracking

SOURCE = str(Path(__file__).resolve().parents[1])

DVC = """
stages:
  data:
    cmd: python -m pipelines data
    outs: [artifacts/data]
    metrics: [{metrics/data.json: {cache: false}}]
  pretrain:
    cmd: python -m pipelines pretrain
    deps: [artifacts/data, pipelines/pretrain.py]
    outs: [artifacts/pretrain]
    metrics: [{metrics/pretrain.json: {cache: false}}]
  sft:
    cmd: python -m pipelines sft
    deps: [artifacts/pretrain, artifacts/data]
    outs: [artifacts/sft]
    metrics: [{metrics/sft.json: {cache: false}}]
"""

REGISTRY = """
models:
  sluice-base:
    stage: pretrain
    model: model
    gate:
    - {metric: bits_per_byte, at_most: 4.0}
    - {score: bits, per: bytes, lower_is_better: true, better_than: bits_before}
    - {score: bits, per: bytes, lower_is_better: true, not_worse_than: champion, margin: 0.01}
    promote: auto
  sluice-sft:
    stage: sft
    model: model
    gate: [{score: bits, per: bytes, lower_is_better: true, not_worse_than: "stage:pretrain", margin: 0.5}]
    promote: manual
"""


class Lora(BaseModel):
    rank: int = 4


class Section(BaseModel):
    """Params of a stage."""

    lr: float = 0.1
    lora: Lora = Lora()


def declare_stages(monkeypatch: object = None) -> None:
    """Stand-ins of the stage modules: what they say they write."""
    import pipelines

    for name in ("pretrain", "sft"):
        module = types.ModuleType(f"pipelines.{name}")
        module.METRICS = frozenset({"bits_per_byte", "task/*"})  # type: ignore[attr-defined]
        module.SCORES = frozenset({"bits", "bits_before", "bytes"})  # type: ignore[attr-defined]
        if monkeypatch is None:
            sys.modules[module.__name__] = module
        else:
            monkeypatch.setitem(sys.modules, module.__name__, module)  # type: ignore[attr-defined]
            monkeypatch.setattr(pipelines, name, module, raising=False)  # type: ignore[attr-defined]


def make_database(place: Path) -> Path:
    """An empty MLflow database. Making the first one takes seconds: it is made once and copied."""
    import mlflow

    place.parent.mkdir(parents=True, exist_ok=True)
    mlflow.MlflowClient(f"sqlite:///{place}").search_experiments()
    return place


def make_root(root: Path, database: Path | None) -> Path:
    """A repository with three stages, of which `data` has run."""
    (root / "mlflow").mkdir(parents=True)
    (root / "mlflow" / "registry.yaml").write_text(REGISTRY)
    (root / "dvc.yaml").write_text(DVC)
    (root / "artifacts" / "data").mkdir(parents=True)
    (root / "artifacts" / "data" / "corpus.txt").write_text("to be or not to be\n")
    (root / "metrics").mkdir()
    if database is not None:
        place = root / environment.STATE / "mlflow" / "mlflow.db"
        place.parent.mkdir(parents=True)
        shutil.copyfile(database, place)
    return root


def make_model(place: Path, seed: int = 0) -> None:
    """A two-layer Llama with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1, **{letter: n + 2 for n, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(place)
    fast.save_pretrained(place)
    (place / "README.md").write_text(f"# A model\n\nMade with seed {seed}.\n")


def write_rows(place: Path, bits: float, ids: Sequence[str] = tuple(f"row-{n}" for n in range(40))) -> None:
    """Per-example rows: `bits` a byte after training, 3.0 before; noise that two models share."""
    size = 100.0 + np.arange(len(ids))
    noise = np.sin(np.arange(len(ids)))
    rows = {"id": list(ids), "bits": size * bits + noise, "bits_before": size * 3.0, "bytes": size.astype(int)}
    place.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(place)


def fill(root: Path, template: Path, bits: float, mark: str = "", stage: str = "pretrain") -> None:
    """Put an output of a stage in its place, as a run of it or DVC would."""
    output = root / "artifacts" / stage
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(template, output / "model")
    (output / "mark.txt").write_text(f"{bits} {mark}")
    write_rows(output / "evaluation.parquet", bits)
    (root / "metrics" / f"{stage}.json").write_text(json.dumps({"bits_per_byte": bits}))


def run_stage(root: Path, template: Path, bits: float, mark: str = "", stage: str = "pretrain") -> str:
    """A run of a stage with its record, as the runner does it. Returns the key of its spool."""
    recorder = tracking.Recorder(root, stage, f"{stage}{bits}{mark}".encode().hex(), courier=False)
    for step in range(3):
        recorder.log(step, {"loss": 4.0 - step})
    fill(root, template, bits, mark, stage)
    run = context.StageContext(stage, root, "f" * 16, samples=["once upon a time"])
    metrics = {"bits_per_byte": bits, "seconds": 1.5}
    record = lineage.record(root, graph.stage(root, stage), Section(), metrics, run)
    recorder.finish("FINISHED", record)
    return recorder.spool.key


def python(root: Path, code: str, **variables: str) -> subprocess.Popen[str]:
    """Code in a process of its own, with this repository's modules and the store of `root`."""
    env = {**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{SOURCE}/tests", "OMP_NUM_THREADS": "1", **variables}
    head = "from pathlib import Path\nimport stores\nstores.declare_stages()\nroot = Path.cwd()\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code],
        cwd=root,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def drain(root: Path) -> object:
    """A client of the root's store, after everything that is spooled was delivered."""
    from pipelines.core import courier, store

    courier.deliver(root)
    return store.connect(root)[0]


@functools.cache
def _templates(base: Path) -> tuple[Path, Path]:
    make_model(base / "sluice-model")
    return make_database(base / "sluice-store" / "mlflow.db"), base / "sluice-model"


@pytest.fixture
def repository(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """A repository with an embedded store, and a model to put in as output. Import it where it is used."""
    database, model = _templates(tmp_path_factory.getbasetemp())
    root = make_root(tmp_path / "root", database)
    declare_stages(monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/{environment.STATE}/mlflow/mlflow.db")
    return root, model
