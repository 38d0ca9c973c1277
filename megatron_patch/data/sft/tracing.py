"""Jinja templates that tell, for every character they write, where it came from.

    text = compile_template(source).render(messages=[{"role": "user", "content": trace("Hi", code)}])
    text.origin                        # as long as the text: chr(0) where the template itself wrote, `code` elsewhere

A `Traced` is a string with a second string of the same length beside it, whose characters are codes. It goes through a
template as any string does, and what templates do to strings (cut, strip, split, join, replace, add) is done to both.
What is not followed (`format`, `%`) comes out as if the template had written it, so a caller must not take the absence
of a code for proof. The text is that of transformers' own rendering. It knows neither chats nor tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn, SupportsIndex

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

TEMPLATE, DATA = "\x00", "\x01"
"""What the template wrote; what is somebody's data but of no one source any more."""
GENERATED = 0x80000
"""Added to the code of a character inside {% generation %}."""


class Traced(str):
    """A string that knows where its characters came from."""

    origin: str

    def __new__(cls, text: str, origin: str) -> Traced:
        made = super().__new__(cls, text)
        made.origin = origin
        return made

    def __str__(self) -> str:
        return self

    def __getitem__(self, index: SupportsIndex | slice) -> Traced:
        return Traced(str.__getitem__(self, index), self.origin[index])

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __add__(self, other: str) -> Traced:
        return Traced(str.__add__(self, other), self.origin + origin(other))

    def __radd__(self, other: str) -> Traced:
        return Traced(str.__add__(other, self), origin(other) + self.origin)

    def __mul__(self, times: SupportsIndex) -> Traced:
        return Traced(str.__mul__(self, times), self.origin * times)

    __rmul__ = __mul__

    # --------------------------------------------------------------------------------------------- parts of the string

    def strip(self, chars: str | None = None) -> Traced:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> Traced:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None) -> Traced:
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str) -> Traced:
        return self[len(prefix) :] if prefix and self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> Traced:
        return self[: -len(suffix)] if suffix and self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._found(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._found(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines = self._found(str.splitlines(self, keepends=True))
        return lines if keepends else [line[: len(str.splitlines(line)[0])] for line in lines]

    def partition(self, sep: str) -> tuple[str, str, str]:
        head, middle, tail = str.partition(self, sep)
        return self[: len(head)], self[len(head) : len(head) + len(middle)], self[len(self) - len(tail) :]

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        head, middle, tail = str.rpartition(self, sep)
        return self[: len(head)], self[len(head) : len(head) + len(middle)], self[len(self) - len(tail) :]

    def _found(self, parts: Iterable[str], sep: str | None = None) -> list[str]:
        """Parts that follow one another in this string."""
        found, end = [], 0
        for part in parts:
            start = str.find(self, part, end)
            found.append(self[start : start + len(part)])
            end = start + len(part) + len(sep or "")
        return found

    # ----------------------------------------------------------------------------------------------------- new strings

    def join(self, parts: Iterable[str]) -> Traced:
        texts = list(parts)
        return Traced(str.join(self, texts), self.origin.join(map(origin, texts)))

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> Traced:
        if not old:
            return self._rewritten(str.replace(self, old, new, count))
        return Traced(new, origin(new)).join(self.split(old, count))

    def lower(self) -> Traced:
        return self._rewritten(str.lower(self))

    def upper(self) -> Traced:
        return self._rewritten(str.upper(self))

    def title(self) -> Traced:
        return self._rewritten(str.title(self))

    def capitalize(self) -> Traced:
        return self._rewritten(str.capitalize(self))

    def _rewritten(self, text: str) -> Traced:
        if len(text) == len(self):
            return Traced(text, self.origin)
        return Traced(text, only_code(self.origin) * len(text))


def trace(text: str, code: str) -> Traced:
    """A text all of which has one code."""
    return Traced(text, code * len(text))


def trace_all(value: Any, code: str) -> Any:
    """Plain JSON with every string value in it traced; keys stay as they are."""
    if isinstance(value, str):
        return trace(value, code)
    if isinstance(value, Mapping):
        return {key: trace_all(item, code) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [trace_all(item, code) for item in value]
    return value


def origin(text: Any) -> str:
    """The codes of a string, traced or not."""
    return text.origin if isinstance(text, Traced) else TEMPLATE * len(text)


def only_code(codes: Iterable[str]) -> str:
    """The code that all data among these have; DATA if there are several or none."""
    found = set(codes) - {TEMPLATE}
    return found.pop() if len(found) == 1 else DATA


# ------------------------------------------------------------------------------------------------------------ templates


def _concat(pieces: Iterable[str]) -> Traced:
    return Traced("", "").join(pieces)


class _Generator(CodeGenerator):
    """Compiles `a ~ b` into a joining that follows codes."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802  # jinja2's name
        self.write("environment.concat(map(str, (")
        for one in node.nodes:
            self.visit(one, frame)
            self.write(", ")
        self.write(")))")


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: what is between them is to be learned."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> Traced:
        text = caller()
        return Traced(text, "".join(chr(ord(code) | GENERATED) for code in origin(text)))


class _Namespace(Namespace):
    """Refuses names that could lead out of the sandbox."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template may not set {name!r}")
        super().__setitem__(name, value)


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' settings for chat templates; strings are joined with their codes."""

    code_generator_class = _Generator
    concat = staticmethod(_concat)  # type: ignore[assignment]

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # jinja2's names
        """Methods of the template's own strings follow the codes of their arguments too."""
        owner = getattr(__obj, "__self__", None)
        if type(owner) is str and __obj.__name__ in ("join", "replace"):
            __obj = getattr(Traced(owner, origin(owner)), __obj.__name__)
        return super().call(__context, __obj, *args, **kwargs)


def compile_template(source: str) -> jinja2.Template:
    """A template whose `render` returns a Traced. Raises jinja2.TemplateError for what is no template."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters.update(tojson=_tojson, join=_join, replace=_replace)
    environment.globals.update(
        raise_exception=_raise,
        strftime_now=_now,
        namespace=_Namespace,
        dict=lambda *args, **items: dict(*args, **items),
    )
    return environment.from_string(source)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> Traced:
    """transformers' filter. What data became is data: it writes no control tokens."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return trace(text, only_code(_codes(value)))


def _codes(value: Any) -> Iterator[str]:
    if isinstance(value, Traced):
        yield from set(value.origin)
    elif isinstance(value, Mapping):
        yield from (code for item in value.values() for code in _codes(item))
    elif isinstance(value, list | tuple):
        yield from (code for item in value for code in _codes(item))


def _join(parts: Iterable[Any], separator: str = "", attribute: str | None = None) -> Traced:
    values = parts if attribute is None else (one[attribute] for one in parts)
    return Traced(separator, origin(separator)).join(map(str, values))


def _replace(text: Any, old: str, new: str, count: int | None = None) -> Traced:
    return Traced(str(text), origin(str(text))).replace(old, new, -1 if count is None else count)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
