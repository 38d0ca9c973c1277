"""`import megatron_patch` names what a user needs and loads nothing heavy for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import megatron_patch


@pytest.mark.parametrize("name", megatron_patch.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(megatron_patch, name) is not None


def test_an_unknown_name_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'convrt'; it offers .*convert"):
        _ = megatron_patch.convrt


def test_dir_shows_the_public_names() -> None:
    assert set(megatron_patch.__all__) <= set(dir(megatron_patch))


def test_importing_the_package_loads_no_torch() -> None:
    script = "import sys, megatron_patch; sys.exit('torch' in sys.modules or 'megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
