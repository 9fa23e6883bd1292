"""Code, dvc.yaml, params.yaml, registry.yaml and README may not drift apart."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from closure import closure

from pipelines.core import graph
from pipelines.core.params import whole

ROOT = Path(__file__).parents[1]
STAGES = tuple(graph.load(ROOT))


def stage_files() -> set[str]:
    return {path.stem for path in (ROOT / "pipelines").glob("*.py") if not path.stem.startswith("__")}


def test_files_are_stages_are_sections() -> None:
    sections = set(whole.Params.model_fields) - {"compute", "flow"}
    assert stage_files() == set(STAGES) == sections


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_import_closure(stage: str) -> None:
    declared = set(graph.stage(ROOT, stage).code)
    assert declared == closure(ROOT, f"pipelines/{stage}.py")


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_entry(stage: str) -> None:
    raw = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]
    assert raw["cmd"] == f"python -m pipelines {stage}"
    assert raw["params"] == [stage]
    assert list(raw["metrics"][0].items()) == [(f"metrics/{stage}.json", {"cache": False})]


def test_core_imports_no_stage() -> None:
    names = stage_files()
    for path in (ROOT / "pipelines/core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                parts = (module or "").split(".")
                assert not (parts[0] == "pipelines" and len(parts) > 1 and parts[1] in names), f"{path}: {module}"


def test_mlflow_folder_does_not_shadow_the_library() -> None:
    assert not list((ROOT / "mlflow").rglob("*.py"))
    code = "import mlflow; print(mlflow.__version__)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("stage", STAGES)
def test_committed_metrics_have_the_declared_keys(stage: str) -> None:
    place = ROOT / graph.stage(ROOT, stage).metrics
    if not place.exists():
        pytest.fail(f"{place} is not committed: run the pipeline with the default profile")
    keys = set(yaml.safe_load(place.read_text()))
    assert keys >= importlib.import_module(f"pipelines.{stage}").METRICS


def test_every_module_and_public_function_is_short_enough_to_read() -> None:
    for path in [*(ROOT / "pipelines").rglob("*.py"), *(ROOT / "flows").rglob("*.py")]:
        source = path.read_text()
        assert source.count("\n") <= 300, f"{path} has {source.count(chr(10))} lines"
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, ast.Global), f"{path}:{node.lineno} global"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno
                assert length <= 75, f"{path}:{node.lineno} {node.name} has {length} lines"


def test_stage_modules_import_fast_and_light() -> None:
    heavy = {"torch", "transformers", "mlflow", "prefect", "great_expectations", "pandas"}
    code = (
        "import sys, importlib\n"
        f"for stage in {STAGES!r}: importlib.import_module(f'pipelines.{{stage}}')\n"
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(("made_in", "cleared"), [("", False), (".", False), ("/elsewhere/.venv", True)])
def test_a_moved_folder_gets_a_new_virtual_environment(tmp_path: Path, made_in: str, cleared: bool) -> None:
    """The scripts of the old one call a Python by its path; a stamp of before these were told apart is let be."""
    root = tmp_path / "a folder"
    for name in ("pyproject.toml", "constraints.txt", "flows/environment.pth", ".venv/.sluice-stamp"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    shutil.copy(ROOT / "Makefile", root)
    (root / ".venv/.sluice-stamp").write_text(f"{root.resolve()}/.venv\n" if made_in == "." else made_in)
    command = ["make", "-n", "setup", "VENV=.venv"]  # said again: the tests may run under `make VENV=...`
    printed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert ("-m venv --clear" in printed) is cleared and ("-m venv" in printed) is cleared


def test_tools_work_on_the_state_of_the_project_that_they_are_called_in(tmp_path: Path) -> None:
    """DVC keeps the hashes of a worktree's files there, where `sluice run` looks for them, not in the main folder."""
    start = f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n" + (ROOT / "flows/environment.pth").read_text()
    code = start + "import os; print(os.environ['DVC_SITE_CACHE_DIR'])"
    worktree = tmp_path / "worktree"
    (worktree / "pipelines/core").mkdir(parents=True)
    (worktree / "pipelines/core/environment.py").touch()
    env = {key: value for key, value in os.environ.items() if key != "DVC_SITE_CACHE_DIR"}
    for place, root in ((worktree, worktree), (tmp_path, ROOT), (ROOT, ROOT)):
        # -S: without the installed copy of that file
        command = [sys.executable, "-S", "-c", code]
        run = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == f"{root}/.sluice/dvc/site", place
    closed = (
        "import os; look = os.stat\n"
        "def stat(path, **how):\n"
        "    if str(path).startswith('pipelines'): raise PermissionError(13, 'Permission denied', path)\n"
        "    return look(path, **how)\n"
        "os.stat = stat\n"
    )
    command = [sys.executable, "-S", "-c", closed + code]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.stdout.strip() == f"{ROOT}/.sluice/dvc/site", "called in a folder that nobody lets us search"


