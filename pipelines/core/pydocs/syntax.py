"""Small questions to `ast` nodes: a dotted name, a literal text, the names of an `__all__`, the docstring of a body."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence


def statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a block, including those under `if`, `try` and `with`."""
    for statement in body:
        yield statement
        if isinstance(statement, (ast.If, ast.Try)):
            yield from statements(statement.body)
            yield from statements(statement.orelse)
            for handler in statement.handlers if isinstance(statement, ast.Try) else ():
                yield from statements(handler.body)
        elif isinstance(statement, ast.With):
            yield from statements(statement.body)


def docstring(body: Sequence[ast.stmt]) -> str:
    """The raw docstring of a module's, class's or function's body, or ""."""
    first = body[0] if body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return first.value.value
    return ""


def dotted(node: ast.expr) -> str:
    """`a.b.c` as text, through calls and subscripts (a decorator's or base's arguments); "" for anything else."""
    parts: list[str] = []
    while True:
        if isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        elif isinstance(node, ast.Call):
            node = node.func
        elif isinstance(node, ast.Subscript):
            node = node.value
        else:
            return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def literal_text(node: ast.expr) -> str:
    """The literal text of constants, their sums, f-strings and `.format(...)` less the fields; else ""."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(literal_text(item) for item in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = literal_text(node.left), literal_text(node.right)
        return left + right if left and right else ""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return literal_text(node.func.value).replace("{{", "{").replace("}}", "}")
    return ""


def exported_names(node: ast.expr) -> list[str] | None:
    """The names an `__all__` expression lists ("@x.__all__" for another's list), or None if code must run."""
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        names = [
            item.value if isinstance(item, ast.Constant) and isinstance(item.value, str) else None for item in node.elts
        ]
        return [name for name in names if name] if None not in names else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.BitOr)):
        left, right = exported_names(node.left), exported_names(node.right)
        return None if left is None or right is None else left + right
    if isinstance(node, ast.Call) and dotted(node.func) in ("list", "set", "sorted", "tuple") and len(node.args) == 1:
        return exported_names(node.args[0])
    name = dotted(node)
    return [f"@{name}"] if name.endswith("__all__") and not isinstance(node, ast.Call) else None
