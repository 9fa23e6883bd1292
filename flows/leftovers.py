"""What a measurement, and the removal of a version, leave on the disk when they are killed: whole models.

Each of them holds the lock `registry`, so what lies there while nobody holds it belongs to none that goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.core import file_locks, store, store_files


class Left(NamedTuple):
    """A folder that nobody comes back to."""

    kind: str
    name: str
    place: Path
    why: str


def found(root: Path, client: Any | None) -> list[Left]:
    """Everything that was left; nothing while the lock is held, since it may be of whoever holds it.

    Args:
        client: of the store; None where no store was ever made.

    Raises:
        StoreUnavailable: the store is away.
    """
    with file_locks.opened(store.lock_file(root, "registry")) as file:
        if not file_locks.taken(file):
            return []
        return [*_measurements(root), *(_removals(root, client) if client is not None else ())]


def remove(root: Path, left: Left) -> None:
    """Remove it, unless another process has."""
    with store.locked(root, "registry"):
        if left.place.exists():
            shutil.rmtree(left.place)


def _measurements(root: Path) -> Iterator[Left]:
    """Copies of champions that were to be measured again."""
    from pipelines.core import verdicts

    for place in sorted(verdicts.measured(root).glob("*")):
        if place.is_dir():
            yield Left("measurement", place.name, place, "it was killed")


def _removals(root: Path, client: Any) -> Iterator[Left]:
    """Files of an embedded store's models that are deleted there and that no version names."""
    from pipelines.core import references, versions

    if (database := store.embedded(root)) is None:
        return
    ours = store.own(root).parent
    with store.answering(root):
        every = [entry for model in versions.models(client) for entry in references.every(client, model)]
    named = {references.logged(entry) for entry in every}
    for one in store_files.deleted(database):
        place = store_files.local(one.location)
        if one.model_id not in named and place is not None and place.is_relative_to(ours) and place.exists():
            yield Left("deleted model", f"{one.name} {one.model_id}", place, "its removal was cut off")
