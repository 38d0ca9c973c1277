"""A checkpoint as evaluation uses it: opened and described before any weight is read, then loaded in a layout.

It knows no text and nothing of what is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_patch.checkpoint import directory
from megatron_patch.checkpoint.formats import Source
from megatron_patch.checkpoint.logits import load_model
from megatron_patch.checkpoint.opening import open_weights
from megatron_patch.evaluation.arguments import ScoringArgs
from megatron_patch.family import Architecture
from megatron_patch.layers.rotary import Rotary
from megatron_patch.models import family_for
from megatron_patch.tokenizer import Tokenizer, load_tokenizer
from megatron_patch.training.initialize import parallel


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose weights are still on disk."""

    source: Path | Source
    """What `load_model` takes."""
    architecture: Architecture
    tokenizer: Tokenizer
    seq_length: int
    """Most tokens that the model is to see at once."""

    def check_ids(self, largest: int, what: str) -> None:
        """Raises ValueError unless the model has this token."""
        if largest >= self.architecture.vocab_size:
            raise ValueError(
                f"{what}: token id {largest} is beyond the model's vocabulary of {self.architecture.vocab_size}; is "
                f"{self.tokenizer.directory} the tokenizer of this model?"
            )


def open_checkpoint(args: ScoringArgs, longest: int | None = None) -> Opened:
    """To be called before there is a parallel state: describing a model makes one of its own.

    Args:
        longest: the window where the user asked for none; by default as much as the model has positions for.

    Raises:
        ValueError: what was given is no checkpoint, or has no such tokenizer, or fewer positions.
    """
    source = open_weights(args.load, hf_config=args.hf_config, trust_pickle=args.trust_pickle)
    architecture = _architecture(source)
    tokenizer = load_tokenizer(args.tokenizer_directory, args.trust_remote_code)
    return Opened(source, architecture, tokenizer, _seq_length(args, architecture, longest))


@contextmanager
def loaded(args: ScoringArgs, opened: Opened) -> Iterator[GPTModel]:
    """This rank's part of the model, in the parallel state that the arguments want."""
    with parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        timeout_minutes=args.distributed_timeout_minutes,
    ):
        dtype = getattr(torch, args.dtype)
        (model,) = load_model(opened.source, dtype, parallel_output=True, sequence_parallel=args.sequence_parallel)
        yield model


def _architecture(source: Path | Source) -> Architecture:
    if isinstance(source, Source):
        return source.model.architecture
    config = directory.read_config(source)
    return family_for(config).describe(config)


def _seq_length(args: ScoringArgs, architecture: Architecture, longest: int | None) -> int:
    limit = architecture.max_position_embeddings
    if architecture.rope is not None and not architecture.config.get("multi_latent_attention"):
        limit = Rotary(architecture.rope, architecture.kv_channels).num_positions
    if args.seq_length is None:
        parts = args.tensor_model_parallel_size if args.sequence_parallel else 1
        return min(limit, longest or limit) // parts * parts
    if args.seq_length > limit:
        raise ValueError(f"--seq-length {args.seq_length}: the model has {limit} positions; choose {limit} or less")
    return args.seq_length
