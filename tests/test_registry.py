"""Registration: one version for one content, whoever is killed; lineage; gates with the champion's rows."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from stores import drain, fill, make_root, python, repository, run_stage, write_rows

from pipelines.core import artifacts, declared, moves, policy, promotion, registry, store, tracking, verdicts
from pipelines.core.errors import ArtifactError, GateError, StoreUnavailable

__all__ = ["repository"]
NAME = "sluice-base"


def the(registered: list[registry.Registered]) -> registry.Registered:
    """The one model of a stage."""
    (found,) = registered
    return found


def entries(root: Path) -> list:
    client, _ = store.connect(root)
    return sorted(client.search_model_versions(f"name = '{NAME}'"), key=lambda entry: int(entry.version))


def logged(root: Path) -> list:
    client, experiment = store.connect(root)
    return list(client.search_logged_models([experiment]))


def make_champion(root: Path, model: Path, bits: float = 2.5) -> str:
    run_stage(root, model, bits)
    version = the(registry.settle(root, "pretrain")).version
    promotion.promote(root, NAME, version, why="test", expected_champion=None)
    return version


def test_a_version_with_its_whole_lineage(repository):
    root, model = repository
    run_stage(root, model, 2.5)
    registered = the(registry.settle(root, "pretrain"))
    (entry,) = entries(root)
    client, _ = store.connect(root)
    tags = client.get_model_version(NAME, entry.version).tags
    content = artifacts.content_hash(root / "artifacts/pretrain")
    assert tags["sluice.content_hash"] == content and tags["gate"] == "passed"
    assert tags["sluice.input.data"] == artifacts.content_hash(root / "artifacts/data") == tags["sluice.data_hash"]
    wanted = ["sluice.stage", "sluice.params_hash", "sluice.device", "sluice.wall_seconds", "sluice.rows_hash"]
    wanted += [f"package.{name}" for name in ("torch", "transformers", "peft", "mlflow", "python")]
    assert {*wanted, "git.commit", "git.dirty"} <= set(tags)
    assert entry.description == (model / "README.md").read_text() and entry.run_id == registered.run_id
    run = client.get_run(registered.run_id)
    assert run.data.tags["gate"] == "passed" and run.data.params["lora.rank"] == "4"
    assert {"verdict.json", "verdict.txt"} <= {item.path for item in client.list_artifacts(registered.run_id)}
    stored = json.loads((root / ".sluice/verdicts/sluice-base.json").read_text())
    assert stored["content_hash"] == content and stored["version"] == "1" and stored["passed"] is True
    assert verdicts.stored(root, "sluice-base") == registered.verdict


def test_settling_again_changes_nothing(repository):
    root, model = repository
    run_stage(root, model, 2.5)
    first = the(registry.settle(root, "pretrain"))
    client, experiment = store.connect(root)
    assert the(registry.settle(root, "pretrain")) == first
    assert registry.reconcile(root) == []
    (root / ".sluice/verdicts/sluice-base.json").unlink()
    shutil.rmtree(root / ".sluice/registry")
    shutil.rmtree(root / ".sluice/spool")
    assert the(registry.settle(root, "pretrain")) == first
    assert len(entries(root)) == len(logged(root)) == len(client.search_runs([experiment])) == 1


@pytest.mark.parametrize(
    "moment",
    [
        "versions._log = die",  # the intent is written, nothing else
        "import mlflow.pyfunc; mlflow.pyfunc.save_model = die",  # MLflow has half a logged model
        "versions._create = die",  # the files are there, the version is not
        "registry.verdicts.judge = die",  # the version is there, its verdict is not
    ],
)
def test_kill_at_any_moment_ends_in_one_version(repository, moment):
    root, model = repository
    run_stage(root, model, 2.5)
    code = (
        "import os\nfrom pipelines.core import registry, versions\n"
        f"def die(*a, **k): os.kill(os.getpid(), 9)\n{moment}\nregistry.settle(root, 'pretrain')\n"
    )
    process = python(root, code)
    _, error = process.communicate()
    assert process.returncode == -9, error
    assert not (root / ".sluice/verdicts/sluice-base.json").exists()
    assert [registered.version for registered in registry.reconcile(root)] == ["1"]
    assert [str(entry.version) for entry in entries(root)] == ["1"]
    assert [str(entry.status).rpartition(".")[2] for entry in logged(root)] == ["READY"]
    folders = list((root / ".sluice/mlflow/artifacts/models").iterdir())
    assert len(folders) == 1 and not list((root / ".sluice/registry/intents").iterdir())


def test_a_disk_that_fills_up_leaves_nothing_behind(repository, monkeypatch):
    root, model = repository
    run_stage(root, model, 2.5)

    def save(path, **_):
        Path(path, "artifacts").mkdir(parents=True)
        Path(path, "artifacts", "half").write_text("of a model")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("mlflow.pyfunc.save_model", save)
        with pytest.raises(OSError, match="No space left"):
            registry.settle(root, "pretrain")
    assert [str(entry.status).rpartition(".")[2] for entry in logged(root)] == ["FAILED"]
    assert not list((root / ".sluice/mlflow/artifacts/models").rglob("half"))
    assert the(registry.settle(root, "pretrain")).version == "1"


@pytest.mark.parametrize(("own", "inside"), [(None, ("560", "0")), ("55", ("55", "2"))])
def test_an_upload_may_take_longer_than_a_question(repository, monkeypatch, own, inside):
    """A server that keeps files in a bucket answers when all of one is there."""
    names = ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    if own is not None:
        monkeypatch.setenv(names[0], own)
    store.connect(repository[0])
    before = [os.environ[name] for name in names]
    with store.patient(500_000_000):
        assert tuple(os.environ[name] for name in names) == inside
    assert [os.environ[name] for name in names] == before == [own or "10", "2"]


def test_begun_version_is_finished_after_the_output_was_replaced(repository):
    root, model = repository
    run_stage(root, model, 2.5)
    code = (
        "import os\nfrom pipelines.core import registry, versions\n"
        "versions._create = lambda *a: os.kill(os.getpid(), 9)\nregistry.settle(root, 'pretrain')\n"
    )
    assert python(root, code).wait() == -9
    first = artifacts.content_hash(root / "artifacts/pretrain")
    run_stage(root, model, 2.4)
    assert the(registry.settle(root, "pretrain")).version == "2"
    client, _ = store.connect(root)
    assert client.get_model_version(NAME, "1").tags["sluice.content_hash"] == first


def test_two_processes_register_one_version(repository):
    root, model = repository
    run_stage(root, model, 2.5)
    code = "from pipelines.core import registry\nprint(registry.settle(root, 'pretrain')[0].version)\n"
    both = [python(root, code) for _ in range(2)]
    assert [process.communicate()[0] for process in both] == ["1\n", "1\n"]
    assert len(entries(root)) == 1 and len(logged(root)) == 1


def test_restored_output_gets_a_run_with_the_lineage_of_dvc_lock(repository):
    root, model = repository
    fill(root, model, 2.5)
    entry = {
        "cmd": "python -m pipelines pretrain",
        "deps": [{"path": "artifacts/data", "md5": "abc.dir"}],
        "params": {"params.yaml": {"pretrain": {"lr": 0.2, "method": "lora"}}},
    }
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {"pretrain": entry}}))
    (registered,) = registry.reconcile(root)
    client, _ = store.connect(root)
    run = client.get_run(registered.run_id)
    assert run.data.params == {"lr": "0.2", "method": "lora"} and run.data.metrics == {"bits_per_byte": 2.5}
    tags = client.get_model_version(NAME, "1").tags
    assert tags["dvc.artifacts/data"] == "abc.dir" and tags["sluice.restored"] == "from DVC's cache"
    assert tags["sluice.input.data"] == artifacts.content_hash(root / "artifacts/data")
    assert registry.reconcile(root) == []


def test_parents_are_versions_by_the_content_that_was_read(repository):
    root, model = repository
    run_stage(root, model, 2.5)
    registry.settle(root, "pretrain")
    run_stage(root, model, 2.4, stage="sft")
    registered = the(registry.settle(root, "sft"))
    client, _ = store.connect(root)
    tags = client.get_model_version("sluice-sft", registered.version).tags
    assert tags["sluice.parent.sluice-base"] == "1"
    (row,) = registered.verdict.rows
    assert row.baseline == "stage:pretrain: 2.5" and row.passed


def test_a_failed_gate_registers_and_says_so(repository):
    root, model = repository
    run_stage(root, model, 4.5)
    registered = the(registry.settle(root, "pretrain"))
    assert not registered.verdict.passed
    client, _ = store.connect(root)
    assert client.get_model_version(NAME, registered.version).tags["gate"] == "failed"
    with pytest.raises(GateError, match="gate verdict failed"):
        promotion.promote(root, NAME, registered.version, why="hope", expected_champion=None)


def test_verdict_of_a_champion_stays_and_new_rules_are_asked_anew(repository):
    root, model = repository
    make_champion(root, model)
    before = verdicts.stored(root, "sluice-base")
    assert the(registry.settle(root, "pretrain")).verdict == before
    path = root / "mlflow/registry.yaml"
    path.write_text(path.read_text().replace("at_most: 4.0", "at_most: 2.0"))
    (registered,) = registry.reconcile(root)
    assert not registered.verdict.passed and registered.version == "1"
    assert registered.verdict.rows[2].note == "this version is the champion"


def test_a_verdict_about_another_champion_is_no_ticket(repository):
    root, model = repository
    for bits in (2.5, 2.51):  # both are judged while nobody is champion
        run_stage(root, model, bits)
        registry.settle(root, "pretrain")
    promotion.promote(root, NAME, 2, why="first", expected_champion=None)
    with pytest.raises(GateError, match="version 1 was judged against champion none, and the champion is 2 now"):
        promotion.promote(root, NAME, 1, why="second", expected_champion=2)
    fill(root, model, 2.5)  # the first output again, as `dvc checkout` brings it
    (registered,) = registry.reconcile(root)
    assert registered.version == "1" and registered.verdict.champion == "2"
    assert promotion.promote(root, NAME, 1, why="second", expected_champion=2) is not None


def test_champion_is_compared_by_its_own_rows(repository):
    root, model = repository
    make_champion(root, model, 2.5)
    run_stage(root, model, 2.6)
    registered = the(registry.settle(root, "pretrain"))
    row = registered.verdict.rows[2]
    assert not row.passed and row.baseline == "champion v1: 2.5" and row.low > 0.09
    assert registered.verdict.champion == "1"


def test_champion_is_measured_again_when_the_rows_have_changed(repository):
    root, model = repository
    make_champion(root, model, 2.5)
    today = [f"new-{n}" for n in range(40)]
    run_stage(root, model, 2.6)
    write_rows(root / "artifacts/pretrain/evaluation.parquet", 2.6, today)
    calls = []

    def measure(folder: Path, out: Path) -> None:
        assert (folder / "config.json").exists() and (folder / "model.safetensors").exists()
        calls.append(out)
        write_rows(out, 2.59, today)

    unmeasured = the(registry.settle(root, "pretrain"))
    assert not unmeasured.verdict.passed and "measured on other rows" in unmeasured.verdict.table()
    for _ in range(2):
        registered = the(registry.settle(root, "pretrain", measure))
        row = registered.verdict.rows[2]
        assert row.passed and row.baseline == "champion v1: 2.59" and registered.version == "2"
    assert len(calls) == 1
    (kept,) = (root / ".sluice/registry/measured").iterdir()
    assert kept.name.startswith("sluice-base-1-") and len(pd.read_parquet(kept)) == 40


def two_versions_that_passed(root: Path, model: Path) -> None:
    """And the first is champion."""
    make_champion(root, model, 2.5)
    run_stage(root, model, 2.4)
    registry.settle(root, "pretrain")


def test_a_champion_that_moves_while_a_gate_is_asked_has_it_asked_again(repository, monkeypatch):
    """Whoever promotes does not wait for the gate, and what is settled is not settled by the champion before."""
    root, model = repository
    two_versions_that_passed(root, model)
    run_stage(root, model, 2.3)
    judge = verdicts.judge

    def meanwhile(*words):
        verdict = judge(*words)
        promotion.promote(root, NAME, 2, why="quicker", expected_champion=1)
        return verdict

    with monkeypatch.context() as patch:
        patch.setattr(verdicts, "judge", meanwhile)
        assert the(registry.settle(root, "pretrain")).verdict.champion == "1"
    assert the(registry.reconcile(root)).verdict.champion == "2"
    assert registry.reconcile(root) == []


def test_a_promotion_fails_no_stage_that_is_being_settled(repository, monkeypatch):
    """In another worktree: between the folder of `settled` and the file in it, and between a look and a read."""
    root, model = repository
    two_versions_that_passed(root, model)
    run_stage(root, model, 2.3)
    folder, sync = root / ".sluice/registry/settled", os.fsync

    def meanwhile(file):
        sync(file)
        if any(folder.glob(".*.partial")) and promotion.history(root)[-1][1].moves[0].target == "1":
            promotion.promote(root, NAME, 2, why="quicker", expected_champion=1)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", meanwhile)
        assert the(registry.settle(root, "pretrain")).version == "3"
    assert promotion.history(root)[-1][1].moves[0].target == "2"
    (candidate,) = verdicts.candidates(root, "pretrain")
    moves.settled(root, NAME).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda place: True)
        assert not registry._is_settled(candidate)


def test_a_measure_on_other_rows_is_refused_and_not_kept(repository):
    root, model = repository
    make_champion(root, model, 2.5)
    run_stage(root, model, 2.6)
    write_rows(root / "artifacts/pretrain/evaluation.parquet", 2.6, ["a", "b", "c"])
    with pytest.raises(GateError, match="other examples"):
        registry.settle(root, "pretrain", lambda folder, out: write_rows(out, 2.5, ["a", "b"]))
    assert not list((root / ".sluice/registry/measured").iterdir())


def test_rows_kept_of_a_champion_are_not_taken_for_those_of_another_store(repository, tmp_path, monkeypatch):
    root, model = repository
    other = tmp_path / "other.db"
    shutil.copyfile(root / ".sluice/mlflow/mlflow.db", other)
    for bits in (2.5, 2.8):
        make_champion(root, model, bits)
        run_stage(root, model, bits, "challenger")
        registered = the(registry.settle(root, "pretrain"))
        assert registered.version == "2" and registered.verdict.rows[2].baseline == f"champion v1: {bits}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    assert len(list((root / ".sluice/registry/measured").iterdir())) == 2


@pytest.mark.parametrize("rows_changed", [False, True])
def test_a_champion_whose_files_are_gone_is_told_with_what_to_do(repository, rows_changed):
    root, model = repository
    make_champion(root, model, 2.5)
    shutil.rmtree(root / ".sluice/mlflow/artifacts/models")
    run_stage(root, model, 2.6)
    if rows_changed:
        write_rows(root / "artifacts/pretrain/evaluation.parquet", 2.6, [f"new-{n}" for n in range(40)])
    part = "model" if rows_changed else "evaluation.parquet"
    with pytest.raises(GateError, match=rf"(?s)sluice-base 1 has no {part} in the store: .*`sluice rollback sluice-b"):
        registry.settle(root, "pretrain", lambda folder, out: write_rows(out, 2.5))


def test_a_disk_that_is_full_is_not_told_as_files_that_are_gone(repository, monkeypatch):
    import mlflow

    root, _ = repository

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", full)
    with pytest.raises(OSError, match="No space left"):
        verdicts.copied(root, SimpleNamespace(name=NAME, version="1"), "model", root / "had")


def test_a_run_that_is_gone_from_the_store_is_no_obstacle(repository):
    """`mlflow gc` removes runs that were put in the bin; versions of them stay."""
    root, model = repository
    run_stage(root, model, 2.5)
    (first,) = registry.settle(root, "pretrain")
    client, _ = store.connect(root)
    rules = root / "mlflow" / "registry.yaml"
    for bound, remove in ((3.9, client.delete_run), (3.8, client._tracking_client.store._hard_delete_run)):
        remove(first.run_id)
        rules.write_text(rules.read_text().replace("at_most: 4.0", f"at_most: {bound}"))  # so the gate is asked again
        (again,) = registry.settle(root, "pretrain")
        assert (again.version, again.verdict.passed, again.verdict.rows[0].bound) == ("1", True, bound)
        rules.write_text(rules.read_text().replace(f"at_most: {bound}", "at_most: 4.0"))
    assert client.get_model_version(NAME, "1").tags["gate"] == "passed"


def test_a_store_that_was_begun_anew_gets_the_runs_that_another_had(repository, tmp_path):
    root, model = repository
    database = root / ".sluice/mlflow/mlflow.db"
    shutil.copyfile(database, tmp_path / "empty.db")
    run_stage(root, model, 2.5)
    (first,) = registry.settle(root, "pretrain")
    from mlflow.tracking._tracking_service.utils import _get_store

    _get_store().engine.dispose()
    shutil.copyfile(tmp_path / "empty.db", database)
    for name in ("settled", "intents"):
        shutil.rmtree(root / ".sluice/registry" / name, ignore_errors=True)
    (again,) = registry.settle(root, "pretrain")
    assert again.run_id != first.run_id and again.verdict.passed
    assert store.connect(root)[0].get_run(again.run_id).data.metrics["bits_per_byte"] == 2.5


def test_a_damaged_database_is_told(repository):
    root, _ = repository
    database = root / ".sluice/mlflow/mlflow.db"
    database.write_bytes(b"what a disk gave back" * 1000)
    with pytest.raises(StoreUnavailable, match="mlflow.db is no SQLite database: bring back a copy"):
        store.connect(root)
    database.write_bytes(b"")
    store.probe(root)


def test_output_without_a_model_is_refused(repository):
    root, model = repository
    run_stage(root, model, 2.5)
    (root / "artifacts/pretrain/model/config.json").unlink()
    with pytest.raises(ArtifactError, match="artifacts/pretrain/model is nothing that can be served"):
        registry.settle(root, "pretrain")


def test_store_that_is_away_delays_registration(repository, monkeypatch):
    root, model = repository
    run_stage(root, model, 2.5)
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        with pytest.raises(StoreUnavailable, match="sluice run"):
            registry.settle(root, "pretrain")
        with pytest.raises(StoreUnavailable):
            registry.reconcile(root)
    assert [registered.version for registered in registry.reconcile(root)] == ["1"]
    assert registry.reconcile(root) == [] and tracking.backlog(root) == []


def test_model_loads_and_generates_from_any_folder(repository, tmp_path):
    root, model = repository
    run_stage(root, model, 2.5)
    registry.settle(root, "pretrain")
    drain(root)
    code = """
