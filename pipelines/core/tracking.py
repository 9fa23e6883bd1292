"""Records of a run, spooled first: what a stage logs goes to `.sluice/spool/` and from there to MLflow.

A spool directory `<stage>-<fingerprint>-<n>/` holds

    key            unique name of the run, so that it is never created twice in MLflow
    events.jsonl   one line an event: `start`, `metrics` (step, time, values), `finish` (status, record)
    files/         copies of the files to log, since the stage's output may be another one at delivery
    state.json     what the courier has delivered: run id, bytes of events.jsonl

The stage only ever appends; the courier (`pipelines.core.courier`, a process of its own) only ever reads and
moves `state.json`. So a kill of either, or a store that is away for a week, loses and doubles nothing.
No MLflow here: its import takes longer than many a stage.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from pipelines.core import artifacts, store
from pipelines.core.environment import STATE

Status = Literal["FINISHED", "FAILED", "KILLED"]
BUFFER_SECONDS = 1.0
KEPT_SECONDS = 3600.0  # a run that ended is looked for when its output is registered; see `prune`
ATTENDED = "SLUICE_ATTENDED"  # set by a flow: it delivers, registers and judges for the stages it starts


@dataclass(frozen=True)
class Record:
    """What is known of a run when it ends."""

    params: dict[str, str] = field(default_factory=dict)  # flattened: "lora.rank" -> "16"
    metrics: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)  # lineage
    inputs: dict[str, str] = field(default_factory=dict)  # name -> content hash
    files: tuple[Path, ...] = ()  # to be logged as artifacts of the run, each under its own name
    texts: dict[str, str] = field(default_factory=dict)  # file name -> text, logged like files


@dataclass(frozen=True)
class Spool:
    """One spool directory, read."""

    place: Path

    @property
    def stage(self) -> str:
        """Stage of the run."""
        return self.place.name.rsplit("-", 2)[0]

    @property
    def root(self) -> Path:
        """Repository."""
        return self.place.parents[2]

    @property
    def key(self) -> str:
        """Unique name of the run, on every machine."""
        return (self.place / "key").read_text(encoding="utf-8")

    def state(self) -> dict[str, Any]:
        """What the courier has delivered: `run_id` (None before the run is created) and `offset` in bytes."""
        try:
            state: dict[str, Any] = json.loads((self.place / "state.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {"run_id": None, "offset": 0}
        return state

    def events(self, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
        """Whole events from a byte offset on, each with the offset behind it. A torn line is not one."""
        try:
            file = (self.place / "events.jsonl").open("rb")
        except (FileNotFoundError, NotADirectoryError):  # pruned just now, for another worktree; or none of ours
            return
        with file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                try:
                    event = json.loads(line)
                except ValueError:  # what was appended to half a line, or what a machine that went off left
                    continue
                yield event, offset

    def last(self, kind: str) -> dict[str, Any] | None:
        """The newest event of a kind."""
        return next((e for e, _ in reversed(list(self.events())) if e["event"] == kind), None)

    def last_step(self) -> int:
        """The last step of the live curves, 0 when there are none."""
        return max((e["step"] for e, _ in self.events() if e["event"] == "metrics"), default=0)

    def finished(self) -> dict[str, Any] | None:
        """The `finish` event that ends the newest attempt, or None while it runs or when it was killed."""
        ends = [event for event, _ in self.events() if event["event"] in ("start", "finish")]
        return ends[-1] if ends and ends[-1]["event"] == "finish" else None

    def owned(self) -> bool:
        """Whether the process of the newest attempt lives and has not finished."""
        start = self.last("start")
        return start is not None and self.finished() is None and _alive(start["pid"], start["born"])

    def settled(self) -> bool:
        """Whether the store in use has everything, the end of the run included."""
        state = self.state()
        here = state.get("store") == store.place(self.root) and state.get("ended") is True
        return here and next(self.events(state["offset"]), None) is None


class Recorder:
    """Appends one attempt of a stage to its spool. A killed attempt of the same fingerprint is continued."""

    def __init__(self, root: Path, stage: str, fingerprint: str, *, courier: bool = True) -> None:
        """Open the spool and start the courier (`courier=False`: whoever calls delivers).

        A step that the spool already holds, because an earlier attempt reached it, is not written again.
        """
        self.root = root
        self._buffer: list[str] = []
        self._flushed = time.monotonic()
        with store.locked(root, "spool"):
            self.spool = _open(root, stage, fingerprint)
            self._seen = {e["step"] for e, _ in self.spool.events() if e["event"] == "metrics"}
            self._end = (self.spool.place / "events.jsonl").stat().st_size
            self._append("start", pid=os.getpid(), born=_born(psutil.Process()))
            self._flush()
        if courier:
            start_courier(root)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Add a point to the live curves. Cheap: the file is written about once a second."""
        if step in self._seen:
            return
        self._seen.add(step)
        self._append("metrics", step=step, values=metrics)
        if time.monotonic() - self._flushed >= BUFFER_SECONDS:
            self._flush()

    def finish(self, status: Status, record: Record | None = None) -> None:
        """End the attempt: FINISHED, FAILED or KILLED. The files of the record are copied."""
        record = record or Record()
        folder = self.spool.place / "files"
        folder.mkdir(exist_ok=True)
        for path in record.files:
            shutil.copyfile(path, folder / path.name)
        for name, text in record.texts.items():
            artifacts.write_text(folder / name, text)
        body = asdict(record)
        body["files"] = sorted({*(path.name for path in record.files), *body.pop("texts")})
        self._append("finish", status=status, record=body)
        self._flush()
        artifacts.sync_tree(folder)
        # Not the drafts of the courier, which writes its state beside them: they come and go.
        artifacts.sync(self.spool.place / "events.jsonl")
        artifacts.sync(self.spool.place)

    def _append(self, event: str, **body: Any) -> None:
        self._buffer.append(json.dumps({"event": event, "time": int(time.time() * 1000), **body}) + "\n")

    def _flush(self) -> None:
        lines = "".join(self._buffer).encode()
        with (self.spool.place / "events.jsonl").open("ab") as file:
            file.truncate(self._end)  # a write that failed, on a full disk, may have left a part of these lines
            file.write(lines)
        self._end += len(lines)
        self._buffer.clear()
        self._flushed = time.monotonic()


