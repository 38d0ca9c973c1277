"""The parallel layouts every model is tested under, and a tiny model loaded into one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Layout:
    """A parallel layout."""

    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline


LAYOUTS: dict[str, Layout] = {
    "TP1": Layout(),
    "TP2": Layout(2),
    "TP2+SP": Layout(2, sequence_parallel=True),
    "TP4": Layout(4),
    "TP4+SP": Layout(4, sequence_parallel=True),
    "PP2": Layout(pipeline=2),
    "TP2xPP2": Layout(2, 2),
    "TP2xPP2+SP": Layout(2, 2, sequence_parallel=True),
}


def load_tiny(root: str, layout: Layout, **config: Any) -> torch.nn.Module:
    """This rank's part of a converted checkpoint; the process group exists already."""
    from megatron.core import parallel_state

    from megatron_patch.checkpoint.directory import read_config
    from megatron_patch.checkpoint.megatron import load_weights
    from megatron_patch.model import build_model, transformer_config
    from megatron_patch.models import family_for
    from megatron_patch.training.initialize import initialize, seed_everything

    if parallel_state.is_initialized():
        seed_everything(1234)
    else:  # once a call: every gloo group has threads of its own
        initialize(layout.tensor, layout.pipeline)
    values = read_config(root)
    architecture = family_for(values).describe(values)
    settings = transformer_config(
        architecture,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        sequence_parallel=layout.sequence_parallel,
        **config,
    )
    model = build_model(architecture, settings, make_vocab_size_divisible_by=16)
    load_weights([model], root)
    return model
