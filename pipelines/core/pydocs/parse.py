"""One Python file: source text in, a compact record of what it defines, imports and documents out.

`ast` only: nothing is imported or executed. Names that `exec` or `setattr` would make are not seen.
"""

from __future__ import annotations

import ast
import gc
import io
import sys
import tokenize
import warnings
from collections.abc import Sequence

from pipelines.core.pydocs.added import ADDS_DOCS, added_docs, helper_target
from pipelines.core.pydocs.docstrings import NO_DOCSTRING
from pipelines.core.pydocs.docstrings import parse as parse_docstring
from pipelines.core.pydocs.records import Definition, Module, Skipped, SourceFile, is_private
from pipelines.core.pydocs.signatures import class_arguments, function_arguments, function_code
from pipelines.core.pydocs.syntax import docstring, dotted, exported_names, literal_text, statements

LARGEST_FILE = 4_000_000  # bytes; beyond it a file is generated tables, not documentation
_KEPT_DUNDERS = {"__init__", "__call__"}
_READ_ONLY = {"cache_readonly", "memoized_attribute", "lazy_attribute", "classproperty"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def parse_files(files: Sequence[SourceFile], lazily: bool = False) -> list[Module | Skipped]:
    """Parse a chunk of files (one call of a worker process), in their order.

    `lazily` leaves out private modules that add no documentation to others: they matter only if something public
    turns out to come from them, and then they are asked for.
    """
    collecting = gc.isenabled()
    gc.disable()  # trees hold no garbage while they grow: the collector would only walk them again and again
    try:
        read = (parse_file(file, lazily and is_private(file.module)) for file in files)
        return [item for item in read if item is not None]
    finally:
        if collecting:
            gc.enable()


def parse_file(file: SourceFile, if_adds_docs: bool = False) -> Module | Skipped | None:
    """Parse one file; a file of another language version, a broken encoding or no file at all is `Skipped`.

    With `if_adds_docs` a file without a call such as `add_newdoc` is not parsed: None.
    """
    try:
        if file.path.stat().st_size > LARGEST_FILE:
            return Skipped(file.shown, f"larger than {LARGEST_FILE} bytes")
        raw = file.path.read_bytes()
        adds_docs = bool(ADDS_DOCS.search(raw))
        if if_adds_docs and not adds_docs:
            return None
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        text = raw.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
        return _Reader(file, adds_docs, text.split("\n")).read(tree)
    except OSError as error:
        return Skipped(file.shown, f"cannot be read: {error.strerror or type(error).__name__}")
    except (SyntaxError, ValueError, LookupError) as error:
        line = getattr(error, "lineno", None)
        told = f"no source of Python {sys.version_info.major}.{sys.version_info.minor}: {getattr(error, 'msg', error)}"
        return Skipped(file.shown, told + f" (line {line})" * bool(line))
    except (RecursionError, MemoryError):
        return Skipped(file.shown, "nested too deeply")


class _Reader:
    """Walks the top level and the class bodies of one tree."""

    def __init__(self, file: SourceFile, adds_docs: bool, lines: list[str]) -> None:
        self.file = file
        self.adds_docs = adds_docs
        self.lines = lines
        self.is_stub = file.path.suffix == ".pyi"
        self.is_package = file.path.stem == "__init__"
        self.definitions: dict[str, Definition] = {}
        self.bindings: dict[str, tuple[str, str]] = {}
        self.reexports: set[str] = set()
        self.stars: list[str] = []
        self.exports: list[str] | None = None
        self.exports_known = True
        self.bases: dict[str, tuple[str, ...]] = {}
        self.is_lazy = self.is_package and any("_LazyModule" in line or "lazy_loader" in line for line in lines)
        self.typing_only: set[int] = set()  # imports that exist for type checkers only, unless the package is lazy
        self.homes: dict[str, str] = {}
        self.added: list[tuple[str, Definition]] = []
        self.helpers: dict[str, str] = {}  # function that adds a docstring to an attribute of X -> X

    def read(self, tree: ast.Module) -> Module:
        """Fill a record from a tree."""
        self._define("", "module", "", 1, "", docstring(tree.body))
        for statement in statements(tree.body):
            if isinstance(statement, (*_FUNCTIONS, ast.ClassDef)):
                self._home(statement)
            if isinstance(statement, _FUNCTIONS):
                self._function(statement, "")
                if self.adds_docs and (target := helper_target(statement)):
                    self.helpers[statement.name] = target
            elif isinstance(statement, ast.ClassDef):
                self._class(statement, "")
            elif isinstance(statement, ast.ImportFrom):
                self._import_from(statement)
            elif isinstance(statement, ast.If) and dotted(statement.test).endswith("TYPE_CHECKING"):
                self.typing_only |= {id(item) for item in statement.body if not self.is_lazy}
            elif isinstance(statement, ast.Import):
                for alias in statement.names:
                    target = alias.name if alias.asname else alias.name.partition(".")[0]
                    self.bindings.setdefault(alias.asname or target, (target, ""))
            else:
                self._assignment(statement)
        return Module(
            self.file, self.is_package, tuple(self.definitions.values()), self.bindings, frozenset(self.reexports),
            tuple(self.stars), tuple(self.exports) if self.exports is not None and self.exports_known else None,
            self.bases, tuple(self.added), self.homes,
        )  # fmt: skip

    def _define(self, name: str, kind: str, arguments: str, line: int, code: str, raw: str) -> None:
        known = self.definitions.get(name)
        if known is None or (not known.doc.text and raw):
            doc = parse_docstring(raw) if raw else NO_DOCSTRING
            self.definitions[name] = Definition(name, kind, arguments, line, code, doc)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, owner: str) -> None:
        raw = docstring(node.body)
        if (node.name[0] == "_" and not (owner and node.name in _KEPT_DUNDERS)) or not (raw or not owner):
            return
        decorators = {dotted(item).rpartition(".")[2] for item in node.decorator_list}
        if decorators & {"setter", "deleter", "overload"}:
            return
        name = f"{owner}.{node.name}" if owner else node.name
        if not raw:
            self._define(name, "function", "", node.lineno, "", "")
            return
        if owner and (decorators & _READ_ONLY or any("property" in item for item in decorators)):
            self._define(name, "property", "", node.lineno, "", raw)
            return
        arguments = function_arguments(node, self.lines, bound=bool(owner) and "staticmethod" not in decorators)
        kind = "method" if owner else "function"
        self._define(name, kind, arguments, node.lineno, function_code(node, self.lines), raw)

    def _class(self, node: ast.ClassDef, owner: str) -> None:
        name = f"{owner}.{node.name}" if owner else node.name
        if owner and node.name[0] == "_":
            return
        self._define(name, "class", class_arguments(node, self.lines), node.lineno, "", docstring(node.body))
        self.bases.setdefault(name, tuple(base for item in node.bases if (base := dotted(item))))
        for statement in statements(node.body):
            if isinstance(statement, _FUNCTIONS):
                self._function(statement, name)
            elif isinstance(statement, ast.ClassDef) and name.count(".") < 2:
                self._class(statement, name)

    def _home(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        """Note `@set_module("numpy.strings")`, by which numpy and pandas say where an object is to be found."""
        for item in node.decorator_list:
            if isinstance(item, ast.Call) and dotted(item).endswith("set_module") and item.args:
                self.homes[node.name] = literal_text(item.args[0])

    def _import_from(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if node.level:
            parts = self.file.module.split(".")
            parts = parts[: len(parts) - node.level + self.is_package]
            module = ".".join([*parts, module] if module else parts)
        for alias in node.names:
            if alias.name == "*":
                self.stars.append(module)
                continue
            bound = alias.asname or alias.name
            self.bindings.setdefault(bound, (module, alias.name))
            if (
                self.is_package and not self.is_stub and id(node) not in self.typing_only
            ) or alias.asname == alias.name:
                self.reexports.add(bound)
            if bound == "__all__":
                self._export([f"@{module}.__all__"])

    def _assignment(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            call = node.value
            if isinstance(call.func, ast.Attribute) and dotted(call.func.value) == "__all__" and call.args:
                argument = call.args[0]
                self._export(exported_names(ast.List([argument]) if call.func.attr == "append" else argument))
            else:
                self.added += added_docs(call, "", self.file.module, self.helpers)
            return
        if isinstance(node, ast.AugAssign):
            if dotted(node.target) == "__all__":
                self._export(exported_names(node.value))
            return
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            return
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Attribute) and target.attr == "__doc__":
                self._documented_later(dotted(target.value), literal_text(node.value))
            if not isinstance(target, ast.Name):
                continue
            if target.id == "__all__":
                self.exports, self.exports_known = None, True
                self._export(exported_names(node.value))
            elif isinstance(node.value, ast.Call):
                if dotted(node.value.func) == f"{target.id}_gen":
                    self._sole_instance(target.id, f"{target.id}_gen")
                self.added += added_docs(node.value, target.id, self.file.module, self.helpers)
            elif isinstance(node.value, (ast.Name, ast.Attribute)) and (origin := dotted(node.value)):
                self.bindings.setdefault(target.id, ("", origin))

    def _documented_later(self, name: str, raw: str) -> None:
        """Read `Class.__doc__ = "..."`."""
        known = self.definitions.get(name)
        if known is not None and raw and not known.doc.text:
            self.definitions[name] = known._replace(doc=parse_docstring(raw))

    def _sole_instance(self, name: str, class_name: str) -> None:
        """Give `norm = norm_gen(name="norm")` the documentation of its class: the object is what is used."""
        for old in [key for key in self.definitions if key == class_name or key.startswith(f"{class_name}.")]:
            new = name + old.removeprefix(class_name)
            self.definitions[new] = self.definitions.pop(old)._replace(name=new)
        if class_name in self.bases:
            self.bases[name] = self.bases.pop(class_name)

    def _export(self, names: list[str] | None) -> None:
        if names is None:
            self.exports_known = False
        else:
            self.exports = [*(self.exports or []), *names]
