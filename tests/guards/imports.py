"""Who may know what: the table of ARCHITECTURE.md as data, and the checker that reads a module's imports with `ast`.

Imports inside functions and under TYPE_CHECKING count as well: they are knowledge too. A new part needs a row here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_patch"

_DISK = ("os", "pathlib", "shutil", "tempfile", "io", "glob", "json", "orjson", "safetensors")
_COMMAND_LINE = ("argparse", "tyro")
_RANKS = ("torch.distributed", "megatron.core.parallel_state")


@dataclass(frozen=True)
class Rule:
    """What one part may know of the package, and what it may never know of the world."""

    may: tuple[str, ...] = ()
    """Parts of the package, beside itself; everything else in the package is forbidden."""
    never: tuple[str, ...] = ()
    """Prefixes of other packages' module names."""


_MODEL = ("weights", "family", "models", "layers", "backend", "model")
_EVERYTHING = (*_MODEL, "checkpoint", "tokenizer", "data", "training")

RULES = {
    "weights": Rule(never=("megatron", "transformers", *_RANKS, *_DISK)),
    "family": Rule(may=("weights",), never=("megatron", "torch.distributed", *_COMMAND_LINE, *_DISK)),
    "models": Rule(may=("family", "weights"), never=("megatron", *_RANKS, *_COMMAND_LINE, *_DISK)),
    "layers": Rule(may=("backend",), never=("transformers", *_COMMAND_LINE, *_DISK)),
    "backend": Rule(never=("transformers", *_COMMAND_LINE)),
    "model": Rule(may=("family", "weights", "layers", "backend"), never=("transformers", *_COMMAND_LINE, *_DISK)),
    "checkpoint.directory": Rule(never=("megatron", "transformers", *_COMMAND_LINE)),
    "checkpoint.huggingface": Rule(
        may=("checkpoint.archive", "checkpoint.directory"), never=("megatron", "transformers", *_COMMAND_LINE)
    ),
    "checkpoint.archive": Rule(never=("megatron", "transformers", "safetensors", *_COMMAND_LINE)),
    "checkpoint.arguments": Rule(may=("checkpoint.directory",), never=("torch", "megatron", "transformers", "tyro")),
    "checkpoint.startup": Rule(
        may=("checkpoint.directory",), never=("torch", "megatron", "transformers", *_COMMAND_LINE)
    ),
    "checkpoint.crew": Rule(never=("megatron", "transformers", *_COMMAND_LINE)),
    "checkpoint.manifest": Rule(
        may=("checkpoint.directory",), never=("megatron", "transformers", "torch.distributed", *_COMMAND_LINE)
    ),
    "checkpoint.naming": Rule(
        may=("weights",), never=("transformers", "safetensors", "megatron.core.parallel_state", *_COMMAND_LINE)
    ),
    "checkpoint.sharding": Rule(
        may=("weights",), never=("transformers", "safetensors", "megatron.core.parallel_state", *_COMMAND_LINE)
    ),
    "checkpoint.megatron": Rule(
        may=("checkpoint.archive", "checkpoint.directory"),
        never=("transformers", "safetensors", "megatron.core.parallel_state", *_COMMAND_LINE),
    ),
    "checkpoint.formats": Rule(
        may=("checkpoint.archive", "checkpoint.huggingface", "checkpoint.whole"),
        never=("megatron", "transformers", *_COMMAND_LINE),
    ),
    "checkpoint": Rule(may=(*_MODEL, "tokenizer", "generation"), never=_COMMAND_LINE),
    # A legacy checkpoint holds Megatron-LM's arguments as an argparse.Namespace; nothing is parsed here.
    "checkpoint.legacy_args": Rule(may=("checkpoint", "checkpoint.sharding", *_MODEL), never=("tyro",)),
    "tokenizer": Rule(never=("megatron", *_RANKS, *_COMMAND_LINE)),
    "data.tool_arguments": Rule(
        may=("data.arguments",), never=("torch", "megatron", "transformers", "numpy", *_COMMAND_LINE)
    ),
    "data.sft.arguments": Rule(
        may=("data.arguments", "data.readers"), never=("torch", "megatron", "transformers", "numpy", *_COMMAND_LINE)
    ),
    "data": Rule(may=("tokenizer", "progress"), never=("safetensors", "megatron.core.parallel_state", *_COMMAND_LINE)),
    "training.arguments": Rule(
        may=("data.arguments", "data.sft.arguments"), never=("torch", "megatron", "transformers", *_COMMAND_LINE)
    ),
    "training": Rule(
        may=(
            "data",
            "model",
            "layers",
            "backend",
            "family",
            "checkpoint.directory",
            "checkpoint.megatron",
            "checkpoint.filling",
            "checkpoint.formats",
            "checkpoint.opening",
        ),
        never=("transformers", "safetensors", *_COMMAND_LINE),
    ),
    "progress": Rule(never=("torch", "megatron", "transformers", "numpy", *_COMMAND_LINE, *_DISK)),
    "recipe": Rule(never=("torch", "megatron", "transformers", "numpy", *_COMMAND_LINE)),
    "memory": Rule(never=("megatron", "transformers", *_COMMAND_LINE, *_DISK)),
    "generation": Rule(may=("model", "layers", "backend"), never=("transformers", *_COMMAND_LINE, *_DISK)),
    "generation.arguments": Rule(
        may=("checkpoint.arguments", "data.sft.arguments", "generation.params"),
        never=("torch", "megatron", "transformers", *_COMMAND_LINE),
    ),
    "generation.stops": Rule(may=("tokenizer",), never=("torch", "megatron", "transformers", *_COMMAND_LINE, *_DISK)),
    "generation.prompts": Rule(
        may=("data.readers", "data.sft.conversations"), never=("torch", "megatron", "transformers", *_COMMAND_LINE)
    ),
    "generation.answers": Rule(
        may=("generation.prompts", "checkpoint.directory"),
        never=("torch", "megatron", "transformers", *_COMMAND_LINE),
    ),
    "generation.chat": Rule(
        may=("tokenizer", "data.sft"), never=("torch", "megatron", "transformers", *_COMMAND_LINE, *_DISK)
    ),
    "generation.job": Rule(
        may=(*_EVERYTHING, "generation", "progress"), never=("transformers", "safetensors", *_COMMAND_LINE)
    ),
    "generation.text": Rule(may=("generation", "tokenizer", *_MODEL), never=("transformers", *_COMMAND_LINE, *_DISK)),
    "vocab.arguments": Rule(
        may=("checkpoint.directory", "data.arguments", "data.readers"),
        never=("torch", "megatron", "transformers", *_COMMAND_LINE),
    ),
    "vocab.megatron": Rule(
        may=("vocab", "progress", "checkpoint"), never=("transformers", "torch.distributed", *_COMMAND_LINE)
    ),
    "vocab": Rule(
        may=(
            "family",
            "progress",
            "weights",
            "models",
            "tokenizer",
            "data.readers",
            "checkpoint.directory",
            "checkpoint.huggingface",
            "checkpoint.sharding",
        ),
        never=("megatron", "torch.distributed", *_COMMAND_LINE),
    ),
    "evaluation.arguments": Rule(
        may=("checkpoint.arguments", "data.arguments", "training.arguments"),
        never=("torch", "megatron", "transformers", "numpy", *_COMMAND_LINE),
    ),
    "evaluation.windows": Rule(never=("torch", "megatron", "transformers", *_COMMAND_LINE, *_DISK)),
    "evaluation.scoring": Rule(
        may=("evaluation.windows", "model", "layers", "backend"), never=("transformers", *_COMMAND_LINE, *_DISK)
    ),
    "evaluation": Rule(may=(*_EVERYTHING, "generation", "progress", "vocab.corpus"), never=_COMMAND_LINE),
    "launch": Rule(may=(*_EVERYTHING, "progress", "generation", "evaluation", "memory", "recipe", "vocab")),
    "__init__": Rule(may=("backend",), never=("torch", "megatron", "transformers")),
    "__main__": Rule(may=("launch",)),
}

