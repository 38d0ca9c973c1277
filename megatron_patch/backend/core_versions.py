"""Where the megatron-core releases we support differ, and how to speak to each of them.

0.16 wraps nested modules of a layer spec in `ModuleSpec`; 0.19 uses `functools.partial` for some of them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any


def submodules(spec: Any) -> Any:
    """The submodules record of a spec, whichever way this release spells it."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules


def with_module(spec: Any, module: type) -> Any:
    """The same spec, but of another class."""
    return partial(module, *spec.args, **spec.keywords) if isinstance(spec, partial) else replace(spec, module=module)
