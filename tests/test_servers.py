"""Servers that are started, killed and started again; runs that start by themselves, die and are approved.

The fast tests ask what would be started; those marked `live` start it, once, and go on with what the test before left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import fake_repository as fake
import prefect
import psutil
import pytest
import station
from prefect.settings import PREFECT_API_AUTH_STRING, Settings, temporary_settings
from processes import has_ended
from station import Api, Receiver, until
from typer.testing import CliRunner

from flows import automations, server, server_processes, servers
from flows.cli import app
from pipelines.core.errors import StoreUnavailable, UserError

MINUTES = 60.0


def test_servers_listen_on_the_loopback_address_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = servers.parts(tmp_path, 4200, 5000)
    assert [part.name for part in found] == ["prefect", "mlflow", "worker"]
    for part in found[:2]:
        assert part.command[part.command.index("--host") + 1] == "127.0.0.1"
    assert f"sqlite:///{tmp_path}/.sluice/mlflow/mlflow.db" in found[1].command


def test_the_pages_are_those_of_the_database_that_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that the environment names is no server, and another one than the clone's: its pages were empty."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    for address, used in (("sqlite:///x.db", "x.db"), ("http://127.0.0.1:5000", ".sluice/mlflow/mlflow.db")):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        _, mlflow, _ = servers.parts(tmp_path, 4200, 5000)
        assert f"sqlite:///{tmp_path}/{used}" in mlflow.command


def test_prefect_knows_by_name_what_the_server_of_one_run_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that a later Prefect has changed would be passed over without a word."""

    def on() -> set[str]:
        found = Settings().server
        names = {
            f"PREFECT_SERVER_SERVICES_{name.upper()}_ENABLED" for name, one in found.services if one.enabled is True
        }
        return names | ({"PREFECT_API_BLOCKS_REGISTER_ON_START"} if found.register_blocks_on_start else set())

    before = on()
    for name in server.UNNEEDED:
        monkeypatch.setenv(name, "false")
    assert before - on() == set(server.UNNEEDED)


def test_a_server_that_the_environment_names_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(servers, "require", asked.append)
    monkeypatch.setenv("PREFECT_API_URL", "https://prefect.example.org/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    assert [part.name for part in servers.parts(tmp_path, 4200, 5000)] == ["worker"]
    assert asked == ["https://prefect.example.org/api"]


def test_the_address_of_our_own_servers_is_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell has it in which deployments were run, or users have it in their profile."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    assert [part.name for part in servers.parts(tmp_path, 4200, 5000)] == ["prefect", "mlflow", "worker"]


def test_a_prefect_server_that_does_not_answer_us_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUIRE_SECONDS", 0.2)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        with pytest.raises(StoreUnavailable, match=rf"at http://127.0.0.1:{port}/api does not answer .*unset PREFECT"):
            server.require(f"http://127.0.0.1:{port}/api")

    class Guarded(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.headers["Authorization"] == "Basic YTpi" else 401)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as guarded:
        threading.Thread(target=guarded.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{guarded.server_port}/api"
        with pytest.raises(StoreUnavailable, match="does not know this log-in: set PREFECT_API_AUTH_STRING"):
            server.require(address)
        with temporary_settings({PREFECT_API_AUTH_STRING: "a:b"}):
            server.require(address)
        guarded.shutdown()


def test_prefect_cloud_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.urllib.request, "urlopen", pytest.fail)
    server.require("https://api.prefect.cloud/api/accounts/1/workspaces/2")


def test_what_is_no_address_or_no_http_server_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUIRE_SECONDS", 0.2)
    for address in ("prefect", "http://user:planted@host:port/api"):
        with pytest.raises(StoreUnavailable, match="is no address: PREFECT_API_URL is to be") as caught:
            server.require(address)
        assert "planted" not in str(caught.value)
    with socket.create_server(("127.0.0.1", 0)) as other:

        def greet() -> None:  # as a server of mail or of SSH does
            with contextlib.suppress(OSError):
                while True:
                    with other.accept()[0] as caller:
                        caller.sendall(b"SSH-2.0-OpenSSH\r\n")

        threading.Thread(target=greet, daemon=True).start()
        address = f"http://127.0.0.1:{other.getsockname()[1]}/api"
        with pytest.raises(StoreUnavailable, match="does not answer"):
            server.require(address)
        assert not server.answers(address)


def test_a_port_that_is_taken_is_named_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} .*prefect server.*make server PREFECT_PORT=N"):
            servers.start(tmp_path, port, 5000)
    with pytest.raises(UserError, match=f"port {port} cannot be Prefect's and MLflow's"):
        servers.start(tmp_path, port, port)
    assert servers.state(tmp_path) is None
    assert servers.stop(tmp_path) is False