import sys
there = set(sys.modules)  # the virtual environment sets its stores' addresses when Python starts
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model("models:/sluice-base/1")
ask = pd.DataFrame({"prompt": ["def f(", "", "x" * 500]})
greedy = model.predict(ask, params={"max_new_tokens": 8})
assert list(greedy.columns) == ["text"] and len(greedy) == 3, greedy
assert greedy.equals(model.predict(ask, params={"max_new_tokens": 8, "seed": 5})), "greedy is greedy"
warm = {"max_new_tokens": 8, "temperature": 1.5}
assert model.predict(ask, params={**warm, "seed": 1}).equals(model.predict(ask, params={**warm, "seed": 1}))
assert not model.predict(ask, params={**warm, "seed": 1}).equals(model.predict(ask, params={**warm, "seed": 2}))
assert not [name for name in set(sys.modules) - there if name.partition(".")[0] == "pipelines"], "not self-contained"
from transformers import AutoModelForCausalLM
place = mlflow.artifacts.download_artifacts("models:/sluice-base/1/artifacts/model")
AutoModelForCausalLM.from_pretrained(place)
requirements = open(mlflow.artifacts.download_artifacts("models:/sluice-base/1/requirements.txt")).read()
assert all(line.count("==") == 1 and "+" not in line for line in requirements.split()), requirements
"""
    keep = {key: os.environ[key] for key in ("PATH", "MLFLOW_TRACKING_URI")}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, env=keep, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_champions_without_a_store_are_nobody_and_make_no_store(tmp_path, monkeypatch, repository):
    root, _ = repository
    assert registry.champions(root) == {"sluice-base": None, "sluice-sft": None}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none/mlflow.db")
    assert registry.champions(root) == {"sluice-base": None, "sluice-sft": None}
    assert not (tmp_path / "none").exists()


def several(root: Path, model: Path, **bits: float) -> None:
    """`pretrain` declared to make one model a directory, with an output that holds these."""
    declared = yaml.safe_load((root / "mlflow/registry.yaml").read_text())
    gate = [{"score": "bits", "lower_is_better": True, "not_worse_than": "champion", "margin": 0.01}]
    entry = {"stage": "pretrain", "model": "models/*", "gate": gate, "promote": "auto"}
    del declared["models"][NAME]
    (root / "mlflow/registry.yaml").write_text(yaml.safe_dump({"models": {**declared["models"], "sluice-of-*": entry}}))
    run_stage(root, model, 2.5)
    output = root / "artifacts/pretrain"
    for name, value in bits.items():
        shutil.copytree(model, output / "models" / name)
        (output / "models" / name / "README.md").write_text(f"bits {value}")


def test_several_models_of_a_stage_are_registered_one_by_one(repository):
    root, model = repository
    several(root, model, first=1.0, second=2.0)
    made = registry.settle(root, "pretrain")
    assert [(found.name, found.version) for found in made] == [("sluice-of-first", "1"), ("sluice-of-second", "1")]
    assert all(found.verdict.passed and found.verdict.model == found.name for found in made)
    assert registry.settle(root, "pretrain") == made and registry.reconcile(root) == []
    assert registry.champions(root)["sluice-of-first"] is None

    (root / "artifacts/pretrain/models/second/README.md").write_text("another")
    assert [(one.name, one.version) for one in registry.settle(root, "pretrain")] == [
        ("sluice-of-first", "1"),
        ("sluice-of-second", "2"),
    ], "a change of one makes one version"
    client, _ = store.connect(root)
    assert client.get_model_version("sluice-of-second", "2").description == "another"


def test_models_of_one_content_are_kept_apart(repository):
    """Two models that are equal to the byte: neither is taken for what is left of the other."""
    root, model = repository
    several(root, model, first=1.0, second=1.0)
    made = registry.settle(root, "pretrain")
    assert [(found.name, found.version) for found in made] == [("sluice-of-first", "1"), ("sluice-of-second", "1")]
    client, _ = store.connect(root)
    places = {client.get_model_version_download_uri(one.name, one.version).removeprefix("file://") for one in made}
    assert len(places) == 2 and all((Path(place) / "MLmodel").exists() for place in places)


def test_a_star_in_one_of_name_and_directory_is_refused(repository):
    root, _ = repository
    rules = yaml.safe_load((root / "mlflow/registry.yaml").read_text())
    rules["models"][NAME]["model"] = "models/*"
    (root / "mlflow/registry.yaml").write_text(yaml.safe_dump(rules))
    with pytest.raises(GateError, match=r"one \* in both the name and the directory, or none in either"):
        declared.check(root)


def test_rules_of_an_entry_with_a_star_speak_of_each_model():
    raw = {
        "stage": "pretrain", "model": "models/*", "promote": "manual",
        "gate": [
            {"score": "score", "per": "examples_*", "lower_is_better": False, "better_than": "score_majority"},
            {"metric": "*/score", "at_least": 0.5},
        ],
    }  # fmt: skip
    one = policy.ModelPolicy.model_validate(raw).of("kind")
    assert one.model == "models/kind" and one.promote == "manual"
    comparison, budget = one.gate
    assert isinstance(comparison, policy.Comparison) and isinstance(budget, policy.Budget)
    assert (comparison.per, comparison.score, comparison.better_than) == ("examples_kind", "score", "score_majority")
    assert (budget.metric, budget.at_least) == ("kind/score", 0.5)


@pytest.mark.parametrize("name", ["moved", "mine [50 %]; ü"])
def test_a_folder_that_was_moved_has_its_files_with_it(repository, tmp_path, name):
    """MLflow keeps whole paths: what was registered is found at the new place, and nothing goes to the old one."""
    root, model = repository
    run_stage(root, model, 2.5)
    registry.settle(root, "pretrain")
    moved = root.rename(root.with_name(name))
    code = f"""
