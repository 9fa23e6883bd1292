"""What `sluice gc` removes, and above all what it never does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fake_repository as fake
import pytest
import station
from mlflow.store.entities.paged_list import PagedList
from rich.console import Console
from stores import python, repository, run_stage, write_rows

from flows import approve, gc, overrides, run_locks, workspace
from pipelines.core import promotion, references, registry, store, versions
from pipelines.core.errors import UserError

__all__ = ["repository"]
Version = namedtuple("Version", "version tags")


def console() -> Console:
    return Console(width=200, color_system=None)


# Versions: a rule over tags and aliases


def test_aliases_rollbacks_parents_and_the_newest_are_needed() -> None:
    policies = [
        Version("1", {}),
        Version("2", {"promotion.from": "1", "sluice.parent.base": "2"}),
        Version("3", {"sluice.parent.base": "3"}),  # failed
        Version("4", {"promotion.from": "2", "sluice.parent.base": "4"}),
        Version("5", {"promotion.from": "4"}),
        Version(6, {}),  # the newest; a store may give a number
    ]
    bases = [Version(str(n), {"sluice.parent.base": "not registered"}) for n in range(1, 7)]
    kept = gc.needed({"policy": policies, "base": bases}, {"policy": {"champion": 5, "previous": "4"}, "base": {}})
    assert kept == {("policy", number) for number in "12456"} | {("base", number) for number in "246"}


def test_what_is_on_offer_is_needed_until_its_time_is_over() -> None:
    now = datetime.now(UTC)
    later, over = ((now + timedelta(hours=hours)).isoformat() for hours in (1, -1))
    policies = [
        Version("1", {"sluice.offered.a": over}),
        Version("2", {"sluice.offered.a": over, "sluice.offered.b": later, "sluice.parent.base": "1"}),
        Version("3", {}),
    ]
    kept = gc.needed({"policy": policies, "base": [Version("1", {}), Version("2", {})]}, {"policy": {}, "base": {}})
    assert kept == {("policy", "2"), ("policy", "3"), ("base", "1"), ("base", "2")}


def test_versions_nobody_needs_go_with_their_files_and_the_champion_loads(repository) -> None:
    root, model = Path(repository[0]), repository[1]
    subprocess.run(["git", "init", "-q", "."], cwd=root, check=True)
    for number, bits in enumerate((2.0, 1.9, 1.8, 1.7), start=1):
        run_stage(root, model, bits)
        registry.settle(root, "pretrain")
        if number in (1, 3):
            promotion.promote(root, "sluice-base", number, why="x", expected_champion=None if number == 1 else 1)
    client, _ = store.connect(root)
    found = list(gc._versions(root, client))
    assert [(one.name, one.bytes > 10_000) for one in found] == [("sluice-base 2", True)]
    place = gc._files(root, client, client.get_model_version("sluice-base", "2"))
    found[0].remove()
    assert place is not None and not place.exists()
    assert sorted(int(one.version) for one in client.search_model_versions("name = 'sluice-base'")) == [1, 3, 4]
    assert versions.alias(client, "sluice-base", "champion") == "3"
    kept = gc._files(root, client, client.get_model_version("sluice-base", "3"))
    assert kept is not None and list(kept.rglob("model.safetensors"))
    assert list(gc._versions(root, client)) == []


def test_what_a_removal_that_was_cut_off_left_goes_and_what_a_version_names_stays(repository, monkeypatch) -> None:
    root, model = Path(repository[0]), repository[1]
    for bits in (2.0, 1.9, 1.8):
        run_stage(root, model, bits)
        registry.settle(root, "pretrain")
    promotion.promote(root, "sluice-base", 2, why="x", expected_champion=None)
    client, _ = store.connect(root)
    places = {one: gc._files(root, client, client.get_model_version("sluice-base", one)) for one in "12"}
    (first,) = gc._versions(root, client)

    def killed(place: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        first.remove()
    named = references.logged(client.get_model_version("sluice-base", "2"))
    client.delete_logged_model(named)  # by a person, on MLflow's page
    (left,) = gc._left(root, client)
    assert (left.kind, left.why, left.bytes > 10_000) == ("deleted model", "its removal was cut off", True)
    assert left.name.startswith("sluice-base m-") and named not in left.name
    left.remove()
    assert not places["1"].exists() and places["2"].exists() and list(gc._left(root, client)) == []


def test_what_a_killed_measurement_left_goes_and_what_one_is_at_stays(repository) -> None:
    root, model = Path(repository[0]), repository[1]
    run_stage(root, model, 2.0)
    registry.settle(root, "pretrain")
    promotion.promote(root, "sluice-base", 1, why="x", expected_champion=None)
    run_stage(root, model, 1.9)
    today = [f"new-{n}" for n in range(40)]
    write_rows(root / "artifacts/pretrain/evaluation.parquet", 1.9, today)
    code = """
