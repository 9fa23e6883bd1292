"""Worktrees of runs: what they share, what they keep to themselves, and what is left when they end or are killed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_repository as fake
import psutil
import pytest
import station
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Crashed, Failed, Pending
from processes import has_ended

from flows import backfill, evaluate, failures, isolated, overrides, run_locks, sources, stages, workspace
from flows.isolated import run_name
from flows.supervise import detached_environment
from pipelines.core import artifacts, lineage, store
from pipelines.core.errors import ArtifactError, ParamsError, StoreUnavailable, UserError


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which everything has run and is committed."""
    root = station.make(tmp_path_factory.mktemp("workspace") / "clone")
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], cwd=root, env=_environment(root), check=True)
    station.commit(root, "everything has run")
    return root


def _environment(root: Path) -> dict[str, str]:
    return fake.environment(root, root / ".sluice" / "prefect")


@pytest.fixture
def root(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "clone"
    shutil.copytree(template, place, symlinks=True)
    for key, value in _environment(place).items():
        monkeypatch.setenv(key, value)
    fake.ran(place)
    return place


def change_params(place: Path) -> None:
    """Of stage `pretrain`, which `right` depends on."""
    overrides.apply(place, ["pretrain.tokens=4096"])


def dvc(place: Path, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *words], cwd=place, env=detached_environment(), check=True)


def test_a_run_has_the_commits_files_and_outputs_and_the_working_copy_stays_as_it_is(root: Path) -> None:
    (root / "stage.py").write_text("in the middle of something")
    (root / "data").mkdir()
    (root / "data" / "mine.jsonl").write_text("{}")
    before = workspace.git(root, "status", "--porcelain")
    with workspace.opened(root, "nightly-1") as run:
        assert "in the middle" not in (run.place / "stage.py").read_text()
        assert (run.place / "artifacts" / "left" / "made.txt").read_text() == "left"  # from the clone's cache
        assert (run.place / "data" / "mine.jsonl").read_text() == "{}"
        assert store.address(run.place) == store.address(root)  # one store, one journal
        change_params(run.place)
        dvc(run.place, "repro", "-q")
        assert fake.ran(run.place) == ["report", "right"]
        assert run.commit("what it made") is not None
        assert run.commit("nothing more") is None
    assert workspace.git(root, "status", "--porcelain") == before
    assert not run.place.exists() and run_locks.living(root) == []
    changed = workspace.git(root, "diff", "--name-only", "HEAD", "runs/nightly-1").split()
    assert set(changed) <= {"dvc.lock", "params.yaml"} and "dvc.lock" in changed


def test_files_of_ones_own_make_no_run_dirty(root: Path) -> None:
    """Or each of its models would be told as made of code that is in no commit."""
    shutil.copy(fake.ROOT / ".gitignore", root)
    station.commit(root, "as in the real one")
    (root / "data").mkdir()
    with workspace.opened(root, "nightly") as run:
        assert (run.place / "data").is_symlink() and workspace.git(run.place, "status", "--porcelain") == ""


def test_files_of_ones_own_are_the_deps_they_are_in_the_clone(root: Path) -> None:
    """By another name every run would make the data again, with the clone's address in its `dvc.yaml`."""
    (root / "data").mkdir()
    (root / "data" / "mine.jsonl").write_text('{"text": "a"}\n')
    shutil.copy(fake.ROOT / ".gitignore", root)
    overrides.apply(root, ["data.sources=[{path: data/mine.jsonl, table: corpus}]"])
    assert sources.keep(root) == ["dvc.yaml: stage data now depends on data/mine.jsonl"]
    dvc(root, "repro", "-q")
    station.commit(root, "data of one's own")
    with workspace.opened(root, "nightly") as run:
        assert sources.keep(run.place) == []
        assert set(stages.look(run.place).reasons) <= {"report"}, "which no cache has"


def test_a_file_whose_name_is_no_utf8_is_no_obstacle(root: Path) -> None:
    """As an old archive leaves one, where git is told not to quote names: each stage ended in a traceback."""
    subprocess.run(["git", "config", "core.quotepath", "false"], cwd=root, check=True)
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.txt")).write_text("")
    assert lineage._git(root)["git.dirty"] == "true"
    assert os.fsencode(workspace.git(root, "status", "--porcelain")).endswith(b"caf\xe9.txt")