def test_a_port_that_is_none_is_refused() -> None:
    found = CliRunner().invoke(app, ["server", "start", "--mlflow-port", "70000"])
    assert found.exit_code == 2 and "65535" in found.output and "Traceback" not in found.output


def test_a_run_whose_worker_was_killed_is_stopped_too(tmp_path: Path) -> None:
    run = {servers.CLONE: str(tmp_path), "PREFECT__FLOW_RUN_ID": "a"}
    others = ({**run, servers.CLONE: f"{tmp_path}/other"}, {servers.CLONE: str(tmp_path)})
    command = [sys.executable, "-c", "print(flush=True); import time; time.sleep(600)"]
    found = []
    try:
        for variables in (run, *others):
            env = {**os.environ, **variables}
            found.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, start_new_session=True))
        for process in found:
            assert process.stdout is not None and process.stdout.readline() == b"\n"
        assert servers.stop(tmp_path) is True
        assert [process.poll() is None for process in found] == [False, True, True]
        assert servers.stop(tmp_path) is False
    finally:
        for process in found:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("words", [[], [server_processes.KEEPER, "/another/clone"]])
def test_a_number_that_a_keeper_left_and_another_process_has_now_is_not_stopped(
    tmp_path: Path, words: list[str]
) -> None:
    """The keeper was killed, the machine started again, and somebody asks for a moment whether there is a keeper."""
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", *words])
    lock = servers._lock(tmp_path)
    assert lock is not None
    (tmp_path / ".sluice/servers/lock").write_text(str(stranger.pid))
    stopping = threading.Thread(target=servers.stop, args=(tmp_path,))
    try:
        stopping.start()
        stopping.join(timeout=1.0)
        assert stopping.is_alive(), "the lock is held"
        os.close(lock)
        stopping.join(timeout=MINUTES)
        assert not stopping.is_alive() and stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.parametrize("taken", [False, True])
