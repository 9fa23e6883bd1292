"""A tracking server that asks for a log-in: what is said to whoever has none, what is kept, and who gets in.

The fast tests ask a server that answers as one does; the one marked `live` starts MLflow's own.
"""

from __future__ import annotations

import base64
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fake_repository as fake
import pytest
from stores import python, repository, run_stage
from test_tracking import wait_for

from pipelines.core import courier, promotion, registry, runner, store, tracking, versions
from pipelines.core.errors import StoreUnavailable

__all__ = ["repository"]
NAME = "sluice-base"
ADMIN, READER, WRONG = "correct-horse-9", "battery-staple-9", "tr0ub4dor-3"
UNKNOWN = r"does not know this log-in \(401\): see MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD\. Nothing is "
ANSWERS = {
    401: (b"You are not authenticated.", UNKNOWN),
    403: (b"Permission denied", r"does not let this log-in do that \(403\): see MLFLOW_.* once it lets us in"),
    404: (b"<html>", r"does not answer \(API request to endpoint .* failed with error code 404.* it is back"),
    200: (b"<html>", r"does not answer \(API request to endpoint was successful but the response body was not .* JSON"),
}  # fmt: skip


class Guard(http.server.ThreadingHTTPServer):
    """Says that it is well and lets nobody in."""

    answer = 401

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Refusal)
        self.asked: list[str] = []  # as whom

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class Refusal(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        well = self.path == "/health"
        if not well:
            kind, _, login = self.headers.get("Authorization", "").partition(" ")
            self.server.asked.append(base64.b64decode(login).decode() if kind == "Basic" else kind)  # type: ignore[attr-defined]
        self.send_response(200 if well else self.server.answer)  # type: ignore[attr-defined]
        self.end_headers()
        self.wfile.write(b"OK" if well else ANSWERS[self.server.answer][0])  # type: ignore[attr-defined]

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def guard() -> Iterator[Guard]:
    server = Guard()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def log_in(monkeypatch: pytest.MonkeyPatch, address: str, user: str | None = None, password: str = "") -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    for name, value in (("USERNAME", user), ("PASSWORD", password)):
        if user is None:
            monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
        else:
            monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", str(value))


@pytest.mark.parametrize("status", ANSWERS)
def test_who_is_not_let_in_goes_on_and_is_told_once(repository, guard, monkeypatch, capsys, status):
    root, model = repository
    guard.answer = status
    log_in(monkeypatch, f"http://{guard.host}", "bob", WRONG)
    run_stage(root, model, 2.5)
    for ask in (
        courier.deliver,
        registry.champions,
        lambda root: promotion.promote(root, NAME, 1, why="x", expected_champion=None),
    ):
        with pytest.raises(
            StoreUnavailable, match=f"the MLflow store http://{guard.host} {ANSWERS[status][1]}"
        ) as error:
            ask(root)
        assert WRONG not in str(error.value) and "\n" not in str(error.value)
    assert set(guard.asked) == {f"bob:{WRONG}"}
    capsys.readouterr()
    monkeypatch.setattr(runner, "measure_for", lambda *_: None)
    runner._settle(root, "pretrain")  # what a stage does when it has ended well
    said = capsys.readouterr().err
    assert said.startswith("warning: the MLflow store") and len(said.splitlines()) == 1
    assert len(tracking.backlog(root)) == 1


def test_the_courier_says_it_in_a_line_and_ends(repository, guard, monkeypatch):
    root, model = repository
    log_in(monkeypatch, f"http://bob:{WRONG}@{guard.host}")
    run_stage(root, model, 2.5)
    told = python(root, "from pipelines.core import courier\ncourier.main(root)\n")
    out, error = told.communicate()
    assert told.returncode == 0 and out == "" and len(error.splitlines()) == 1 and "(401)" in error
    assert set(guard.asked) == {f"bob:{WRONG}"} and WRONG not in error  # a log-in in the address is one, too


def test_status_and_doctor_say_it(guard, tmp_path, monkeypatch):
    root = fake.make(tmp_path / "repository")
    env = fake.environment(root, root / ".sluice/prefect")
    env |= {"MLFLOW_TRACKING_URI": f"http://bob:{WRONG}@{guard.host}"}
    for command, code in (("status", 75), ("doctor", 1)):
        line = [sys.executable, "-c", "from flows.cli import app; app()", command]
        done = subprocess.run(line, cwd=root, env=env, capture_output=True, text=True)
        said = done.stdout + done.stderr
        assert done.returncode == code and f"http://{guard.host} does not know this log-in (401)" in said, said
        assert WRONG not in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("./mlruns", "keeps no runs in a folder of files any more: name a server, http://HOST:PORT"),
        ("file:///tmp/mlruns", "keeps no runs in a folder of files any more"),
        ("localhost:5000", "MLflow knows no such address: name a server"),
        ("sqlite://mlflow.db", "Invalid SQLite URL: sqlite://mlflow.db"),
        ("postgresql://bob:hunter2@db/mlflow", "it needs the package psycopg2, which is not installed"),
    ],
)
def test_an_address_that_is_none_of_a_store_is_one_message(tmp_path, monkeypatch, address, said):
    """A traceback otherwise; of a stage, after its training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(StoreUnavailable, match=re.escape(said)) as told:
        store.connect(tmp_path)
    assert "hunter2" not in str(told.value) and "records wait in .sluice/spool" in str(told.value)


def test_what_is_no_address_is_told_without_the_login(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://bob:{WRONG}@127.0.0.1:port")
    with pytest.raises(StoreUnavailable, match="the MLflow store http://127.0.0.1:port does not answer") as error:
        store.probe(tmp_path)
    assert WRONG not in str(error.value)


# With MLflow's own


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Host and port of a server as docs/access.md starts it; it knows `admin`, and `reader`, who may look."""
    pytest.importorskip("flask_wtf", reason="pip install Flask-WTF")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    place = tmp_path / "server"
    place.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    env |= {"MLFLOW_FLASK_SERVER_SECRET_KEY": "any", "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN}
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", host.partition(":")[2]]
    command += ["--backend-store-uri", f"sqlite:///{place}/mlflow.db", "--artifacts-destination", f"{place}/artifacts"]
    with (place / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=place, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: answers(host), seconds=120)
        body = json.dumps({"username": "reader", "password": READER}).encode()
        login = base64.b64encode(f"admin:{ADMIN}".encode()).decode()
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {login}"}
        made = urllib.request.Request(f"http://{host}/api/2.0/mlflow/users/create", body, headers)
        urllib.request.urlopen(made, timeout=60).close()
        yield host
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(host: str) -> bool:
    try:
        urllib.request.urlopen(f"http://{host}/health", timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.live
def test_mlflows_own_login(repository, server, tmp_path, monkeypatch, capfd):
    root, model = repository
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # each request is a password's hash for the server
    run_stage(root, model, 2.5)
    log_in(monkeypatch, f"http://{server}", "admin", WRONG)
    with pytest.raises(StoreUnavailable, match=UNKNOWN):
        courier.deliver(root)
    log_in(monkeypatch, f"http://{server}", "admin", ADMIN)
    (first,) = registry.settle(root, "pretrain")
    promotion.promote(root, NAME, first.version, why="first", expected_champion=None)
    assert tracking.backlog(root) == [] and registry.champions(root)[NAME] == "1"

    run_stage(root, model, 2.4)
    log_in(monkeypatch, f"http://{server}", "reader", READER)
    assert registry.champions(root)[NAME] == "1", "it may look"
    with pytest.raises(StoreUnavailable, match=r"does not let this log-in do that \(403\)"):
        registry.settle(root, "pretrain")
    assert len(tracking.backlog(root)) == 1

    log_in(monkeypatch, f"http://admin:{ADMIN}@{server}")
    (second,) = registry.settle(root, "pretrain")
    assert second.version == "2" and second.verdict.rows[2].baseline == "champion v1: 2.5"
    promotion.promote(root, NAME, "2", why="better", expected_champion="1")
    client, _ = store.connect(root)
    assert versions.alias(client, NAME, "champion") == "2" and tracking.backlog(root) == []
    said = "".join(capfd.readouterr())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    for secret in (ADMIN, READER, WRONG):
        assert secret not in said
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