@pytest.mark.slow
def test_set_up_knows_an_archive_a_clone_and_a_folder_of_a_larger_repository(tmp_path: Path) -> None:
    """DVC works in each of them, and of an archive that becomes a repository later it knows the history."""
    root = tmp_path / "a folder"
    for name in ("pyproject.toml", "constraints.txt", "flows/environment.pth", ".venv/.sluice-stamp"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    shutil.copy(ROOT / "Makefile", root)
    shutil.copytree(ROOT / ".dvc", root / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))

    def set_up() -> str:
        env = {
            **os.environ,
            "GIT_CEILING_DIRECTORIES": str(tmp_path.parent),
            "DVC_SITE_CACHE_DIR": str(tmp_path / "site"),
        }
        for command in (["make", "setup", "VENV=.venv"], ["dvc", "status", "-q"]):
            subprocess.run(command, cwd=root, env=env, check=True, capture_output=True)
        command = ["dvc", "config", "core.no_scm"]
        return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True).stdout.strip()

    assert set_up() == "true", "an archive"
    assert set_up() == "true"
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    assert set_up() == ""
    (root / ".dvc/config.local").write_text("# no_scm: what `make setup` writes\n")
    assert set_up() == "", "a word in a comment is no setting"
    (root / ".dvc/config.local").write_text("[core]\n\tno_scm = True\n")
    assert set_up() == "", "as Python and people write it"
    shutil.rmtree(root / ".git")
    shutil.rmtree(root / ".dvc")
    assert set_up() == "True" and not (root / ".dvc/config.local").exists(), "which `dvc init` has written"
    shutil.rmtree(root / ".dvc")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    assert set_up() == "", "a folder of a repository"


def test_clean_forgets_its_own_worktrees_and_no_other(tmp_path: Path) -> None:
    """One of a person's may be on a disk that is not mounted now."""
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    root, theirs = tmp_path / "a folder", tmp_path / "theirs"
    root.mkdir()
    shutil.copy(ROOT / "Makefile", root)
    for words in (
        ["init", "-q"],
        ["commit", "-q", "--allow-empty", "-m", "start"],
        ["worktree", "add", "-q", ".sluice/worktrees/nightly-1"],
        ["worktree", "add", "-q", str(theirs)],
    ):
        subprocess.run([*git, *words], cwd=root, check=True)
    theirs.rename(tmp_path / "off")
    subprocess.run(["make", "clean", "VENV=.venv"], cwd=root, check=True, capture_output=True)
    left = subprocess.run(["git", "worktree", "list"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert "theirs" in left and "nightly-1" not in left and not (root / ".sluice").exists()


def test_targets_are_made_one_after_the_other_whatever_make_is_told(tmp_path: Path) -> None:
    for name in (
        "pyproject.toml",
        "constraints.txt",
        "flows/environment.pth",
        ".venv/.sluice-stamp",
        ".venv/bin/sluice",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = true\n")
    stand_in = tmp_path / ".venv/bin/sluice"
    stand_in.write_text("#!/bin/sh\necho begin $1; sleep 0.5; echo end $1\n")
    stand_in.chmod(0o755)
    command = ["make", "--no-print-directory", "-j4", "status", "doctor", "VENV=.venv"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert printed.split("\n")[:4] == ["begin status", "end status", "begin doctor", "end doctor"]


def test_readme_names_what_exists() -> None:
    """Its make targets, sluice commands, params keys and the paths of its tree."""
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    commands = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    targets = {line.split()[1] for line in commands if line.startswith("make ")}
    declared = {name for line in re.findall(r"^([a-z -]+):(?!=)", makefile, re.MULTILINE) for name in line.split()}
    assert {"run", "ui", "check"} <= targets <= declared
    from flows.cli import app

    known = {(command.name or command.callback.__name__) for command in app.registered_commands if command.callback}
    used = {line.split()[1] for line in commands if line.startswith("sluice ")}
    assert used and used <= known
    tree = next(block for block in blocks if block.startswith("params.yaml "))
    made_by_runs = {"artifacts/", "reports/", ".sluice/", ".work/"}
    for line in tree.splitlines():
        for path in line.split("   ")[0].split():
            assert path in made_by_runs or (ROOT / path).exists(), f"README's tree names {path}"
    sources = yaml.safe_load(next(block for block in blocks if block.startswith("data:\n")))
    every = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section, keys in sources.items():
        every[section] |= keys
    whole.Params.model_validate(every)
