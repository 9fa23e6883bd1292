"""Documented public objects: parsed modules of one library in, `Entry` records under their public names out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from pipelines.core.pydocs.names import Names, Place
from pipelines.core.pydocs.records import Definition, Module, is_private

SHORTEST_TEXT = 40  # characters of a docstring without a usable summary; shorter ones are "See base class."
_REPEATS = 3  # a summary that more objects share says nothing about any of them


@dataclass(slots=True)
class Entry:
    """One public object with its documentation.

    `name` is the public qualified name, `signature` that name with its arguments, `group` the top-level class or
    function (the module itself for a module) that decides the side of the split, `scope` the dotted name that `name`
    lives in, `members` short forms of a class's methods, `shared` how many objects have the same summary; `is_first`
    is true for one object among those.
    """

    name: str
    kind: str
    group: str
    scope: str
    package: str
    signature: str
    summary: str
    text: str
    parameters: tuple[tuple[str, str], ...]
    see_also: tuple[tuple[str, str], ...]
    code: str
    url: str
    members: tuple[str, ...] = ()
    shared: int = 1
    is_first: bool = True

    @property
    def is_distinct(self) -> bool:
        """Whether the summary may stand for this object: not boilerplate, or boilerplate's one representative."""
        return bool(self.summary) and (self.shared <= _REPEATS or self.is_first)


def number(key: str) -> int:
    """A number that depends on nothing but the key: what random choices are made with."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def collect(modules: Mapping[str, Module], names: Names, label: Callable[[str], str]) -> list[Entry]:
    """The entries of a library, sorted by name; `label` gives the package of a module."""
    found: dict[str, Entry] = {}
    for path, item, group, module in sorted(_placed(modules, names), key=lambda row: row[0]):
        text = item.doc.text
        if path in found or (is_private(path) and not path.endswith((".__init__", ".__call__"))):
            continue
        if len(text) < SHORTEST_TEXT and not item.doc.summary:
            continue
        found[path] = Entry(
            name=path,
            kind=item.kind,
            group=group,
            scope=path.rpartition(".")[0],
            package=label(module.file.module),
            signature=f"{path}{item.arguments}",
            summary=item.doc.summary,
            text=text,
            parameters=item.doc.parameters,
            see_also=item.doc.see_also,
            code=item.code,
            url=f"{module.file.shown}#L{item.line}",
        )
    entries = [found[path] for path in sorted(found)]
    _count_summaries(entries)
    _list_members(entries, found)
    return entries


def _placed(modules: Mapping[str, Module], names: Names) -> Iterator[tuple[str, Definition, str, Module]]:
    """(public name, definition, group, module) of everything that has a public name; the best claim first."""
    inherited: list[tuple[str, Definition, str, Module]] = []
    last: list[tuple[str, Definition, str, Module]] = []
    for name in sorted(modules):
        module = modules[name]
        for item in module.definitions:
            if not item.name:
                if not is_private(name):
                    last.append((name, item, name, module))
                continue
            top, _, rest = item.name.partition(".")
            public, owner = names.public.get((name, top)), names.owners.get((name, top))
            if rest and owner:
                inherited.append((f"{owner}.{rest}", item, owner, module))
            elif public:
                yield f"{public}.{rest}" if rest else public, item, public, module
        for dotted, item in module.added:
            path, group = _public_path(dotted, modules, names)
            if path != group:
                item = item._replace(kind="method" if item.arguments else "property")
            if path:
                last.append((path, item, group, module))
    yield from inherited
    yield from last


def _public_path(dotted: str, modules: Mapping[str, Module], names: Names) -> tuple[str, str]:
    """(public name, group) of an object that a call names by an absolute path; ("", "") if it has none."""
    parts = dotted.split(".")
    split = max((at for at in range(1, len(parts)) if ".".join(parts[:at]) in modules), default=len(parts) - 1)
    for end in (split, len(parts) - 2, len(parts) - 1):
        if not 0 < end < len(parts):
            continue
        module, name, rest = ".".join(parts[:end]), parts[end], parts[end + 1 :]
        place: Place = names.resolve(module, name) or (module, name)
        public = names.public.get(place)
        owner = names.owners.get(place) or public
        if not rest and public is None and module in modules and not is_private(dotted):
            public = dotted
        if rest and owner:
            return ".".join([owner, *rest]), owner
        if not rest and public:
            return public, public
    return "", ""


def _count_summaries(entries: Iterable[Entry]) -> None:
    entries = list(entries)
    counts = Counter(entry.summary for entry in entries)
    seen: set[str] = set()
    for entry in entries:
        entry.shared = counts[entry.summary]
        entry.is_first = entry.summary not in seen
        seen.add(entry.summary)


def _list_members(entries: Iterable[Entry], found: Mapping[str, Entry]) -> None:
    for entry in entries:
        if entry.kind in ("method", "property") and entry.summary and not entry.name.endswith("__"):
            owner = found.get(entry.scope)
            if owner is not None:
                short = entry.signature.removeprefix(entry.scope + ".").partition(" -> ")[0]
                owner.members += (f"{short}: {entry.summary}",)