import os
from pipelines.core import registry
registry.settle(root, "pretrain", lambda *_: os.kill(os.getpid(), 9))
"""
    child = python(root, code, MLFLOW_TRACKING_URI=store.address(root))
    assert child.wait() == -9
    client, _ = store.connect(root)
    (left,) = gc._left(root, client)
    assert (left.kind, left.why, left.bytes > 10_000) == ("measurement", "it was killed", True)
    seen: list[list[gc.Waste]] = []

    def measure(folder: Path, out: Path) -> None:
        seen.append(list(gc._left(root, client)))
        write_rows(out, 1.95, today)

    registry.settle(root, "pretrain", measure)
    assert seen == [[]], "one goes on"
    assert [one.name for one in gc._left(root, client)] == [left.name]
    left.remove()
    left.remove()  # nothing is wrong where it has gone meanwhile
    (kept,) = (root / ".sluice/registry/measured").iterdir()
    assert kept.suffix == ".parquet" and list(gc._left(root, client)) == []


def test_what_no_stage_made_is_not_ours_to_remove(repository) -> None:
    root, _ = repository
    client, _ = store.connect(root)
    client.create_registered_model("by-hand")
    for _ in range(2):
        client.create_model_version("by-hand", source=f"file://{root}/artifacts/data")
    assert list(gc._versions(root, client)) == []


def test_a_version_on_offer_stays_until_it_is_decided(repository) -> None:
    root, model = Path(repository[0]), repository[1]
    for bits in (2.0, 1.9, 1.8):
        run_stage(root, model, bits)
        registry.settle(root, "pretrain")
    client, _ = store.connect(root)
    listed = list(gc._versions(root, client))
    assert [one.name for one in listed] == ["sluice-base 2", "sluice-base 1"]
    shown = {"members": [["sluice-base", "2", None]]}
    approve.hold(root, shown, "a-run", 1.0)
    approve.hold(root, shown, "another", 1.0)
    listed[0].remove()
    assert [one.name for one in gc._versions(root, client)] == ["sluice-base 1"]
    approve.let_go(root, shown, "a-run")
    assert [one.name for one in gc._versions(root, client)] == ["sluice-base 1"], "the other run still asks"
    approve.let_go(root, shown, "another")
    assert [one.name for one in gc._versions(root, client)] == ["sluice-base 2", "sluice-base 1"]
    approve.hold(root, shown, "a-run", -1.0)
    assert [one.name for one in gc._versions(root, client)] == ["sluice-base 2", "sluice-base 1"], "nobody answered"


def test_a_version_that_became_champion_meanwhile_stays(repository) -> None:
    root, model = Path(repository[0]), repository[1]
    for bits in (2.0, 1.9, 1.8):
        run_stage(root, model, bits)
        registry.settle(root, "pretrain")
    client, _ = store.connect(root)
    first = list(gc._versions(root, client))[0]
    promotion.promote(root, "sluice-base", 1, why="meanwhile", expected_champion=None)
    first.remove()
    assert versions.alias(client, "sluice-base", "champion") == "1"


def test_what_a_rollback_goes_back_to_stays_though_its_successor_came_back(repository) -> None:
    """1, 2, 3, and 2 again: version 2 was promoted over 3 at last, and before that over 1."""
    root = Path(repository[0])
    client, _ = store.connect(root)
    client.create_registered_model("sluice-base")
    for number in range(4):
        tags = {"gate": "passed", "sluice.content_hash": str(number)}
        client.create_model_version("sluice-base", source=f"file://{root}/artifacts/data", tags=tags)
    for version, before in ((1, None), (2, 1), (3, 2), (2, 3)):
        promotion.promote(root, "sluice-base", version, why="better", expected_champion=before)
    assert list(gc._versions(root, client)) == []


# DVC's cache, worktrees and checkpoints


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = station.make(tmp_path_factory.mktemp("gc") / "clone")
    _repro(root)
    station.commit(root, "first")
    return root


@pytest.fixture
def clone(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "clone"
    shutil.copytree(template, place, symlinks=True)
    for key, value in fake.environment(place, place / ".sluice" / "prefect").items():
        monkeypatch.setenv(key, value)
    return place


def _repro(root: Path) -> None:
    env = fake.environment(root, root / ".sluice" / "prefect")
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], cwd=root, env=env, check=True)


def _made(root: Path, word: str) -> None:
    """Other outputs of every stage."""
    place = root / "stage.py"
    place.write_text(re.sub(r"\.write_text\(name.*\)", f".write_text(name + '{word}')", place.read_text()))
    _repro(root)


def _kept(root: Path) -> set[str]:
    """Contents of the files in the cache."""
    files = (root / ".dvc" / "cache" / "files" / "md5").rglob("*")
    return {path.read_text() for path in files if path.is_file() and not path.name.endswith(".dir")}


def test_only_what_no_branch_tag_experiment_or_working_copy_needs_goes(clone: Path) -> None:
    _made(clone, "-tagged")
    station.commit(clone, "tagged")
    workspace.git(clone, "tag", "v1")
    _made(clone, "-lost")
    _made(clone, "-tried")
    save = [sys.executable, "-m", "dvc", "exp", "save", "--name", "tried", "--force"]
    subprocess.run(save, cwd=clone, check=True, capture_output=True)
    _made(clone, "-branch")
    station.commit(clone, "on a branch of a run")
    workspace.git(clone, "branch", "runs/nightly-1")
    workspace.git(clone, "reset", "-q", "--hard", "HEAD~2")
    _made(clone, "-now")  # and not committed
    before = _kept(clone)
    assert "data-lost" in before
    found = gc.collect(clone, False, console())
    assert [one.kind for one in found] == ["DVC's cache"] and found[0].bytes > 0
    assert _kept(clone) == before  # shown, not done
    gc.collect(clone, True, console())
    after = _kept(clone)
    # In git; what DVC's cache of runs and its experiments keep of them is, to `dvc gc` too, unneeded
    not_cached = {'{"score": 0.25, "other": 3}\n', "report-tried"}
    assert before - after - not_cached == {"data-lost", "left-lost", "right-lost"}
    assert {"data", "data-tagged", "data-tried", "data-branch", "data-now"} <= after
    assert gc.collect(clone, False, console()) == []


def test_nothing_is_removed_while_a_run_goes_on_but_it_is_shown(clone: Path) -> None:
    _made(clone, "-lost")
    workspace.git(clone, "checkout", "-q", ".")
    with workspace.opened(clone, "nightly") as run:
        overrides.apply(run.place, ["pretrain.tokens=4096"])
        _made(run.place, "-running")  # in the shared cache, in no commit yet
        assert "data-running" in _kept(clone)
        assert gc.collect(clone, False, console())
        with pytest.raises(UserError, match=r"runs are going on \(nightly\)"):
            gc.collect(clone, True, console())
        kept = list(gc._cache(clone, None))
        kept[0].remove()
        assert {"data-running", "left-running", "right-running"} <= _kept(clone)
        assert "data-lost" not in _kept(clone)
    with run_locks.alone(clone), pytest.raises(UserError, match="another flow is running"):
        gc.collect(clone, True, console())


def test_a_dvc_command_at_work_is_waited_for(clone: Path) -> None:
    place = clone / ".dvc" / "tmp" / "rwlock"
    holder = {"pid": os.getpid(), "cmd": "dvc repro"}
    place.write_text(json.dumps({"write": {"artifacts/data": holder}, "read": {}}))
    with pytest.raises(UserError, match=f"dvc is at work here .process {os.getpid()}"):
        gc.collect(clone, True, console())
    place.write_text(json.dumps({"write": {}, "read": {"artifacts/data": [{**holder, "pid": 999_999_999}]}}))
    gc.collect(clone, True, console())


def test_a_lock_of_before_a_reboot_holds_up_nobody(clone: Path) -> None:
    """Its number is another process's by now, as in a container always; or the file is half written."""
    place = clone / ".dvc" / "tmp" / "rwlock"
    dead, alive = {"pid": 1, "cmd": "dvc repro"}, {"pid": os.getpid(), "cmd": "dvc status"}
    place.write_text(json.dumps({"write": {"artifacts/left": dead}, "read": {"artifacts/data": [dead, alive]}}))
    os.utime(place, (0, 0))
    assert run_locks.dvc_at_work(clone) == []
    assert json.loads(place.read_text()) == {"write": {}, "read": {}}
    for torn in ("", '{"write": {"artifacts/', '{"write": 1}'):
        place.write_text(torn)
        assert run_locks.dvc_at_work(clone) == [] and not place.exists()
    place.write_text(json.dumps({"write": {"artifacts/data": dead}, "read": {"artifacts/data": [alive]}}))
    assert run_locks.dvc_at_work(clone) == [1, os.getpid()], "both were there when it was written"


