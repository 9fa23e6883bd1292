"""Moving aliases, which only this module does: `champion` by compare-and-set, with a journal; and the best of several.

MLflow has no compare-and-set for aliases (the last writer wins), so a promotion happens under a lock and names
the champion it means to replace. Steps: write the intent, move `champion` (from here on it has happened), point
`previous` at the old champion, tag the version with who, when, why and from, write `done`. Whoever comes after
a crash finishes or drops what the journal `.sluice/registry/promotions.jsonl` says was begun. The lock holds on one
machine; machines that share a server must promote from one of them.
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from pipelines.core import store, versions
from pipelines.core.environment import STATE
from pipelines.core.errors import GateError
from pipelines.core.policy import ANY, CHAMPION

PREVIOUS = "previous"
FROM = "promotion.from"


@dataclass(frozen=True)
class Promotion:
    """One move of the champion. Versions are text: a store may give them as numbers."""

    id: str
    action: Literal["promote", "rollback"]
    model: str
    source: str | None  # the champion that was replaced
    target: str
    previous: str | None  # where `previous` points afterwards
    who: str
    why: str
    when: str
    store: str


def promote(
    root: Path, model: str, version: str | int, *, who: str = "", why: str, expected_champion: str | int | None
) -> Promotion | None:
    """Make a version that passed its gate the champion; None when it is the champion already.

    Args:
        who: a person or a flow; the name of the logged-in user when empty.
        expected_champion: the champion the caller saw and means to replace, None for none.

    Raises:
        GateError: no such version, its gate did not pass or was asked about another champion, or the champion
            is not the expected one.
        StoreUnavailable: the store is away.
    """
    with store.locked(root, "promotion"):
        client, _ = store.connect(root)
        with store.answering(root):
            _recover(root, client)
            now, target = versions.alias(client, model, CHAMPION), str(version)
            entry = _version(client, model, target)
            outcome = entry.tags.get(versions.GATE, "none")
            if outcome != "passed":
                raise GateError(
                    f"{model} version {target} cannot become champion: gate verdict {outcome}, needed: passed"
                )
            if now == target:
                return None
            _compare(model, now, expected_champion)
            judged = entry.tags.get(versions.GATE_CHAMPION, "any")
            if judged not in ("any", now or "none"):
                raise GateError(
                    f"{model} version {target} was judged against champion {judged}, and the champion is "
                    f"{now or 'nobody'} now: run its stage again, which asks the gate again"
                )
            return _move(root, client, "promote", model, now, target, previous=now, who=who, why=why)


def rollback(root: Path, model: str, *, who: str = "", why: str, expected_champion: str | int | None) -> Promotion:
    """Make the version behind the alias `previous` the champion again; `previous` steps back one more.

    Raises:
        GateError: there is nothing to go back to, or the champion is not the expected one.
        StoreUnavailable: the store is away.
    """
    with store.locked(root, "promotion"):
        client, _ = store.connect(root)
        with store.answering(root):
            _recover(root, client)
            now = versions.alias(client, model, CHAMPION)
            _compare(model, now, expected_champion)
            target = versions.alias(client, model, PREVIOUS)
            if target is None:
                raise GateError(f"{model} has no previous champion to go back to (champion: {now or 'none'})")
            before = _version(client, model, target).tags.get(FROM) or None
            return _move(root, client, "rollback", model, now, target, previous=before, who=who, why=why)


def point_best(root: Path, stage: str) -> str | None:
    """Give the alias that `mlflow/registry.yaml` names under `best` to the best model of a stage that passed its gate.

    It is on one model at a time. Where none passed it stays where it is. It follows from the verdicts that are stored,
    so doing it again changes nothing, and a crash in between is mended by the next call.

    Returns what was done, in words; nothing where nothing was to do.

    Raises:
        StoreUnavailable: the store is away.
    """
    from pipelines.core import lineage, verdicts

    found = [one for one in verdicts.candidates(root, stage) if one.policy.best is not None]
    if not found:
        return None
    metrics = lineage.read_metrics(root, found[0].spec)
    passed: dict[str, tuple[float, str]] = {}
    for one in found:
        best, part = one.policy.best, Path(one.policy.model).name
        assert best is not None
        verdict = verdicts.stored(root, one.name)
        allowed = not best.only or any(fnmatchcase(part, name) for name in best.only)
        if allowed and verdict is not None and verdict.passed and verdict.content_hash == one.content:
            passed[one.name] = (metrics[best.lowest.replace(ANY, part)], verdict.version)
    if not passed:
        return None
    chosen = min(passed, key=lambda name: (passed[name][0], name))
    best = found[0].policy.best
    assert best is not None
    with store.locked(root, "promotion"):
        client, _ = store.connect(root)
        with store.answering(root):
            return _point(client, best.alias, chosen, passed[chosen][1], [one.name for one in found])


def _point(client: Any, alias: str, chosen: str, version: str, family: list[str]) -> str | None:
    """Move an alias to one model of a family; the new one first, so that there is always one that has it."""
    holders = {name: versions.alias(client, name, alias) for name in family}
    if holders[chosen] != version:
        client.set_registered_model_alias(chosen, alias, version)
    for name, held in holders.items():
        if held is not None and name != chosen:
            client.delete_registered_model_alias(name, alias)
    return None if holders[chosen] == version else f"{chosen} {version} is {alias} now"


def history(root: Path) -> list[dict[str, Any]]:
    """The journal: every intent and what became of it, oldest first. A line that a crash tore is left out."""
    path = _journal(root)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _compare(model: str, now: str | None, expected: str | int | None) -> None:
    expected = None if expected is None else str(expected)
    if now != expected:
        raise GateError(
            f"{model}: the champion is {f'version {now}' if now else 'nobody'}, not "
            f"{f'version {expected}' if expected else 'nobody'} as expected: somebody was quicker. "
            "Nothing was changed; look at the new champion and ask again."
        )


def _version(client: Any, model: str, version: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(model, version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise GateError(f"{model} has no version {version}") from None


def _move(
    root: Path,
    client: Any,
    action: Literal["promote", "rollback"],
    model: str,
    source: str | None,
    target: str,
    *,
    previous: str | None,
    who: str,
    why: str,
) -> Promotion:
    when = datetime.now(UTC).isoformat(timespec="seconds")
    name = who or getpass.getuser()
    step = Promotion(uuid.uuid4().hex, action, model, source, target, previous, name, why, when, store.address(root))
    _write(root, "intent", step)
    client.set_registered_model_alias(model, CHAMPION, target)
    _finish(root, client, step)
    return step


def _finish(root: Path, client: Any, step: Promotion) -> None:
    """Everything behind the move itself; may be done twice."""
    if step.previous is None:
        if versions.alias(client, step.model, PREVIOUS) is not None:
            client.delete_registered_model_alias(step.model, PREVIOUS)
    else:
        client.set_registered_model_alias(step.model, PREVIOUS, step.previous)
    prefix = "promotion" if step.action == "promote" else "rollback"
    for key, value in (("from", step.source or ""), ("who", step.who), ("why", step.why), ("when", step.when)):
        client.set_model_version_tag(step.model, step.target, f"{prefix}.{key}", value)
    # Verdicts that compared with the champion before are asked again by the next `reconcile`
    shutil.rmtree(root / STATE / "registry" / "settled", ignore_errors=True)
    _write(root, "done", step)


def _recover(root: Path, client: Any) -> None:
    """Bring to an end what a crash cut off: done when the alias had moved, aborted when it had not."""
    open_steps: dict[str, Promotion] = {}
    for line in history(root):
        step = Promotion(**{key: value for key, value in line.items() if key != "state"})
        if line["state"] == "intent":
            open_steps[step.id] = step
        else:
            open_steps.pop(step.id, None)
    for step in open_steps.values():
        if step.store != store.address(root):
            continue
        if versions.alias(client, step.model, CHAMPION) == step.target:
            _finish(root, client, step)
        else:
            _write(root, "aborted", step)


def _write(root: Path, state: Literal["intent", "done", "aborted"], step: Promotion) -> None:
    path = _journal(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():  # a crash may have left half a line
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"state": state, **asdict(step)}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _journal(root: Path) -> Path:
    return root / STATE / "registry" / "promotions.jsonl"
