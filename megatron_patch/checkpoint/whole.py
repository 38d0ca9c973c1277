"""A model as a conversion sees it: on the meta device, one rank, no padding; its weight rules bound to its tensors.

    describe(config) -> WholeModel

Everything that a format needs to know of a model is here as plain records: which internal tensors (see weights.py) it
has, what Hugging Face tensors they are made of, how megatron-core saves them and how it splits them over ranks. It
knows no disk and no values.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_patch.checkpoint.megatron import Blueprint, blueprint
from megatron_patch.checkpoint.sharding import Split, splits
from megatron_patch.checkpoint.startup import without_garbage_collection
from megatron_patch.family import EMBEDDING, Architecture
from megatron_patch.model import build_model, transformer_config
from megatron_patch.models import family_for
from megatron_patch.weights import Claim, claim


@dataclass(frozen=True)
class WholeModel:
    """A model: no values, one rank, no padding."""

    architecture: Architecture
    blueprint: Blueprint
    claims: Mapping[str, Claim]
    """Internal name -> its rule, in the model's order."""

    splits: Mapping[str, Split]
    """Internal name -> how megatron-core spreads it over ranks."""

    left_out: str = ""
    """What stands before the Hugging Face names of the family, but not of this checkpoint; see `as_named`."""

    @cached_property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name -> shape, of every tensor that a parameter is made of."""
        pairs = ((one.hf, one.hf_shapes(self.architecture)) for one in self.claims.values())
        return {name: shape for names, shapes in pairs for name, shape in zip(names, shapes, strict=True)}

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(torch.Size(shape).numel() for shape in self.blueprint.shapes.values())

    @cached_property
    def repeats(self) -> dict[str, str]:
        """Hugging Face tensors that a checkpoint may have as mere copies of another one -> that one."""
        pairs = self.architecture.repeats.items()
        return {one.removeprefix(self.left_out): other.removeprefix(self.left_out) for one, other in pairs}

    def as_named(self, names: Collection[str]) -> WholeModel:
        """The same model with the Hugging Face names of a checkpoint.

        A model that was saved without its head has names without the one that the whole model calls the rest by
        (GPT-2 and BLOOM: ``h.0.`` for ``transformer.h.0.``).
        """
        (embedding,) = self.claims[EMBEDDING].hf
        first, _, rest = embedding.partition(".")
        if embedding in names or rest not in names:
            return self
        claims = {
            name: replace(one, hf=tuple(part.removeprefix(f"{first}.") for part in one.hf))
            for name, one in self.claims.items()
        }
        return replace(self, claims=claims, left_out=f"{first}.")

    def stored_dtypes(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
        """Internal name -> the narrowest dtype that holds, exactly, all that megatron-core stores under the same key.

        Args:
            dtypes: Hugging Face name -> dtype.
        """
        by_key: dict[str, list[torch.dtype]] = {}
        for one in self.claims.values():
            by_key.setdefault(self.blueprint.key(one.name), []).extend(dtypes[name] for name in one.hf)
        widest = {key: reduce(torch.promote_types, found) for key, found in by_key.items()}
        return {name: widest[self.blueprint.key(name)] for name in self.claims}


def describe(config: Mapping[str, Any], content: dict[str, Any] | None = None) -> WholeModel:
    """The model of a Hugging Face config, on the meta device; `content` is what a torch_dist checkpoint says of itself.

    Raises:
        ValueError: no family knows this config.
    """
    architecture = family_for(config).describe(config)
    with without_garbage_collection(), world_of_one(), torch.device("meta"):
        model = build_model(
            architecture,
            # Without initialisation core does not say how it splits parameters; without values there is none to do.
            transformer_config(architecture, use_cpu_initialization=True, **dict.fromkeys(_INITIALISERS, _leave)),
            make_vocab_size_divisible_by=1,
        )
        plan = blueprint(model, content)
    claims = claim(architecture.family.weights, plan.shapes, architecture.num_layers)
    return WholeModel(architecture, plan, {one.name: one for one in claims}, splits(model, plan.shapes))


_INITIALISERS = ("init_method", "output_layer_init_method", "embedding_init_method")


def _leave(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@contextmanager
def world_of_one() -> Iterator[None]:
    """The parallel state that megatron-core wants before it builds a model; a conversion talks to nobody."""
    if parallel_state.is_initialized() or dist.is_initialized():
        raise ValueError("a conversion runs in one process, outside of torch.distributed")
    hook = sys.excepthook
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    sys.excepthook = hook  # torch puts one more "[rank0]" before each line of a traceback, every time
    try:
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
