"""Which format a directory holds, and which one is wanted: opens any `Source`, makes any `Target`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_patch.checkpoint import directory
from megatron_patch.checkpoint.arguments import ConvertArgs, Format, Naming
from megatron_patch.checkpoint.formats import MegatronSource, Source, Target
from megatron_patch.checkpoint.hf_format import HFSource, HFTarget, PlannedSource
from megatron_patch.checkpoint.huggingface import has_weights
from megatron_patch.checkpoint.legacy import LegacySource, LegacyTarget
from megatron_patch.checkpoint.megatron import Reader
from megatron_patch.checkpoint.sharding import Layout, Pipeline
from megatron_patch.checkpoint.torch_dist import TorchDistSource, TorchDistTarget
from megatron_patch.checkpoint.whole import describe


@dataclass(frozen=True)
class Wanted:
    """What a conversion is to write."""

    format: Format | None = None
    """By default: torch_dist from Hugging Face, Hugging Face from Megatron."""

    dtype: torch.dtype | None = None
    """Of every tensor; by default each keeps its own."""

    max_shard_size: str | None = None
    """Hugging Face: size of the files, as in "5GB"; by default the original files' names and contents, or 5GB."""

    layout: Layout = Layout()
    """Legacy: over which ranks; torch_dist loads at any layout."""

    naming: Naming = "local"
    """Legacy: whose parameter names."""

    expert_layout: Literal["sequential", "grouped"] = "sequential"
    """Legacy: names of experts."""

    make_vocab_size_divisible_by: int = 128
    """Legacy: the vocabulary is padded to a multiple of this times the tensor parallel size."""

    extra_vocab_size: int | None = None
    """Legacy: pad the vocabulary by exactly so many rows instead."""

    replicate_kv_heads: bool = False
    """Legacy, with more tensor-parallel ranks than key/value heads: repeat the heads instead of cutting them."""


def wanted(args: ConvertArgs) -> Wanted:
    """What a user asked for on the command line."""
    pipeline = Pipeline(
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers,
        args.pipeline_model_parallel_layout,
    )
    sizes = (args.expert_model_parallel_size, args.expert_tensor_parallel_size)
    return Wanted(
        format=args.target_format,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        max_shard_size=args.max_shard_size,
        layout=Layout(args.tensor_model_parallel_size, pipeline, *sizes),
        naming=args.naming or "local",
        expert_layout=args.expert_layout or "sequential",
        make_vocab_size_divisible_by=args.make_vocab_size_divisible_by or Wanted.make_vocab_size_divisible_by,
        extra_vocab_size=args.extra_vocab_size,
        replicate_kv_heads=args.replicate_kv_heads,
    )


def like(source: MegatronSource) -> Wanted:
    """What writes a Megatron checkpoint in the format, layout and naming that a source has."""
    if not isinstance(source, LegacySource):
        return Wanted("torch_dist")
    ranks = source.ranks
    return Wanted(
        "legacy",
        layout=ranks.layout,
        naming=ranks.naming.name,
        expert_layout="grouped" if ranks.naming.grouped else "sequential",
        make_vocab_size_divisible_by=ranks.divisible_by,
        replicate_kv_heads=ranks.replicate_kv,
    )


def open_source(
    path: str | Path,
    *,
    hf_config: str | Path | None = None,
    trust_pickle: bool = False,
    weightless: bool = False,
) -> Source:
    """Open a checkpoint of any format.

    Args:
        path: a Hugging Face directory, or a Megatron checkpoint: its root, or the directory of one iteration.
        hf_config: directory with the config.json of a Megatron checkpoint that does not carry it.
        trust_pickle: unpickle legacy checkpoints fully where that is needed, which can run any code.
        weightless: for a plan, a Hugging Face directory needs no weights, or may have some that are not read yet.

    Raises:
        ValueError: it is none, or incomplete, or not the model that its config describes.
    """
    path = Path(path)
    if directory.is_huggingface(path):
        config = directory.read_config(path)
        model = describe(config)
        if weightless and (model.architecture.plan_only or not has_weights(path)):
            return PlannedSource(path, model, config)
        return HFSource(path, model)
    if not directory.is_megatron(path):
        kinds = f"a Hugging Face directory ({directory.CONFIG}) nor a Megatron checkpoint ({directory.TRACKER})"
        raise ValueError(f"{path} is neither {kinds}")
    root, weights, _ = directory.locate(path)
    folder = Path(hf_config) if hf_config else directory.huggingface_directory(root)
    config = _config(root, folder)
    if directory.is_legacy(weights):
        return LegacySource(weights, folder, describe(config), trust_pickle=trust_pickle)
    reader = Reader(weights)
    return TorchDistSource(weights, folder, reader, describe(config, reader.content()))


def open_weights(path: str | Path, *, hf_config: str | Path | None = None, trust_pickle: bool = False) -> Path | Source:
    """What `load_model` takes, for a checkpoint of any format: see `open_source`.

    To be called before there is a parallel state: describing a model makes one of its own.
    """
    path = Path(path)
    torch_dist = directory.is_megatron(path) and not directory.is_legacy(directory.locate(path)[1])
    if torch_dist and not hf_config:
        return path  # megatron-core loads it at any layout
    return open_source(path, hf_config=hf_config, trust_pickle=trust_pickle)


def _config(root: Path, folder: Path) -> Mapping[str, Any]:
    if not (folder / directory.CONFIG).is_file():
        raise ValueError(
            f"{root} does not carry the model's {directory.CONFIG}; name a Hugging Face directory of this model by"
            " --hf-config"
        )
    return directory.read_json(folder / directory.CONFIG)


def open_target(source: Source, wanted: Wanted) -> Target:
    """Lay out what a source becomes.

    Raises:
        ValueError: the layout does not fit the model, or the format cannot hold it.
    """
    view, model = source.view(), source.model
    kind = wanted.format or ("huggingface" if isinstance(source, MegatronSource) else "torch_dist")
    if wanted.max_shard_size and kind != "huggingface":
        raise ValueError(f"max_shard_size={wanted.max_shard_size} is for writing Hugging Face files, not {kind}")
    if kind == "huggingface":
        return HFTarget(model, view, wanted.dtype, wanted.max_shard_size)
    # By what the Hugging Face tensors are, not by what a Megatron source stores: no step on the way widens anything.
    natural = model.stored_dtypes(view.dtypes)
    dtypes = dict.fromkeys(natural, wanted.dtype) if wanted.dtype else natural
    if kind == "torch_dist":
        return TorchDistTarget(model, dtypes)
    return LegacyTarget(
        model,
        dtypes,
        wanted.layout,
        naming=wanted.naming,
        expert_layout=wanted.expert_layout,
        divisible_by=wanted.make_vocab_size_divisible_by,
        extra_vocab_size=wanted.extra_vocab_size,
        replicate_kv=wanted.replicate_kv_heads,
    )
