"""Docstrings of compiled objects that live in calls: call nodes in, (dotted target, definition) pairs out.

`add_newdoc("numpy", "array", "...")`, `erf = add_docstr(special_erf, "...")` and functions of the same file that wrap
such a call are read where target and text are literal.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping

from pipelines.core.pydocs.docstrings import parse
from pipelines.core.pydocs.records import Definition
from pipelines.core.pydocs.syntax import dotted, literal_text

ADDS_DOCS = re.compile(rb"add_?(?:new)?_?doc")
_ADDS_DOC = re.compile(r"_?add_?(?:new)?_?doc")


def helper_target(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """What `def add(name, doc): add_docstr(getattr(X, name), doc)` documents parts of ("X"), or ""."""
    for call in ast.walk(node):
        if not isinstance(call, ast.Call) or not _ADDS_DOC.match(dotted(call.func).rpartition(".")[2]):
            continue
        target: list[str] = []
        for item in call.args:
            if isinstance(item, ast.Call) and dotted(item) == "getattr" and item.args:
                target.append(dotted(item.args[0]))
            if not literal_text(item):
                break
            target.append(literal_text(item))
        if target and all(target):
            return ".".join(target)
    return ""


def added_docs(call: ast.Call, bound_to: str, module: str, helpers: Mapping[str, str]) -> list[tuple[str, Definition]]:
    """The docstrings a call adds; none if it is another kind of call.

    `bound_to` is the name its result is given in `module`, or ""; `helpers` maps the file's own wrappers to what they
    document parts of.
    """
    function = dotted(call.func).rpartition(".")[2]
    helper = helpers.get(function)
    if not (helper or _ADDS_DOC.match(function)) or len(call.args) < 2:
        return []
    where = [literal_text(item) or dotted(item) for item in call.args[:-1]]
    documents = call.args[-1]
    given = ""  # arguments of the documented object, which a wrapper may be told
    if bound_to:
        where = [module, bound_to]
    elif helper:
        where, given = [helper, where[0]], "".join(where[1:])
    elif len(where) == 1 and isinstance(call.args[0], ast.Constant):
        where = [module.rpartition(".")[0] or module, *where]
    found = []
    for pair in documents.elts if isinstance(documents, ast.List) else [documents]:
        name, body = where, pair
        if isinstance(pair, ast.Tuple) and len(pair.elts) == 2:
            name, body = [*where, literal_text(pair.elts[0])], pair.elts[1]
        raw = literal_text(body)
        if raw and all(name):
            doc = parse(raw)
            arguments = doc.signature or (f"({given})" if given else "")
            found.append((".".join(name), Definition(name[-1], "function", arguments, call.lineno, "", doc)))
    return found
