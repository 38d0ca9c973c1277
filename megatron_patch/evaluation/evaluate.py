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

import numpy as np
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_patch.evaluation.arguments import EvaluateArgs
from megatron_patch.evaluation.documents import Dataset, Reading, beginning, read_indexed, read_text
from megatron_patch.evaluation.loading import Opened, loaded, open_checkpoint
from megatron_patch.evaluation.report import EvaluationReport, Figures
from megatron_patch.evaluation.scoring import score
from megatron_patch.evaluation.windows import Row, rolling, sums
from megatron_patch.progress import Progress

_LONGEST = 2048
"""Window where nothing else was asked for."""


def evaluate(args: EvaluateArgs) -> EvaluationReport | None:
    """Score everything; every process calls it, and only rank 0 gets the report.

    Raises:
        ValueError: arguments, data, tokenizer and model do not fit one another.
    """
    opened = open_checkpoint(args, _LONGEST)
    reading = Reading(
        opened.tokenizer,
        beginning(opened.tokenizer, args.begin_with),
        args.append_eod,
        args.max_documents,
        args.text_key,
    )
    datasets = _read(args, reading, opened)
    seq_length = opened.seq_length
    stride = args.stride or seq_length
    if stride > seq_length:
        raise ValueError(f"--stride {stride}: must be at most the window of {seq_length} tokens; give --seq-length")
    rows = [list(rolling(one.ids, reading.begin, seq_length, stride)) for data in datasets for one in data.documents]
    with loaded(args, opened) as model:
        is_first, processes = dist.get_rank() == 0, dist.get_world_size()
        found, seconds = _sums(model, rows, args.micro_batch_size, quiet=not is_first)
    if not is_first:
        return None
    total, figures = _figures(datasets, found)
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


def _read(args: EvaluateArgs, reading: Reading, opened: Opened) -> list[Dataset]:
    found = [read_text(name, reading) for name in args.data]
    found += [read_indexed(prefix, reading) for prefix in args.data_path]
    for data in found:
        opened.check_ids(max(data.max_id, *reading.begin), data.name)
    return found


# ---------------------------------------------------------------------------------------------------- the model at work


def _sums(
    model: GPTModel, rows: Sequence[Sequence[Row]], micro_batch_size: int, quiet: bool
) -> tuple[np.ndarray, float]:
    """The sum of -log p of each document, and the seconds it took."""
    flat = [row for document in rows for row in document]
    with Progress("evaluate", sum(row.counts for row in flat), "tokens", quiet) as progress:
        found = score(model, flat, micro_batch_size=micro_batch_size, on_batch=progress).negative_log_likelihood
    return sums(found, rows), progress.seconds


def _figures(datasets: Sequence[Dataset], found: np.ndarray) -> tuple[Figures, tuple[Figures, ...]]:
    """Over all, and of each dataset."""
    figures, first = [], 0
    for data in datasets:
        last = first + len(data.documents)
        figures.append(Figures.of(data.name, _sizes(data), float(found[first:last].sum()), data.left_out))
        first = last
    sizes = [size for data in datasets for size in _sizes(data)]
    return Figures.of("total", sizes, float(found.sum())), tuple(figures)


def _sizes(data: Dataset) -> list[tuple[int, int, int]]:
    return [(len(one.ids), one.characters, one.bytes) for one in data.documents]
