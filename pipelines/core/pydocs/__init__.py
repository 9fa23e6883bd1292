"""The `pydocs` builder: Python source in, rows of every table out. Parsed with `ast`, never imported.

`build` reads the standard library, installed packages and folders of the user's own, library by library, in parallel
over processes; what it yields depends on the source files alone, not on the number of workers.

    files.py       where source lies, and the module name of each file
    records.py     one parsed file as plain records
    added.py       docstrings of compiled objects, which live in calls
    parse.py       one file -> its record (with syntax.py, signatures.py, docstrings.py and prose.py)
    names.py       where an object is defined -> the public name a user types
    entries.py     documented public objects under these names
    rows.py        corpus, knowledge, demonstrations, prompts, and questions as queries
    tasks.py       labelled tasks, and "See Also" lines as queries
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.core.pydocs import rows, tasks
from pipelines.core.pydocs.entries import Entry, collect
from pipelines.core.pydocs.files import Library, libraries
from pipelines.core.pydocs.names import Names
from pipelines.core.pydocs.parse import parse_files
from pipelines.core.pydocs.records import Module, Skipped, SourceFile

if TYPE_CHECKING:
    from pipelines.core.params.data import PydocsSource

__all__ = ["build"]
Parsed = list[Module | Skipped]
_AHEAD = 2  # libraries
_CHUNK = 24  # files a call: small enough to balance two workers, large enough to hide the cost of a call


class Complete(NamedTuple):
    """A library, read as far as its public names reach."""

    modules: dict[str, Module]
    names: Names
    skipped: list[Skipped]


def build(source: PydocsSource, workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (table, row) in an order that depends on the files alone.

    Tables are those of `source.tables`, plus `queries` (kind, query, target, answers, referrer) where `knowledge` is
    one of them, plus `skipped` (path, reason) for every file that could not be read as Python. Every other row has
    `id`, unique within its table, and `group`, the key of the split. At most three libraries are held in memory.

    Raises:
        DataError: a package is not installed or has no Python source; a folder does not exist.
    """
    return _stream(source, libraries(source), workers)


def _stream(source: PydocsSource, found: list[Library], workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    labels = sorted({library.label(file.module) for library in found for file in library.files})
    seen: set[str] = set()
    for library, (modules, names, skipped) in _parsed(found, workers):
        entries = collect(modules, names, library.label)
        entries = [entry for entry in entries if entry.name not in seen]  # a folder may hold an installed package
        seen.update(entry.name for entry in entries)
        yield from _rows(source, entries, names, labels)
        yield from (("skipped", item._asdict()) for item in sorted((*library.skipped, *skipped)))


def _rows(
    source: PydocsSource, entries: list[Entry], names: Names, labels: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of one library, object by object, then those that need all of its objects."""
    wanted = set(source.tables)
    texts: dict[str, str] = {}
    for entry in entries:
        if "corpus" in wanted:
            yield "corpus", rows.corpus(entry)
        known = rows.knowledge(entry)
        texts[entry.name] = known["text"]
        if "knowledge" in wanted:
            yield "knowledge", known
            yield from (("queries", row) for row in rows.questions(entry))
        if "demonstrations" in wanted:
            yield from (("demonstrations", row) for row in rows.demonstrations(entry))
        if "prompts" in wanted:
            yield from (("prompts", row) for row in rows.prompts(entry))
    found = tasks.queries(entries, names, texts)
    if "knowledge" in wanted:
        yield from (("queries", row) for row in found)
    if "tasks" in wanted:
        yield from (("tasks", row) for row in tasks.tasks(entries, labels))
        yield from (("tasks", row) for row in tasks.similarities(found, entries))


def _parsed(found: list[Library], workers: int) -> Iterator[tuple[Library, Complete]]:
    """Parse library by library; the workers are ahead, so that neither they nor the rows wait for one another."""
    with ExitStack() as stack:
        pool = readers = None
        if workers > 1 and sum(len(library.files) for library in found) > _CHUNK:
            # Spawned, not forked: the caller may have threads (torch, pyarrow), and a fork copies locks in any state.
            pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_end_with_parent)
            stack.enter_context(pool)
            readers = stack.enter_context(ThreadPoolExecutor(_AHEAD))  # they only wait for the workers
        waiting: deque[Future[Complete]] = deque()
        for at, library in enumerate(found):
            if readers is None:
                yield library, _complete(pool, library)
                continue
            while at + len(waiting) < min(at + 1 + _AHEAD, len(found)):
                waiting.append(readers.submit(_complete, pool, found[at + len(waiting)]))
            yield library, waiting.popleft().result()


def _end_with_parent() -> None:
    """In a worker: end when the stage does, which a worker that waits for its next call would not notice."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _complete(pool: ProcessPoolExecutor | None, library: Library) -> Complete:
    """Parse a library, then what its public names turn out to come from, round by round, until all are resolved."""
    parsed = _parse(pool, library.files, lazily=True)
    modules: dict[str, Module] = {}
    skipped: list[Skipped] = []
    unread = {file.module: file for file in library.files}
    while True:
        modules.update((item.file.module, item) for item in parsed if isinstance(item, Module))
        skipped += [item for item in parsed if isinstance(item, Skipped)]
        broken = {item.path for item in skipped}
        unread = {name: file for name, file in unread.items() if name not in modules and file.shown not in broken}
        names = Names(modules, unread.keys())
        if not names.missing:
            return Complete(modules, names, skipped)
        parsed = _parse(pool, [unread[name] for name in sorted(names.missing)], lazily=False)


def _parse(pool: ProcessPoolExecutor | None, files: Sequence[SourceFile], lazily: bool) -> Parsed:
    """Files in chunks, by the workers if there are any."""
    if pool is None:
        return parse_files(files, lazily)
    chunks = [files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK)]
    started = [pool.submit(parse_files, chunk, lazily) for chunk in chunks]
    return [item for future in started for item in future.result()]
