"""The graph and its state, asked from DVC: which stages there are, what each waits for, which are stale and why.

Only questions that DVC answers without running or writing anything are asked in this process; everything that
changes the workspace goes through the `dvc` command (its lock holds between processes, not between threads).
"""

from __future__ import annotations

from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from pipelines.core import graph, hardware
from pipelines.core.errors import StoreUnavailable, UserError
from pipelines.core.params import whole


@dataclass(frozen=True)
class State:
    """The graph as DVC sees it now."""

    parents: dict[str, tuple[str, ...]]  # stage -> the stages it waits for; parents come first
    reasons: dict[str, tuple[str, ...]]  # stale stage -> why; a fresh stage is absent
    shows: dict[str, str]  # stage -> the metric that stands for it (`meta: {shows: KEY}` in dvc.yaml)
    files: tuple[tuple[int, int], ...] = ()  # what DVC's files were when it was asked
    links: bool = False  # whether DVC puts links in the place of the files that a stage has made (`cache.type`)

    def holds(self, root: Path) -> bool:
        """Whether params, graph and lock file are still those that DVC was asked about."""
        return self.files == _files(root)

    def needed(self, wanted: list[str], only: bool = False) -> list[str]:
        """The wanted stages (all, if none is named) and everything they depend on, parents first.

        Args:
            only: without what they depend on: what stands of it is taken as it is.

        Raises:
            UserError: a name that is no stage; the message lists those there are.
        """
        unknown = sorted(set(wanted) - set(self.parents))
        if unknown:
            raise UserError(f"no stage {unknown[0]!r} in dvc.yaml; there are: {', '.join(self.parents)}")
        if only and wanted:
            return [stage for stage in self.parents if stage in wanted]
        return graph.needed(self.parents, wanted or self.parents)

    def between(self, first: str | None, last: str | None) -> list[str]:
        """`first` and what depends on it, as far as `last` needs it; without `first` or `last` there is no such end.

        Raises:
            UserError: a name that is no stage, or `last` does not depend on `first`.
        """
        self.needed([name for name in (first, last) if name is not None])
        after = set(self.parents) if first is None else {first}
        for stage, parents in self.parents.items():
            if after.intersection(parents):
                after.add(stage)
        before = self.needed([last] if last is not None else [])
        chosen = [stage for stage in before if stage in after]
        if not chosen:
            raise UserError(f"stage {last} does not depend on {first}: there is nothing between them")
        return chosen

    def suspects(self) -> set[str]:
        """Stages that are stale, or that may become so when a stage they depend on runs."""
        found: set[str] = set()
        for stage, parents in self.parents.items():
            if stage in self.reasons or found.intersection(parents):
                found.add(stage)
        return found


def look(root: Path) -> State:
    """Ask DVC for the graph and for what has changed since each stage last ran. About 0.5 s.

    Raises:
        UserError: `dvc.yaml` is missing or invalid, or DVC was never initialised.
        StoreUnavailable: another process holds DVC's lock.
    """
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo

    if not (root / "dvc.yaml").exists():
        raise UserError(f"dvc.yaml: no such file in {root}. Run from the repository's root.")
    files = _files(root)
    try:
        with Repo(str(root), _wait_for_lock=True) as repo:
            edges = repo.index.graph
            parents = {s.name: tuple(sorted(p.name for p in edges.successors(s))) for s in edges}
            shows = {s.name: s.meta["shows"] for s in edges if "shows" in (s.meta or {})}
            names = {s.addressing: s.name for s in edges}  # an address depends on the current directory
            links = repo.cache.local.cache_types[0] not in ("reflink", "copy")
            status = {names[address]: changes for address, changes in repo.status().items()}
    except LockError as error:
        raise StoreUnavailable(f"DVC's lock is held by another process: {error}") from None
    except DvcException as error:
        raise UserError(_causes(error)) from None
    order = TopologicalSorter({name: parents[name] for name in sorted(parents)}).static_order()
    reasons = {name: tuple(_explain(status[name])) for name in sorted(parents) if name in status}
    return State({name: parents[name] for name in order}, reasons, shows, files, links)


def _files(root: Path) -> tuple[tuple[int, int], ...]:
    """Time of change and size of each."""
    found = [root / name for name in ("params.yaml", "dvc.yaml", "dvc.lock")]
    return tuple((place.stat().st_mtime_ns, place.stat().st_size) for place in found if place.exists())


def side_by_side(root: Path) -> int:
    """How many stages may compute at once without sharing a core."""
    threads = whole.load(root / "params.yaml").compute.threads
    return max(1, hardware.cores() // threads) if threads else 1


def _explain(changes: list[Any]) -> list[str]:
    """DVC's changes of one stage as short phrases: `pretrain.lr modified`, `artifacts/data deleted`."""
    found = []
    for change in changes:
        if isinstance(change, str):  # "changed command", "always changed"
            found.append(change)
            continue
        for items in change.values():
            for path, what in items.items():
                pairs = what.items() if isinstance(what, dict) else [(path, what)]  # params: by key
                found += [f"{name} {state}" for name, state in pairs]
    return list(dict.fromkeys(found))


def _causes(error: BaseException | None) -> str:
    """DVC's message with the messages behind it: the outermost alone rarely says which line is wrong."""
    texts: list[str] = []
    while error is not None:
        texts.append(str(error).strip())
        error = error.__cause__
    return ": ".join(dict.fromkeys(text for text in texts if text))
