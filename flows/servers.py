"""`sluice server`: the Prefect server, the MLflow server and a worker on this machine, with all data in `.sluice/`.

One process in the background, the keeper, starts the three and starts again whichever ends. It holds a lock, so there
is one; whoever kills it takes the three along (flows/supervise.py), and the next `sluice server start` finds every
record where it was: the servers' databases are files that each answer has reached before it was given.

Another server that the environment names is used instead of one of our own: `PREFECT_API_URL`, `MLFLOW_TRACKING_URI`.
Ours listen on the loopback address. To let others in, put a proxy with TLS and a log-in before them, or name servers
that have one; `PREFECT_SERVER_API_AUTH_STRING` (and `PREFECT_API_AUTH_STRING` for whoever asks) guards Prefect's
besides.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from flows import server_processes
from flows.automations import HEARTBEAT_SECONDS, POOL
from flows.server import PAGES, START_SECONDS, answers, require
from flows.server_processes import CLONE, GRACE_SECONDS, KEEPER
from flows.supervise import Crew, child_environment
from pipelines.core import artifacts, file_locks, store
from pipelines.core.environment import STATE
from pipelines.core.errors import StoreUnavailable, UserError

HOST = "127.0.0.1"
PAUSES = (1.0, 2.0, 5.0, 15.0, 30.0)  # before a server that ended is started again
STEADY_SECONDS = 60.0  # after which an end is a new story
PATIENCE_SECONDS = 3.0  # whoever asks whether there is a keeper holds its lock for a moment
TICK = 0.5


@dataclass(frozen=True)
class Part:
    """One of the three."""

    name: str
    command: list[str]
    health: str | None  # address that answers once it is ready
    port: int | None


@dataclass
class Running:
    """A part's process, how often it ended early, and when it is to be started (again)."""

    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    failures: int = 0
    due: float = 0.0


def start(root: Path, prefect_port: int, mlflow_port: int) -> dict[str, Any]:
    """Start what is not running and return when all of it answers. Returns `prefect` and `mlflow`: the addresses.

    Raises:
        UserError: a port is taken, or both are to have the same one.
        StoreUnavailable: one did not come up; the message says where its log is.
    """
    log, keeper = _logs(root) / "keeper.log", None
    begun = log.stat().st_size if log.exists() else 0
    if not _kept(root):
        wanted = parts(root, prefect_port, mlflow_port)
        for part in wanted:
            _require_free(part)
        if len({part.port for part in wanted}) < len(wanted):
            raise UserError(f"port {prefect_port} cannot be Prefect's and MLflow's: give one of them another")
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", KEEPER, str(root), str(prefect_port), str(mlflow_port)]
        with log.open("ab") as output:
            keeper = subprocess.Popen(
                command, cwd=root, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
    deadline = time.monotonic() + 2 * START_SECONDS
    while (found := state(root)) is None:
        if (keeper is not None and keeper.poll() is not None) or time.monotonic() > deadline:
            stop(root)
            tail = "\n".join(log.read_bytes()[begun:].decode("utf-8", "replace").splitlines()[-5:])
            raise StoreUnavailable(f"the servers did not start; see {_logs(root).relative_to(root)}/\n{tail}")
        time.sleep(TICK)
    return found


def stop(root: Path) -> bool:
    """Stop all of it; runs that are going on write a checkpoint first. False when nothing ran."""
    ran, lock, clones = False, _folder(root) / "lock", {root.resolve()}
    while _kept(root):
        ran = True
        holder = lock.read_text(encoding="utf-8")  # it writes its number just after it has the lock
        if holder and (clone := server_processes.kept_by(int(holder), lock)) is not None:
            if not clone.exists():  # or its runs are those of a clone that has taken the place of this one
                clones.add(clone)
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(holder), signal.SIGTERM)
        time.sleep(TICK)
    return server_processes.end_runs(clones) or ran


def state(root: Path) -> dict[str, Any] | None:
    """Addresses of the servers that run for this clone and answer; None when they do not (yet)."""
    place = _folder(root) / "state.json"
    if not (place.exists() and _kept(root)):
        return None
    found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return found


def parts(root: Path, prefect_port: int, mlflow_port: int) -> list[Part]:
    """What is to run here: no server that the environment names another one for, and always a worker.

    Raises:
        StoreUnavailable: the environment names a Prefect server that does not answer, or not to us.
    """
    python, home = [sys.executable, "-m"], root.resolve() / STATE / "mlflow"
    found = []
    if named := _another("PREFECT_API_URL", prefect_port):
        require(named)
    else:
        command = [*python, "uvicorn", "--factory", "prefect.server.api.server:create_app"]
        command += ["--host", HOST, "--port", str(prefect_port), "--log-level", "warning"]
        found.append(Part("prefect", command, f"http://{HOST}:{prefect_port}/api/health", prefect_port))
    if not _another("MLFLOW_TRACKING_URI", mlflow_port):
        command = [*python, "mlflow", "server", "--host", HOST, "--port", str(mlflow_port), "--workers", "1"]
        # What runs write to: a database that the environment names, or that of the clone
        own = os.environ.get("MLFLOW_TRACKING_URI", "").startswith("sqlite:///")
        command += ["--backend-store-uri", store.address(root) if own else f"sqlite:///{home}/mlflow.db"]
        command += ["--artifacts-destination", f"{home}/artifacts"]
        found.append(Part("mlflow", command, f"http://{HOST}:{mlflow_port}/health", mlflow_port))
    worker = [*python, "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", "sluice"]
    return [*found, Part("worker", worker, None, None)]


