"""What crosses process boundaries: one parsed file as small, picklable records free of `ast` nodes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pipelines.core.pydocs.docstrings import Docstring

# "pandas.core, pandas.compat, and pandas.util top-level modules are PRIVATE" (pandas' API reference, first page).
_DECLARED_PRIVATE = ("pandas.core.", "pandas.compat.", "pandas.util.")


class SourceFile(NamedTuple):
    """A file to read: where it is, how it is shown (relative, for `url`), and its dotted module name."""

    path: Path
    shown: str
    module: str


class Definition(NamedTuple):
    """A class, function, method or property, or the module itself (`name` "").

    `name` is qualified inside the module ("Class.method"); `code` is a function's header and body without its
    docstring, cut short, or "" where there is nothing to describe.
    """

    name: str
    kind: str
    arguments: str
    line: int
    code: str
    doc: Docstring


class Module(NamedTuple):
    """What one file says. Bindings are name -> (module, attribute); attribute "" stands for the module itself.

    `exports` holds the names of `__all__`, with "@dotted" for one taken from elsewhere; None: no `__all__`, or one
    that only running the code could tell. `reexports` are names that `__init__.py` or `import x as x` makes public;
    `homes` the modules that objects say they belong to; `added` docstrings of objects defined elsewhere.
    """

    file: SourceFile
    is_package: bool
    definitions: tuple[Definition, ...]
    bindings: dict[str, tuple[str, str]]
    reexports: frozenset[str]
    stars: tuple[str, ...]
    exports: tuple[str, ...] | None
    bases: dict[str, tuple[str, ...]]
    added: tuple[tuple[str, Definition], ...]
    homes: dict[str, str]


class Skipped(NamedTuple):
    """A file that could not be read as Python, and why."""

    path: str
    reason: str


def is_private(dotted: str) -> bool:
    """Whether a dotted name is private: a part starts with an underscore, or its library says so."""
    return dotted.startswith(("_", *_DECLARED_PRIVATE)) or "._" in dotted
