"""`megatron-patch evaluate`: from validated arguments to the report.

    report = evaluate(EvaluateArgs(load="model/", data=("held_out.jsonl",)))
    report.total.bits_per_character

What is computed: for each document the sum of -log p(token | the tokens before it in the document), over all its
tokens, each exactly once; documents do not see one another. The first token is given what begins a text (see
`documents.beginning`), so that every character is paid for, and bits per character compare between tokenizers. A
document beyond --seq-length is scored in windows (see `windows.rolling`). Logits become log p in fp32, sums are taken
in float64; padding is masked. The sums depend neither on the micro-batch size nor on the parallel layout.

Data are read, encoded and checked before weights are loaded. Every process reads all of them, and keeps the ids in
memory (4 bytes a token).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_patch.checkpoint import directory
from megatron_patch.checkpoint.formats import Source
from megatron_patch.checkpoint.logits import load_model
from megatron_patch.checkpoint.opening import open_source
from megatron_patch.evaluation.arguments import EvaluateArgs
from megatron_patch.evaluation.documents import Dataset, Reading, beginning, read_indexed, read_text
from megatron_patch.evaluation.progress import Progress
from megatron_patch.evaluation.report import EvaluationReport, Figures
from megatron_patch.evaluation.scoring import score
from megatron_patch.evaluation.windows import Row, rolling
from megatron_patch.family import Architecture
from megatron_patch.layers.rotary import Rotary
from megatron_patch.models import family_for
from megatron_patch.tokenizer import load_tokenizer
from megatron_patch.training.initialize import parallel

_LONGEST = 2048
"""Window where nothing else was asked for."""


def evaluate(args: EvaluateArgs) -> EvaluationReport | None:
    """Score everything; every process calls it, and only rank 0 gets the report.

    Raises:
        ValueError: arguments, data, tokenizer and model do not fit one another.
    """
    source = _open(args)
    architecture = _architecture(source)
    reading = _reading(args)
    datasets = _read(args, reading, architecture)
    seq_length = _seq_length(args, architecture)
    stride = args.stride or seq_length
    if stride > seq_length:
        raise ValueError(f"--stride {stride}: must be at most the window of {seq_length} tokens; give --seq-length")
    rows = [list(rolling(one.ids, reading.begin, seq_length, stride)) for data in datasets for one in data.documents]
    with parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        timeout_minutes=args.distributed_timeout_minutes,
    ):
        dtype, is_first, processes = getattr(torch, args.dtype), dist.get_rank() == 0, dist.get_world_size()
        (model,) = load_model(source, dtype, parallel_output=True, sequence_parallel=args.sequence_parallel)
        sums, seconds = _sums(model, rows, args.micro_batch_size, quiet=not is_first)
    if not is_first:
        return None
    total, figures = _figures(datasets, sums)
    return EvaluationReport(
        load=args.load,
        tokenizer=args.tokenizer_directory,
        seq_length=seq_length,
        stride=stride,
        begin=reading.begin,
        append_eod=args.append_eod,
        dtype=args.dtype,
        processes=processes,
        rows=figures,
        total=total,
        windows=sum(map(len, rows)),
        seconds=seconds,
        tokens_per_second=total.tokens / seconds,
    )


# --------------------------------------------------------------------------------------------------- before the weights


def _open(args: EvaluateArgs) -> Path | Source:
    """What `load_model` takes. Opened before the parallel state is there: describing a model makes one of its own."""
    path = Path(args.load)
    torch_dist = directory.is_megatron(path) and not directory.is_legacy(directory.locate(path)[1])
    if torch_dist and not args.hf_config:
        return path  # megatron-core loads it at any layout
    return open_source(path, hf_config=args.hf_config, trust_pickle=args.trust_pickle)


def _architecture(source: Path | Source) -> Architecture:
    if isinstance(source, Source):
        return source.model.architecture
    config = directory.read_config(source)
    return family_for(config).describe(config)


def _reading(args: EvaluateArgs) -> Reading:
    tokenizer = load_tokenizer(args.tokenizer_directory, args.trust_remote_code)
    begin = beginning(tokenizer, args.begin_with)
    return Reading(tokenizer, begin, args.append_eod, args.max_documents, args.text_key)


def _read(args: EvaluateArgs, reading: Reading, architecture: Architecture) -> list[Dataset]:
    found = [read_text(name, reading) for name in args.data]
    found += [read_indexed(prefix, reading) for prefix in args.data_path]
    size = architecture.vocab_size
    for data in found:
        if (largest := max(data.max_id, *reading.begin)) >= size:
            raise ValueError(
                f"{data.name}: token id {largest} is beyond the model's vocabulary of {size}; is "
                f"{args.tokenizer_directory} the tokenizer of this model?"
            )
    return found


def _seq_length(args: EvaluateArgs, architecture: Architecture) -> int:
    limit = architecture.max_position_embeddings
    if architecture.rope is not None and not architecture.config.get("multi_latent_attention"):
        limit = Rotary(architecture.rope, architecture.kv_channels).num_positions
    if args.seq_length is None:
        parts = args.tensor_model_parallel_size if args.sequence_parallel else 1
        return min(limit, _LONGEST) // parts * parts
    if args.seq_length > limit:
        raise ValueError(f"--seq-length {args.seq_length}: the model has {limit} positions; choose {limit} or less")
    return args.seq_length


# ---------------------------------------------------------------------------------------------------- the model at work


def _sums(
    model: GPTModel, rows: Sequence[Sequence[Row]], micro_batch_size: int, quiet: bool
) -> tuple[np.ndarray, float]:
    """The sum of -log p of each document, and the seconds it took."""
    flat = [row for document in rows for row in document]
    ends = [0, *accumulate(map(len, rows))]
    with Progress(sum(row.counts for row in flat), quiet) as progress:
        found = score(model, flat, micro_batch_size=micro_batch_size, on_batch=progress)
    return np.array([found[first:last].sum() for first, last in pairwise(ends)]), progress.seconds


def _figures(datasets: Sequence[Dataset], sums: np.ndarray) -> tuple[Figures, tuple[Figures, ...]]:
    """Over all, and of each dataset."""
    figures, first = [], 0
    for data in datasets:
        last = first + len(data.documents)
        figures.append(Figures.of(data.name, _sizes(data), float(sums[first:last].sum()), data.left_out))
        first = last
    sizes = [size for data in datasets for size in _sizes(data)]
    return Figures.of("total", sizes, float(sums.sum())), tuple(figures)


def _sizes(data: Dataset) -> list[tuple[int, int, int]]:
    return [(len(one.ids), one.characters, one.bytes) for one in data.documents]