def test_a_dvc_that_lives_keeps_its_lock_whatever_the_clocks_say(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the lock while we wait for the file; or the file is older than it by the clock of a file server."""
    import dvc.rwlock

    place, edit = clone / ".dvc" / "tmp" / "rwlock", dvc.rwlock._edit_rwlock
    held = json.dumps({"write": {"artifacts/data": {"pid": os.getpid(), "cmd": "dvc repro"}}, "read": {}})

    def taken_meanwhile(*words):
        place.write_text(held)
        return edit(*words)

    place.write_text("{}")
    os.utime(place, (0, 0))
    with monkeypatch.context() as patched:
        patched.setattr(dvc.rwlock, "_edit_rwlock", taken_meanwhile)
        assert run_locks.dvc_at_work(clone) == [os.getpid()]
    assert json.loads(place.read_text()) == json.loads(held)
    command = [sys.executable, "-c", "import sys; sys.stdin.read()", "-m", "dvc", "repro"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as other:
        place.write_text(json.dumps({"write": {}, "read": {"artifacts/data": [{"pid": other.pid, "cmd": "dvc"}]}}))
        os.utime(place, (0, 0))
        assert run_locks.dvc_at_work(clone) == [other.pid]
        other.stdin.close()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert run_locks.dvc_at_work(clone) == [], "it has ended, though its parent has not asked yet"


def test_a_cache_that_others_may_use_is_left_alone(clone: Path, tmp_path: Path) -> None:
    """`dvc cache dir` of a team names one for all their clones: what this clone does not need, another does."""
    shared = tmp_path / "shared"
    (clone / ".dvc" / "cache").rename(shared)
    dvc = [sys.executable, "-m", "dvc", "cache", "dir", "-q", str(shared)]
    subprocess.run(dvc, cwd=clone, check=True)
    station.commit(clone, "a shared cache")
    other = shared / "files" / "md5" / "00" / ("0" * 30)
    other.parent.mkdir(exist_ok=True)
    other.write_text("of another clone")
    shown = console()
    with shown.capture() as said:
        assert gc.collect(clone, True, shown) == []
    assert other.exists() and f"DVC's cache in {shared} is left alone" in said.get()


def test_an_archive_without_git_has_a_cache_too(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(clone.parent))
    _made(clone, "-lost")
    _made(clone, "-now")
    shutil.rmtree(clone / ".git")
    subprocess.run([sys.executable, "-m", "dvc", "config", "--local", "core.no_scm", "true"], cwd=clone, check=True)
    gc.collect(clone, True, console())
    assert "data-now" in _kept(clone) and "data-lost" not in _kept(clone)


def test_what_a_killed_run_left_goes(clone: Path) -> None:
    with workspace.opened(clone, "victim") as run:
        shutil.copytree(run.place, run.place.with_name("dead"), symlinks=True)
    checkpoint = clone / ".sluice" / "checkpoints" / "data" / "0123"
    checkpoint.mkdir(parents=True)
    (checkpoint / "step-1").write_text("x" * 100)
    measurement = clone / ".sluice" / "registry" / "measured" / "tmp0123"
    measurement.mkdir(parents=True)
    found = gc.collect(clone, True, console())
    assert (found[-1].kind, found[-1].name) == ("measurement", "tmp0123") and not measurement.exists()
    assert [(one.kind, one.name) for one in found[:2]] == [("worktree", "dead"), ("checkpoint", "data/0123")]
    assert not checkpoint.exists() and run_locks.abandoned(clone) == []
    assert (clone / ".sluice" / "mlflow").exists()  # what the worktree only linked to


def test_the_commit_that_recorded_an_aliased_version_is_needed(clone: Path) -> None:
    """Its outputs are in the `dvc.lock` of the commit after the one it was made at."""
    made_at = workspace.resolve(clone, "HEAD")
    _made(clone, "-champion")
    recorded = station.commit(clone, "results")
    (clone / "x").write_text("of another matter")
    station.commit(clone, "later")
    aliases, more = {"champion": 2}, dict[str, str]()

    class Client:
        def search_registered_models(self, max_results: int, page_token: str | None) -> PagedList[object]:
            return PagedList([type("Model", (), {"name": "m"})], None)

        def get_registered_model(self, name: str) -> object:
            return type("Model", (), {"aliases": aliases})

        def search_model_versions(self, query: str) -> list[Version]:
            return [Version("1", {"git.commit": "0" * 40}), Version("2", {"git.commit": made_at, **more})]

    assert list(gc._revisions(clone, Client())) == [made_at, recorded]
    aliases.clear()
    assert list(gc._revisions(clone, Client())) == []
    more["sluice.offered.a-run"] = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    assert list(gc._revisions(clone, Client())) == [made_at, recorded], "what may be champion soon"