def test_a_run_that_changes_nothing_leaves_no_branch(root: Path) -> None:
    with workspace.opened(root, "idle"):
        assert workspace.git(root, "branch", "--list", "runs/*")
    assert workspace.git(root, "branch", "--list", "runs/*") == ""
    assert workspace.git(root, "worktree", "list").count("\n") == 0


def test_a_persons_hooks_do_not_meet_it(root: Path) -> None:
    """`dvc install` sets one that checks outputs out, before the worktree knows of the clone's cache."""
    dvc(root, "install")
    for name in ("prepare-commit-msg", "post-commit"):
        hook = root / ".git" / "hooks" / name
        hook.write_text("#!/bin/sh\nexit 1\n")
        hook.chmod(0o755)
    shutil.rmtree(root / "artifacts")
    with workspace.opened(root, "nightly") as run:
        (run.place / "stage.py").write_text("# other\n")
        assert run.commit("other") is not None
    assert not (root / "artifacts").exists()


def test_half_an_author_is_made_whole(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A nightly run would fail at its last step where git knows an address and no name."""
    half = tmp_path / "gitconfig"
    half.write_text("[user]\nemail = ada@example.org\nuseConfigOnly = true\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(half))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for who in ("AUTHOR", "COMMITTER"):
        for what in ("NAME", "EMAIL"):
            monkeypatch.delenv(f"GIT_{who}_{what}", raising=False)
    with workspace.opened(root, "half") as run:
        change_params(run.place)
        made = run.commit("by whom")
    assert workspace.git(root, "log", "-1", "--format=%an <%ae>", str(made)) == "sluice <ada@example.org>"


def test_two_at_once_do_not_meet(root: Path) -> None:
    with workspace.opened(root, "one") as one, workspace.opened(root, "two") as two:
        assert run_locks.living(root) == ["one", "two"]
        (one.place / "stage.py").write_text((one.place / "stage.py").read_text() + "# one\n")
        dvc(one.place, "repro", "-q")
        assert (fake.ran(one.place), fake.ran(two.place)) == (
            ["data", "report"],
            [],
        )  # the same bytes: left, right stay
        with pytest.raises(UserError, match="a run named one is going on"), workspace.opened(root, "one"):
            pass
        one.commit("one")
        assert two.commit("two") is None
    assert workspace.git(root, "branch", "--list", "--format=%(refname:short)", "runs/*") == "runs/one"


def _hold(root: str, ready: str) -> None:
    """A run that is killed: it has a checkpoint, and never ends."""
    with workspace.opened(Path(root), "victim") as run:
        checkpoint = run.place / ".work" / "data" / "0123456789abcdef"
        checkpoint.mkdir(parents=True)
        (checkpoint / "step-7").write_text("seven")
        Path(ready).write_text("ready")
        time.sleep(600)


def test_a_killed_run_is_no_obstacle_and_its_checkpoints_go_on(root: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    process = multiprocessing.get_context("spawn").Process(target=_hold, args=(str(root), str(ready)))
    process.start()
    while not ready.exists():
        assert process.is_alive()
        time.sleep(0.1)
    assert run_locks.living(root) == ["victim"] and run_locks.abandoned(root) == []
    os.kill(int(process.pid or 0), signal.SIGKILL)
    process.join()
    assert run_locks.living(root) == [] and run_locks.abandoned(root) == ["victim"]
    for name in ("next", "the-one-after"):  # a run that does not use them hands them on
        with workspace.opened(root, name) as run:
            assert (run.place / ".work" / "data" / "0123456789abcdef" / "step-7").read_text() == "seven"
            assert run_locks.abandoned(root) == []
    assert workspace.git(root, "branch", "--list", "runs/*") == ""


def test_a_run_that_fails_leaves_no_lock(root: Path) -> None:
    with pytest.raises(ZeroDivisionError), workspace.opened(root, "fails"):
        raise ZeroDivisionError
    assert list(run_locks.folder(root).iterdir()) == [run_locks.folder(root) / "present"]


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [("../up", "HEAD", "is no name of a run"), ("a", "no-such-branch", "'no-such-branch' names no commit")],
)
def test_a_name_or_revision_that_is_none_is_refused(root: Path, name: str, revision: str, said: str) -> None:
    with pytest.raises(UserError, match=said), workspace.opened(root, name, revision):
        pass
    assert run_locks.living(root) == []


def test_a_folder_of_a_larger_repository_is_refused(root: Path) -> None:
    part = root / "models"
    part.mkdir()
    with (
        pytest.raises(UserError, match=f"models is a folder of the git repository in {root}: a run"),
        workspace.opened(part, "x"),
    ):
        pass
    assert not (part / ".sluice").exists()


def test_a_remote_that_is_away_for_a_moment_is_asked_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dvc(root, "remote", "add", "-q", "-d", "team", str(tmp_path / "remote"))
    station.commit(root, "a remote")
    real, asked = workspace.Workspace.dvc, list[str]()

    def away(run: workspace.Workspace, *words: str) -> None:
        asked.append(words[0])
        if asked in (["fetch"], ["fetch", "fetch"]):
            raise StoreUnavailable("away")
        real(run, *words)

    monkeypatch.setattr(workspace, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(workspace.Workspace, "dvc", away)
    with workspace.opened(root, "patient"):
        assert asked == ["fetch", "fetch", "fetch", "checkout"]


def test_outputs_go_to_the_remote_and_come_back_where_the_cache_has_lost_them(root: Path, tmp_path: Path) -> None:
    dvc(root, "remote", "add", "-q", "-d", "team", str(tmp_path / "remote"))
    station.commit(root, "a remote")
    with workspace.opened(root, "pushes") as run:
        assert run.remote == "team"
        run.push()
    shutil.rmtree(root / ".dvc" / "cache")
    with workspace.opened(root, "pulls") as run:
        assert (run.place / "artifacts" / "data" / "made.txt").read_text() == "data"


def test_a_remote_that_is_not_committed_yet_is_one(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "PAUSES", (0.0, 0.0))
    dvc(root, "remote", "add", "-q", "-d", "team", str(tmp_path / "remote"))
    with workspace.opened(root, "pushes") as run:
        run.push()
        assert list((tmp_path / "remote").rglob("*.dir")) and workspace.git(run.place, "status", "-s", ".dvc") == ""


def test_why_a_remote_fails_is_told_and_no_password(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes into the state of the flow run, and from there to a webhook."""
    monkeypatch.setattr(workspace, "PAUSES", (0.0, 0.0))
    dvc(root, "remote", "add", "-q", "-d", "team", "http://team:planted@127.0.0.1:9/store")
    with workspace.opened(root, "pushes") as run:
        with pytest.raises(StoreUnavailable, match=r"dvc push --run-cache in pushes: (?s:.*)Cannot connect to host"):
            run.push()
        with pytest.raises(StoreUnavailable, match="remote 'http://127.0.0.1:9/store' doesn't exist") as caught:
            run.dvc("remote", "remove", "http://team:planted@127.0.0.1:9/store")
    assert "planted" not in str(caught.value) and "troubles" not in str(caught.value)


@pytest.fixture
def hanging(root: Path) -> Iterator[None]:
    """A remote that takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dvc(root, "remote", "add", "-q", "-d", "team", f"http://127.0.0.1:{silent.getsockname()[1]}/store")
        yield


@pytest.mark.usefixtures("hanging")
def test_a_remote_that_hangs_is_told_with_the_place_of_the_log(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that waits for it has every later one cancelled, and ends in no state that somebody hears of."""
    monkeypatch.setattr(workspace, "PAUSES", ())
    monkeypatch.setattr(workspace, "DVC_HOURS", 0.001)
    with pytest.raises(StoreUnavailable) as caught, workspace.opened(root, "waits"):
        pass
    log = root / ".sluice" / "logs" / "runs" / "waits.log"
    assert str(caught.value) == f"dvc fetch in waits: took longer than 0.001 hours and was stopped; see {log}"
    assert log.exists() and _dvc_of(root, "waits") == []


def test_what_dvc_prints_is_kept_without_a_login(root: Path) -> None:
    with workspace.opened(root, "prints") as run, pytest.raises(StoreUnavailable):
        run.dvc("remote", "remove", "http://team:planted@127.0.0.1:9/store")
    said = (root / ".sluice" / "logs" / "runs" / "prints.log").read_text()
    assert "remote 'http://127.0.0.1:9/store' doesn't exist" in said


def test_what_dvc_has_printed_stays_when_a_run_is_cancelled(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worktree goes, and with it what DVC has written into."""

    def cancelled(seconds: float, command: list[str], cwd: Path, log: Path, env: dict[str, str]) -> int | None:
        with log.open("a") as file:
            file.write("3 files pushed\n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), workspace.opened(root, "ends") as run:
        monkeypatch.setattr(workspace, "run_within", cancelled)
        run.dvc("push")
    assert (root / ".sluice" / "logs" / "runs" / "ends.log").read_text().endswith("3 files pushed\n")


def _dvc_of(root: Path, run: str) -> list[psutil.Process]:
    """DVC's processes that work in a run's place, supervisors included."""
    place = str(run_locks.folder(root) / run)
    found = [one for one in psutil.process_iter(["cmdline", "cwd"]) if one.info["cwd"] == place]
    return [one for one in found if "dvc" in (one.info["cmdline"] or []) and not has_ended(one)]


@pytest.mark.usefixtures("hanging")
def test_a_killed_run_leaves_no_dvc_behind(root: Path, tmp_path: Path) -> None:
    """It would go on in a worktree that the next run removes."""
    given = (str(root), str(tmp_path / "never"))
    process = multiprocessing.get_context("spawn").Process(target=_hold, args=given)
    process.start()
    while not (left := _dvc_of(root, "victim")):
        assert process.is_alive()
        time.sleep(0.1)
    os.kill(int(process.pid or 0), signal.SIGKILL)
    process.join()
    psutil.wait_procs(left, timeout=60)
    assert [one for one in left if not has_ended(one)] == [] == _dvc_of(root, "victim")


def test_the_key_file_of_a_remote_is_that_of_the_clone(root: Path) -> None:
    """As `dvc remote modify` writes it, it is relative to the folder of the config."""
    from dvc.repo import Repo

    dvc(root, "remote", "add", "-q", "team", "gs://bucket/store")
    dvc(root, "remote", "modify", "-q", "--local", "team", "credentialpath", "secrets/key.json")
    with workspace.opened(root, "reads") as run:
        with Repo(str(run.place)) as repo:
            assert repo.config["remote"]["team"]["credentialpath"] == str(root / "secrets" / "key.json")
        assert (run.place / ".dvc" / "config.local").stat().st_mode & 0o077 == 0, "it may hold a password"


def test_a_worktree_of_a_person_is_kept_though_its_disk_is_not_mounted_now(root: Path, tmp_path: Path) -> None:
    theirs, off = tmp_path / "disk", tmp_path / "off"
    workspace.git(root, "worktree", "add", "-q", "-b", "theirs", str(theirs))
    theirs.rename(off)
    for _ in range(2):
        with workspace.opened(root, "nightly"):
            pass
    off.rename(theirs)
    assert workspace.git(theirs, "branch", "--show-current") == "theirs"
    assert "nightly" not in workspace.git(root, "worktree", "list")


@pytest.mark.parametrize("copied", [False, True])
def test_a_killed_run_is_forgotten_where_the_clone_was_moved_or_copied(root: Path, copied: bool) -> None:
    """Git names worktrees by whole paths, and lets nobody delete or take up a branch that is checked out in one."""
    left = root / ".sluice" / "worktrees" / "victim"
    workspace.git(root, "worktree", "add", "-q", "-B", "runs/victim", str(left))
    left.with_name("victim.base").write_text(workspace.resolve(root, "HEAD"))
    other = root.with_name("other")
    if copied:
        shutil.copytree(root, other, symlinks=True)
    else:
        root.rename(other)
    for _ in range(2):
        with workspace.opened(other, "victim") as run:
            assert (run.place / "dvc.yaml").exists()
    assert "victim" not in workspace.git(other, "worktree", "list") + workspace.git(other, "branch")
    if copied:
        assert workspace.git(left, "branch", "--show-current") == "runs/victim"


def test_line_ends_are_as_committed_whatever_git_is_told(root: Path) -> None:
    """Or every file that DVC has hashed would be another one in a worktree, and all stages run again."""
    shutil.copy(fake.ROOT / ".gitattributes", root)
    station.commit(root, "attributes")
    workspace.git(root, "config", "core.autocrlf", "true")
    with workspace.opened(root, "nightly") as run:
        assert stages.look(run.place).reasons == {"report": ("reports deleted",)}, "which is not in the cache"


# What a deployment is given


def test_a_runs_name_is_fit_for_a_branch() -> None:
    assert run_name("Bold Otter_7", "0123456789ab-cdef") == "bold-otter-7-01234567"
    assert run_name("학습", "0123456789ab-cdef") == "run-01234567"
    long = run_name("why not " * 40, "0123456789ab-cdef")
    assert workspace._NAME.fullmatch(long) and len(long) < 80


def test_from_and_until_leave_out_what_is_not_between() -> None:
    parents = {"data": (), "left": ("data",), "right": ("data",), "report": ("left", "right")}
    state = stages.State(parents, {}, {})
    assert state.between(None, None) == list(parents)
    assert state.between("left", None) == ["left", "report"]
    assert state.between(None, "right") == ["data", "right"]
    assert state.between("data", "left") == ["data", "left"]
    assert state.needed(["report"], only=True) == ["report"]
    with pytest.raises(UserError, match="stage right does not depend on left"):
        state.between("left", "right")
    with pytest.raises(UserError, match="no stage 'lift' in dvc.yaml"):
        state.between("lift", None)


def test_from_a_stage_on_what_it_needs_is_taken_as_it_stands(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], bool]] = []
    monkeypatch.setattr(isolated, "run_name", lambda *_: "nightly")
    monkeypatch.setattr(isolated, "create_markdown_artifact", lambda *_, **__: None)
    monkeypatch.setattr(isolated, "run_stages", lambda _, wanted, only, hours: asked.append((wanted, only)))
    for given in ({"from_stage": "left"}, {"until_stage": "left"}, {"only": ["right"]}, {}):
        isolated.isolated_run.fn(str(root), **given)
    every = ["data", "left", "right", "report"]
    assert asked == [(["left", "report"], True), (["data", "left"], False), (["right"], True), (every, False)]
    with pytest.raises(UserError, match="from_stage and until_stage do not go with it"):
        isolated.isolated_run.fn(str(root), only=["right"], from_stage="left")


def test_files_that_overrides_name_are_deps_before_a_stage_runs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "data").mkdir()
    (root / "data" / "mine.jsonl").write_text('{"text": "a"}\n')
    shutil.copy(fake.ROOT / ".gitignore", root)
    station.commit(root, "as in the real one")
    seen: list[str] = []
    monkeypatch.setattr(isolated, "run_name", lambda *_: "nightly")
    monkeypatch.setattr(isolated, "create_markdown_artifact", lambda *_, **__: None)
    monkeypatch.setattr(isolated, "run_stages", lambda run, *_: seen.append(workspace.git(run.place, "status", "-s")))
    isolated.isolated_run.fn(str(root), params=["data.sources=[{path: data/mine.jsonl, table: corpus}]"])
    assert seen == [""], "what is registered names a commit that makes it again"
    assert "- data/mine.jsonl" in workspace.git(root, "show", "runs/nightly:dvc.yaml")


@pytest.mark.slow
def test_an_evaluation_measures_todays_data_and_keeps_none(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It took those of the commit, so what has come since was never seen, and an older one passed for today's."""
    mine, code = root / "data" / "mine.jsonl", (root / "stage.py").read_text()
    copies = '.write_text((root / "data/mine.jsonl").read_text() if name == "data" else name)'
    (root / "stage.py").write_text(code.replace(".write_text(name)", copies))
    mine.parent.mkdir()
    mine.write_text('{"text": "then"}')
    shutil.copy(fake.ROOT / ".gitignore", root)
    overrides.apply(root, ["data.sources=[{path: data/mine.jsonl, table: corpus}]"])
    sources.keep(root)
    dvc(root, "repro", "-q", "-s", "data")
    assert fake.ran(root) == ["data"]
    before = station.commit(root, "data of one's own"), workspace.git(root, "branch", "--list")
    measured: list[tuple[str, list[str]]] = []

    def measure(run: workspace.Workspace, answers: Path, hours: float) -> None:
        measured.append(((run.place / "artifacts" / "data" / "made.txt").read_text(), fake.ran(run.place)))
        artifacts.write_json(answers, {"rows": [], "notes": []})

    monkeypatch.setattr(evaluate, "run_name", lambda *_: "weekly")
    monkeypatch.setattr(evaluate, "create_markdown_artifact", lambda *_, **__: None)
    monkeypatch.setattr(evaluate, "run_stages", isolated.run_stages.fn)
    monkeypatch.setattr(evaluate, "_measure", measure)
    for text in ("then", "now"):
        mine.write_text(f'{{"text": "{text}"}}')
        assert evaluate.evaluate.fn(str(root)) == []
    assert measured == [('{"text": "then"}', []), ('{"text": "now"}', ["data"])]
    assert (workspace.resolve(root, "HEAD"), workspace.git(root, "branch", "--list")) == before
    assert workspace.git(root, "status", "--porcelain") == ""


def test_overrides_are_written_as_the_values_they_are(root: Path) -> None:
    overrides.apply(root, ["sft.lr=0.0005", "ppo.iterations=12"])
    said = overrides.apply(root, ["sft.lr=1e-4", "ppo.iterations=3"])
    assert said == ["sft.lr: 0.0005 -> 0.0001", "ppo.iterations: 12 -> 3"]
    text = (root / "params.yaml").read_text()
    assert "lr: 0.0001" in text and "# generate, score, update" in text
    assert overrides.apply(root, ["sft.lr=1e-4"]) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("sft.lrr=1", r"no key 'sft\.lrr'; sft has: .*lr"),
        ("soft.lr=1", r"no key 'soft\.lr'; it has: .*sft"),
        ("sft.lr", "expected KEY=VALUE"),
        ("rag.kinds=[symbols", r"'rag\.kinds=\[symbols': the value is not valid YAML: (?s:.*)expected ',' or '\]'"),
        ("sft.lr=-1", r"sft\.lr: Input should be greater than 0"),
    ],
)
def test_an_override_that_is_none_leaves_the_params_alone(root: Path, given: str, said: str) -> None:
    before = (root / "params.yaml").read_text()
    with pytest.raises(ParamsError, match=said):
        overrides.apply(root, ["ppo.iterations=3", given])
    assert (root / "params.yaml").read_text() == before


