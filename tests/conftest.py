"""Fixtures that every test may use: the shared pool of gloo workers, and the marker for tests that need a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import megatron_patch  # noqa: F401  before any test imports megatron.core, which its backend adapts where there is no CUDA
from tests.workers import Pool

# Set before torch is imported anywhere: several small processes with one thread each beat one that owns every core.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """One pool for the whole session; its workers start when the first test asks for them."""
    shared = Pool()
    yield shared
    shared.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
