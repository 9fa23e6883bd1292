"""Where the embedded store's files are: MLflow keeps whole paths of them, and a folder may be moved, or copied.

`.sluice/mlflow` holds the database and, beside it, `artifacts/`. In a folder that was moved or copied the database
still names the old place, where nothing is, or what is another clone's. Every process that opens the store therefore
looks once, and writes the place where it has found the database into it.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import NamedTuple

DATABASE, FILES = "mlflow.db", "artifacts"
COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)


def uri(home: Path) -> str:
    """The address of the files of a store, given its folder."""
    return f"file://{home.resolve()}/{FILES}"


def local(address: str) -> Path | None:
    """The path that a file's address means; None for that of another kind."""
    return Path(address.removeprefix("file://")) if address.startswith("file://") else None


def begun(database: Path, experiment: str) -> str | None:
    """The address of an experiment's files, as a database has it; None where it has no such experiment."""
    if not database.is_file():
        return None
    with contextlib.closing(sqlite3.connect(database)) as opened, contextlib.suppress(sqlite3.Error):
        found = opened.execute("SELECT artifact_location FROM experiments WHERE name = ?", (experiment,)).fetchone()
        return str(found[0]) if found else None
    return None


class Deleted(NamedTuple):
    """A logged model that is deleted: MLflow keeps its row, and leaves its files to others."""

    name: str
    model_id: str
    location: str  # address of its files


def deleted(database: Path) -> list[Deleted]:
    """Every logged model of a database that is deleted."""
    with contextlib.closing(sqlite3.connect(database, timeout=60.0)) as opened:
        query = "SELECT name, model_id, artifact_location FROM logged_models WHERE lifecycle_stage = 'deleted'"
        return [Deleted(*row) for row in opened.execute(query)]


def follow(home: Path, location: str) -> None:
    """Name all files by where they are now.

    Args:
        home: the folder of the store.
        location: of the experiment's files, as the database has it.
    """
    old, new = local(location), uri(home)
    if old is None or old == local(new) or not ((home / FILES).is_dir() or not old.exists()):
        return
    with contextlib.closing(sqlite3.connect(home / DATABASE, timeout=60.0)) as database, database:
        for table, column in COLUMNS:
            database.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR {column} GLOB ?",  # noqa: S608
                (new, len(location) + 1, location, _prefix(location)),
            )


def _prefix(location: str) -> str:
    """A pattern of what is below a place, whatever its name."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in location) + "/*"
