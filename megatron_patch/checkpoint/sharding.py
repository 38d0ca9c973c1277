"""How internal tensors spread over the ranks of a layout: tensor-parallel pieces, pipeline stages, padded vocabulary.

What is cut along which axis is read off the parameters of megatron-core's own model; everything here is arithmetic on
whole tensors and plain numbers, for any rank, without a process group. It knows no file formats and no families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from torch import Tensor

from megatron_patch.weights import QKV, Heads

_VOCABULARY = ("embedding.word_embeddings.", "output_layer.")
_QKV = ".self_attention.linear_qkv."
_EXPERT = ".experts.local_experts."


@dataclass(frozen=True)
class Split:
    """How one internal tensor spreads over tensor-parallel ranks."""

    axis: int | None = None
    """The axis that is cut; None: every rank has all of it."""

    stride: int = 1
    """Into how many blocks the axis falls of which every rank has a part: 2 for gate over up."""

    is_expert: bool = False
    """Whether it belongs to an expert: expert parallelism applies, and expert tensor parallelism."""

    is_vocabulary: bool = False
    """Whether the axis is the vocabulary, which is padded."""

    is_qkv: bool = False
    """Whether it holds queries, keys and values per query group."""


def splits(model: torch.nn.Module, names: Mapping[str, object]) -> dict[str, Split]:
    """Read the split of each named tensor off a model's parameters; tensors that are buffers are on every rank."""
    parameters = dict(model.named_parameters())
    return {name: _split_of(name, parameters[name]) if name in parameters else Split() for name in names}


def _split_of(name: str, parameter: torch.nn.Parameter) -> Split:
    is_parallel = getattr(parameter, "tensor_model_parallel", False)
    return Split(
        parameter.partition_dim if is_parallel else None,
        parameter.partition_stride if is_parallel else 1,
        is_expert=_EXPERT in name,
        is_vocabulary=name.startswith(_VOCABULARY),
        is_qkv=_QKV in name,
    )


# ----------------------------------------------------------------------------------------------------- tensor parallel


def blocks(tensor: Tensor, split: Split, ranks: int) -> tuple[tuple[Tensor, ...], ...]:
    """The piece of each rank, as the blocks that stand one after the other in it: views, nothing is copied.

    The whole tensor for every rank where it is not cut.
    """
    if split.axis is None or ranks == 1:
        return ((tensor,),) * ranks
    rows = tensor.shape[split.axis]
    assert rows % (split.stride * ranks) == 0, f"{rows} do not fall into {split.stride} x {ranks} parts"
    assert split.stride == 1 or split.axis == 0, "blocks of another axis do not stand one after the other"
    strips = (block.chunk(ranks, split.axis) for block in tensor.chunk(split.stride, split.axis))
    return tuple(zip(*strips, strict=True))


def cut(tensor: Tensor, split: Split, ranks: int) -> tuple[Tensor, ...]:
    """The piece of each rank, contiguous; the whole tensor for every rank where it is not cut."""
    pieces = blocks(tensor, split, ranks)
    return tuple(torch.cat(piece) if len(piece) > 1 else piece[0].contiguous() for piece in pieces)


def join(pieces: Sequence[Tensor], split: Split) -> Tensor:
    """The whole tensor from the pieces of all ranks; the inverse of `cut`."""
    if split.axis is None or len(pieces) == 1:
        return pieces[0]
    blocks = zip(*(piece.chunk(split.stride, split.axis) for piece in pieces), strict=True)
    return torch.cat([piece for block in blocks for piece in block], split.axis)


@dataclass(frozen=True)
class _Local:
    """The attention of one rank whose key and value head other ranks have too."""

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int


def cut_replicated(tensor: Tensor, heads: Heads, ranks: int) -> tuple[Tensor, ...]:
    """Queries, keys and values for more ranks than groups: each rank its queries, and a copy of their group's head."""
    queries, keys, values = QKV("").to_hf(tensor, heads)
    parts = zip(queries.chunk(ranks), *(_repeated(part, heads, ranks) for part in (keys, values)), strict=True)
    local = _local(heads, ranks)
    return tuple(QKV("").to_internal(part, local) for part in parts)


def join_replicated(pieces: Sequence[Tensor], heads: Heads) -> Tensor:
    """The whole tensor from `cut_replicated` pieces; of each head the first copy."""
    local, copies = _local(heads, len(pieces)), len(pieces) // heads.num_query_groups
    queries, keys, values = zip(*(QKV("").to_hf(piece, local) for piece in pieces), strict=True)
    return QKV("").to_internal([torch.cat(queries), *(torch.cat(part[::copies]) for part in (keys, values))], heads)


def disagreeing_ranks(pieces: Sequence[Tensor], heads: Heads) -> tuple[int, int] | None:
    """Two ranks of `cut_replicated` pieces that have different copies of a head, if there are any."""
    local, copies = _local(heads, len(pieces)), len(pieces) // heads.num_query_groups
    heads_of = [QKV("").to_hf(piece, local)[1:] for piece in pieces]
    pairs = ((i - i % copies, i) for i in range(len(pieces)))
    return next((pair for pair in pairs if not all(map(same_bits, *(heads_of[i] for i in pair)))), None)


