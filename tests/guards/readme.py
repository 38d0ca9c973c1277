"""Reads a README: its headings, its code blocks, the commands in them and the paths of its annotated tree."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HEADING = re.compile(r"(#+) ")
_FENCE = re.compile(r"\s*```+(?P<language>\w*)")
_PATH = re.compile(r"[\w.*<>-]+(/[\w.*<>-]+)*(/|\.\w+)|\.ci/run|LICENSE")
_BRANCHES = str.maketrans("│├└─", "    ")
SHELL = ("bash", "sh", "console", "shell")


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    lines: tuple[str, ...]


def headings(text: str) -> list[int]:
    """The level of each heading outside code blocks, in order: what two languages have in common."""
    return [len(match[1]) for line in _outside_blocks(text) if (match := _HEADING.match(line))]


def _outside_blocks(text: str) -> Iterator[str]:
    inside = False
    for line in text.splitlines():
        inside ^= bool(_FENCE.match(line))
        if not inside:
            yield line


def blocks(text: str) -> list[Block]:
    """Every fenced block, in order."""
    found: list[Block] = []
    lines: list[str] | None = None
    for line in text.splitlines():
        fence = _FENCE.match(line)
        if fence and lines is None:
            language, lines = fence["language"], []
        elif fence:
            found.append(Block(language, tuple(lines)))
            lines = None
        elif lines is not None:
            lines.append(line)
    return found


def without_comments(block: Block) -> list[str]:
    """A block as both languages must have it: a tree's paths, or the lines without their comments."""
    if is_tree(block):
        return tree_paths(block)
    return [line for line in (re.sub(r"(^|\s+)# .*", "", line).rstrip() for line in block.lines) if line]


def commands(block: Block, program: str = "megatron-patch") -> list[list[str]]:
    """The arguments of every call of `program` in a shell block; `$ ` prompts and continued lines are understood."""
    if block.language not in SHELL:
        return []
    joined = "\n".join(block.lines).replace("\\\n", " ").splitlines()
    words = [shlex.split(line.strip().removeprefix("$ "), comments=True) for line in joined if program in line]
    return [line[1:] for line in words if line and line[0] == program]


def scripts(block: Block) -> list[str]:
    """The scripts of this tree that a shell block starts (`./name`)."""
    if block.language not in SHELL:
        return []
    starts = (line.strip().removeprefix("$ ").split(" ")[0] for line in block.lines)
    return [word for word in starts if word.startswith("./")]


def is_tree(block: Block) -> bool:
    """Whether a block is the annotated tree: it shows the package's folder as a line of its own."""
    starts = (line.translate(_BRANCHES).split() for line in block.lines)
    return block.language not in SHELL and any(words[:1] == ["megatron_patch/"] for words in starts)


def tree_paths(block: Block) -> list[str]:
    """The paths an annotated tree names: indentation nests, and what follows the paths of a line explains them."""
    found: list[str] = []
    parents: list[tuple[int, str]] = []
    for line in block.lines:
        text = line.translate(_BRANCHES)
        indent, names = len(text) - len(text.lstrip()), _leading_paths(text.split())
        while parents and parents[-1][0] >= indent:
            parents.pop()
        prefix = parents[-1][1] if parents else ""
        found += [prefix + name for name in names]
        if names and names[0].endswith("/"):
            parents.append((indent, prefix + names[0]))
    return found


def _leading_paths(words: list[str]) -> list[str]:
    end = next((index for index, word in enumerate(words) if not _PATH.fullmatch(word)), len(words))
    return words[:end]


def missing_paths(block: Block, root: Path) -> list[str]:
    """The paths of a tree that are not on the disk; `<name>` and `*` stand for anything."""
    return [path for path in tree_paths(block) if not any(root.glob(re.sub(r"<\w+>", "*", path.rstrip("/"))))]
