"""`sluice lineage`: everything that is recorded of a version, and commands that make the same bytes again."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import own_environment
from rich.console import Console
from stores import repository, run_stage

from flows import lineage_report
from pipelines.core import artifacts, lineage, promotion, provenance, registry, store
from pipelines.core.errors import GateError
from pipelines.core.params import whole
from pipelines.core.provenance import Origin

__all__ = ["repository"]
ROOT = Path(__file__).parents[1]
WHO = ("-c", "user.name=test", "-c", "user.email=test@example.org")


def git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *WHO, *words], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def told(root: Path, reference: str) -> str:
    console = Console(width=200, color_system=None)
    with console.capture() as said:
        lineage_report.show(root, reference, console)
    return said.get()


def test_commit_data_parents_gate_and_approval(repository):
    root, model = repository
    (root / ".gitignore").write_text(".sluice\nartifacts\nmetrics\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "start")
    git(root, "remote", "add", "origin", "https://ada:hunter2@git.example.org/sluice.git")
    run_stage(root, model, 2.5)
    registry.settle(root, "pretrain")
    run_stage(root, model, 2.4, stage="sft")
    registry.settle(root, "sft")
    promotion.promote(root, "sluice-sft", 1, who="ada", why="the pairs were better", expected_champion=None)
    assert f"git clone {root} rebuilt" in told(root, "sluice-sft@champion"), "nobody else has the commit"
    git(root, "update-ref", "refs/remotes/origin/main", "HEAD")  # as a push does
    text = told(root, "sluice-sft@champion")
    hashes = {name: artifacts.content_hash(root / "artifacts" / name) for name in ("data", "pretrain", "sft")}
    assert text.startswith("sluice-sft version 1   aliases: champion\n")
    assert f"content   {hashes['sft']}" in text and f"data      {hashes['data']}" in text
    assert f"commit    {git(root, 'rev-parse', 'HEAD')}\n" in text
    assert f"  pretrain    {hashes['pretrain']}  sluice-base 1" in text
    assert text.index(hashes["data"] + "  not in the store") < text.index(hashes["pretrain"] + "  sluice-base")
    assert "sluice-sft version 1: gate passed" in text and "stage:pretrain" in text
    assert "promote by ada: the pairs were better" in text
    assert "git clone https://git.example.org/sluice.git rebuilt" in text and "hunter2" not in text
    assert "dvc repro sft" in text and hashes["sft"] in text.splitlines()[-1]
    assert "by nobody: it was never promoted" in told(root, "sluice-base/1")


def test_without_a_commit_nothing_can_be_made_again(repository):
    root, model = repository
    run_stage(root, model, 2.5)
    registry.settle(root, "pretrain")
    text = told(root, "sluice-base/1")
    assert text.rstrip().endswith("made outside a git repository: no commit says what its code was")
    assert "git clone" not in text


def test_a_version_that_no_stage_made_is_told(repository):
    root, _ = repository
    client, _ = store.connect(root)
    client.create_registered_model("by-hand")
    client.create_model_version("by-hand", source=f"file://{root}/artifacts/data")
    with pytest.raises(GateError, match="by-hand 1 carries no sluice.content_hash: no stage of this"):
        told(root, "by-hand/1")


@pytest.fixture
def committed(tmp_path: Path) -> tuple[Path, str]:
    """A repository with this one's params, and its commit."""
    root = tmp_path / "params"
    root.mkdir()
    shutil.copy(ROOT / "params.yaml", root)
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "start")
    return root, git(root, "rev-parse", "HEAD")


def origins(root: Path, **changes: object) -> list[Origin]:
    params = whole.load(root / "params.yaml").pretrain.model_dump(mode="json") | changes
    tags = {"sluice.stage": "pretrain", "git.commit": "0" * 40, "git.dirty": "false", "sluice.threads": "3"}
    return [Origin("sluice-base", "c" * 64, ("sluice-base 1",), tags, lineage.as_texts(params), True)]


def test_only_params_that_differ_from_the_commit_are_written(committed):
    root, commit = committed
    found = provenance.changed_params(root, commit, origins(root, lr=0.25, base=None))
    assert found == {"pretrain.lr": 0.25, "pretrain.base": None, "compute.threads": 3}
    everything = provenance.changed_params(root, "f" * 40, origins(root))
    assert set(everything) > {"pretrain.lr", "pretrain.tokens", "compute.threads"}, "that commit is not here"


