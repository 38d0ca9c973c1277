"""The style budgets of this project, as functions from source text to measurements or complaints."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

MAX_FUNCTION_LINES = 50
MAX_MEDIAN_FUNCTION_LINES = 12
MIN_ANNOTATED = 0.9
MAX_LAUNCH_LINES = 60
WINDOW = 20
"""Lines of code that may not stand in two places."""

# Written in pieces, so that this file does not complain about itself.
MACHINE_PATHS = re.compile(r"""(?<![\w.~$}])/""" + r"(work|farm|home|root|mnt|Users|opt|tmp/w)\b")

FAMILY_NAME = re.compile(
    r"(code)?llama|qwen|qwq|baichuan|bloom|falcon|mi[sx]tral|(chat)?glm|galactica|starcoder|deepseek|internlm|gpt2|opt\b|yi\b"
    r"|phi\d?\b|gemma",
    re.IGNORECASE,
)

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: str) -> Iterator[_Function]:
    """Every function and method, nested ones included."""
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, _Function))


def body_lines(function: _Function) -> int:
    """Lines from `def` to the end, without the docstring: explaining more must not count against anybody."""
    docstring = function.body[0] if ast.get_docstring(function) else None
    return function.end_lineno - function.lineno + 1 - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)


def is_annotated(function: _Function) -> bool:
    """Whether the return value and every argument but self and cls have annotations."""
    spec = function.args
    arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
    return bool(function.returns) and all(one.annotation for one in arguments if one.arg not in ("self", "cls"))


def is_public(function: _Function) -> bool:
    return not function.name.startswith("_")


def code_lines(source: str) -> list[tuple[int, str]]:
    """Line number and text of each line that holds code: no comments, blank lines, docstrings or imports."""
    skipped = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom) or _is_bare_string(node)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    stripped = ((number, line.strip()) for number, line in enumerate(source.splitlines(), 1))
    return [(number, line) for number, line in stripped if line and line[0] != "#" and number not in skipped]


def _is_bare_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def duplicates(sources: Mapping[str, str], window: int = WINDOW) -> list[str]:
    """Places where `window` lines of code in a row are the same, whatever their indentation."""
    places: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, source in sources.items():
        lines = code_lines(source)
        for start in range(len(lines) - window + 1):
            text = tuple(line for _, line in lines[start : start + window])
            places[text].append(f"{name}:{lines[start][0]}")
    return [" = ".join(found) for found in places.values() if len(found) > 1]


def machine_paths(text: str) -> list[str]:
    """Lines that name a folder of somebody's machine."""
    lines = enumerate(text.splitlines(), 1)
    return [f"line {number}: {line.strip()}" for number, line in lines if MACHINE_PATHS.search(line)]


def name_comparisons(source: str) -> list[str]:
    """Comparisons, `match` cases and string tests against a literal that is, or starts with, a model family's name."""
    compared = _compared_strings(ast.parse(source))
    return [f"line {node.lineno}: {text!r}" for node, text in compared if FAMILY_NAME.match(text)]


def _compared_strings(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(tree):
        for operand in _operands(node):
            yield from ((node, text) for text in _strings(operand))


def _operands(node: ast.AST) -> list[ast.expr]:
    match node:
        case ast.Compare():
            return [node.left, *node.comparators]
        case ast.MatchValue():
            return [node.value]
        case ast.Call(func=ast.Attribute(attr="startswith" | "endswith" | "match" | "fullmatch" | "search")):
            return node.args
    return []


def _strings(operand: ast.AST) -> Iterator[str]:
    """String literals of an operand, those inside a tuple, list or set included."""
    for element in getattr(operand, "elts", [operand]):
        if isinstance(element, ast.Constant) and isinstance(element.value, str):
            yield element.value
