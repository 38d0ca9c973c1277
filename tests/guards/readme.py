"""Reads a README or guide: its headings, links and code spans, its code blocks, the commands in them and the paths of
its annotated tree."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HEADING = re.compile(r"(#+) ")
_FENCE = re.compile(r"\s*```+(?P<language>\w*)")
_PATH = re.compile(r"[\w.*<>-]+(/[\w.*<>-]+)*(/|\.\w+)|\.ci/run|LICENSE")
_VARIABLE = re.compile(r"[A-Z_]+=")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_SPAN = re.compile(r"`([^`]+)`")
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


def links(text: str) -> list[str]:
    """The targets of all links and pictures."""
    return [target for line in _outside_blocks(text) for target in _LINK.findall(line)]


def spans(text: str) -> list[str]:
    """What stands between backticks, outside code blocks; one may go over the end of a line."""
    return [" ".join(span.split()) for span in _SPAN.findall("\n".join(_outside_blocks(text)))]


def anchors(text: str) -> set[str]:
    """What a link to a section of this text may say behind #."""
    titles = (line.lstrip("#").strip() for line in _outside_blocks(text) if _HEADING.match(line))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def first_cells(text: str, header: str) -> list[list[str]]:
    """The code spans of the first cell of each row of the tables whose first column is called `header`."""
    rows, inside = [], False
    for line in _outside_blocks(text):
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        inside = bool(cells) and (inside or cells[0] == header)
        if inside and cells[0] != header and set(cells[0]) - set("-|"):
            rows.append(_SPAN.findall(cells[0]))
    return rows


def _outside_blocks(text: str) -> Iterator[str]:
    inside = False
    for line in text.splitlines():
        fence = bool(_FENCE.match(line))
        inside ^= fence
        if not inside and not fence:
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


@dataclass(frozen=True)
class Call:
    """A line of a shell block."""

    variables: dict[str, str]
    """Set before the command, for it alone."""
    words: list[str]


def calls(block: Block) -> list[Call]:
    """Every line of a shell block but those of files in it; `$ ` prompts and continued lines are understood."""
    if block.language not in SHELL:
        return []
    without_files = re.sub(r"<<'(\w+)'\n.*?\n\1$", "", "\n".join(block.lines), flags=re.DOTALL | re.MULTILINE)
    joined = without_files.replace("\\\n", " ").splitlines()
    lines = (shlex.split(line.strip().removeprefix("$ "), comments=True) for line in joined)
    found = []
    for words in lines:
        count = next((i for i, word in enumerate(words) if not _VARIABLE.match(word)), len(words))
        found.append(Call(dict(word.split("=", 1) for word in words[:count]), words[count:]))
    return [call for call in found if call.words]


def arguments(words: list[str], program: str = "megatron-patch") -> list[str] | None:
    """What a call hands to `program`, under torchrun or not; None if it calls another."""
    module = program.replace("-", "_")
    if words[0] == "torchrun" and module in words:
        return words[words.index(module) + 1 :]
    return words[1:] if words[0] == program else None


def commands(block: Block) -> list[list[str]]:
    """The arguments of every call of ours in a shell block."""
    found = (arguments(call.words) for call in calls(block))
    return [words for words in found if words is not None]


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
