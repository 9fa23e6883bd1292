"""Who may move aliases, and what was begun: the one interface behind which promotions are kept apart.

A promotion holds the ledger, writes what it means to do (`intent`), does it, and writes `done`; whoever holds the
ledger next finishes or undoes what a crash cut off (`pipelines.core.moves`). Lock and journal are one interface,
since a lock that several hosts share is worth nothing without a journal that they share. `FileLedger` is for one
clone and its worktrees: `flock` on `.sluice/locks/promotion`, lines of JSON in `.sluice/registry/promotions.jsonl`. A
database takes its place by the same three methods, where several clones, of one machine or more, promote in one store:
`of` is what gives it to everybody.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from pipelines.core import faults, file_locks, store
from pipelines.core.environment import STATE
from pipelines.core.errors import UserError

Action = Literal["promote", "rollback"]
State = Literal["intent", "done", "aborted"]
PATIENCE = 120.0  # seconds; a promotion holds the ledger for one or two on an idle machine
QUIET = 3.0  # of them, before whoever waits is told what for
POLL = 0.05
LONGEST = 5000  # characters of a name or a reason: what every MLflow store takes in a tag


class LedgerHeld(UserError):
    """Another promotion does not come to its end. Worth trying again."""

    exit_code = 75  # EX_TEMPFAIL


@dataclass(frozen=True)
class Move:
    """One model's champion, from one version to another. Versions are text: a store may give them as numbers."""

    model: str
    source: str | None  # the champion that is replaced; None: there was none
    target: str | None  # the champion afterwards; None: there is none
    previous: str | None  # where `previous` points afterwards


@dataclass(frozen=True)
class Promotion:
    """Moves that happen together or not at all."""

    id: str
    action: Action
    moves: tuple[Move, ...]
    who: str
    why: str
    when: str  # ISO 8601, UTC
    store: str  # see `store.place`
    release: str | None = None  # what a release is named after, such as `sluice-policy 5`

    @classmethod
    def begin(
        cls, root: Path, action: Action, moves: list[Move], who: str, why: str, release: str | None = None
    ) -> Promotion:
        """One that is about to happen: now, by somebody (the logged-in user when empty), in the store in use.

        What a terminal of another encoding makes of a reason is written so that the store can take it, and no more of
        it than that: refused when champions have moved, it would hold up every later promotion.
        """
        who, why = (faults.writable(text)[:LONGEST] for text in (who or _user(), why))
        return cls(uuid.uuid4().hex, action, tuple(moves), who, why, now(), store.place(root), release)

    @property
    def models(self) -> tuple[str, ...]:
        """Models whose champion moves."""
        return tuple(move.model for move in self.moves)

    def to_json(self) -> dict[str, Any]:
        """As the journal keeps it and hooks are told it."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Promotion:
        """The inverse of `to_json`. Lines of before there were releases hold one move among the other keys."""
        values = {key: value for key, value in raw.items() if key != "state"}
        if "moves" not in values:
            values["moves"] = [{key: values.pop(key) for key in ("model", "source", "target", "previous")}]
            values["store"] = store.without_login(values["store"])
        return cls(**{**values, "moves": tuple(Move(**move) for move in values["moves"])})


class Ledger(Protocol):
    """A lock and a journal that all who promote share."""

    def held(self) -> AbstractContextManager[None]:
        """Hold the ledger; one holder at a time, and none after the holder's death. Not re-entrant.

        Raises:
            LedgerHeld: somebody else holds it and does not let go; the message says who.
        """
        ...

    def entries(self) -> list[tuple[State, Promotion]]:
        """Every line, oldest first."""
        ...

    def write(self, state: State, promotion: Promotion) -> None:
        """Add a line; on the disk when this returns. Only the holder calls it."""
        ...


class FileLedger:
    """The ledger of one clone, see the module."""

    def __init__(self, root: Path, patience: float = PATIENCE) -> None:
        """Nothing is opened yet. `patience`: seconds to wait for another holder."""
        self.journal = root / STATE / "registry" / "promotions.jsonl"
        self.lock = root / STATE / "locks" / "promotion"
        self.patience = patience

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """See `Ledger`. The kernel lets go of the lock of a process that dies."""
        self.lock.parent.mkdir(parents=True, exist_ok=True)
        with self.lock.open("a+", encoding="utf-8") as file:
            began, told = time.monotonic(), False
            while not file_locks.taken(file.fileno()):
                waited = time.monotonic() - began
                if waited > self.patience:
                    raise LedgerHeld(
                        f"another promotion holds {self.lock} and has not let go for {self.patience:g} seconds: "
                        f"{_holder(file)}. Nothing was changed; look at that process first."
                    )
                if waited > QUIET and not told:
                    told = True
                    print(f"waiting until another promotion ends: {_holder(file)}", file=sys.stderr, flush=True)
                time.sleep(POLL)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {now()}\n")
            file.flush()
            yield

    def entries(self) -> list[tuple[State, Promotion]]:
        """See `Ledger`. A line that a crash tore is left out.

        Raises:
            UserError: another line is none of ours; the message says which.
        """
        text = self.journal.read_text(encoding="utf-8", errors="replace") if self.journal.exists() else ""
        found: list[tuple[State, Promotion]] = []
        for number, line in enumerate(text.split("\n")[:-1], start=1):
            try:
                entry = json.loads(line)
                found.append((entry["state"], Promotion.from_json(entry)))
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self.journal}, line {number}: found {line[:60]!r}, which is no promotion as JSON. Bring back a "
                    "copy of the file, or take that line out: who is champion is kept in the MLflow store."
                ) from None
        return found

    def write(self, state: State, promotion: Promotion) -> None:
        """See `Ledger`."""
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        if self.journal.exists():  # a crash may have left half a line
            os.truncate(self.journal, self.journal.read_bytes().rfind(b"\n") + 1)
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"state": state, **promotion.to_json()}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def of(root: Path) -> Ledger:
    """The ledger of a repository: the one place that says what it is."""
    return FileLedger(root)


def now() -> str:
    """The time as promotions keep it: ISO 8601, UTC, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _user() -> str:
    """Who is logged in; the number where it has no name, as of a container's user that nobody has entered."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user {os.getuid()}"


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "holder unknown"
