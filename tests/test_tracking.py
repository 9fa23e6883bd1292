"""Spool and courier: nothing lost, nothing doubled, whoever is killed and whatever is away."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml
from mlflow.entities import RunTag
from stores import drain, fill, make_root, python, repository, run_stage

from pipelines.core import courier, environment, lineage, promotion, registry, store, tracking
from pipelines.core.artifacts import content_hash
from pipelines.core.errors import StoreUnavailable
from pipelines.core.tracking import Record, Recorder

__all__ = ["repository"]
PRINT = "print('ready', flush=True)\nimport time; time.sleep(60)\n"


def runs(root: Path) -> list:
    client, experiment = store.connect(root)
    return client.search_runs([experiment])


def losses(root: Path, run_id: str) -> list[tuple[int, float]]:
    client, _ = store.connect(root)
    return [(point.step, point.value) for point in client.get_metric_history(run_id, "loss")]


def killed_stage(root: Path, steps: range, fingerprint: str = "f" * 16) -> None:
    """A stage that logs some steps and is killed without a word."""
    code = (
        "from pipelines.core import tracking\n"
        f"r = tracking.Recorder(root, 'pretrain', {fingerprint!r}, courier=False)\n"
        f"for s in range({steps.start}, {steps.stop}): r.log(s, {{'loss': s / 2}})\n"
        "r._flush()\n"
    )
    process = python(root, code + PRINT)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.kill()
    process.communicate()


def test_record_of_a_run_arrives_whole(repository):
    root, model = repository
    run_stage(root, model, 2.5)
    client = drain(root)
    (run,) = runs(root)
    assert run.info.status == "FINISHED" and run.info.end_time >= run.info.start_time
    assert run.data.params == {"lr": "0.1", "lora.rank": "4"}
    assert run.data.metrics == {"loss": 2.0, "bits_per_byte": 2.5, "seconds": 1.5}
    assert losses(root, run.info.run_id) == [(0, 4.0), (1, 3.0), (2, 2.0)]
    tags = run.data.tags
    assert tags["sluice.stage"] == "pretrain" and len(tags["sluice.content_hash"]) == 64
    assert tags["package.torch"] and tags["sluice.device"] == "cpu" and tags["git.dirty"]
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "data" and tags["sluice.input.data"].startswith(dataset.dataset.digest)
    assert tags["sluice.data_hash"] == tags["sluice.input.data"]
    files = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert files == {"evaluation.parquet", "mark.txt", "samples.txt"}
    assert f"{root}/.sluice/mlflow/artifacts/" in run.info.artifact_uri


def test_a_file_may_be_called_whatever_a_user_likes(repository):
    """MLflow takes neither brackets nor commas in the name of a tag, and no more than 250 characters."""
    root, model = repository
    deep = "/".join(["a folder with a long name"] * 12)
    names = ["data/reviews (1).csv", "data/reviews [1].csv", 'data/a+b, "c".csv', f"data/{deep}/x.csv", "data/büro.csv"]
    names.append("../x.csv")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    graph = yaml.safe_load((root / "dvc.yaml").read_text())
    graph["stages"]["pretrain"]["deps"] += names
    (root / "dvc.yaml").write_text(yaml.safe_dump(graph))
    lock = {"stages": {"pretrain": {"deps": [{"path": name, "md5": "0" * 32} for name in names]}}}
    (root / "dvc.lock").write_text(yaml.safe_dump(lock))
    run_stage(root, model, 2.5)
    client = drain(root)
    (run,) = runs(root)
    read = {key: value for key, value in run.data.tags.items() if key.startswith("sluice.input.") and "/" in key}
    assert len(read) == len(names) and set(read.values()) == {content_hash(root / name) for name in names}
    assert "sluice.input.data/büro.csv" in read
    assert any(key.startswith("sluice.input.data/reviews _1_.csv-") for key in read)
    assert len(run.inputs.dataset_inputs) == len(names) + 1
    restored = lineage.restored(root, "pretrain").tags
    client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in restored.items()])


def test_a_lock_file_that_dvc_is_writing_is_read_when_it_is_whole(repository, monkeypatch):
    """DVC may write what it has of another stage while an output is registered."""
    root, model = repository
    run_stage(root, model, 2.5)
    whole = yaml.safe_dump({"stages": {"data": {}, "pretrain": {"deps": [{"path": "x", "md5": "0" * 32}]}}})
    parts = ["", whole[:18], whole[:40], whole, whole]
    place = root / "dvc.lock"
    place.write_text(parts.pop(0))
    with monkeypatch.context() as patched:
        patched.setattr(lineage.time, "sleep", lambda _: place.write_text(parts.pop(0)))
        assert lineage.restored(root, "pretrain").tags["sluice.restored"] == "from DVC's cache"
    assert not parts
    place.unlink()
    assert "without an entry" in lineage.restored(root, "pretrain").tags["sluice.restored"]


def test_delivering_twice_changes_nothing_even_when_the_state_is_lost(repository):
    root, model = repository
    run_stage(root, model, 2.5)
    drain(root)
    (before,) = runs(root)
    (tracking.spools(root)[0].place / "state.json").unlink()
    drain(root)
    (after,) = runs(root)
    assert after.data.to_dictionary() == before.data.to_dictionary()
    assert losses(root, after.info.run_id) == [(0, 4.0), (1, 3.0), (2, 2.0)]
    assert len(after.inputs.dataset_inputs) == 1


def test_killed_stage_is_closed_and_the_same_run_goes_on(repository):
    root, _ = repository
    killed_stage(root, range(4))
    drain(root)
    (run,) = runs(root)
    assert run.info.status == "KILLED"
    recorder = Recorder(root, "pretrain", "f" * 16, courier=False)
    for step in range(2, 6):  # from its checkpoint at step 2 on
        recorder.log(step, {"loss": step / 2})
    recorder._flush()
    drain(root)
    assert [r.info.status for r in runs(root)] == ["RUNNING"]
    recorder.finish("FINISHED", Record(metrics={"bits_per_byte": 2.0}))
    drain(root)
    (again,) = runs(root)
    assert again.info.run_id == run.info.run_id and again.info.status == "FINISHED"
    assert losses(root, run.info.run_id) == [(s, s / 2) for s in range(6)]


def test_half_a_line_is_dropped_and_the_step_is_written_again(tmp_path):
    root = make_root(tmp_path / "root", None)
    killed_stage(root, range(3))
    (spool,) = tracking.spools(root)
    events = spool.place / "events.jsonl"
    os.truncate(events, events.stat().st_size - 5)
    recorder = Recorder(root, "pretrain", "f" * 16, courier=False)
    recorder.log(2, {"loss": 9.0})
    recorder.finish("FAILED", Record())
    points = [(e["step"], e["values"]["loss"]) for e, _ in spool.events() if e["event"] == "metrics"]
    assert points == [(0, 0.0), (1, 0.5), (2, 9.0)]
    assert tracking.spools(root) == [spool]


def test_a_full_disk_leaves_no_half_line_between_events(tmp_path):
    root = make_root(tmp_path / "root", None)
    code = (
        "import resource\nfrom pipelines.core import tracking\n"
        "r = tracking.Recorder(root, 'pretrain', 'f' * 16, courier=False)\n"
        "for s in range(3): r.log(s, {'loss': s / 2})\n"
        "size = (r.spool.place / 'events.jsonl').stat().st_size\n"
        "limits = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size + 120, limits[1]))\n"  # one line of three and a half
        "try: r._flush()\n"
        "except OSError as error: print(error)\n"
        "print((r.spool.place / 'events.jsonl').stat().st_size - size, flush=True)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, limits)\n"
        "r.log(3, {'loss': 1.5})\n"
        "r.finish('FAILED', tracking.Record())\n"
    )
    said, error = python(root, code).communicate()
    assert said.splitlines() == ["[Errno 27] File too large", "120"], error
    (spool,) = tracking.spools(root)
    kinds = [event["event"] for event, _ in spool.events()]
    assert kinds == ["start", *["metrics"] * 4, "finish"] and spool.last_step() == 3


def test_a_draft_of_the_courier_that_vanishes_ends_no_run(repository):
    """It writes its state beside the events, and the draft may be gone between a look into the folder and the flush."""
    root, _ = repository
    recorder = Recorder(root, "pretrain", "f" * 16, courier=False)
    (recorder.spool.place / ".state.json.1.partial").symlink_to("gone")
    recorder.finish("FINISHED", Record())
    assert '"event": "finish"' in (recorder.spool.place / "events.jsonl").read_text()


def test_a_damaged_line_is_left_out_and_holds_nothing_up(repository):
    root, _ = repository
    killed_stage(root, range(3))
    (spool,) = tracking.spools(root)
    events = spool.place / "events.jsonl"
    events.write_bytes(events.read_bytes() + b'{"event": "met{"event": "finish"}\n')
    assert [event["event"] for event, _ in spool.events()] == ["start", *["metrics"] * 3]
    drain(root)
    assert tracking.backlog(root) == [] and runs(root)[0].info.status == "KILLED"
    Recorder(root, "pretrain", "f" * 16, courier=False).finish("FINISHED", Record())
    drain(root)
    assert tracking.backlog(root) == [] and runs(root)[0].info.status == "FINISHED"


def test_a_spool_whose_first_event_was_never_written_is_none(tmp_path):
    root = make_root(tmp_path / "root", None)
    events = Recorder(root, "pretrain", "f" * 16, courier=False).spool.place / "events.jsonl"
    os.truncate(events, 20)
    assert tracking.spools(root) == []
    Recorder(root, "pretrain", "f" * 16, courier=False)
    assert [spool.place for spool in tracking.spools(root)] == [events.parent]


def test_a_run_that_ended_well_or_lives_is_not_continued(tmp_path):
    root = make_root(tmp_path / "root", None)
    living = Recorder(root, "pretrain", "f" * 16, courier=False)
    second = Recorder(root, "pretrain", "f" * 16, courier=False)
    assert second.spool != living.spool and living.spool.owned()
    second.finish("FINISHED", Record())
    assert not second.spool.owned()
    assert Recorder(root, "pretrain", "f" * 16, courier=False).spool not in (living.spool, second.spool)


def test_a_pid_that_another_process_has_now_is_no_owner(tmp_path):
    root = make_root(tmp_path / "root", None)
    spool = Recorder(root, "pretrain", "f" * 16, courier=False).spool
    events = spool.place / "events.jsonl"
    start = json.loads(events.read_text())
    events.write_text(json.dumps({**start, "born": start["born"] - 100}) + "\n")
    assert not spool.owned()


def test_a_clock_that_is_set_ends_no_run(tmp_path, monkeypatch):
    """As when a machine gets the network's time: processes seemed to have begun at another one, and runs as KILLED."""
    root = make_root(tmp_path / "root", None)
    spool = Recorder(root, "pretrain", "f" * 16, courier=False).spool
    boot = psutil.boot_time()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot + 3600.0)
    assert psutil.boot_time() == boot + 3600.0 and spool.owned()


