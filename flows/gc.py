"""`sluice gc`: what takes room and nobody needs. Shown first; removed with `--yes`, and never while a run is going on.

1. Worktrees of runs that were killed, and checkpoints that no run has taken up.
2. Objects of DVC's cache that no branch (`runs/*` among them), no tag, no experiment (`dvc exp`), no worktree and no
   version that has an alias or is on offer refers to. A version refers to the commit it was made at and to the next one
   that changed `dvc.lock`, which recorded it. A cache outside the clone is left alone: others may have theirs there.
3. Versions that stages made, of an embedded store. Kept are: what has an alias; what a rollback, however often,
   would go back to; what is on offer; parents of what is kept; the newest of each model, which may be offered next.
4. Models that a measurement, or the removal of a version, left on the disk when it was killed (flows/leftovers.py).

On offer is a version that a person is asked to approve (flows/approve.py), until it is decided or its time is over.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flows import leftovers, run_locks, workspace
from pipelines.core import store_files
from pipelines.core.environment import STATE
from pipelines.core.errors import UserError

PARENT = "sluice.parent."
COMMIT = "git.commit"
OFFERED = "sluice.offered."  # and the id of the flow run that asks -> when it asks no more, ISO 8601 (flows/approve.py)


@dataclass(frozen=True)
class Waste:
    """Something nobody needs."""

    kind: str
    name: str
    bytes: int
    why: str
    remove: Callable[[], None]


def collect(root: Path, yes: bool, console: Console) -> list[Waste]:
    """Show what nobody needs, and remove it if `yes`. Returns it.

    Raises:
        UserError: something is to be removed while a run, a flow or a `dvc` command is going on.
        StoreUnavailable: the store is away: what its aliases need cannot be told.
    """
    with ExitStack() as stack:
        if yes:
            stack.enter_context(run_locks.alone(root))
            stack.enter_context(run_locks.quiet(root))
            if busy := run_locks.dvc_at_work(root):
                raise UserError(f"dvc is at work here (process {', '.join(map(str, busy))}): wait for it")
        client = _client(root)
        found = [*_worktrees(root), *_checkpoints(root), *_cache(root, client)]
        found += [*_versions(root, client), *_left(root, client)]
        _show(found, console)
        for one in found if yes else []:
            one.remove()
    if (elsewhere := _cache_elsewhere(root)) is not None:
        told = (
            f"DVC's cache in {elsewhere} is left alone, other clones may use it: `dvc gc --projects` takes their names"
        )
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    total = _size(sum(one.bytes for one in found))
    told = f"removed {total}" if yes else f"{total} could go: `sluice gc --yes`"
    console.print(told if found else "nothing to remove", markup=False, highlight=False)
    return found


def needed(
    versions_of: dict[str, list[Any]], aliases: dict[str, dict[str, str]], replaced: Iterable[tuple[str, str]] = ()
) -> set[tuple[str, str]]:
    """The (model, version) pairs that must stay.

    Args:
        versions_of: model -> its versions, each with `version` and `tags`.
        aliases: model -> alias -> version.
        replaced: (model, version) pairs that releases have replaced; a rollback of these puts them back.
    """
    from pipelines.core.moves import FROM

    by_number = {(model, str(one.version)): one for model, every in versions_of.items() for one in every}
    waiting = [*replaced, *((model, str(version)) for model, held in aliases.items() for version in held.values())]
    waiting += [key for key, one in by_number.items() if _offered(one)]
    waiting += [(model, str(max(int(one.version) for one in every))) for model, every in versions_of.items() if every]
    keep: set[tuple[str, str]] = set()
    while waiting:
        model, version = waiting.pop()
        if (model, version) in keep or (model, version) not in by_number:
            continue
        keep.add((model, version))
        tags = by_number[model, version].tags
        waiting.append((model, tags.get(FROM, "")))
        waiting += [(key.removeprefix(PARENT), value) for key, value in tags.items() if key.startswith(PARENT)]
    return keep


def _offered(entry: Any) -> bool:
    """Whether somebody is asked to approve a version."""
    ends = (value for key, value in entry.tags.items() if key.startswith(OFFERED))
    return any(datetime.fromisoformat(end) > datetime.now(UTC) for end in ends)


def _worktrees(root: Path) -> Iterator[Waste]:
    for name in run_locks.abandoned(root):
        place = run_locks.folder(root) / name
        yield Waste("worktree", name, _bytes(place), "its run was killed", lambda n=name: workspace.remove(root, n))  # type: ignore[misc]


def _checkpoints(root: Path) -> Iterator[Waste]:
    for place in sorted((root / STATE / workspace.CHECKPOINTS).glob("*/*")):
        name = place.relative_to(place.parents[1]).as_posix()
        yield Waste("checkpoint", name, _bytes(place), "no run has taken it up", lambda p=place: shutil.rmtree(p))  # type: ignore[misc]


def _cache(root: Path, client: Any | None) -> Iterator[Waste]:
    """Objects of the cache, as one entry.

    Raises:
        UserError: what a revision needs cannot be told; the message is DVC's.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.scm import NoSCM

    if _cache_elsewhere(root) is not None:
        return
    with Repo(str(root)) as repo:
        git = not isinstance(repo.scm, NoSCM)  # an archive that was unpacked has no history that could need anything
        places = [root, *(_other_worktrees(root) if git else ())]
        revisions = list(_revisions(root, client)) if git and client is not None else []
        everywhere = {"all_branches": git, "all_tags": git, "all_experiments": git}
        try:
            needs = [repo.used_objs(**everywhere, revs=revisions or None)]
            for place in places:  # what is not committed there yet
                with Repo(str(place)) as other:
                    needs.append(other.used_objs())
        except DvcException as error:
            raise UserError(f"nothing is removed: {error}") from None
        used = {info.value for each in needs for infos in each.values() for info in infos}
        odb = repo.cache.local
        unused = [Path(odb.oid_to_path(oid)) for oid in odb.all() if oid not in used]
    if unused:
        size = sum(path.stat().st_size for path in unused if path.exists())

        def remove() -> None:
            for path in unused:
                path.chmod(0o644)
                path.unlink(missing_ok=True)

        why = "no branch, tag, experiment, worktree or alias needs them"
        yield Waste("DVC's cache", f"{len(unused)} objects", size, why, remove)


