"""The import rule: every module knows only what ARCHITECTURE.md lets it know."""

from __future__ import annotations

import ast

import pytest

from tests.guards.imports import EXCEPTIONS, RULES, imports, package_modules, part_of, violations


def test_every_module_imports_only_what_its_part_may_know() -> None:
    found = [line for module, path in package_modules() for line in violations(module, path.read_text())]
    assert not found, "\n" + "\n".join(found)


def test_every_exception_is_still_needed() -> None:
    sources = {module: path.read_text() for module, path in package_modules()}
    for module, part in EXCEPTIONS:
        names = [name.removeprefix("megatron_patch.") for _, name in imports(sources[module])]
        assert part in map(part_of, names), f"{module} no longer imports {part}: drop its exception"


def test_the_table_itself_lets_imports_go_down_only() -> None:
    def below(part: str, seen: tuple[str, ...] = ()) -> None:
        assert part not in seen, f"a circle: {' -> '.join((*seen, part))}"
        for other in RULES[part].may:
            nearest = part_of(other)
            if nearest != part:
                below(nearest, (*seen, part))

    for part in RULES:
        below(part)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("weights", "import megatron.core"),
        ("weights", "from megatron_patch.family import Family"),
        ("family", "import os"),
        ("models.llama", "from megatron_patch.checkpoint import convert"),
        ("models.llama", "from torch import distributed"),
        ("layers.norm", "def f():\n    from megatron_patch.models import family_for"),
        ("backend.overlay", "from transformers import AutoModel"),
        ("training.loss", "from megatron_patch.checkpoint.convert import convert"),
        ("training.arguments", "import torch.distributed as dist"),
        ("generation.engine", "from megatron_patch.tokenizer import load_tokenizer"),
        ("checkpoint.huggingface", "if TYPE_CHECKING:\n    from megatron.core import parallel_state"),
        ("data.datasets", "from megatron_patch import convert"),
        ("model", "from . import family"),
        ("a_new_part.module", ""),
    ],
)
def test_a_forbidden_import_is_found(module: str, line: str) -> None:
    ast.parse(line)
    assert violations(module, line)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("weights", "import torch"),
        ("models.llama", "from megatron_patch.family import Family"),
        ("launch.convert", "from megatron_patch.checkpoint.convert import convert"),
        ("tokenizer.hf", "import megatron_patch.tokenizer.encoder"),
    ],
)
def test_an_allowed_import_is_not_reported(module: str, line: str) -> None:
    assert violations(module, line) == []