def test_points_are_buffered_and_files_are_those_of_the_time(tmp_path):
    root = make_root(tmp_path / "root", None)
    recorder = Recorder(root, "pretrain", "f" * 16, courier=False)
    size = (recorder.spool.place / "events.jsonl").stat().st_size
    for step in range(100):
        recorder.log(step, {"loss": 1.0})
    assert (recorder.spool.place / "events.jsonl").stat().st_size == size
    card = root / "README.md"
    card.write_text("first")
    recorder.finish("FINISHED", Record(files=(card,)))
    card.write_text("second")
    assert (recorder.spool.place / "files" / "README.md").read_text() == "first"
    assert len(list(recorder.spool.events())) == 102


def test_courier_killed_between_run_and_note_makes_no_second_run(repository):
    root, model = repository
    run_stage(root, model, 2.5)
    code = "import os\nfrom pipelines.core import courier\ncourier._save = lambda *a: os.kill(os.getpid(), 9)\n"
    assert python(root, code + "courier.deliver(root)").wait() == -9
    assert [run.info.status for run in runs(root)] == ["RUNNING"]
    drain(root)
    (run,) = runs(root)
    assert run.info.status == "FINISHED" and len(losses(root, run.info.run_id)) == 3


def test_large_curves_are_delivered_in_batches(repository, monkeypatch):
    root, _ = repository
    recorder = Recorder(root, "pretrain", "f" * 16, courier=False)
    for step in range(700):
        recorder.log(step, {"loss": float(step), "lr": 0.1, "kl": float("nan")})
    recorder.finish("FINISHED", Record())
    client, _ = store.connect(root)
    sizes = []
    original = type(client).log_batch

    def log_batch(self, run_id, metrics=(), **rest):
        sizes.append(len(metrics))
        return original(self, run_id, metrics=metrics, **rest)

    monkeypatch.setattr(type(client), "log_batch", log_batch)
    drain(root)
    assert max(sizes) <= 1000 and sum(sizes) == 2100 and len(sizes) <= 4
    assert losses(root, runs(root)[0].info.run_id)[-1] == (699, 699.0)


