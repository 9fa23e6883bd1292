"""A clone in which the servers run, for the slow tests of deployments: a small repository, a receiver of news."""

from __future__ import annotations

import base64
import http.server
import json
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_repository as fake

AUTH = "team:planted-password"

PREFECT = """
name: sluice
pull:
- prefect.deployments.steps.set_working_directory: {directory: "{{ $PWD }}"}
deployments:
- name: train
  entrypoint: flows/isolated.py:isolated_run
  parameters: {root: .}
  tags: [sluice]
  work_pool: {name: sluice}
  schedules: [{cron: "* * * * *", timezone: UTC, active: true}]
  concurrency_limit: {limit: 1, collision_strategy: CANCEL_NEW}
- name: promote
  entrypoint: approval.py:promote
  parameters: {root: ., model: sluice-base}
  tags: [sluice]
  work_pool: {name: sluice}
"""

# The real flow, over a registry that only writes down what it is asked to do.
APPROVAL = """
import pathlib
from flows import approve
from pipelines.core import promotion

def offer(root, model, version, whole):
    with (CLONE / "offered.txt").open("a") as file:
        file.write("once\\n")
    page = "# sluice-base 2\\n\\n| rule | value |\\n| --- | --- |\\n| bits | 1.5 |"
    return {"name": "sluice-base 2", "model": model, "members": [[model, "2", "1"]], "release": whole, "page": page}

def move(root, model, version, *, who, why, expected_champion):
    (CLONE / "moved.txt").write_text(f"{model} {version} {expected_champion} {who}")
    return object()

def hold(root, shown, run, hours):
    (CLONE / "held.txt").write_text(f"{run} {hours}")

def let_go(root, shown, run):
    (CLONE / "held.txt").unlink()

CLONE = pathlib.Path.cwd()
approve.offer, promotion.promote = offer, move
approve.hold, approve.let_go = hold, let_go
promote = approve.promote
"""


def make(root: Path) -> Path:
    """A repository of one commit, with our own `flows` and `pipelines` in it."""
    fake.make(root)
    for name in ("flows", "pipelines"):
        (root / name).symlink_to(fake.ROOT / name)
    (root / "prefect.yaml").write_text(PREFECT)
    (root / "approval.py").write_text(APPROVAL)
    with (root / ".gitignore").open("a") as file:
        file.write("ran.txt\n*.pid\n/offered.txt\n/held.txt\n/moved.txt\n__pycache__/\n")
    commit(root, "start")
    return root


def commit(root: Path, message: str) -> str:
    """Commit everything; returns the commit."""
    who = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    for command in (["add", "-A"], [*who, "commit", "-qm", message]):
        subprocess.run(["git", *command], cwd=root, check=True)
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


class Receiver:
    """What a chat system's webhook would get."""

    def __init__(self) -> None:
        got: list[dict[str, Any]] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.got = got
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/planted-token"

    def heard(self, *words: str) -> bool:
        """Whether one message has all the words."""
        return any(all(word in message["text"] for word in words) for message in self.got)


class Api:
    """Prefect's API, asked as whoever has the password."""

    def __init__(self, address: str, auth: str | None = AUTH) -> None:
        self.address, self.auth = address, auth

    def __call__(self, path: str, body: Any = None, method: str = "POST") -> Any:
        headers = {"Content-Type": "application/json"}
        if self.auth:
            headers["Authorization"] = f"Basic {base64.b64encode(self.auth.encode()).decode()}"
        data = None if method == "GET" else json.dumps(body if body is not None else {}).encode()
        request = urllib.request.Request(f"{self.address}{path}", data, headers, method=method)
        for wait in (1.0, 2.0, 4.0, 8.0, None):  # as Prefect's own client does: SQLite is busy for a moment
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    return json.load(reply)
            except urllib.error.HTTPError as error:
                if error.code != 503 or wait is None:
                    raise
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def runs(self, deployment: str, **more: Any) -> list[dict[str, Any]]:
        """Runs of a deployment that are not of the future, newest first."""
        wanted = {"deployments": {"name": {"any_": [deployment]}}, "sort": "EXPECTED_START_TIME_DESC", **more}
        found = self("/flow_runs/filter", wanted)
        return [run for run in found if run["state"]["type"] != "SCHEDULED"]

    def run(self, flow: str, deployment: str, **parameters: Any) -> str:
        """Start a run of a deployment; returns its id."""
        known = self(f"/deployments/name/{flow}/{deployment}", method="GET")
        return str(self(f"/deployments/{known['id']}/create_flow_run", {"parameters": parameters})["id"])

    def state(self, run: str) -> tuple[str, str, str]:
        """Type, name and message of a run's state."""
        found = self(f"/flow_runs/{run}", method="GET")["state"]
        return found["type"], found["name"], found["message"] or ""


def until(what: Callable[[], Any], seconds: float, told: str = "") -> Any:
    """What it returns once that is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if found := what():
                return found
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        time.sleep(1.0)
    raise AssertionError(f"it did not happen within {seconds:g} s: {told}")