def test_a_clone_that_was_moved_under_its_servers_can_stop_them(tmp_path: Path, taken: bool) -> None:
    """The lock moves with the folder, and its keeper is known by it; runs of its worker have the old path.

    Where another clone has taken that place, runs with it may be its own.
    """
    old, new = tmp_path / "old", tmp_path / "new"
    code = (
        "import pathlib, sys, time; from flows import servers; lock = servers._lock(pathlib.Path(sys.argv[2]));"
        "import os; os.write(lock, str(os.getpid()).encode()); print(flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, server_processes.KEEPER, str(old)]
    run = {**os.environ, servers.CLONE: str(old), "PREFECT__FLOW_RUN_ID": "a"}
    asleep = [sys.executable, "-c", "print(flush=True); import time; time.sleep(600)"]
    keeper = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    worked = subprocess.Popen(asleep, stdout=subprocess.PIPE, env=run, start_new_session=True)
    try:
        for process in (keeper, worked):
            assert process.stdout is not None and process.stdout.readline() == b"\n"
        old.rename(new)
        if taken:
            old.mkdir()
        stopping = threading.Thread(target=servers.stop, args=(new,), daemon=True)
        stopping.start()
        stopping.join(timeout=MINUTES)
        assert not stopping.is_alive()
        assert keeper.poll() is not None and (worked.poll() is None) is taken
    finally:
        for process in (keeper, worked):
            process.kill()
            process.communicate()


def test_a_keeper_that_fails_says_why_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(servers, "PATIENCE_SECONDS", 0.0)
    lock = servers._lock(tmp_path)
    assert lock is not None and servers.main(tmp_path, 4200, 5000) == 2
    assert capsys.readouterr().err == f"error: the servers of {tmp_path} run already\n"
    os.close(lock)


def test_whoever_guards_our_own_server_is_let_in_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`PREFECT_SERVER_API_AUTH_STRING` of a shell guards the server of a single `sluice run` too."""
    from prefect.settings import get_current_settings

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "")
    monkeypatch.delenv("PREFECT_API_AUTH_STRING")
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "team:word")
    server._log_in()
    found = get_current_settings().api.auth_string
    assert found is not None and found.get_secret_value() == "team:word"


def test_silence_is_three_heartbeats_and_news_need_a_webhook() -> None:
    zombies, *others = automations.automations(None)
    assert others == []
    assert zombies.trigger.within.total_seconds() >= 3 * automations.HEARTBEAT_SECONDS
    assert zombies.trigger.expect == {"prefect.flow-run.*"}  # one that is suspended has said so, and is no zombie


def test_a_run_that_another_keeps_from_starting_is_told_and_one_that_a_person_cancels_is_not() -> None:
    from prefect.server.events.schemas.automations import EventTrigger
    from prefect.server.events.schemas.events import ReceivedEvent

    limit = "Deployment concurrency limit reached."
    rules = Path(prefect.__file__).parent / "server" / "orchestration" / "core_policy.py"
    assert rules.read_text(encoding="utf-8").count(f'message="{limit}"') == 2, "of a run that starts, and of a late one"
    triggers = {one.name: one.trigger.model_dump(mode="json") for one in automations.automations(uuid4())}
    tag = {"prefect.resource.id": f"prefect.tag.{automations.TAG}", "prefect.resource.role": "tag"}
    for message, told in ((limit, [automations.SKIPPED]), ("Cancelled by a person", []), ("", [])):
        resource = {"prefect.resource.id": f"prefect.flow-run.{uuid4()}", "prefect.state-message": message}
        event = ReceivedEvent(
            occurred=datetime.now(UTC), event="prefect.flow-run.Cancelled", resource=resource, related=[tag], id=uuid4()
        )
        covered = [name for name, one in triggers.items() if EventTrigger.model_validate(one).covers(event)]
        assert [name for name in covered if name != automations.ZOMBIES] == told


# With real servers


@pytest.fixture(scope="module")
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> Iterator[Path]:
    """A clone whose servers run until the last test."""
    root = station.make(tmp_path_factory.mktemp("servers") / "clone")
    before = dict(os.environ)
    wanted = fake.environment(root, root / ".sluice" / "prefect")
    wanted |= {
        "SLUICE_NOTIFY_WEBHOOK": receiver.address,
        "PREFECT_SERVER_API_AUTH_STRING": station.AUTH,
        "PREFECT_API_AUTH_STRING": station.AUTH,
    }
    os.environ.clear()
    os.environ.update(wanted)
    try:
        _start(root)
        yield root
    finally:
        servers.stop(root)
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def api(clone: Path) -> Api:
    found = servers.state(clone)
    assert found is not None
    return Api(found["prefect"])


def _start(root: Path) -> dict[str, Any]:
    return servers.start(root, _free_port(), _free_port())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def _flow_process(root: Path) -> psutil.Process | None:
    """The engine that runs an isolated run: the process that holds a run's lock."""
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "prefect" in " ".join(line) and any(
            f.path.startswith(f"{root}/.sluice/worktrees/") for f in _files(process)
        ):
            return process
    return None


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # of a zombie too, such as what is left of an engine that was killed
        return []


def _files(process: psutil.Process) -> list[Any]:
    try:
        return process.open_files()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


@pytest.mark.live
def test_a_cron_run_starts_by_itself_and_leaves_the_working_copy_alone(clone: Path, api: Api) -> None:
    (clone / "stage.py").write_text((clone / "stage.py").read_text() + "# in the middle of something\n")
    done = until(
        lambda: [one for one in api.runs("train") if one["auto_scheduled"] and one["state"]["type"] == "COMPLETED"],
        10 * MINUTES,
        str([(one["state"]["name"], one["state"]["message"]) for one in api.runs("train")]),
    )
    assert done
    branch = _git(clone, "branch", "--list", "--format=%(refname:short)", "runs/*").splitlines()[0]
    changed = _git(clone, "diff", "--name-only", "HEAD", branch).splitlines()
    assert {"dvc.lock", "metrics/data.json"} <= set(changed) and "stage.py" not in changed
    assert _git(clone, "status", "--porcelain") == "M stage.py"
    assert not (clone / "artifacts").exists()
    _git(clone, "checkout", "-q", "stage.py")


@pytest.mark.live
def test_without_the_password_nothing_is_told(clone: Path, api: Api) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        Api(api.address, None).runs("train")
    assert caught.value.code == 401
    assert all("planted" not in path.read_text(errors="replace") for path in (clone / ".sluice/logs").rglob("*.log"))


@pytest.mark.live
def test_a_killed_engine_is_marked_crashed_somebody_hears_and_the_next_run_goes_ahead(
    clone: Path, api: Api, receiver: Receiver
) -> None:
    def commit(message: str) -> None:  # with other outputs, or DVC brings the stages back from its cache
        code, writes = (clone / "stage.py").read_text(), '"made.txt").write_text('
        (clone / "stage.py").write_text(code.replace(writes, f"{writes}{message!r} + "))
        station.commit(clone, message)

    (clone / "behaviour" / "left").write_text("sleep 600")
    commit("a stage that takes long")

    def engine() -> psutil.Process | None:  # of a run that the schedule starts: one at a time, it has no rival
        return _flow_process(clone) if list((clone / ".sluice/worktrees").glob("*/left.pid")) else None

    found = until(engine, 8 * MINUTES, "the stage never started")
    (run,) = (one["id"] for one in api.runs("train") if one["state"]["type"] == "RUNNING")
    (clone / "behaviour" / "left").unlink()
    commit("and one that does not")
    found.kill()
    killed = time.time()
    until(lambda: api.state(run)[0] == "CRASHED", 6 * MINUTES, str(api.state(run)))
    assert receiver.heard("Crashed") or until(lambda: receiver.heard("Crashed"), MINUTES, str(receiver.got))
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(killed))

    def later() -> list[Any]:
        return [one for one in api.runs("train") if one["state"]["type"] == "COMPLETED" and one["start_time"] > since]

    until(later, 10 * MINUTES, "no later run completed")
    assert not [path for path in (clone / ".sluice/worktrees").iterdir() if path.is_dir()]