def test_the_place_to_clone_from_is_one_word_of_a_shell(committed):
    place = committed[0].rename(committed[0].with_name("it's a folder"))
    shutil.copy(ROOT / "dvc.yaml", place)
    shutil.copytree(ROOT / "mlflow", place / "mlflow")
    lines = provenance.commands(place, origins(place))
    assert shlex.split(lines[0])[:4] == ["git", "clone", str(place), "rebuilt"]


def test_data_of_a_backfill_are_pulled(committed):
    root, _ = committed
    shutil.copytree(ROOT / "mlflow", root / "mlflow")
    text = (ROOT / "dvc.yaml").read_text()
    for head, pulls in (("  data:\n", []), ("  data:\n    frozen: true\n", ["dvc pull data"])):
        (root / "dvc.yaml").write_text(text.replace("  data:\n", head, 1))
        git(root, "add", "-A")
        git(root, "commit", "-qm", "graph")
        (one,) = origins(root)
        one.tags["git.commit"] = git(root, "rev-parse", "HEAD")
        lines = [line.partition("  #")[0] for line in provenance.commands(root, [one]) if line.startswith("dvc ")]
        assert lines == [*pulls, "dvc repro pretrain"]


def test_the_here_document_writes_what_was_recorded(committed, tmp_path):
    root, commit = committed
    changes = {"pretrain.lr": 1e-05, "pretrain.base": "it's a \"dir\"\n'''END", "tuning.new.deep": [{"a": None}]}
    script = provenance._script(changes)
    subprocess.run(["bash", "-euc", script], cwd=root, check=True, env=os.environ)
    written = yaml.safe_load((root / "params.yaml").read_text())
    assert written["pretrain"]["lr"] == 1e-05 and written["pretrain"]["base"] == changes["pretrain.base"]
    assert (
        written["tuning"]["new"]["deep"] == [{"a": None}]
        and written["sft"]["lr"] == whole.load(ROOT / "params.yaml").sft.lr
    )


def test_doubts_are_told(committed):
    root, _ = committed
    (one,) = origins(root)
    assert provenance.doubts(root, [one]) == []
    dirty = Origin("data", "d" * 64, (), {"git.dirty": "true", "sluice.stage": "data"}, {}, True)
    lost = Origin("tokenizer", "e" * 64, (), {}, {}, False)
    old = Origin(one.name, one.content, one.versions, one.tags | {"package.torch": "1.0"}, {"x": "y" * 5000}, True)
    lines = provenance.doubts(root, [dirty, lost, old])
    assert [line.split(":")[0] for line in lines[:3]] == ["data", "tokenizer eeeeeeeeeeee", "pretrain"]
    assert "changes that were not committed" in lines[0] and "longer than what the store keeps" in lines[2]
    assert lines[3].startswith("torch 1.0 made it, and here is ")


def test_files_that_the_commit_has_not_are_told(committed):
    root, commit = committed
    (one,) = origins(root)
    read = {"params.yaml": "a" * 64, "data/mine.csv": "b" * 64}
    one.tags.update({"git.commit": commit, **{f"sluice.input.{name}": digest for name, digest in read.items()}})
    told = f"pretrain: reads data/mine.csv, which the commit has not: put it there (SHA-256 {'b' * 64})"
    assert provenance.doubts(root, [one]) == [told]
    one.tags["git.commit"] = "f" * 40
    assert provenance.doubts(root, [one]) == [], "a commit of another clone: nobody can tell here"


def test_files_are_told_by_their_names_whatever_those_are_and_artifacts_are_none(committed):
    """A tag cannot have every name; what a stage makes is no file to put there; code of one's own is one."""
    root, _ = committed
    (one,) = origins(root)
    (root / "data").mkdir()
    (root / "data/reviews (1).csv").write_text("a")
    graph_text = (ROOT / "dvc.yaml").read_text()
    start = graph_text.index("  pretrain:")
    own = ["data/reviews (1).csv", "data/lost (2).csv", "data/own.py", "artifacts/data/corpus"]
    added = "    deps:\n" + "".join(f'    - "{path}"\n' for path in own)
    (root / "dvc.yaml").write_text(graph_text[:start] + graph_text[start:].replace("    deps:\n", added, 1))
    git(root, "add", "-A")
    git(root, "commit", "-qm", "files with brackets")
    names = {lineage.tag_name(lineage.INPUT, name): "b" * 64 for name in own if name != "data/own.py"}
    one.tags.update({"git.commit": git(root, "rev-parse", "HEAD"), **names})
    assert provenance.doubts(root, [one]) == [
        f"pretrain: reads data/lost (2).csv, which the commit has not: put it there (SHA-256 {'b' * 64})",
        "pretrain: reads data/own.py, which the commit has not: put it there",
    ]


