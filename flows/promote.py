"""`sluice promote`, `sluice rollback`, `sluice history`: champions, one by one or a whole release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.core.errors import GateError, UserError
from pipelines.core.ledger import Promotion


def promote(root: Path, model: str, version: str | None, why: str, expected: str | None, console: Console) -> None:
    """Make a version (the newest if none is named) the champion; its gate is asked again if either has changed.

    Args:
        expected: the champion the caller saw, `none` for none; the one in office now when None.

    Raises:
        UserError: no such model or version.
        GateError: the gate did not pass, or the champion is not the expected one.
        StoreUnavailable, LedgerHeld: the store is away; another promotion does not end.
    """
    from pipelines.core import moves, policy, promotion, references, store, versions

    client, _ = store.connect(root)
    with store.answering(root):
        chosen = references.resolve(client, f"{model}/{version}") if version else references.newest(client, model)
        champion = versions.alias(client, model, policy.CHAMPION)
        seen = champion if expected is None else _seen(expected)
        if champion != str(chosen.version):
            moves.compare(model, champion, seen)  # before a gate is asked, which may take minutes
        _asked(root, client, [(chosen, champion)], console)
    done = promotion.promote(root, model, chosen.version, why=why, expected_champion=seen)
    _say(console, *(_told(done) if done else [f"{references.shown(chosen)} is the champion already"]))


def promote_release(
    root: Path, model: str | None, version: str | None, why: str, expected: str | None, console: Console
) -> None:
    """Make every version that belongs to a version (of `sluice-policy` if none is named) champion, or none of them.

    Args:
        expected: the champion of that model that the caller saw, `none` for none.

    Raises:
        UserError, GateError, StoreUnavailable, LedgerHeld: as `promote`; no whole release.
    """
    from pipelines.core import moves, release, store

    client, _ = store.connect(root)
    with store.answering(root):
        planned = release.plan(root, client, model, version)
        head = next(one for one in planned.members if f"{one.model} {one.version}" == planned.name)
        if expected is not None:
            moves.compare(head.model, head.champion, _seen(expected))
        _say(console, f"release {planned.name}", *(f"  {one.model} {one.version}" for one in planned.members))
        _say(
            console, *(f"  {name} {gone}: was not made, has no champion then" for name, gone in planned.retired.items())
        )
        _asked(root, client, [(one.entry, one.champion) for one in planned.members], console)
    done = release.promote(root, planned, why=why)
    _say(console, *(_told(done) if done else [f"release {planned.name} is in office already"]))


def rollback(root: Path, model: str, why: str, expected: str | None, console: Console) -> None:
    """Make the previous champion of a model the champion again.

    Args:
        expected: the champion the caller saw, `none` for none; the one in office now when None.

    Raises:
        UserError, GateError, StoreUnavailable, LedgerHeld: as `promote`; there is nothing to go back to.
    """
    from pipelines.core import policy, promotion, references, store, versions

    client, _ = store.connect(root)
    with store.answering(root):
        references.registered(client, model)
        champion = versions.alias(client, model, policy.CHAMPION)
    seen = champion if expected is None else _seen(expected)
    _say(console, *_told(promotion.rollback(root, model, why=why, expected_champion=seen)))


def rollback_release(root: Path, why: str, console: Console) -> None:
    """Put back what the release in office has replaced.

    Raises:
        GateError: there is none, or a champion was moved since.
        StoreUnavailable, LedgerHeld: as `promote`.
    """
    from pipelines.core import ledger, release

    seen = release.last(root, ledger.of(root))
    told = _told(release.rollback(root, seen, why=why))
    _say(console, *(told or [f"release {seen.release}: every champion that it made had been taken back already"]))


def history(root: Path, model: str | None, console: Console) -> None:
    """Print every promotion and rollback of the journal, or those of one model, oldest first.

    Raises:
        UserError: the journal knows no such model.
    """
    from pipelines.core import promotion

    lines = {entry.id: (state, entry) for state, entry in promotion.history(root)}  # the last word on each
    known = sorted({name for _, entry in lines.values() for name in entry.models})
    if model is not None and model not in known:
        raise UserError(f"{model} was never promoted here; there are: {', '.join(known) or 'none'}")
    table = Table(box=None, pad_edge=False)
    for heading in ("when", "", "model", "from", "to", "who", "why"):
        table.add_column(heading, overflow="fold")
    for state, entry in lines.values():
        did = entry.action if state == "done" else f"{entry.action}: {'cut off' if state == 'intent' else 'undone'}"
        if entry.release is not None:
            did += f" (release {entry.release})"
        for move in entry.moves:
            if model in (None, move.model):
                ends = (move.source or "nobody", move.target or "nobody")
                table.add_row(entry.when, did, move.model, *ends, entry.who, entry.why)
    console.print(table, markup=False)


def _asked(root: Path, client: Any, pairs: list[tuple[Any, str | None]], console: Console) -> None:
    """Ask the gates again of the versions that were judged against another champion, or by other rules.

    Tells what was not measured of those that would not have been promoted without a person.

    Raises:
        GateError: some did not pass; the message has their tables.
    """
    from pipelines.core import rejudging, runner, versions

    failed = []
    for entry, champion in pairs:
        unmeasured = entry.tags.get(versions.GATE_UNMEASURED)
        if (why := rejudging.stale(root, entry, champion)) is not None:
            against = f"champion {champion}" if champion else "no champion"
            _say(console, f"{entry.name} {entry.version}: its gate {why}, asked again: {against}")
            stage = entry.tags.get(rejudging.STAGE)
            measure = runner.measure_for(root, stage) if stage is not None else None
            verdict = rejudging.ask(root, client, entry, measure)
            unmeasured = verdict.unmeasured
            if not verdict.passed:
                failed.append(verdict.table())
        if unmeasured and champion != str(entry.version):
            _say(
                console,
                f"{entry.name} {entry.version}: not measured, which is left to whoever promotes it: {unmeasured}",
            )
    if failed:
        raise GateError("\n".join(failed))


def _told(done: Promotion) -> list[str]:
    """What a promotion has done, a line a model."""
    ends = [(move.model, move.source or "nobody", move.target or "nobody") for move in done.moves]
    return [f"{model}: champion {target}, after {source}" for model, source, target in ends]


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _seen(expected: str) -> str | None:
    """The champion that a caller saw."""
    return None if expected == "none" else expected
