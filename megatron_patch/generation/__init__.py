"""Generation: an engine on token ids, sampling as pure functions, and a thin layer of text around them.

`generate` is the way in. Importing this package imports no torch; asking for `generate` does.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "generate": "megatron_patch.generation.engine",
    "SamplingParams": "megatron_patch.generation.params",
    "generate_text": "megatron_patch.generation.text",
}
"""Public name -> the module that holds it."""

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_PUBLIC[name]), name)