from pipelines.core import registry, store, verdicts
for bits in (2.5, 2.4):
    stores.run_stage(root, Path({str(model)!r}), bits)
    (made,) = registry.settle(root, "pretrain")
    entry = store.connect(root)[0].get_model_version({NAME!r}, made.version)
    kept = [verdicts.copied(root, entry, part, root / made.version) for part in (verdicts.EVALUATION, "model")]
    print(made.version, made.verdict.passed, *(place.exists() for place in kept))
"""
    child = python(moved, code, MLFLOW_TRACKING_URI=f"sqlite:///{moved}/.sluice/mlflow/mlflow.db")
    out, err = child.communicate()
    assert out.splitlines() == ["1 True True True", "2 True True True"], err
    assert not root.exists()


@pytest.mark.parametrize("name", ["why?", "try #1", "a%20b"])
def test_a_folder_whose_name_no_address_can_have_is_told(tmp_path, monkeypatch, name):
    """Or MLflow would write its files beside the folder: into one whose name ends before the `#`."""
    root = tmp_path / name
    root.mkdir()
    for database in (root / ".sluice/mlflow/mlflow.db", tmp_path / "elsewhere.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
        with pytest.raises(StoreUnavailable, match="MLflow takes no .* in the path of a folder: rename that"):
            store.probe(root)


def test_files_are_where_the_clone_that_began_a_database_has_them(repository, tmp_path, monkeypatch):
    """Whatever the clones that share it are called."""
    root, model = repository
    shared = tmp_path / "shared.db"
    shutil.copyfile(root / ".sluice/mlflow/mlflow.db", shared)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shared}")
    other = make_root(tmp_path / "try #2", None)
    with pytest.raises(StoreUnavailable, match="takes no '#'"):
        store.probe(other)
    store.connect(root)
    run_stage(other, model, 2.5)
    entry = store.connect(other)[0].get_model_version(NAME, the(registry.settle(other, "pretrain")).version)
    assert verdicts.copied(other, entry, "model", tmp_path / "copy").is_dir()
    assert list((root / ".sluice/mlflow/artifacts").rglob("model.safetensors"))