EXCEPTIONS = {
    ("layers.rotary", "family"): "for the plain record Rope, which says what frequencies a model wants",
    ("training.setup", "models"): "looks up the family that a checkpoint's own config names",
    ("training.setup", "tokenizer"): "loads it once, for whatever the data need of it",
    ("training.pretraining", "tokenizer"): "the datasets need the tokenizer's end-of-document id",
    ("training.finetuning", "tokenizer"): "conversations become tokens at the start of a run",
}
"""(module, imported part) -> why the table does not hold there. A row that is no longer needed fails the test."""


def part_of(module: str) -> str | None:
    """The row for a module's dotted name inside the package: its own or its nearest parent's."""
    while module and module not in RULES:
        module = module.rpartition(".")[0]
    return module or None


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a module imports; `from a import b` counts as `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def violations(module: str, source: str) -> list[str]:
    """What `module` (its dotted name inside the package) imports and may not, one line each."""
    part = part_of(module)
    if part is None:
        return [f"{module}: no rule for this part; add a row to tests/guards/imports.py"]
    problems = (_problem(module, part, name) for _, name in imports(source))
    lines = (line for line, _ in imports(source))
    return [f"{module}, line {line}: {problem}" for line, problem in zip(lines, problems, strict=True) if problem]


def _problem(module: str, part: str, name: str) -> str | None:
    if name.startswith("."):
        return f"{name}: write imports in full"
    if name == PACKAGE or name.startswith(PACKAGE + "."):
        return _problem_inside(module, part, name.removeprefix(PACKAGE).lstrip("."))
    rule = RULES[part]
    return next((f"{part} may not know {bad} ({name})" for bad in rule.never if _within(name, bad)), None)


def _problem_inside(module: str, part: str, name: str) -> str | None:
    target = part_of(name)
    if target is None:
        return f"{name or PACKAGE}: import from the module that defines it, not from the front door"
    if target == part or (module, target) in EXCEPTIONS:
        return None
    allowed = (*RULES[part].may, part)
    return None if any(_within(name, one) for one in allowed) else f"{part} may not know {target} ({name})"


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def package_modules() -> Iterator[tuple[str, Path]]:
    """Dotted name inside the package, and file, of every module."""
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts), path
