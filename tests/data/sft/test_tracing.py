"""Strings that know where their characters came from go through templates as any string does."""

from __future__ import annotations

import random
from collections.abc import Callable

import jinja2
import pytest

from megatron_patch.data.sft.tracing import DATA, TEMPLATE, Traced, compile_template, trace, trace_all

METHODS: tuple[Callable[[str], list[str]], ...] = (
    *(lambda s, sep=sep, n=n: s.split(sep, n) for sep in (None, "|", "ab") for n in (-1, 0, 1, 2)),
    *(lambda s, sep=sep, n=n: s.rsplit(sep, n) for sep in (None, "|", "ab") for n in (-1, 1)),
    *(lambda s, sep=sep: list(s.partition(sep)) for sep in ("|", "ab")),
    *(lambda s, sep=sep: list(s.rpartition(sep)) for sep in ("|", "ab")),
    *(lambda s, chars=chars: [s.strip(chars), s.lstrip(chars), s.rstrip(chars)] for chars in (None, "a|")),
    lambda s: s.splitlines(),
    lambda s: s.splitlines(True),
    lambda s: [s.removeprefix("a"), s.removesuffix("b")],
    lambda s: [s[1:-1], s[::2], s[-3:]],
    lambda s: list(s),
)


@pytest.mark.parametrize("method", METHODS)
def test_parts_of_a_string_keep_their_characters_codes(method: Callable[[str], list[str]]) -> None:
    draw = random.Random(3)
    for _ in range(300):
        text = "".join(draw.choices("aab \n|", k=draw.randrange(12)))
        codes = "".join(chr(100 + i) for i in range(len(text)))
        parts, expected = method(Traced(text, codes)), method(text)
        assert parts == expected
        places = [[ord(code) - 100 for code in part.origin] for part in parts]
        assert ["".join(text[i] for i in one) for one in places] == expected
        assert all(one == sorted(one) for one in places)


def test_a_part_is_not_taken_for_a_piece_of_the_separator_before_it() -> None:
    _, second = Traced("xabb", "0123").split("ab")
    assert (second, second.origin) == ("b", "3")


def test_joining_replacing_and_adding_follow_both_sides() -> None:
    text = Traced("a-b", "123")
    assert (Traced("+", "9").join([text, "c"]).origin, ("<" + text + ">").origin) == (
        f"1239{TEMPLATE}",
        f"{TEMPLATE}123{TEMPLATE}",
    )
    assert (text.replace("-", "::"), text.replace("-", "::").origin) == ("a::b", f"1{TEMPLATE * 2}3")
    assert text.replace("-", trace("xy", "7"), 1).origin == "1773"
    assert (text * 2).origin == "123123"


SPELLINGS = {
    "{{ m.c }}": "ccc",
    "{{ '<' + m.c + '>' }}": ".ccc.",
    "{{ '<' ~ m.c ~ 1 }}": ".ccc.",
    "{{ m.c | trim }}": "c",
    "{{ m.c.strip() | upper }}": "c",
    "{{ m.c.split('x')[0] }}|{{ m.c.split('x')[-1] }}": "c.c",
    "{{ m['c'] | replace('x', 'yy') }}": "c..c",
    "{{ ['<', m.c] | join('-') }}": "..ccc",
    "{{ ', '.join(['<', m.c]) }}": "...ccc",
    "{{ '[x]'.replace('x', m.c) }}": ".ccc.",
    "{% set z %}({{ m.c }}){% endset %}{{ z }}": ".ccc.",
    "{% macro f(a) %}({{ a }}){% endmacro %}{{ f(m.c) }}": ".ccc.",
    "{% set n = namespace(t='') %}{% set n.t = n.t + m.c %}{{ n.t }}": "ccc",
    "{% if m.c.startswith(' ') %}{{ m.c[1:] }}{% endif %}": "cc",
    "{% for c in m.c %}{{ c }}{% endfor %}": "ccc",
    "{{ m.c | tojson }}": "ccccc",
    "{{ m | tojson }}": "c" * 12,
    "{{ '<' if 'x' in m.c else m.c }}": ".",
    "{% for x in [1, 2] %}{% if x == 2 %}{% break %}{% endif %}{{ m.c }}{% endfor %}": "ccc",
}


@pytest.mark.parametrize("source", SPELLINGS)
def test_whatever_a_template_does_with_a_string_is_followed(source: str) -> None:
    text = compile_template(source).render(m={"c": trace(" x ", "c")})
    assert text.origin.replace(TEMPLATE, ".") == SPELLINGS[source]
    assert text == compile_template(source).render(m={"c": " x "})


def test_json_of_several_sources_is_data_of_none() -> None:
    text = compile_template("{{ v | tojson }}").render(v=[trace("a", "1"), trace("b", "2")])
    assert set(text.origin) == {DATA}


def test_values_are_traced_and_keys_are_not() -> None:
    traced = trace_all({"a": ["b", 1, None, {"c": "d"}]}, "7")
    assert traced == {"a": ["b", 1, None, {"c": "d"}]}
    assert (traced["a"][0].origin, traced["a"][3]["c"].origin, {type(key) for key in traced}) == ("7", "7", {str})


def test_a_template_stays_in_its_sandbox() -> None:
    for source in ("{{ m.c.__class__.__mro__ }}", "{% set n = namespace(a=1) %}{% set n.__class__ = 1 %}"):
        with pytest.raises(jinja2.TemplateError):
            compile_template(source).render(m={"c": trace("x", "c")})