def _cache_elsewhere(root: Path) -> Path | None:
    """Where DVC's cache is, if that is not in the clone."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        place = Path(repo.cache.local_cache_dir).resolve()
    return None if place.is_relative_to(root.resolve()) else place


def _revisions(root: Path, client: Any) -> Iterator[str]:
    """Commits that versions with an alias, or on offer, were made at, and those that recorded what was made."""
    from pipelines.core import references, versions

    for model in versions.models(client):
        aliased = {str(version) for version in client.get_registered_model(model).aliases.values()}
        for entry in references.every(client, model):
            commit = entry.tags.get(COMMIT, "none")
            if (str(entry.version) in aliased or _offered(entry)) and commit != "none":
                try:
                    yield workspace.resolve(root, commit)
                except UserError:  # made in another clone
                    continue
                words = ("--branches", "--ancestry-path", f"^{commit}", "--reverse", "--", "dvc.lock")
                yield from workspace.git(root, "rev-list", *words).split()[:1]


def _versions(root: Path, client: Any | None) -> Iterator[Waste]:
    from pipelines.core import ledger, lineage, promotion, references, release, store, versions

    if client is None or store.embedded(root) is None:  # a shared store is looked after by whoever owns it
        return
    every = {model: references.every(client, model) for model in versions.models(client)}
    held = {model: client.get_registered_model(model).aliases for model in every}
    journal = ledger.of(root)
    moved = [move for one in release.standing(root, journal) for move in one.moves]
    replaced = [(move.model, move.source) for move in moved if move.source is not None]
    replaced += [(model, one) for model in every for one in promotion.trail(root, journal, model) if one]
    keep = needed(every, held, replaced)
    for model, entries in every.items():
        for entry in entries:
            if (model, str(entry.version)) not in keep and lineage.CONTENT in entry.tags:
                place = _files(root, client, entry)
                why = "no alias, no rollback, no approval and no kept version needs it"
                size = _bytes(place) if place else 0
                yield Waste("version", references.shown(entry), size, why, _forget(root, client, entry, place))


def _forget(root: Path, client: Any, entry: Any, place: Path | None) -> Callable[[], None]:
    def remove() -> None:
        from pipelines.core import moves, references, store

        with store.locked(root, "registry"), moves.desk(root, None) as desk:
            now = desk.client.get_model_version(entry.name, entry.version)
            if now.aliases or _offered(now):
                return  # it was promoted or offered just now
            client.delete_model_version(entry.name, str(entry.version))
            if (logged := references.logged(entry)) is not None:
                client.delete_logged_model(logged)
            if place is not None:
                shutil.rmtree(place)

    return remove


def _files(root: Path, client: Any, entry: Any) -> Path | None:
    """Where the files of a version are, if they are ours."""
    from pipelines.core import references

    logged = references.logged(entry)
    if logged is None:
        return None
    place = store_files.local(str(client.get_logged_model(logged).artifact_location))
    ours = place is not None and place.is_relative_to((root / STATE / "mlflow").resolve()) and place.exists()
    return place if ours else None


def _left(root: Path, client: Any | None) -> Iterator[Waste]:
    for one in leftovers.found(root, client):
        yield Waste(one.kind, one.name, _bytes(one.place), one.why, lambda o=one: leftovers.remove(root, o))  # type: ignore[misc]


def _client(root: Path) -> Any | None:
    """The store's client; None where no store was ever made."""
    from pipelines.core import store

    database = store.embedded(root)
    return None if database is not None and not database.exists() else store.connect(root)[0]


def _other_worktrees(root: Path) -> Iterator[Path]:
    for line in workspace.git(root, "worktree", "list", "--porcelain").splitlines():
        place = Path(line.removeprefix("worktree "))
        if line.startswith("worktree ") and place != root.resolve() and (place / ".dvc").exists():
            yield place


def _show(found: list[Waste], console: Console) -> None:
    if not found:
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("", "what", "size", "why"):
        table.add_column(heading, overflow="fold")
    for one in found:
        table.add_row(one.kind, one.name, _size(one.bytes), one.why)
    console.print(table)


def _bytes(place: Path) -> int:
    """Of a folder's own files; what it only links to is another's."""
    return sum(path.lstat().st_size for path in place.rglob("*") if path.is_file() and not path.is_symlink())


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