def replicated_rows(heads: Heads, ranks: int) -> int:
    """Rows of a `cut_replicated` piece."""
    return (heads.num_attention_heads // ranks + 2) * heads.kv_channels


def _local(heads: Heads, ranks: int) -> _Local:
    return _Local(heads.num_attention_heads // ranks, 1, heads.kv_channels)


def _repeated(part: Tensor, heads: Heads, ranks: int) -> list[Tensor]:
    copies = ranks // heads.num_query_groups
    return [head for head in part.chunk(heads.num_query_groups) for _ in range(copies)]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype are the same, NaN and signed zero included."""
    return one.shape == other.shape and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (one, other)))


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """The tensor with zeros below, up to so many rows."""
    if tensor.shape[0] == rows:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])])


# ---------------------------------------------------------------------------------------------------- pipeline parallel


@dataclass(frozen=True)
class Chunk:
    """The layers of one model chunk."""

    stage: int
    virtual: int
    first: int
    """Number of its first layer in the whole model."""

    layers: int


def in_order(counts: Sequence[int], stages: int) -> tuple[Chunk, ...]:
    """Chunks of so many layers each, in the order in which the model runs through them."""
    starts = [0, *accumulate(counts)][:-1]
    return tuple(Chunk(i % stages, i // stages, starts[i], count) for i, count in enumerate(counts))


@dataclass(frozen=True)
class Pipeline:
    """How a user wants the layers spread, in Megatron-LM's terms."""

    stages: int = 1
    virtual: int | None = None
    first: int | None = None
    """Layers of the first stage, where it is not like the others."""

    last: int | None = None
    layout: str | None = None
    """Megatron's layout string instead."""

    def chunks(self, layers: int) -> tuple[Chunk, ...]:
        """All chunks in the order in which the model runs through them.

        Raises:
            ValueError: the numbers do not fit.
        """
        return in_order(self._from_layout(layers) if self.layout else self._from_numbers(layers), self.stages)

    def _from_layout(self, layers: int) -> list[int]:
        if self.first or self.last:
            raise ValueError("give a pipeline layout, or the layers of the first and last stage: not both")
        if self.stages == 1:
            raise ValueError(f"pipeline_model_parallel_layout={self.layout!r} needs pipeline_model_parallel_size > 1")
        try:
            rows = PipelineParallelLayerLayout.parse_str_to_list(self.layout)
            parsed = PipelineParallelLayerLayout(rows, self.stages)
            if (given := parsed.flatten_layout.count(LayerType.decoder)) != layers:
                raise ValueError(f"it places {given} decoder layers (t); the model has {layers}")
            mtp = parsed.flatten_layout.count(LayerType.mtp)
            parsed.validate_layer_layout(layers, mtp or None)
        except (AssertionError, KeyError, ValueError) as error:
            raise ValueError(f"pipeline_model_parallel_layout={self.layout!r}: {error}") from error
        chunks = parsed.virtual_pipeline_model_parallel_size
        if self.virtual not in (None, chunks):
            raise ValueError(
                f"pipeline_model_parallel_layout={self.layout!r} has {chunks} chunks a stage;"
                f" virtual_pipeline_model_parallel_size={self.virtual} contradicts it"
            )
        return [parsed.layout[i % self.stages][i // self.stages].count(LayerType.decoder) for i in range(len(rows))]

    def _from_numbers(self, layers: int) -> list[int]:
        if self.virtual and self.stages == 1:
            raise ValueError("virtual pipeline stages need pipeline_model_parallel_size > 1")
        ends = [count for count in (self.first, self.last) if count is not None]
        middle, rest = self.stages - len(ends), layers - sum(ends)
        if middle < 0 or rest < 0 or (rest % middle if middle else rest):
            raise ValueError(self._misfit(layers, middle, rest, ends))
        counts = [rest // middle if middle else 0] * self.stages
        counts[0] = self.first if self.first is not None else counts[0]
        counts[-1] = self.last if self.last is not None else counts[-1]
        virtual = self.virtual or 1
        if odd := next((count for count in counts if count % virtual), None):
            raise ValueError(
                f"virtual_pipeline_model_parallel_size={virtual} does not divide the {odd} layers of a stage"
            )
        return [count // virtual for _ in range(virtual) for count in counts]

    def _misfit(self, layers: int, middle: int, rest: int, ends: Sequence[int]) -> str:
        if ends:
            return (
                f"{rest} layers are left for {middle} stages between the first and the last, of num_layers={layers}"
                " and cannot be spread evenly; change decoder_first_pipeline_num_layers or ..._last_..."
            )
        choices = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
        return (
            f"pipeline_model_parallel_size={self.stages} does not divide num_layers={layers}; choose one of {choices},"
            " or give decoder_first_pipeline_num_layers or decoder_last_pipeline_num_layers, or a layout"
        )


# ------------------------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """A parallel layout, checked against nothing yet."""

    tensor: int = 1
    pipeline: Pipeline = Pipeline()
    expert: int = 1
    expert_tensor: int | None = None
    """None: as tensor."""

    def __str__(self) -> str:
        pipeline = self.pipeline
        parts = [f"TP{self.tensor}", f"PP{pipeline.stages}"]
        parts += [f"VPP{pipeline.virtual}"] if pipeline.virtual else []
        parts += [f"first {pipeline.first}"] if pipeline.first else []
        parts += [f"last {pipeline.last}"] if pipeline.last else []
        parts += [pipeline.layout] if pipeline.layout else []
        parts += [f"EP{self.expert}"] if self.expert > 1 else []
        parts += [f"ETP{self.expert_tensor}"] if self.expert_tensor not in (None, self.tensor) else []
        return " ".join(parts)
