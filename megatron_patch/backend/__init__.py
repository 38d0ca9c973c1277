"""What this machine has, and the one place that adapts megatron-core's surroundings to it.

Importing this package is cheap: torch and megatron-core are touched only when megatron-core itself is imported.
It knows nothing of model families, arguments or data.
"""

from __future__ import annotations

from megatron_patch.backend.overlay import install

__all__ = ["install"]