def test_a_folder_of_ones_own_is_no_artifact_whatever_it_is_called(committed):
    """As `path: texts/*.txt.gz` makes a dep of `texts`, or of `data`: it was told as what no run in the store made."""
    root, commit = committed
    text = (ROOT / "dvc.yaml").read_text()
    start = text.index("  data:")
    (root / "dvc.yaml").write_text(  # as `sluice run` writes it, and nobody has committed it
        text[:start] + text[start:].replace("    deps:\n", "    deps:\n    - texts\n    - data\n", 1)
    )
    tags = {"sluice.stage": "data", "git.commit": commit, "git.dirty": "false"}
    tags |= {"sluice.input.texts": "a" * 64, "sluice.input.data": "b" * 64, "sluice.input.gone": "c" * 64}
    one = Origin("data", "d" * 64, (), tags, {}, True)
    assert provenance._files(root, one) == {"texts": "texts", "data": "data"}
    assert provenance._files(root, replace(one, tags=tags | {"sluice.stage": "sft"})) == {}, "there data is an artifact"
    lines = [line for line in provenance.doubts(root, [one]) if "put it there" in line]
    assert lines == [
        f"data: reads texts, which the commit has not: put it there (SHA-256 {'a' * 64})",
        f"data: reads data, which the commit has not: put it there (SHA-256 {'b' * 64})",
    ]


def test_a_folder_of_a_larger_repository_is_cloned_with_it(tmp_path):
    root = tmp_path / "team/models"
    root.mkdir(parents=True)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "mlflow", root / "mlflow")
    git(tmp_path / "team", "init", "-q")
    git(tmp_path / "team", "add", "-A")
    git(tmp_path / "team", "commit", "-qm", "start")
    (one,) = origins(root)
    one.tags["git.commit"] = git(root, "rev-parse", "HEAD")
    one.tags.pop("sluice.threads")
    lines = provenance.commands(root, [one])
    assert lines[0] == f"git clone {tmp_path / 'team'} rebuilt && cd rebuilt/models"
    assert not any(line.startswith("python - <<") for line in lines), "the params of the commit are found"


@pytest.mark.slow
def test_the_commands_make_the_same_bytes_in_a_clean_clone(make_workspace: Callable[[], Path], tmp_path, monkeypatch):
    """Profile tiny until pretrain, with a param that was never committed; then the printed commands, typed as they are.

    `make setup` is the one that is not: it stands for the environment that runs this test.
    """
    root = make_workspace()
    git(root, "add", "-A")
    git(root, "commit", "-qm", "with DVC")
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["pretrain"]["lr"] = 0.00025
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    subprocess.run(["dvc", "repro", "-q", "pretrain"], cwd=root, env=own_environment(), check=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/.sluice/mlflow/mlflow.db")
    client, experiment = store.connect(root)
    (entry,) = client.search_model_versions("name = 'sluice-base'")
    found = provenance.trace(root, client, experiment, entry)
    assert [one.stage for one in found] == ["data", "tokenizer", "pretrain"]
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin/make"
    stand_in.write_text("#!/bin/sh\nmkdir -p .venv/bin && touch .venv/bin/activate\n")
    stand_in.chmod(0o755)
    env = own_environment() | {"PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
    script = "\n".join(provenance.commands(root, found))
    clean = tmp_path / "clean"
    clean.mkdir()
    done = subprocess.run(["bash", "-euc", script], cwd=clean, env=env, capture_output=True, text=True)
    assert done.returncode == 0, script + done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "the same bytes"
    rebuilt = clean / "rebuilt"
    assert whole.load(rebuilt / "params.yaml").pretrain.lr == 0.00025
    for stage in ("data", "tokenizer", "pretrain"):
        assert artifacts.content_hash(rebuilt / "artifacts" / stage) == artifacts.content_hash(
            root / "artifacts" / stage
        )