def keep(root: Path, prefect_port: int, mlflow_port: int) -> None:
    """Be the keeper, until SIGTERM: start the servers, tell Prefect what it has to know, then the worker.

    Raises:
        UserError: there is a keeper already.
        StoreUnavailable: a server did not come up.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (lock := _lock(root)) is None:
        if time.monotonic() > deadline:
            raise UserError(f"the servers of {root} run already")
        time.sleep(0.05)
    os.truncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())
    crew, stopping = Crew(grace=GRACE_SECONDS), []

    def end(number: int, frame: FrameType | None) -> None:
        stopping.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    place = _folder(root) / "state.json"
    place.unlink(missing_ok=True)
    wanted = parts(root, prefect_port, mlflow_port)
    api = _another("PREFECT_API_URL", prefect_port) or f"http://{HOST}:{prefect_port}/api"
    mlflow = store.without_login(_another("MLFLOW_TRACKING_URI", mlflow_port) or f"http://{HOST}:{mlflow_port}")
    env = _environment(root, api, mlflow)
    running = {part.name: Running() for part in wanted}
    try:
        servers = [part for part in wanted if part.health]
        _attend(crew, root, servers, running, env, lambda: bool(stopping) or all(map(_ready, servers)))
        if not stopping:
            log = _logs(root) / "set-up.log"
            if crew.run([sys.executable, "-m", "flows.automations"], root, log, env):
                raise StoreUnavailable(f"Prefect could not be told of pool and deployments; see {log}")
            artifacts.write_json(place, {"prefect": api, "mlflow": mlflow, "pid": os.getpid()})
        _attend(crew, root, wanted, running, env, lambda: bool(stopping))
    finally:
        place.unlink(missing_ok=True)
        crew.stop()


def _attend(
    crew: Crew,
    root: Path,
    wanted: list[Part],
    running: dict[str, Running],
    env: dict[str, str],
    done: Callable[[], bool],
) -> None:
    """Start the parts, and start again whichever ends, until `done`."""
    while not done():
        for part in wanted:
            one, now = running[part.name], time.monotonic()
            if one.process is not None and one.process.poll() is not None:
                steady = now - one.began > STEADY_SECONDS
                one.failures = 1 if steady else one.failures + 1
                one.process, one.due = None, now + PAUSES[min(one.failures, len(PAUSES)) - 1]
                print(f"{part.name} ended; it is started again", flush=True)
            if one.process is None and now >= one.due:
                one.process = crew.start(part.command, root, _logs(root) / f"{part.name}.log", env)
                one.began = now
        time.sleep(TICK)


def _another(variable: str, port: int) -> str | None:
    """The server that the environment names, unless it is the one that is started here."""
    address = urlsplit(named := os.environ.get(variable, ""))
    own = address.hostname in (HOST, "localhost") and address.port == port
    return named if address.scheme in ("http", "https") and not own else None


def _environment(root: Path, api: str, mlflow: str) -> dict[str, str]:
    """Of the three, and of every flow run that the worker starts. `mlflow`: where its pages are."""
    guard = os.environ.get("PREFECT_SERVER_API_AUTH_STRING")
    return child_environment(
        **({"PREFECT_API_AUTH_STRING": guard} if guard else {}),
        **{PAGES: mlflow, CLONE: str(root.resolve())},
        PREFECT_API_URL=api,
        PREFECT_SERVER_UI_API_URL=api,
        PREFECT_CLIENT_MAX_RETRIES="10",  # a server that was killed is back within that time
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY=str(HEARTBEAT_SECONDS),
        PREFECT_WORKER_QUERY_SECONDS="5",
        PREFECT_LOGGING_LEVEL="INFO",
    )


def _ready(part: Part) -> bool:
    return part.health is not None and answers(part.health)


def _require_free(part: Part) -> None:
    if part.port is None:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just ended does not count
        try:
            probe.bind((HOST, part.port))
        except OSError:
            raise UserError(
                f"port {part.port} of {HOST} is taken, and the {part.name} server needs it: "
                f"`--{part.name}-port N` (or `make server {part.name.upper()}_PORT=N`) takes another"
            ) from None


def _kept(root: Path) -> bool:
    """Whether there is a keeper."""
    lock = _lock(root)
    if lock is not None:
        os.close(lock)
    return lock is None


def _lock(root: Path) -> int | None:
    """The keeper's lock as a descriptor; None while a keeper has it."""
    descriptor = file_locks.descriptor(_folder(root) / "lock")
    if file_locks.taken(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _folder(root: Path) -> Path:
    return root / STATE / "servers"


def _logs(root: Path) -> Path:
    return root / STATE / "logs" / "servers"


def main(root: Path, prefect_port: int, mlflow_port: int) -> int:
    """Be the keeper; returns the exit code. Whoever started it shows the last of what it printed."""
    try:
        keep(root, prefect_port, mlflow_port)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
