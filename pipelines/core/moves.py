"""Moving aliases in steps that a crash may cut off anywhere, and bringing to an end what it cut off.

Steps of a promotion, under the ledger: write the intent; move `champion` of each model (from the first of these on it
has happened); point `previous` at where each came from; tag each version with who, when, why and from, and one that
was rolled back as such; let the alias of the best follow (`pipelines.core.best`); write `done`. Whoever holds the
ledger next looks at what an open intent has done: no champion moved, it is aborted; some or all moved, the others
follow and it is done; and where one can no longer follow (its version was deleted, or somebody moved that alias by
other means), those that moved go back and it is aborted. So models that belong together move together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.core import best, hooks, store, versions
from pipelines.core import ledger as ledgers
from pipelines.core.environment import STATE
from pipelines.core.errors import GateError, StoreUnavailable
from pipelines.core.ledger import Ledger, Promotion
from pipelines.core.policy import CHAMPION

PREVIOUS = "previous"
FROM = "promotion.from"
ROLLED_BACK = "rolled_back"  # -> when a rollback took a version out of office; gone once it is in office again


@dataclass(frozen=True)
class Desk:
    """What a promotion needs while it holds the ledger."""

    root: Path
    client: Any  # an MlflowClient
    ledger: Ledger
    done: list[Promotion] = field(default_factory=list)

    def champion(self, model: str) -> str | None:
        """The version in office."""
        return versions.alias(self.client, model, CHAMPION)

    def carry_out(self, promotion: Promotion) -> None:
        """All steps of a promotion."""
        self.ledger.write("intent", promotion)
        for move in promotion.moves:
            _point(self.client, move.model, CHAMPION, move.target)
        self._finish(promotion)

    def recover(self) -> None:
        """Bring to an end what a crash cut off."""
        for promotion in begun(self.root, self.ledger):
            self._end(promotion)

    def _end(self, promotion: Promotion) -> None:
        held = {model: self.champion(model) for model in promotion.models}
        moved = [move for move in promotion.moves if held[move.model] == move.target]
        left = [move for move in promotion.moves if held[move.model] == move.source]
        can = all(move.target is None or exists(self.client, move.model, move.target) for move in left)
        if moved and can and len(moved) + len(left) == len(promotion.moves):
            for move in left:
                _point(self.client, move.model, CHAMPION, move.target)
            self._finish(promotion)
            return
        for move in moved:
            there = move.source is not None and exists(self.client, move.model, move.source)
            _point(self.client, move.model, CHAMPION, move.source if there else None)
        best.follow(self.root, self.client, promotion.models)
        self._unsettle()
        self.ledger.write("aborted", promotion)

    def _finish(self, promotion: Promotion) -> None:
        """Everything behind the moves themselves; may be done twice."""
        prefix = "promotion" if promotion.action == "promote" else "rollback"
        told = {"who": promotion.who, "why": promotion.why, "when": promotion.when}
        if promotion.release is not None:
            told["release"] = promotion.release
        for move in promotion.moves:
            there = move.previous is not None and exists(self.client, move.model, move.previous)
            _point(self.client, move.model, PREVIOUS, move.previous if there else None)
            if move.target is not None:
                for key, value in {"from": move.source or "", **told}.items():
                    self.client.set_model_version_tag(move.model, move.target, f"{prefix}.{key}", value)
                if ROLLED_BACK in fetch(self.client, move.model, move.target).tags:
                    self.client.delete_model_version_tag(move.model, move.target, ROLLED_BACK)
            gone = move.source if promotion.action == "rollback" else None
            if gone is not None and exists(self.client, move.model, gone):
                self.client.set_model_version_tag(move.model, gone, ROLLED_BACK, promotion.when)
        best.follow(self.root, self.client, promotion.models)
        self._unsettle()
        self.ledger.write("done", promotion)
        self.done.append(promotion)

    def _unsettle(self) -> None:
        """Have verdicts that compared with the champion before asked again by the next `registry.reconcile`.

        Called behind the moves. It takes no lock: who takes both holds `registry` before the ledger (`sluice gc`), and
        a measurement holds `registry` for minutes. `registry.settle` leaves its file here before it looks who is
        champion, so one that was settled by the champion before is among these, or is not settled at all. The folder
        stays, since others write into it meanwhile.
        """
        for pattern in ("*.asked.json", "*.json"):  # one that is renamed in between is among the second
            for path in settled(self.root, "").parent.glob(pattern):
                path.unlink(missing_ok=True)


def settled(root: Path, model: str) -> Path:
    """The file that says which content of a model is registered and judged, see `registry.settle`."""
    return root / STATE / "registry" / "settled" / f"{model}.json"


@contextlib.contextmanager
def desk(root: Path, ledger: Ledger | None) -> Iterator[Desk]:
    """Hold the ledger (`ledger.of` gives it when None), with what a crash cut off brought to its end first.

    What is done meanwhile is told to the hooks once the ledger is free: a slow one holds up nobody.

    Raises:
        StoreUnavailable: the store is away; the message tells of a promotion that it cut off.
        LedgerHeld: another promotion does not come to its end.
    """
    ledger = ledger or ledgers.of(root)
    try:
        client, _ = store.connect(root)
        opened = Desk(root, client, ledger)
        try:
            with ledger.held(), store.answering(root):
                opened.recover()
                yield opened
        finally:
            for promotion in opened.done:
                hooks.tell(promotion)
    except StoreUnavailable as error:
        raise StoreUnavailable("\n".join([str(error), *map(told, begun(root, ledger))])) from None


def begun(root: Path, ledger: Ledger) -> list[Promotion]:
    """Promotions in the store in use that have no end yet: somebody is at it, or something cut them off.

    Raises:
        UserError: see `FileLedger.entries`.
    """
    found: dict[str, Promotion] = {}
    for state, promotion in ledger.entries():
        if state == "intent":
            found[promotion.id] = promotion
        else:
            found.pop(promotion.id, None)
    return [promotion for promotion in found.values() if store.is_meant(root, promotion.store)]


def told(promotion: Promotion) -> str:
    """One that has no end yet, in a line, and what brings it to one."""
    named = f"release {promotion.release}" if promotion.release is not None else ", ".join(promotion.models)
    return (
        f"{promotion.action} of {named} was begun by {promotion.who} ({promotion.when}) and has not ended: "
        "`sluice run`, `sluice server start` and whatever promotes next finish it, or undo it"
    )


def fetch(client: Any, model: str, version: str) -> Any:
    """A version of a model.

    Raises:
        GateError: there is none.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(model, version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise GateError(f"{model} has no version {version}") from None


def exists(client: Any, model: str, version: str) -> bool:
    """Whether the store has a version: a person may have deleted it."""
    try:
        fetch(client, model, version)
    except GateError:
        return False
    return True


def compare(model: str, now: str | None, expected: str | int | None) -> None:
    """The comparison of compare-and-set.

    Raises:
        GateError: the champion is not the one that the caller means to replace.
    """
    expected = None if expected is None else str(expected)
    if now != expected:
        raise GateError(
            f"{model}: the champion is {f'version {now}' if now else 'nobody'}, not "
            f"{f'version {expected}' if expected else 'nobody'} as expected: somebody was quicker. "
            "Nothing was changed; look at the new champion and ask again."
        )


def refusal(entry: Any, champion: str | None) -> str | None:
    """Why a version may not become champion, in a line; None when it may."""
    version, outcome = f"{entry.name} version {entry.version}", entry.tags.get(versions.GATE, "none")
    if outcome != "passed":
        return f"{version} cannot become champion: gate verdict {outcome}, needed: passed"
    judged = entry.tags.get(versions.GATE_CHAMPION, "any")
    if judged not in ("any", champion or "none") and champion != str(entry.version):
        return (
            f"{version} was judged against champion {judged}, and the champion is {champion or 'nobody'} now: "
            "`sluice promote` asks its gate again, and so does a run of its stage"
        )
    return None


def _point(client: Any, model: str, alias: str, version: str | None) -> None:
    """Set an alias, or take it away; nothing happens where it is right already."""
    held = versions.alias(client, model, alias)
    if version is None and held is not None:
        client.delete_registered_model_alias(model, alias)
    elif version is not None and held != version:
        client.set_registered_model_alias(model, alias, version)
