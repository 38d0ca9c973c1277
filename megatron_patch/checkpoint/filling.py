"""Fills this rank's part of a model from any `Source`, at the layout of megatron-core's parallel state.

`load_weights` does the same for torch_dist checkpoints through megatron-core's own loader; this is for the formats that
core does not load at another layout than they were saved at. It knows no format.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_patch.checkpoint.formats import Source
from megatron_patch.checkpoint.sharding import Split, cut, pad_rows
from megatron_patch.family import EMBEDDING

_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+")
_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+")
_HEAD = "output_layer.weight"


def fill(chunks: Sequence[torch.nn.Module], source: Source) -> None:
    """Copy the source's tensors into this rank's model chunks, cast to their dtypes. Every rank may call it alone."""
    for chunk in chunks:
        state = {name: tensor for name, tensor in chunk.state_dict().items() if isinstance(tensor, Tensor)}
        first = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
        for name, tensor in state.items():
            whole = _global_name(name, first, source)
            tensor.copy_(_piece(source, whole, tensor, source.model.splits[whole]))


def _global_name(name: str, first: int, source: Source) -> str:
    """The name in the whole model of a tensor that this rank has."""
    name = _LAYER.sub(lambda match: str(int(match[0]) + first), name)
    ranks = parallel_state.get_expert_model_parallel_world_size()
    here = (source.model.architecture.config.get("num_moe_experts") or 0) // ranks
    here *= parallel_state.get_expert_model_parallel_rank()
    name = _EXPERT.sub(lambda match: str(int(match[0]) + here), name)
    # The last stage of a model with tied weights has its own copy of the embedding.
    return EMBEDDING if name == _HEAD and name not in source.infos else name


def _piece(source: Source, name: str, like: Tensor, split: Split) -> Tensor:
    whole = source.read(name)
    if split.is_expert:
        rank = parallel_state.get_expert_tensor_parallel_rank()
        ranks = parallel_state.get_expert_tensor_parallel_world_size()
    else:
        rank = parallel_state.get_tensor_model_parallel_rank()
        ranks = parallel_state.get_tensor_model_parallel_world_size()
    if split.is_vocabulary:
        whole = pad_rows(whole, like.shape[0] * ranks)
    return cut(whole, split, ranks)[rank]