@pytest.mark.live
def test_servers_that_are_killed_come_back_with_every_record(clone: Path, api: Api) -> None:
    before = {one["id"] for one in api.runs("train")}
    api_server = next(
        process
        for process in psutil.Process(servers.state(clone)["pid"]).children(recursive=True)  # type: ignore[index]
        if "uvicorn" in (line := _command(process)) and "supervise" not in " ".join(line)
    )
    api_server.kill()
    assert before <= until(lambda: {one["id"] for one in api.runs("train")}, 5 * MINUTES)
    keeper = psutil.Process(servers.state(clone)["pid"])  # type: ignore[index]
    family = keeper.children(recursive=True)
    os.kill(keeper.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=90)
    assert [one for one in alive if not has_ended(one)] == []
    again = Api(_start(clone)["prefect"])
    assert before <= {one["id"] for one in again.runs("train")}
    assert len(again("/automations/filter")) == 4  # set up twice, there once
    assert again("/work_pools/sluice", method="GET")["concurrency_limit"] == automations.RUNS_AT_ONCE


@pytest.mark.live
def test_only_an_approval_moves_the_champion(clone: Path, api: Api, receiver: Receiver) -> None:
    def suspended() -> str:
        run = api.run("promote", "promote", approval_hours=0.5)
        until(lambda: api.state(run)[1] == "Suspended", 6 * MINUTES, str(api.state(run)))
        return run

    def resume(run: str, **answer: Any) -> str:
        return str(api(f"/flow_runs/{run}/resume", {"run_input": answer} if answer else {})["status"])

    for name in ("moved.txt", "offered.txt"):
        (clone / name).unlink(missing_ok=True)
    run = suspended()
    until(lambda: receiver.heard("sluice-base 2 waits for approval"), MINUTES, str(receiver.got))
    assert resume(run) == "REJECT"  # a bare resume
    assert resume(run, approve=True, approver=" ", reason="good") == "REJECT"
    assert resume(run, approve=True, approver="Ada") == "REJECT"
    assert api.state(run)[1] == "Suspended"
    assert (clone / "held.txt").read_text() == f"{run} 1.5"  # from `sluice gc`, longer than the approval may take
    assert resume(run, approve=False, approver="Ada", reason="not yet") == "ACCEPT"
    until(lambda: api.state(run)[1] == "Refused", 6 * MINUTES)
    assert "refused by Ada: not yet" in api.state(run)[2]
    assert not (clone / "moved.txt").exists()
    assert not (clone / "held.txt").exists()
    assert (clone / "offered.txt").read_text() == "once\n"  # what was shown is what is decided

    late = api.run("promote", "promote", approval_hours=0.001)
    until(lambda: api.state(late)[1] in ("Suspended", "Failed"), 6 * MINUTES)
    time.sleep(5)
    assert resume(late, approve=True, approver="Ada", reason="good") != "ACCEPT"
    until(lambda: api.state(late)[0] == "FAILED", MINUTES)
    assert not (clone / "moved.txt").exists()

    run = suspended()
    assert resume(run, approve=True, approver="Ada", reason="better") == "ACCEPT"
    until(lambda: api.state(run)[1] == "Promoted", 6 * MINUTES)
    assert (clone / "moved.txt").read_text() == "sluice-base 2 1 Ada"


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    yield
    for place in tmp_path_factory.getbasetemp().glob("servers*/clone/.sluice/worktrees"):
        shutil.rmtree(place, ignore_errors=True)
