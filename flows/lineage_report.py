"""`sluice lineage MODEL@ALIAS`: commit, data, parents, gate, who approved, and how to make the same bytes again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines.core.errors import UserError
from pipelines.core.ledger import Promotion

MACHINE = ("device", "precision", "threads", "wall_seconds")


def show(root: Path, reference: str, console: Console) -> None:
    """Print all that is recorded of a version.

    Raises:
        UserError: the reference means nothing.
        GateError: no stage made the version.
        StoreUnavailable: the store is away.
    """
    from pipelines.core import provenance, references, store

    client, experiment = store.connect(root)
    with store.answering(root):
        entry = references.resolve(client, reference)
        origins = provenance.trace(root, client, experiment, entry)
        table = _verdict(root, entry)
    for line in _lines(root, entry, origins, table):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _lines(root: Path, entry: Any, origins: list[Any], table: str) -> Iterator[str]:
    from pipelines.core import provenance

    last = origins[-1]
    tags = last.tags
    yield f"{entry.name} version {entry.version}   aliases: {', '.join(sorted(entry.aliases)) or 'none'}"
    yield f"content   {last.content}"
    yield f"stage     {last.stage}"
    clean = {"false": "", "true": ", with changes that were not committed"}
    yield f"commit    {tags.get('git.commit', 'none')}{clean.get(tags.get('git.dirty', ''), ', state unknown')}"
    yield f"data      {tags.get('sluice.data_hash', 'not recorded')}"
    yield f"machine   {'  '.join(f'{key} {tags[each]}' for key in MACHINE if (each := f'sluice.{key}') in tags)}"
    packages = {key.removeprefix("package."): value for key, value in tags.items() if key.startswith("package.")}
    yield f"packages  {'  '.join(f'{key} {value}' for key, value in sorted(packages.items()))}"
    yield "\nmade from, the data first"
    for one in origins[:-1]:
        known = ", ".join(one.versions) if one.versions else "" if one.known else "not in the store"
        yield f"  {one.name:<12}{one.content}  {known}".rstrip()
    yield f"\n{table}"
    yield "\napproved"
    yield from _approvals(root, entry) or ["  by nobody: it was never promoted"]
    yield "\nmade again by"
    try:
        steps = provenance.commands(root, origins)
    except UserError as error:
        yield f"  {error}"
        return
    for doubt in provenance.doubts(root, origins):
        yield f"  # {doubt}"
    yield from steps


def _approvals(root: Path, entry: Any) -> list[str]:
    """Who made it champion, when and why: the journal, or the version's tags where another machine did it."""
    from pipelines.core import promotion

    version = str(entry.version)
    found = [
        _approval(promoted)
        for state, promoted in promotion.history(root)
        if state == "done" and (entry.name, version) in {(move.model, move.target) for move in promoted.moves}
    ]
    if not found:
        for action in ("promotion", "rollback"):
            tags = {key.removeprefix(f"{action}."): value for key, value in entry.tags.items()}
            if f"{action}.who" in entry.tags:
                found.append(f"  {tags['when']}  {action} by {tags['who']}: {tags['why']}")
    return found


def _approval(promoted: Promotion) -> str:
    whole = f", release {promoted.release}" if promoted.release else ""
    return f"  {promoted.when}  {promoted.action} by {promoted.who}{whole}: {promoted.why}"


def _verdict(root: Path, entry: Any) -> str:
    """The table of the version's gate, as its run keeps it."""
    import tempfile

    import mlflow

    from pipelines.core import store, versions

    for name in (f"{entry.name}/verdict.txt", "verdict.txt"):
        with tempfile.TemporaryDirectory() as place:
            try:
                uri = f"runs:/{entry.run_id}/{name}"
                copied = mlflow.artifacts.download_artifacts(uri, dst_path=place, tracking_uri=store.address(root))
            except (mlflow.exceptions.MlflowException, OSError) as error:
                if "API request to" in str(error):  # the store is away
                    raise
                continue
            return Path(copied).read_text(encoding="utf-8").rstrip()
    return f"{entry.name} version {entry.version}: gate {entry.tags.get(versions.GATE, 'never asked')}"
