"""Mends what megatron-core's experts and latent attention leave undone without Transformer Engine, on CUDA and CPU.

Both ask whether parts of Transformer Engine are there by names that mean something only where it is. What concerns the
CPU and gloo alone is in overlay.py.
"""

from __future__ import annotations

from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils


def mend_local_layers() -> None:
    """Let them see that it is missing (idempotent; does nothing where it is installed)."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if not isinstance(getattr(multi_latent_attention, "TELinear", None), type):
        multi_latent_attention.HAVE_TE = False
    if multi_latent_attention.Linear is None:  # from 0.19 on: it no longer names its own replicated linear
        multi_latent_attention.Linear = Linear
