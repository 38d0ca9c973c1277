"""New pieces for one's own text: `megatron-patch vocab train`.

    report = train(VocabTrainArgs(input=("corpus.jsonl",), output="new.model"))
    report = train(VocabTrainArgs(input=("corpus.jsonl",), output="new.json", base="llama3/"))

A SentencePiece model, or the merges that continue those of a byte-level base. In the model text is not normalised,
digits stand alone and there are no byte pieces, so that `merge` can append the pieces to a base whose own they are. It
does not know what is taken of it.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from megatron_patch.checkpoint.directory import write_bytes
from megatron_patch.vocab.arguments import VocabTrainArgs
from megatron_patch.vocab.byte_level import ByteLevel, dump_merges, open_byte_level
from megatron_patch.vocab.byte_level_train import learn, sample_lines
from megatron_patch.vocab.corpus import Corpus

_LONGEST_LINE = 4000
"""Bytes. sentencepiece leaves longer lines out, so they are cut."""
_QUIET = 2


@dataclass(frozen=True)
class TrainReport:
    """What a training made."""

    output: str
    pieces: int
    lines: int
    """Read; --max-lines may have sampled them."""
    characters: int
    skipped: Mapping[str, int]
    """Reason -> number of records that are no document."""
    seconds: float

    def table(self) -> Iterator[tuple[str, str]]:
        """Names and values for a table."""
        yield "pieces", f"{self.pieces:,}"
        yield "text", f"{self.lines:,} lines, {self.characters:,} characters"
        yield from ((f"skipped: {reason}", f"{count:,}") for reason, count in self.skipped.items())
        yield "time", f"{self.seconds:.1f} s"


def train(args: VocabTrainArgs) -> TrainReport:
    """Trains and writes the model, or the merges.

    Raises ValueError for what a user can mend, such as a corpus too small for so many pieces. Nothing is left then.
    """
    start = time.perf_counter()
    args.validate()
    base = open_byte_level(args.base) if args.base is not None else None
    args.require_kind(base is not None)
    corpus = Corpus(args.input, args.text_key, name="vocab train")
    lines = _Documents(corpus) if base else _Lines(corpus)
    content, pieces = _merges(args, base, lines) if base else _model(args, lines)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(output, content)
    seconds = time.perf_counter() - start
    return TrainReport(args.output, pieces, lines.count, lines.characters, dict(corpus.skipped), seconds)


def _merges(args: VocabTrainArgs, base: ByteLevel, documents: Iterable[str]) -> tuple[bytes, int]:
    texts = sample_lines(documents, args.max_lines) if args.max_lines else documents
    merges = learn(base, texts, args.vocab_size, args.threads)
    return dump_merges(base, merges).encode(), len(merges)


def _model(args: VocabTrainArgs, lines: Iterable[str]) -> tuple[bytes, int]:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=args.vocab_size,
            model_type=args.model_type,
            character_coverage=args.character_coverage,
            byte_fallback=False,
            normalization_rule_name="identity",
            split_digits=True,
            input_sentence_size=args.max_lines,
            shuffle_input_sentence=bool(args.max_lines),
            num_threads=args.threads,
            minloglevel=_QUIET,
        )
    except RuntimeError as error:
        raise ValueError(f"sentencepiece cannot train --vocab-size {args.vocab_size}: {error}") from error
    content = model.getvalue()
    return content, sentencepiece.SentencePieceProcessor(model_proto=content).get_piece_size()


class _Documents:
    """Documents as they are."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts, self.count, self.characters = texts, 0, 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.count, self.characters = self.count + text.count("\n") + 1, self.characters + len(text)
            yield text


class _Lines:
    """The lines of documents, no longer than sentencepiece takes them."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts, self.count, self.characters = texts, 0, 0

    def __iter__(self) -> Iterator[str]:
        longest = _LONGEST_LINE // 4  # a character has at most four bytes
        for text in self._texts:
            for line in filter(str.strip, text.split("\n")):
                for start in range(0, len(line), longest):
                    piece = line[start : start + longest]
                    self.count, self.characters = self.count + 1, self.characters + len(piece)
                    yield piece
