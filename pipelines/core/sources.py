"""Named sources to raw rows: local files, folders and globs, hub data sets, and the built-in builder.

`read` yields one `Entry` a row with where it came from; `pipelines.core.rows` makes table rows of them.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.core import readers
from pipelines.core.environment import allow_hub
from pipelines.core.errors import DataError, StoreUnavailable
from pipelines.core.faults import BadRow, writable
from pipelines.core.params.data import DataParams, FileSource, HubSource, PydocsSource

WILD = "*?["


class Entry(NamedTuple):
    """A raw row. `source` names it in the outputs, `where` is what a person opens, `row` counts from 1."""

    source: str
    where: str
    row: int
    record: dict[str, Any] | BadRow


def names_hub(params: DataParams) -> bool:
    """Whether a source is a data set of the hub."""
    return any(isinstance(source, HubSource) for source in params.sources)


def local_paths(params: DataParams, root: Path) -> list[Path]:
    """Every local file and folder the sources read, sorted: what the stage depends on.

    A glob stands for the deepest folder without a wildcard, so that a new file under it is noticed; if that
    folder holds the repository itself, for the files that match now. Links to folders stand for themselves beside the
    folder they lie in, since DVC does not follow them there.

    Raises:
        DataError: a path that does not exist, or a folder or glob without a file that can be read.
    """
    paths: set[Path] = set()
    for source in params.sources:
        if isinstance(source, PydocsSource):
            paths.update(_resolve(folder, root) for folder in source.folders)
        elif isinstance(source, FileSource):
            place = _resolve(source.path, root)
            found = files_of(source, root)
            if _is_glob(source, root):
                parts = Path(source.path).expanduser().parts
                place = root / Path(*parts[: next(i for i, part in enumerate(parts) if any(c in part for c in WILD))])
                if root.resolve().is_relative_to(place.resolve()):
                    paths.update(found)
                    continue
            inner = {folder for file in found for folder in file.parents if folder.is_relative_to(place)} - {place}
            paths.update([place, *(folder for folder in inner if folder.is_symlink())])
    return sorted(paths)


def files_of(source: FileSource, root: Path) -> list[Path]:
    """The files of a source, sorted by name; in a folder (searched to any depth) those with a known extension.

    Raises:
        DataError: nothing there, or nothing that can be read.
    """
    place = _resolve(source.path, root)
    accepted = f"accepted: {', '.join(readers.READERS)}, each also with .gz"
    if place.is_dir():
        files = [path for path in _visible(place) if readers.kind_of(path) is not None]
        if not files:
            raise DataError(f"{place}: the folder holds no file that can be read; {accepted}")
    elif _is_glob(source, root):
        pattern = str(_resolve(source.path, Path(glob.escape(str(root)))))
        names = sorted(glob.glob(pattern, recursive=True), key=lambda name: (name.count("/"), name))
        # Links may loop: of a file with several names the shortest stands for it.
        first = {os.path.realpath(name): Path(name) for name in reversed(names)}
        files = [path for path in first.values() if path.is_file()]
        if not files:
            raise DataError(f"{place}: no file matches; {accepted}")
    elif place.is_file():
        files = [place]
    else:
        raise DataError(f"{place}: no such file or folder (data.sources, path: {source.path})")
    return sorted(files, key=lambda path: path.as_posix())


def _visible(top: Path) -> Iterator[Path]:
    """The files below a folder that are not hidden, behind links to folders too, of no folder twice: links may loop.

    Raises:
        DataError: a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be read: {error.strerror}")

    waiting, seen = [top], set()
    while waiting:
        for name, folders, files in os.walk(waiting.pop(0), onerror=refuse):
            here = Path(name)
            folders[:] = [] if here.resolve() in seen else sorted(one for one in folders if not one.startswith("."))
            if here.resolve() not in seen:
                seen.add(here.resolve())
                waiting += sorted(here / one for one in folders if (here / one).is_symlink())
                yield from (here / one for one in files if not one.startswith(".") and (here / one).is_file())


def within(path: Path, root: Path) -> Path | None:
    """A path as seen from the repository, if it is in there: by its name, or where its links lead.

    By its name first: a folder of data may be a link, as in the worktree of a run that nobody watches.
    """
    whole = root / path
    if ".." not in whole.parts and whole.is_relative_to(root):
        return whole.relative_to(root)
    whole, root = whole.resolve(), root.resolve()
    return whole.relative_to(root) if whole.is_relative_to(root) else None


def read(source: FileSource | HubSource, root: Path) -> Iterator[Entry]:
    """Raw rows of one source, in the order of its files.

    Raises:
        DataError: the source is not there, or a file as a whole cannot be read.
        StoreUnavailable: the hub did not answer.
    """
    if isinstance(source, HubSource):
        yield from _hub(source)
        return
    for path in files_of(source, root):
        label = _label(path, _resolve(source.path, root), root)
        rows = 0
        for row, record in readers.read(path, source):
            rows += 1
            yield Entry(label, str(path), row, record)
        if not rows:
            raise DataError(f"{path}: holds no row; accepted: at least one. Remove it or fill it.")


def build(source: PydocsSource, workers: int, skipped: Callable[[str, str], None]) -> Iterator[tuple[str, Entry]]:
    """Rows of the built-in builder as `(table, entry)`; a file it could not parse goes to `skipped(path, reason)`."""
    from pipelines.core import pydocs

    rows = 0
    for table, record in pydocs.build(source, workers):
        if table == "skipped":
            skipped(str(record["path"]), str(record["reason"]))
            continue
        rows += 1
        yield table, Entry("pydocs", "pydocs", rows, record)
    if not rows:
        raise DataError(
            f"pydocs: no documentation found in stdlib={source.stdlib}, {source.packages}, {source.folders}"
        )


def _hub(source: HubSource) -> Iterator[Entry]:
    """Rows of a hub data set, streamed: nothing but the rows in use is kept."""
    allow_hub(True)
    import datasets

    remedy = "Check hub, config, revision and hub_split in data.sources."
    try:
        stream = datasets.load_dataset(
            source.hub, source.config, split=source.hub_split, revision=source.revision, streaming=True
        )
        for row, record in enumerate(stream, 1):
            yield Entry(f"hub:{source.hub}", f"hub:{source.hub}", row, dict(record))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"hub data set {source.hub}: {error} {remedy}") from None
    except OSError as error:  # requests' and httpx's connection errors reach us as OSError
        raise StoreUnavailable(f"hub data set {source.hub}: the hub did not answer: {error}") from None


def _resolve(path: str, root: Path) -> Path:
    """A path of `params.yaml`: relative to the repository unless absolute or under `~`."""
    return root / Path(path).expanduser()


def _is_glob(source: FileSource, root: Path) -> bool:
    """Whether a path is a pattern: its own characters say so, and nothing of that very name is there."""
    return any(character in source.path for character in WILD) and not _resolve(source.path, root).exists()


def _label(path: Path, place: Path, root: Path) -> str:
    """A file's name in the outputs, which must not depend on where this machine keeps it."""
    inside = within(path, root)
    if inside is None:
        inside = Path(place.name) / path.relative_to(place) if place.is_dir() else Path(path.name)
    return writable(inside.as_posix())