def spools(root: Path) -> list[Spool]:
    """Every spool with an event, oldest first."""
    found = []
    for place in (root / STATE / "spool").glob("*"):
        spool = Spool(place)
        with suppress(FileNotFoundError):
            if next(spool.events(), None) is not None:
                found.append(((place / "key").stat().st_mtime_ns, place.name, spool))
    return [spool for _, _, spool in sorted(found, key=lambda one: one[:2])]


def backlog(root: Path) -> list[str]:
    """Names of the spools that MLflow does not have whole yet."""
    return [spool.place.name for spool in spools(root) if not spool.settled()]


def finished_spool(root: Path, stage: str, content_hash: str) -> Spool | None:
    """The newest run that ended well and made the output with this content hash."""
    for spool in reversed([s for s in spools(root) if s.stage == stage]):
        end = spool.finished()
        tags = end["record"]["tags"] if end and end["status"] == "FINISHED" else {}
        if tags.get("sluice.content_hash") == content_hash:
            return spool
    return None


def prune(root: Path) -> None:
    """Remove spools that MLflow has whole, except the newest of each stage. Call under the delivery lock.

    One that ended just now stays too: worktrees share the spool, and a stage that has begun in another one is newer
    than the run whose output is still to be registered.
    """
    with store.locked(root, "spool"):  # no attempt begins meanwhile, at a spool that goes
        every = spools(root)
        newest = {spool.stage: spool.place for spool in every}
        for spool in every:
            kept = spool.place == newest[spool.stage] or spool.owned() or _just_ended(spool)
            if spool.settled() and not kept:
                (spool.place / "events.jsonl").unlink()  # first: cut off behind it, what is left is no run to deliver
                shutil.rmtree(spool.place)


def _just_ended(spool: Spool) -> bool:
    end = spool.finished()
    return end is not None and end["time"] / 1000 > time.time() - KEPT_SECONDS


@contextmanager
def attended(root: Path) -> Iterator[dict[str, str]]:
    """Deliver for every stage that is started meanwhile with the variables that this gives."""
    courier = start_courier(root, attend=True)
    assert courier.stdin is not None
    with courier.stdin:
        yield {ATTENDED: "1"}


def start_courier(root: Path, attend: bool = False) -> subprocess.Popen[bytes]:
    """Start the process that delivers. It has a session of its own, so it outlives whoever starts it and is killed.

    Args:
        attend: stay until the process's standard input closes, whether a stage runs or not.
    """
    log = root / STATE / "logs" / "courier.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    source = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.core.courier", str(root.resolve()), *(["-"] if attend else [])],
            stdin=subprocess.PIPE if attend else subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )


def _open(root: Path, stage: str, fingerprint: str) -> Spool:
    """The spool of an attempt that was not finished well and that nobody writes, else a new one."""
    home = root / STATE / "spool"
    name = f"{stage}-{fingerprint[:12]}"
    numbers = sorted(int(path.name.rpartition("-")[2]) for path in home.glob(f"{name}-*"))
    if numbers:
        spool = Spool(home / f"{name}-{numbers[-1]}")
        events = spool.place / "events.jsonl"
        end = spool.finished() if events.exists() else None
        if events.exists() and not spool.owned() and (end is None or end["status"] != "FINISHED"):
            whole = max((offset for _, offset in spool.events()), default=0)
            os.truncate(events, whole)  # a kill in the middle of a write leaves half a line
            return spool
    spool = Spool(home / f"{name}-{numbers[-1] + 1 if numbers else 1}")
    spool.place.mkdir(parents=True)
    artifacts.write_text(spool.place / "key", f"{spool.place.name}-{uuid.uuid4().hex[:12]}")
    (spool.place / "events.jsonl").touch()
    return spool


def _alive(pid: int, born: float) -> bool:
    """Whether this very process still runs: a number that another process got meanwhile does not count."""
    try:
        process = psutil.Process(pid)
        return _born(process) == born and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _born(process: psutil.Process) -> float:
    """When a process began, in seconds after the machine did: whoever sets the clock makes no other process of it."""
    return float(round(process.create_time() - psutil.boot_time(), 2))