def test_runs_of_another_clone_in_a_database_that_both_share_are_not_ended(repository, monkeypatch):
    """Their spools are not here, as that of a run whose spool was deleted is not."""
    root, _ = repository
    shared = root.with_name("shared.db")
    shutil.copyfile(root / ".sluice/mlflow/mlflow.db", shared)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shared}")
    for place in (make_root(root.with_name("other"), None), root):
        Recorder(place, "pretrain", "f" * 16, courier=False)
        drain(place)
    assert [run.info.status for run in runs(root)] == ["RUNNING", "RUNNING"]


def test_a_run_whose_spool_was_deleted_is_ended(repository):
    root, _ = repository
    recorder = Recorder(root, "pretrain", "f" * 16, courier=False)
    drain(root)
    shutil.rmtree(recorder.spool.place)
    Recorder(root, "sft", "f" * 16, courier=False)
    drain(root)
    assert {run.info.run_name: run.info.status for run in runs(root)} == {
        "pretrain-ffffffffffff-1": "KILLED",
        "sft-ffffffffffff-1": "RUNNING",
    }


def test_run_in_the_bin_is_taken_out_and_a_run_that_is_gone_is_made_again(repository):
    root, _ = repository
    recorder = Recorder(root, "pretrain", "f" * 16, courier=False)
    client = drain(root)
    client.delete_run(runs(root)[0].info.run_id)
    recorder.log(0, {"loss": 1.0})
    recorder.finish("FAILED", Record())
    drain(root)
    (run,) = runs(root)
    assert run.info.status == "FAILED"
    state = recorder.spool.place / "state.json"
    state.write_text(state.read_text().replace(run.info.run_id, "0" * 32).replace("true", "false"))
    drain(root)
    assert len(runs(root)) == 1