@pytest.fixture
def versions(root: Path) -> tuple[str, str, str]:
    """Three commits: other data at the second one, other code at the third."""
    first = workspace.resolve(root, "HEAD")
    stage = (root / "stage.py").read_text()
    (root / "stage.py").write_text(stage.replace(".write_text(name)", '.write_text(name + "2")'))
    dvc(root, "repro", "-q")
    second = station.commit(root, "other data")
    change_params(root)
    dvc(root, "repro", "-q")
    return first, second, station.commit(root, "other params")


def test_commits_with_the_same_data_are_one_version(root: Path, versions: tuple[str, str, str]) -> None:
    first, second, third = versions
    assert backfill.versions(root, [f"{first}~1..{third}"]) == [first, second]
    assert backfill.versions(root, ["HEAD", first]) == [first, third]
    with pytest.raises(UserError, match="name the versions"):
        backfill.versions(root, [])
    with pytest.raises(UserError, match="no commit in HEAD..HEAD changes dvc.lock"):
        backfill.versions(root, ["HEAD..HEAD"])


def test_a_version_is_started_once_unless_it_ended_badly(
    root: Path, versions: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    states: dict[str, State[Any]] = {}  # a server: one run for a key

    def run_deployment(_: str, *, idempotency_key: str, **given: Any) -> Any:
        state = states.setdefault(idempotency_key, Pending())
        return SimpleNamespace(state=state)

    monkeypatch.setattr(backfill, "run_deployment", run_deployment)
    for then, count in ((Completed(), 2), (Failed(), 2), (Crashed(), 4), (Cancelled(), 6)):
        assert backfill.backfill.fn(str(root), [f"{versions[0]}~1..{versions[2]}"]) == list(versions[:2])
        assert len(states) == count, "what goes on, or ended well, is not started again"
        states |= {key: then for key, state in states.items() if not state.is_final() or state.is_completed()}


def test_a_run_over_the_data_of_another_commit(root: Path, versions: tuple[str, str, str]) -> None:
    with workspace.opened(root, "old-data") as run:
        assert isolated.take_data(run, versions[0]) == [f"data of {versions[0][:12]}"]
        assert (run.place / "artifacts" / "data" / "made.txt").read_text() == "data"
        assert "data" not in stages.look(run.place).reasons  # its metrics are those that dvc.lock tells of
        dvc(run.place, "repro", "-q")
        assert "data" not in fake.ran(run.place)
        assert (run.place / "artifacts" / "left" / "made.txt").read_text() == "left"  # as these data have made before
        told = isolated.told(run, run.commit("made"), ["data of x"])
        assert "* data of x" in told
    shutil.rmtree(root / ".dvc" / "cache")
    with workspace.opened(root, "lost") as run, pytest.raises(ArtifactError, match="neither in DVC's cache"):
        isolated.take_data(run, versions[0])


def test_data_that_are_gone_are_not_a_remote_that_is_away(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dvc(root, "remote", "add", "-q", "-d", "team", str(tmp_path / "remote"))
    commit = station.commit(root, "a remote")
    shutil.rmtree(root / ".dvc" / "cache")
    real, away = workspace.Workspace.dvc, list[str]()

    def ask(run: workspace.Workspace, *words: str) -> None:
        if words[0] in away:
            raise StoreUnavailable("away")
        real(run, *words)

    monkeypatch.setattr(workspace, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(workspace.Workspace, "dvc", ask)
    with workspace.opened(root, "lost") as run:
        with pytest.raises(ArtifactError, match="neither in DVC's cache nor in its remote"):
            isolated.take_data(run, commit)
        away += ["fetch", "pull"]
        with pytest.raises(StoreUnavailable, match="^away$"):
            isolated.take_data(run, commit)


def test_metrics_that_moved_are_told(root: Path) -> None:
    with workspace.opened(root, "moves") as run:
        (run.place / "metrics" / "data.json").write_text('{"score": 0.5, "other": 3, "new": 1}')
        told = isolated.told(run, None, [])
    assert "| data | score | 0.25 | 0.5 |" in told and "| data | new |  | 1 |" in told and "other" not in told


def test_a_child_that_fails_is_the_error_its_exit_code_says(root: Path) -> None:
    with workspace.opened(root, "fails") as run:
        code = "import sys; print('error: a bad row', file=sys.stderr); sys.exit(2)"
        with pytest.raises(UserError, match="error: a bad row"):
            isolated.work(run, [sys.executable, "-c", code], hours=1)
        with pytest.raises(failures.StageKilled, match="exit code 137, nothing printed") as killed:
            isolated.work(run, ["bash", "-c", "kill -9 $$"], hours=1)
        assert failures.worth_retrying(killed.value)
        began = time.monotonic()
        with pytest.raises(UserError, match="took longer than 0.0001 hours"):
            isolated.work(run, [sys.executable, "-c", "import time; time.sleep(60)"], hours=0.0001)
        assert time.monotonic() - began < 30
    assert "a bad row" in (root / ".sluice" / "logs" / "runs" / "fails.log").read_text()


def test_a_store_that_is_named_relative_to_the_clone_is_the_clones(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sqlite:///mlflow.db`, as MLflow's pages have it: what a run registered went with its worktree."""
    monkeypatch.chdir(root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    code = "from pathlib import Path; from pipelines.core import store; print(store.address(Path.cwd()))"
    with workspace.opened(root, "nightly") as run:
        isolated.work(run, [sys.executable, "-c", code], hours=1)
    said = (root / ".sluice" / "logs" / "runs" / "nightly.log").read_text()
    assert said.splitlines()[-1] == f"sqlite:///{root.resolve()}/mlflow.db" == store.address(root)
