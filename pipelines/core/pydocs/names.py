"""Public names: parsed modules of one library in, the name a user types for each object out.

`numpy.lib._twodim_base_impl.flipud` is `numpy.flipud`: imports, star imports, `__all__` and assignments are followed
to the place of definition; of all paths without a private part the shortest wins. What has none is not public.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from functools import partial

from pipelines.core.pydocs.records import Module, is_private

Place = tuple[str, str]  # (module, name inside it): where an object is defined


class Names:
    """The namespaces of a library's modules, resolved on demand.

    `unread` are modules that exist but were not parsed; those that turn out to be needed are in `missing`, and names
    are whole only when that is empty. `public` maps a place of definition to its public name; `aliases` every public
    path to the chosen one; `owners` the place of a private base class to the public class that shows its methods.
    """

    def __init__(self, modules: Mapping[str, Module], unread: Set[str] = frozenset()) -> None:
        self._modules = modules
        self._unread = unread
        self.missing: set[str] = set()
        self._defined = {name: {item.name for item in module.definitions} for name, module in modules.items()}
        self._exports: dict[str, frozenset[str] | None] = {}
        self._stars: dict[str, frozenset[str]] = {}
        self._resolved: dict[Place, Place | None] = {}
        paths: dict[Place, list[str]] = {}
        for name in sorted(modules):
            if not is_private(name):
                for bound in sorted(self._public_names(name)):
                    place = self.resolve(name, bound)
                    if place is not None and place[1]:
                        paths.setdefault(place, []).append(f"{name}.{bound}")
        self.public = {place: min(found, key=partial(self._rank, place)) for place, found in paths.items()}
        self.aliases = {path: self.public[place] for place, found in paths.items() for path in found}
        self.owners = self._owners()

    def _rank(self, place: Place, path: str) -> tuple[bool, int, bool, bool, str]:
        """Where the object itself says it belongs; then the shortest; then the name and module it was defined under."""
        module, _, name = path.rpartition(".")
        record = self._modules.get(place[0])
        home = record.homes.get(place[1]) if record else None
        return module != home, path.count("."), name != place[1], module != place[0], path

    def resolve(self, module: str, name: str) -> Place | None:
        """Where the thing called `name` in `module` is defined; (module, "") for a module, None if not known."""
        key = (module, name)
        if key not in self._resolved:
            self._resolved[key] = None  # a circle of imports ends here
            self._resolved[key] = self._look_up(module, name)
        return self._resolved[key]

    def resolve_dotted(self, module: str, dotted: str) -> Place | None:
        """As `resolve` for "a.b.C" written in `module`, or an absolute path."""
        parts = dotted.split(".")
        place = self.resolve(module, parts[0])
        if place is None and self._exists(parts[0]):
            place = (parts[0], "")
        for part in parts[1:]:
            if place is None or place[1]:
                return None
            place = self.resolve(place[0], part)
        return place

    def _look_up(self, module: str, name: str) -> Place | None:
        record = self._record(module)
        if record is None:
            return None
        if name in self._defined[module] and name:
            return (module, name)
        if name in record.bindings:
            source, attribute = record.bindings[name]
            if not source:  # name = other.name
                return self.resolve_dotted(module, attribute)
            if not attribute:
                return (source, "") if self._exists(source) else None
            found = self.resolve(source, attribute)
            if found is None and not self._exists(source) and _root(source) == _root(module):
                return (source, attribute)  # out of a compiled module: documented by a call, if at all
            return found
        for source in record.stars:
            found = self.resolve(source, name) if name in self._star_names(source) else None
            if found is not None:
                return found
        if self._exists(f"{module}.{name}"):
            return (f"{module}.{name}", "")
        return (module, name) if name in (self._exported(module) or ()) else None

    def _exists(self, module: str) -> bool:
        return module in self._modules or module in self._unread

    def _record(self, module: str) -> Module | None:
        if module in self._unread:
            self.missing.add(module)
        return self._modules.get(module)

    def _exported(self, module: str) -> frozenset[str] | None:
        """The names of a module's `__all__`, or None if it has none or only running it could tell."""
        if module not in self._exports:
            self._exports[module] = None
            record = self._record(module)
            if record is not None and record.exports is not None:
                names: set[str] = set()
                for item in record.exports:
                    listed = self._listed(module, item) if item.startswith("@") else frozenset([item])
                    if listed is None:
                        return None
                    names |= listed
                self._exports[module] = frozenset(names)
        return self._exports[module]

    def _listed(self, module: str, reference: str) -> frozenset[str] | None:
        """The names behind "@a.b.__all__"."""
        dotted = reference[1:].rpartition(".")[0]
        if self._exists(dotted):
            return self._exported(dotted)
        place = self.resolve_dotted(module, dotted) if dotted else None
        return self._exported(place[0]) if place and not place[1] else None

    def _star_names(self, module: str) -> frozenset[str]:
        """What `from module import *` binds."""
        if module not in self._stars:
            self._stars[module] = frozenset()
            record = self._record(module)
            if record is not None:
                exported = self._exported(module)
                self._stars[module] = self._bound(record) if exported is None else exported
        return self._stars[module]

    def _bound(self, record: Module) -> frozenset[str]:
        names = {name for name in self._defined[record.file.module] if name and "." not in name}
        # In a stub only `import x as x` is for others (typing.python.org, "Distributing type information").
        names |= record.reexports if record.file.path.suffix == ".pyi" else set(record.bindings)
        for source in record.stars:
            names |= self._star_names(source)
        return frozenset(name for name in names if not name.startswith("_"))

    def _public_names(self, module: str) -> set[str]:
        """Names that are the module's own to offer, not merely imported for its use."""
        exported = self._exported(module)
        if exported is not None:
            return {name for name in exported if not name.startswith("_")}
        record = self._modules[module]
        names = {name for name in self._defined[module] if name and "." not in name}
        imported = {name for name, (source, _) in record.bindings.items() if not source}
        imported |= {name for name in record.reexports if self._is_own(record.bindings[name][0], module)}
        for source in record.stars:
            if self._is_own(source, module) and (record.is_package or is_private(source)):
                imported |= self._star_names(source)
        for name in imported:
            place = self.resolve(module, name)
            if place is not None and self._is_own(place[0], module):
                names.add(name)
        return {name for name in names if not name.startswith("_")}

    def _is_own(self, source: str, module: str) -> bool:
        return _root(source) in (_root(module), "_" + _root(module), "_py" + _root(module))

    def _is_stub(self, place: Place) -> bool:
        """Whether a class is a compiled one of a private module, as `torch._C.TensorBase`, known from its stub."""
        record = self._modules.get(place[0])
        return record is not None and is_private(place[0]) and record.file.path.suffix == ".pyi"

    def _owners(self) -> dict[Place, str]:
        """Private base classes, and those that are public only far below a subclass, with that subclass's name."""
        owners: dict[Place, str] = {}
        classes = sorted((path, place) for place, path in self.public.items() if place[0] in self._modules)
        for path, place in sorted(classes, key=lambda item: (item[0].count("."), item[0])):
            waiting, seen = [place], {place}
            while waiting:
                module, name = waiting.pop()
                record = self._modules.get(module)
                for base in record.bases.get(name, ()) if record else ():
                    found = self.resolve_dotted(module, base) or (
                        base.rpartition(".")[0],
                        base.rpartition(".")[2],
                    )
                    known = self.public.get(found)
                    if found in seen or (known and not self._is_stub(found) and known.count(".") < path.count(".") + 2):
                        continue
                    seen.add(found)
                    owners.setdefault(found, path)
                    waiting.append(found)
        return owners


def _root(module: str) -> str:
    return module.partition(".")[0]