def test_folder_that_was_moved_with_its_store_has_nothing_to_deliver(repository, monkeypatch):
    root, model = repository
    run_stage(root, model, 2.5)
    drain(root)
    (before,) = runs(root)
    moved = root.rename(root.with_name("moved"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{moved}/.sluice/mlflow/mlflow.db")  # as a process there would
    assert tracking.backlog(moved)  # its state names the store by its path
    drain(moved)
    (after,) = runs(moved)
    assert tracking.backlog(moved) == [] and after.info.run_id == before.info.run_id
    assert losses(moved, after.info.run_id) == [(0, 4.0), (1, 3.0), (2, 2.0)]


def test_delivered_runs_leave_the_spool_when_a_newer_one_is_there(repository, monkeypatch):
    root, model = repository
    monkeypatch.setattr(tracking, "KEPT_SECONDS", 0.0)
    for bits in (2.5, 2.4, 2.3):
        run_stage(root, model, bits)
        drain(root)
    assert len(tracking.spools(root)) == 1 and len(runs(root)) == 3 and tracking.backlog(root) == []


def test_a_spool_whose_removal_was_cut_off_is_none(repository, monkeypatch):
    """Its run was delivered once more, with files that were no more there, and each delivery ended in a traceback."""
    root, model = repository
    monkeypatch.setattr(tracking, "KEPT_SECONDS", 0.0)
    for bits in (2.5, 2.4):
        run_stage(root, model, bits)

    def cut_off(place):
        shutil.rmtree(place / "files")
        (place / "state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(tracking, "shutil", SimpleNamespace(rmtree=cut_off))
        drain(root)
    drain(root)
    assert len(tracking.spools(root)) == 1 and len(runs(root)) == 2 and tracking.backlog(root) == []


def test_spools_that_go_while_they_are_looked_at_are_none(tmp_path, monkeypatch):
    """Worktrees share them: what one run has delivered is pruned while another one looks for its own."""
    root = make_root(tmp_path / "root", None)
    Recorder(root, "pretrain", "f" * 16, courier=False)
    other = Recorder(root, "sft", "f" * 16, courier=False).spool
    (other.place.parent / ".DS_Store").write_text("a stray file")
    read = tracking.Spool.events

    def events(spool, offset=0):
        yield from list(read(spool, offset))
        shutil.rmtree(other.place, ignore_errors=True)

    def first(spool, offset=0):
        shutil.rmtree(other.place, ignore_errors=True)
        yield from read(spool, offset)

    for meanwhile in (first, events):
        shutil.rmtree(other.place, ignore_errors=True)
        other = Recorder(root, "sft", "f" * 16, courier=False).spool
        with monkeypatch.context() as patched:
            patched.setattr(tracking.Spool, "events", meanwhile)
            assert "pretrain-ffffffffffff-1" in tracking.backlog(root)
            assert tracking.finished_spool(root, "sft", "c") is None
        assert not other.place.exists() and other.finished() is None and other.state()["run_id"] is None


def test_a_run_is_found_by_its_output_although_another_worktree_has_begun_the_same_stage(repository):
    root, model = repository
    key = run_stage(root, model, 2.5)
    Recorder(root, "pretrain", "e" * 16, courier=False)
    drain(root)  # as the flow's courier does before the output is registered
    (made,) = registry.settle(root, "pretrain")
    run = store.connect(root)[0].get_run(made.run_id)
    assert run.data.tags["sluice.spool"] == key and "sluice.restored" not in run.data.tags


def test_unreachable_store_is_told_in_a_second_and_loses_nothing(repository, monkeypatch):
    root, model = repository
    with socket.socket() as reserved:  # bound, not listening: nobody answers there
        reserved.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{reserved.getsockname()[1]}")
        run_stage(root, model, 2.5)
        before = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"127.0.0.1:\d+ does not answer .*sluice run") as error:
            courier.deliver(root)
        assert time.monotonic() - before < 5 and "secret" not in str(error.value)
        assert len(tracking.backlog(root)) == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/.sluice/mlflow/mlflow.db")
    drain(root)
    assert [run.info.status for run in runs(root)] == ["FINISHED"]


@pytest.mark.parametrize("kind", ["requests", "mlflow"])
def test_no_password_in_the_traceback_of_a_store_that_is_away(tmp_path, monkeypatch, kind):
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:hunter2@mlflow.example.org")
    text = "API request to http://bob:hunter2@mlflow.example.org/api failed with exception"
    with pytest.raises(StoreUnavailable) as caught, store.answering(tmp_path):
        raise RequestException(text) if kind == "requests" else MlflowException(text)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_recorder_does_not_import_mlflow(tmp_path):
    root = make_root(tmp_path / "root", None)
    code = (
        "import sys\nfrom pipelines.core import declared, tracking, registry\n"
        "declared.check(root)\n"
        "tracking.Recorder(root, 'data', 'f' * 16, courier=False).finish('FINISHED', tracking.Record())\n"
        "assert registry.settle(root, 'data', None) == []\n"
        "assert not {'mlflow', 'torch'} & set(sys.modules), 'heavy import'\n"
    )
    process = python(root, code)
    _, error = process.communicate()
    assert process.returncode == 0, error


@pytest.mark.slow
def test_first_connection_of_two_processes_makes_one_experiment(tmp_path):
    root = make_root(tmp_path / "root", None)
    code = "from pipelines.core import environment, store\nenvironment.prepare(root)\nprint(store.connect(root)[1])\n"
    environment_free = {"MLFLOW_TRACKING_URI": ""}
    both = [python(root, code, **environment_free) for _ in range(2)]
    answers = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert len({out for out, _ in answers}) == 1
    assert sorted(path.name for path in root.iterdir()) == [".sluice", "artifacts", "dvc.yaml", "metrics", "mlflow"]


def test_courier_delivers_while_the_stage_runs_and_closes_it_when_it_is_killed(repository):
    root, _ = repository
    code = (
        "from pipelines.core import tracking\n"
        "r = tracking.Recorder(root, 'pretrain', 'f' * 16)\n"
        "r.log(0, {'loss': 1.0}); r._flush()\n"
    )
    process = python(root, code + PRINT)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    wait_for(lambda: runs(root) and runs(root)[0].data.metrics == {"loss": 1.0})
    assert runs(root)[0].info.status == "RUNNING"
    process.kill()
    process.communicate()
    wait_for(lambda: runs(root)[0].info.status == "KILLED")
    wait_for(lambda: tracking.backlog(root) == [])


def test_one_courier_delivers_for_all_stages_of_a_flow_and_goes_when_it_ends(repository):
    root, _ = repository
    (root / environment.STATE / "locks").mkdir(parents=True, exist_ok=True)
    alone = (root / environment.STATE / "locks" / "courier").open("a")
    with tracking.attended(root) as variables:
        assert variables == {tracking.ATTENDED: "1"}
        for stage in ("data", "pretrain"):
            Recorder(root, stage, "f" * 16, courier=False).finish("FINISHED", Record())
            wait_for(lambda: tracking.backlog(root) == [])
            with pytest.raises(BlockingIOError):
                fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
        Recorder(root, "sft", "f" * 16, courier=False).finish("FINISHED", Record())
    fcntl.flock(alone, fcntl.LOCK_EX)  # it ends by itself, when the last one is delivered
    assert tracking.backlog(root) == [] and len(runs(root)) == 3


@pytest.mark.slow
def test_server_that_goes_away_and_comes_back(repository, monkeypatch, tmp_path):
    """A real `mlflow server`, killed in the middle of a run and started again behind the same address."""
    root, model = repository
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    server = start_server(tmp_path, root, port)
    recorder = Recorder(root, "pretrain", "f" * 16, courier=False)
    recorder.log(0, {"loss": 1.0})
    recorder._flush()
    drain(root)
    stop(server)
    for step in range(3):
        recorder.log(step, {"loss": 1.0 - step})
    fill(root, model, 2.5)
    recorder.finish("FINISHED", Record(files=(root / "artifacts/pretrain/mark.txt",)))
    with pytest.raises(StoreUnavailable):
        courier.deliver(root)
    server = start_server(tmp_path, root, port)
    try:
        client = drain(root)
        (run,) = runs(root)
        assert run.info.status == "FINISHED"
        assert losses(root, run.info.run_id) == [(0, 1.0), (1, 0.0), (2, -1.0)]
        assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["mark.txt"]
        (registered,) = registry.settle(root, "pretrain")
        promotion.promote(root, registered.name, registered.version, why="first", expected_champion=None)
        run_stage(root, model, 2.6)
        assert registry.settle(root, "pretrain")[0].verdict.rows[2].baseline == "champion v1: 2.5"
    finally:
        stop(server)


def start_server(place: Path, root: Path, port: int) -> subprocess.Popen[bytes]:
    database = f"sqlite:///{root}/.sluice/mlflow/mlflow.db"
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", database, "--artifacts-destination", str(place / "served")]
    process = subprocess.Popen(
        command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(lambda: answers(root), seconds=60)
    return process


def answers(root: Path) -> bool:
    try:
        store.probe(root)
    except StoreUnavailable:
        return False
    return True


def stop(server: subprocess.Popen[bytes]) -> None:
    os.killpg(server.pid, 9)
    server.wait()


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
