"""Recipes: the flags of a command as a YAML file, for `--config recipe.yaml`.

A recipe has a key for each flag, without its dashes: `global-batch-size: 64`, `bf16: true`, `data-path: [a, b]`. Flags
that are typed win over it. Keys that the command does not have are refused. It knows flags as names with defaults, and
nothing of what they do.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def expand(file: str, typed: Sequence[str], defaults: Mapping[str, Any], *, repeats: bool = False) -> list[str]:
    """A command's words, the recipe's flags in front of those that are typed, without those that are typed as well.

    Args:
        defaults: every flag that the command has, without dashes, and its default.
        repeats: whether a flag is repeated for each of its values.

    Raises:
        ValueError: for what a recipe may not say, with the line.
    """
    words = [_key(word.partition("=")[0]) for word in typed if word.startswith("--")]
    given = {*words, *(word.removeprefix("no-") for word in words)}
    flags: list[str] = []
    for key, node in _entries(file, defaults):
        flags += [] if key in given else _flags(_place(file, node), key, node, defaults[key], repeats)
    return [*flags, *typed]


def dump(values: Mapping[str, Any]) -> str:
    """The recipe of flags; None is left out."""
    said = {key: value for key, value in values.items() if value is not None}
    return "".join(f"{_key(key)}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in said.items())


def _key(flag: str) -> str:
    return flag.removeprefix("--").replace("_", "-")


def _place(file: str, node: Any) -> str:
    return f"{file}, line {node.start_mark.line + 1}"


def _entries(file: str, known: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each key and the node of its value; nodes have what was written, where yaml's values are converted."""
    import yaml

    if not Path(file).is_file():
        raise ValueError(f"--config {file or '(nothing)'}: no such file")
    try:
        root = yaml.compose(Path(file).read_text("utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{file}: must hold keys and values, as in global-batch-size: 64")
    seen: set[str] = set()
    for node, value in root.value:
        key = _key(str(node.value))
        if key not in known:
            raise ValueError(f"{_place(file, node)}: {key!r} is no flag of this command{_nearest(key, known)}")
        if key in seen:
            raise ValueError(f"{_place(file, node)}: {key!r} is given twice")
        seen.add(key)
        yield key, value


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, known, 3, 0.5)
    return f"; nearest: {', '.join(near)}" if near else ""


def _flags(place: str, key: str, node: Any, default: Any, repeats: bool) -> list[str]:
    """The flags that a value stands for."""
    kind = node.tag.rpartition(":")[2]
    if kind == "null":
        return []
    if isinstance(default, bool):
        return _switch(place, key, node, default, kind)
    if kind == "bool":
        raise ValueError(f"{place}: {key}: {node.value} means yes or no in YAML; put it in quotes")
    if kind == "map" or (kind == "seq" and not all(isinstance(one.value, str) for one in node.value)):
        raise ValueError(f"{place}: {key}: must be a value or a list of values")
    if kind != "seq":
        return [f"--{key}={node.value}"]
    values = [one.value for one in node.value]
    return [word for value in values for word in (f"--{key}", value)] if repeats else [f"--{key}", *values]


def _switch(place: str, key: str, node: Any, default: bool, kind: str) -> list[str]:
    if kind != "bool":
        raise ValueError(f"{place}: {key}: must be true or false")
    is_on = node.value.lower() in ("true", "yes", "on")
    return [] if is_on == default else [f"--{'' if is_on else 'no-'}{key}"]
