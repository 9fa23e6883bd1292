"""Moving aliases, which only promotions do: `champion` of one model by compare-and-set.

MLflow has no compare-and-set for aliases (the last writer wins), so a promotion happens under a lock and names
the champion it means to replace (`pipelines.core.ledger`), in steps that the next one finishes or undoes after a
crash (`pipelines.core.moves`). Models that belong together move together: `pipelines.core.release`. The alias of the
best of several follows: `pipelines.core.best`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from pipelines.core import best, moves, policy, store, versions
from pipelines.core import ledger as ledgers
from pipelines.core.errors import GateError
from pipelines.core.ledger import Ledger, LedgerHeld, Move, Promotion, State
from pipelines.core.moves import FROM, PREVIOUS


def promote(
    root: Path,
    model: str,
    version: str | int,
    *,
    who: str = "",
    why: str,
    expected_champion: str | int | None,
    ledger: Ledger | None = None,
) -> Promotion | None:
    """Make a version that passed its gate the champion; None when it is the champion already.

    Args:
        who: a person or a flow; the name of the logged-in user when empty.
        expected_champion: the champion the caller saw and means to replace, None for none.
        ledger: that of `ledger.of` when None.

    Raises:
        GateError: no such version, its gate did not pass or was asked about another champion, or the champion
            is not the expected one.
        LedgerHeld: another promotion does not come to its end.
        StoreUnavailable: the store is away.
    """
    with moves.desk(root, ledger) as desk:
        now, target = desk.champion(model), str(version)
        entry = moves.fetch(desk.client, model, target)
        refused = moves.refusal(entry, now)
        if entry.tags.get(versions.GATE) != "passed":
            raise GateError(refused)
        if now == target:
            return None
        moves.compare(model, now, expected_champion)
        if refused is not None:
            raise GateError(refused)
        step = Promotion.begin(root, "promote", [Move(model, now, target, previous=now)], who, why)
        desk.carry_out(step)
        return step


def rollback(
    root: Path,
    model: str,
    *,
    who: str = "",
    why: str,
    expected_champion: str | int | None,
    ledger: Ledger | None = None,
) -> Promotion:
    """Make the version behind the alias `previous` the champion again; `previous` steps back one more (`behind`).

    Raises:
        GateError: there is nothing to go back to, or the champion is not the expected one.
        LedgerHeld: another promotion does not come to its end.
        StoreUnavailable: the store is away.
    """
    with moves.desk(root, ledger) as desk:
        now = desk.champion(model)
        moves.compare(model, now, expected_champion)
        target = versions.alias(desk.client, model, PREVIOUS)
        if target is None:
            raise GateError(f"{model} has no previous champion to go back to (champion: {now or 'none'})")
        if target == now:
            raise GateError(
                f"{model}: the alias {PREVIOUS} names the champion itself, version {now}: one of the two was moved by "
                f"other means. Nothing was changed; `sluice promote {model} VERSION --why ...` takes the one you want."
            )
        move = Move(model, now, target, behind(desk, model, now, target))
        step = Promotion.begin(root, "rollback", [move], who, why)
        desk.carry_out(step)
        return step


def recover(root: Path) -> None:
    """Finish or undo what a crash cut off; opens nothing where nothing is open. Called without any lock.

    Where somebody holds the ledger nothing is left to do: every holder does this first.

    Raises:
        StoreUnavailable: something is open, and the store is away.
        UserError: see `FileLedger.entries`.
    """
    if moves.begun(root, ledgers.of(root)):
        with contextlib.suppress(LedgerHeld), moves.desk(root, None):
            pass


def unfinished(root: Path) -> list[str]:
    """Promotions that have no end yet, a line each.

    Raises:
        UserError: see `FileLedger.entries`.
    """
    return [moves.told(one) for one in moves.begun(root, ledgers.of(root))]


def behind(desk: moves.Desk, model: str, now: str | None, target: str | None) -> str | None:
    """The champion that a second rollback would bring back, after one from `now` to `target`.

    As the journal has it; where it knows nothing of the two, as on another machine than the one that promoted them, the
    champion that `target` replaced when it was last promoted.
    """
    if target is None:
        return None
    way = trail(desk.root, desk.ledger, model)
    if len(way) > 2 and way[-2:] == [target, now]:
        return way[-3]
    return moves.fetch(desk.client, model, target).tags.get(FROM) or None


def trail(root: Path, ledger: Ledger, model: str) -> list[str | None]:
    """Champions of a model, each behind the one it replaced; None: there was none. The last is in office.

    A promotion adds one and a rollback takes one away: what somebody went back from is not gone back to. Where an
    alias was moved by other means, or the journal begins in the middle, it begins with what was replaced there.
    """
    way: list[str | None] = []
    for state, entry in ledger.entries():
        for move in entry.moves if state == "done" and store.is_meant(root, entry.store) else ():
            if move.model == model:
                way = way if way[-1:] == [move.source] else [move.source]
                if entry.action == "promote":
                    way.append(move.target)
                else:
                    way = way[:-1] if way[-2:-1] == [move.target] else [move.target]
    return way


def was_promoted(root: Path, model: str, version: str) -> bool:
    """Whether a version has been champion, by whatever way.

    Raises:
        GateError: there is no such version.
        StoreUnavailable: the store is away.
    """
    return any(key.startswith(("promotion.", "rollback.")) for key in _tags(root, model, version))


def was_rolled_back(root: Path, model: str, version: str) -> bool:
    """Whether a version was champion until somebody went back from it.

    Raises:
        GateError: there is no such version.
        StoreUnavailable: the store is away.
    """
    return moves.ROLLED_BACK in _tags(root, model, version)


def _tags(root: Path, model: str, version: str) -> dict[str, str]:
    client, _ = store.connect(root)
    with store.answering(root):
        return dict(moves.fetch(client, model, version).tags)


def history(root: Path) -> list[tuple[State, Promotion]]:
    """The journal: every intent and what became of it, oldest first."""
    return ledgers.of(root).entries()


def point_best(root: Path, stage: str) -> str | None:
    """Point the alias that `mlflow/registry.yaml` names under `best` at the best of the stage's champions.

    Every promotion and rollback does so (`pipelines.core.best`): what is left to do here is what the policy has
    changed since.

    Returns what was done, in words; nothing where nothing was to do.

    Raises:
        StoreUnavailable: the store is away.
        LedgerHeld: another promotion does not come to its end.
    """
    for name, found in policy.load(root).models.items():
        if found.stage == stage and found.best is not None:
            with moves.desk(root, None) as desk:
                return best.point(desk.client, name, found.best)
    return None
