"""Where Python source lies: a `PydocsSource` in, one list of files a library out. Nothing is imported.

A library is the standard library, one installed package or one folder. Tests, vendored code, examples and
generated trees are left out.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipelines.core.errors import DataError
from pipelines.core.faults import writable
from pipelines.core.pydocs.records import Skipped, SourceFile

if TYPE_CHECKING:
    from pipelines.core.params.data import PydocsSource

_LEFT_OUT = {
    "test", "tests", "_vendor", "vendor", "vendored", "_vendored", "externals", "extern", "third_party", "_inductor",
    "examples", "benchmarks", "site-packages", "dist-packages", "node_modules", "idlelib", "lib2to3", "turtledemo",
    "distutils", "_bundled", "venv", "pydoc_data",
}  # fmt: skip
# Code copied from model to model, a test suite for authors of dialects, an older version kept for its users.
_LEFT_OUT_PATHS = ("transformers/models", "sqlalchemy/testing", "pydantic/v1")
_TEST_FILE = re.compile(r"(?:test_.*|.*_test|conftest|setup|__main__)\.pyi?$")
_ROOT_MARKS = ("pyproject.toml", "setup.py", "setup.cfg", ".git")


STANDARD_LIBRARY = "python"  # its label, where packages have their own names


class Library(NamedTuple):
    """Files that are read together, in sorted order; `label` is a file's package for the classification task."""

    name: str
    files: tuple[SourceFile, ...]
    skipped: tuple[Skipped, ...]
    label: Callable[[str], str]


def libraries(source: PydocsSource) -> list[Library]:
    """The libraries a source names: standard library, packages, folders, each in the order given.

    Raises:
        DataError: a package is not installed or has no Python source; a folder does not exist.
    """
    found = [_standard_library()] if source.stdlib else []
    found += [_package(name) for name in dict.fromkeys(source.packages)]
    found += [_folder(name) for name in dict.fromkeys(source.folders)]
    left = sys.maxsize if source.max_files is None else source.max_files
    limited = []
    for library in found:
        limited.append(library._replace(files=library.files[:left]))
        left -= len(limited[-1].files)
    return limited


def _standard_library() -> Library:
    root = Path(sysconfig.get_path("stdlib"))
    files, skipped = _walk(root, root)
    return Library("the Python standard library", files, skipped, lambda _: STANDARD_LIBRARY)


def _package(name: str) -> Library:
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except ValueError:  # a half-made module of that name is loaded, such as __main__
        spec = None
    if spec is None:
        raise DataError(
            f"data.sources: packages: no package {name!r} is installed here. Install it (pip install ...; the list "
            "wants import names, such as sklearn for scikit-learn) or take it off the list."
        )
    roots = [Path(place) for place in spec.submodule_search_locations or ()]
    if not roots and spec.origin and spec.origin.endswith((".py", ".pyi")):
        path = Path(spec.origin)
        return Library(name, (SourceFile(path, path.name, name),), (), _first_component)
    if not roots:
        raise DataError(
            f"data.sources: packages: {name!r} is compiled and ships no Python source. Take it off the list."
        )
    walked = [_walk(root, root.parent) for root in roots]
    files = tuple(sorted((file for files, _ in walked for file in files), key=lambda file: file.shown))
    return Library(name, files, tuple(item for _, skipped in walked for item in skipped), _first_component)


def _folder(name: str) -> Library:
    root = Path(name).expanduser()
    if not root.is_dir():
        reason = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(f"data.sources: folders: {name!r} {reason}. Name a folder that holds .py files.")
    files, skipped = _walk(root, root.resolve())
    if not (files or skipped):
        raise DataError(f"data.sources: folders: {name!r} has no Python source. Name a folder that holds .py files.")
    return Library(root.resolve().name, files, skipped, _first_component)


def _first_component(module: str) -> str:
    return module.partition(".")[0]


def _walk(top: Path, base: Path) -> tuple[tuple[SourceFile, ...], tuple[Skipped, ...]]:
    """All files below `top` in sorted order, shown relative to `base`; links to folders are not followed (loops)."""
    failed: list[OSError] = []
    top = top.resolve()
    base = base.resolve()
    found: dict[str, SourceFile] = {}
    skipped: list[Skipped] = []
    for folder, names, files in os.walk(top, onerror=failed.append):
        here = Path(folder)
        shown = here.relative_to(base).as_posix()
        names[:] = sorted(name for name in names if not _left_out(name, shown, here))
        prefix = _module_prefix(here, base)
        for file in sorted(files):  # .py before .pyi, so a stub counts only where there is no source
            if file.endswith((".py", ".pyi")) and not _TEST_FILE.match(file):
                stem = re.sub(r"\W", "_", file.rpartition(".")[0])
                module = ".".join([*prefix, stem] if stem != "__init__" else prefix)
                if module:
                    path = here / file
                    own = SourceFile(path, writable(path.relative_to(base).as_posix()), module)
                    first = found.setdefault(module, own)
                    if first.path.with_suffix("") != path.with_suffix(""):
                        reason = f"it is module {module}, as {first.shown} is; name the two folders apart"
                        skipped.append(Skipped(own.shown, reason))
    skipped += [
        Skipped(Path(error.filename or top).relative_to(base).as_posix(), f"cannot be read: {error.strerror}")
        for error in failed
    ]
    return tuple(sorted(found.values(), key=lambda file: file.shown)), tuple(skipped)


def _left_out(name: str, parent: str, where: Path) -> bool:
    if name in _LEFT_OUT or name.startswith((".", "__")) or f"{parent}/{name}".endswith(_LEFT_OUT_PATHS):
        return True
    if name in ("build", "dist"):
        return not (where / name / "__init__.py").exists()
    return (where / name / "pyvenv.cfg").exists()


def _module_prefix(here: Path, base: Path) -> list[str]:
    """The dotted name of a folder, in parts: its packages from the outermost one, and the folders around those.

    A `src` folder, a project's root (pyproject.toml, setup.py, .git) and a name that no import could spell end it;
    where `base` itself is a package, its own name and those of the packages around it come first.
    """
    parts: list[str] = []
    inside_package = True
    for folder in (here, *here.parents):
        inside_package = inside_package and _is_package(folder)
        if not folder.name.isidentifier() or not (inside_package or folder.is_relative_to(base)):
            break
        if not inside_package and (
            folder == base or folder.name == "src" or any((folder / mark).exists() for mark in _ROOT_MARKS)
        ):
            break
        parts.append(folder.name)
    return parts[::-1]


def _is_package(folder: Path) -> bool:
    return (folder / "__init__.py").exists() or (folder / "__init__.pyi").exists()
