"""Signatures and short code out of function nodes: `ast` nodes and source lines in, text out."""

from __future__ import annotations

import ast
import re
import textwrap

from pipelines.core.pydocs.prose import legible

LONGEST_SIGNATURE = 300  # characters; beyond it annotations go first, then defaults
LONGEST_CODE = 25  # lines of a body that an instruction quotes
_SPACES = re.compile(r"\s+")
_DELICATE = re.compile(r"[(#'\"\\]")  # brackets, comments and strings need a parser
_INSIDE = re.compile(r"([(\[]) | (?=[)\]])|,(?= ?[)\]])")


def function_arguments(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], bound: bool) -> str:
    """ "(x, y=0) -> int" of a function; `bound` drops the first argument (self, cls)."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    for text in (_quoted(node, lines, bound), f"({_unparsed(node.args, bound)})"):
        if text and len(text + returns) <= LONGEST_SIGNATURE:
            return text + returns
    for argument in _all_arguments(node.args):
        argument.annotation = None
    text = f"({_unparsed(node.args, bound)})"
    if len(text) <= LONGEST_SIGNATURE:
        return text
    return f"({', '.join(argument.arg for argument in _all_arguments(node.args)[bound:])})"[:LONGEST_SIGNATURE]


def _quoted(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], bound: bool) -> str:
    """The arguments as the source has them, twenty times faster than unparsing; "" if that takes more than a look."""
    header = " ".join(lines[node.lineno - 1 : node.body[0].lineno])
    start = header.find("(", header.find(node.name))
    end = header.find(")", start)
    text = header[start : end + 1]
    if _DELICATE.search(text, 1) or not header[end + 1 :].lstrip().startswith((":", "->")):
        return ""
    text = _INSIDE.sub(r"\1", _SPACES.sub(" ", text))
    first = next(iter(node.args.posonlyargs + node.args.args), None)
    if bound and first:
        if first.annotation or not text.startswith(f"({first.arg}"):
            return ""
        text = "(" + text.partition(",")[2].lstrip() if "," in text else "()"
        text = text.replace("(/, ", "(", 1) if text.startswith("(/, ") else text
    return text


def class_arguments(node: ast.ClassDef, lines: list[str]) -> str:
    """The arguments that make an instance, from `__init__` or `__new__`; "" if the class defines neither."""
    for wanted in ("__init__", "__new__"):
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == wanted:
                return function_arguments(item, lines, bound=True).partition(" -> ")[0]
    return ""


def function_code(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """Header and body without the docstring, at most `LONGEST_CODE` lines; "" if it does nothing or is illegible."""
    body = node.body[1:]
    if not any(_does_something(statement) for statement in body):
        return ""
    docstring = node.body[0]
    header = lines[node.lineno - 1 : docstring.lineno - 1]
    if not header:
        return ""  # all on one line
    rest = lines[docstring.end_lineno or docstring.lineno : node.end_lineno]
    while rest and not rest[0].strip():
        rest = rest[1:]
    code = textwrap.dedent("\n".join([*header, *rest])).rstrip().split("\n")
    if len(code) > LONGEST_CODE:
        last = code[LONGEST_CODE - 1]
        code = [*code[: LONGEST_CODE - 1], f"{last[: len(last) - len(last.lstrip())] or '    '}..."]
    text = "\n".join(code)
    return text if legible(text) else ""


def _does_something(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    ):
        return False
    if isinstance(statement, ast.Raise):
        raised = statement.exc.func if isinstance(statement.exc, ast.Call) else statement.exc
        return not (isinstance(raised, ast.Name) and raised.id in ("NotImplementedError", "AbstractMethodError"))
    return True


def _all_arguments(arguments: ast.arguments) -> list[ast.arg]:
    extra = [item for item in (arguments.vararg, *arguments.kwonlyargs, arguments.kwarg) if item]
    return [*arguments.posonlyargs, *arguments.args, *extra]


def _unparsed(arguments: ast.arguments, bound: bool) -> str:
    if bound and (arguments.posonlyargs or arguments.args):
        positional = arguments.posonlyargs[1:] if arguments.posonlyargs else []
        plain = arguments.args if arguments.posonlyargs else arguments.args[1:]
        arguments = ast.arguments(
            positional, plain, arguments.vararg, arguments.kwonlyargs, arguments.kw_defaults,
            arguments.kwarg, arguments.defaults[-len(positional + plain) :] if positional + plain else [],
        )  # fmt: skip
    return ast.unparse(arguments)
