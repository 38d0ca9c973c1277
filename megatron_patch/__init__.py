"""Megatron Patch: Hugging Face checkpoints on unmodified megatron-core.

This is the front door. It names the handful of things a user imports and loads each one when it is first asked for, so
that `import megatron_patch` costs nothing and `--help` needs no torch. It knows no other module's contents.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

from megatron_patch.backend import install

install()  # before anyone imports megatron.core; costs nothing until then

_PUBLIC = {
    "Family": "megatron_patch.family",
    "family_for": "megatron_patch.models",
    "build_model": "megatron_patch.model",
    "convert": "megatron_patch.checkpoint.convert",
    "Wanted": "megatron_patch.checkpoint.opening",
    "Layout": "megatron_patch.checkpoint.sharding",
    "Pipeline": "megatron_patch.checkpoint.sharding",
    "verify": "megatron_patch.checkpoint.verify",
    "load_tokenizer": "megatron_patch.tokenizer",
    "generate": "megatron_patch.generation",
}
"""Public name -> the module that holds it."""

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("megatron-patch")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'megatron_patch' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
