"""What the training tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import arguments, make_workplace, train


@pytest.fixture(scope="package")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="package")
def run(pool: Any, workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """run(world_size, save=None, **arguments) trains and returns the directory it saved to."""

    def run(world_size: int, save: Path | None = None, **changes: Any) -> Path:
        save = save or tmp_path_factory.mktemp("run")
        pool.run(train, world_size, arguments(workplace, save, **changes))
        return save

    return run


@pytest.fixture(scope="package")
def plain(run: Callable[..., Path]) -> Path:
    """20 iterations in one process: what every other run is compared with."""
    return run(1)
