"""Prompt files in MLflow's registry: one version for each content, aliases that follow the file and the choice."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.core import prompt_files, prompt_registry, store
from pipelines.core.errors import StoreUnavailable, UserError

DVC = """
stages:
  prompts:
    cmd: python -m pipelines prompts
    outs: [artifacts/prompts]
    metrics: [{metrics/prompts.json: {cache: false}}]
"""
FILES = Path(__file__).parents[1] / "mlflow/prompts"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "dvc.yaml").write_text(DVC)
    (tmp_path / "mlflow/prompts").mkdir(parents=True)
    for name in ("entailment-plain", "entailment-role"):
        shutil.copy(FILES / f"{name}.yaml", tmp_path / "mlflow/prompts")
    (tmp_path / ".sluice/mlflow").mkdir(parents=True)
    return tmp_path


def choose(root: Path, name: str, strategy: str = "zero_shot") -> None:
    place = root / "artifacts/prompts/models/fits/prompt.yaml"
    place.parent.mkdir(parents=True, exist_ok=True)
    version = prompt_files.load(root / "mlflow/prompts")[name].version
    place.write_text(yaml.safe_dump({"task": "fits", "name": name, "version": version, "strategy": strategy}))


def aliases(root: Path, name: str) -> dict[str, int]:
    client, _ = store.connect(root)
    numbers = [one.version for one in client.search_prompt_versions(name)]
    return {alias: number for number in numbers for alias in client.get_prompt_version(name, number).aliases}


def edit(root: Path, old: str, new: str) -> None:
    place = root / "mlflow/prompts/entailment-plain.yaml"
    place.write_text(place.read_text().replace(old, new))


def test_one_version_for_each_content_and_aliases_that_move(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = prompt_registry.sync(root)
    assert "prompt entailment-plain: version 1" in done and len(done) == 4
    client, _ = store.connect(root)
    made = client.get_prompt_version("entailment-plain", 1)
    assert made.variables == {"instruction", "premise", "hypothesis", "options"}
    (role,) = client.search_prompt_versions("entailment-role")
    assert [turn["role"] for turn in role.template] == ["system", "user"]

    # Nothing changed: the store is not even asked. And where it is, because our note is lost, nothing is doubled.
    with monkeypatch.context() as patch:
        patch.setattr(store, "connect", lambda root: pytest.fail("asked the store for nothing"))
        assert prompt_registry.sync(root) == []
    (root / ".sluice/registry/prompts.json").unlink()
    assert prompt_registry.sync(root) == []

    # Notes are no part of the version, instructions are; an old content comes back as its old version.
    edit(root, "One wording", "A wording")
    assert prompt_registry.sync(root) == []
    edit(root, "Do the two belong", "Would the two belong")
    assert prompt_registry.sync(root) == [
        "prompt entailment-plain: version 2", "prompt entailment-plain: current is version 2"
    ]  # fmt: skip
    edit(root, "Would the two belong", "Do the two belong")
    assert prompt_registry.sync(root) == ["prompt entailment-plain: current is version 1"]

    choose(root, "entailment-plain")
    assert prompt_registry.sync(root) == ["prompt entailment-plain: chosen-fits is version 1"]
    choose(root, "entailment-role")
    prompt_registry.sync(root)
    assert aliases(root, "entailment-plain") == {"current": 1}
    assert aliases(root, "entailment-role") == {"current": 1, "chosen-fits": 1}
    choose(root, "entailment-role", "search")
    prompt_registry.sync(root)
    assert aliases(root, "entailment-role") == {"current": 1}


def test_a_prompt_whose_file_is_gone_is_chosen_no_more(root: Path) -> None:
    choose(root, "entailment-role")
    prompt_registry.sync(root)
    choose(root, "entailment-plain")
    (root / "mlflow/prompts/entailment-role.yaml").unlink()
    assert "prompt entailment-role: no longer chosen-fits" in prompt_registry.sync(root)
    assert aliases(root, "entailment-role") == {"current": 1}
    assert aliases(root, "entailment-plain") == {"current": 1, "chosen-fits": 1}


def test_a_store_that_is_away_and_a_file_with_a_mistake(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(StoreUnavailable):
        prompt_registry.sync(root)
    assert not (root / ".sluice/registry/prompts.json").exists()
    edit(root, "{{ premise }}", "{{ premises }}")
    with pytest.raises(UserError, match="premises"):
        prompt_registry.sync(root)


def test_without_prompts_there_is_nothing_to_do(tmp_path: Path) -> None:
    empty: list[Any] = prompt_registry.sync(tmp_path)
    assert empty == [] and not os.listdir(tmp_path)
