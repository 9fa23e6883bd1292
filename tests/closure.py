"""Which of our files a stage's code imports, at module level or inside functions; type-only imports aside.

A file that a registered model carries along imports its neighbours by name: `import_module(f"{__package__}.int8" ...)`,
or `_ours("fusion")`, which does that.
"""

from __future__ import annotations

import ast
from pathlib import Path


def closure(root: Path, start: str) -> set[str]:
    """Paths, relative to `root`, of the `pipelines` modules that `start` reaches, itself included."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        waiting += _imports(root, path)
    return found


def _imports(root: Path, path: str) -> set[str]:
    tree = ast.parse((root / path).read_text(encoding="utf-8"))
    names: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "_ours":
            names |= {f"pipelines.core.{one.value}" for one in node.args if isinstance(one, ast.Constant)}
        elif isinstance(node, ast.JoinedStr) and ast.unparse(node).startswith("f'{__package__}."):
            parts = [one.value for one in node.values if isinstance(one, ast.Constant)]
            names |= {f"pipelines.core{part}" for part in parts if part != "."}  # `_ours` itself names no file
    return {file for name in names if (file := _file(root, name)) is not None}


def _file(root: Path, name: str) -> str | None:
    if name.split(".")[0] != "pipelines":
        return None
    path = name.replace(".", "/")
    for candidate in (f"{path}.py", f"{path}/__init__.py"):
        # The empty packages say nothing: an edit of their docstring re-trains nothing.
        if (root / candidate).is_file() and candidate not in ("pipelines/__init__.py", "pipelines/core/__init__.py"):
            return candidate
    return None
