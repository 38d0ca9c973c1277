"""Text to indexed datasets, tokenized by several processes: `megatron-patch preprocess`.

    report = preprocess(PreprocessArgs(input=("corpus.jsonl",), output_prefix="corpus", tokenizer_model="model/"))

The input is cut into shards (shards.py) that workers tokenize into files of their own (tokenizing.py); once all are
there they are put together in the order of the input (assembling.py). So the output depends on the input alone, not on
the number of workers, and whatever ends a run early, what it had finished is there for the next one (partial.py).

Workers are started by "spawn": a script that calls `preprocess` needs an `if __name__ == "__main__"` guard.
It does not know the flags of training, nor models.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path

from megatron_patch.data import readers
from megatron_patch.data.arguments import PreprocessArgs
from megatron_patch.data.assembling import Dataset, orders, read_documents, without_duplicates, write
from megatron_patch.data.cleaning import STEPS, Cleaner
from megatron_patch.data.indexed import token_dtype
from megatron_patch.data.ledger import Ledger, NoDocuments
from megatron_patch.data.manifest import write_manifest
from megatron_patch.data.partial import PartialRun, partial_run
from megatron_patch.data.readers import STDIN, BadRecord, Record, expand_inputs, record_text
from megatron_patch.data.shards import Shard, ShardReader, plan, shard_bytes
from megatron_patch.data.tokenizing import Job
from megatron_patch.data.workers import Crew
from megatron_patch.tokenizer import Tokenizer, load_tokenizer
from megatron_patch.tokenizer.engines import EngineMismatch, EngineRecipe, choose

_FIRST_SHARDS = 2
"""Shards whose documents the engine is proven on."""
_KEY_RECORDS = 1000
"""Records of which one must have the text that was asked for."""


@dataclass(frozen=True)
class PreprocessReport:
    """What a run did."""

    datasets: tuple[Dataset, ...]
    """What it wrote, each for --data-path of `pretrain`."""
    documents: int
    """Documents written."""
    tokens: int
    """Tokens written, end-of-document tokens included."""
    records: int
    """Records read."""
    bad: int
    """Records that were no document."""
    skipped: tuple[tuple[str, int], ...]
    """Reason and number of the documents that were left out, the most frequent reason first."""
    changed: tuple[tuple[str, int], ...]
    """Cleaning step and number of the documents that it changed, in the order of the steps."""
    quarantine: str | None
    """File of the bad records, if they were kept."""
    input_bytes: int
    """Size of the input files on disk."""
    output_bytes: int
    """Size of the .bin and .idx files."""
    dtype: str
    """Type of a stored token id."""
    engine: str
    """What tokenized, and its version."""
    proof: str
    """Why it was trusted."""
    resumed: int
    """Shards that an earlier run had finished."""
    shards: int
    """All shards."""
    seconds: float
    """Wall time, start-up included."""
    notes: tuple[str, ...]
    """What the user should know about this dataset."""

    @property
    def prefix(self) -> str:
        """The first dataset's prefix."""
        return self.datasets[0].prefix

    @property
    def tokens_per_second(self) -> float:
        """Tokens written per second of wall time."""
        return self.tokens / self.seconds


def preprocess(args: PreprocessArgs) -> PreprocessReport:
    """Tokenizes the input files into datasets.

    Raises ValueError for wrong arguments and for an input without a document, DamagedInput for a bad record under
    --on-error stop and for a file that breaks off, TooManyErrors above --max-errors, ChildProcessError if a worker
    died.
    No dataset is written then; what was finished is kept beside its place for the next run.
    """
    start = time.perf_counter()
    args.validate()
    files = expand_inputs(args.input, stdin=True)
    tokenizer = load_tokenizer(args.tokenizer_model, args.trust_remote_code)
    if args.append_eod and tokenizer.eod is None:
        raise ValueError(f"--append-eod: the tokenizer in {tokenizer.directory!r} has no end-of-sequence token")
    total = sum(os.path.getsize(path) for path in files if path != STDIN)
    shards = plan(files, args.txt_document, shard_bytes(total))
    first = list(islice(shards, _FIRST_SHARDS))
    _require_keys(first, args)
    run = _Run(args, tokenizer, files, total, start)
    try:
        with Crew(args.workers) as crew:
            recipe = choose(tokenizer, args.engine, _first_texts(first, args), crew.fault)
            return run.with_engine(recipe, crew, chain(first, shards))
    except EngineMismatch as error:
        if args.engine != "auto" or STDIN in files:
            raise ValueError(str(error)) from None
        print(f"warning: {error}; starting again with transformers' own", file=sys.stderr, flush=True)
    with Crew(args.workers) as crew:
        return run.with_engine(choose(tokenizer, "hf"), crew, plan(files, args.txt_document, shard_bytes(total)))


# --------------------------------------------------------------------------------------------------------- before it


def _first_records(shards: Iterable[Shard], args: PreprocessArgs) -> Iterator[Record]:
    for shard in shards:
        yield from ShardReader(shard, args.txt_document)


def _first_texts(shards: Iterable[Shard], args: PreprocessArgs) -> Iterator[str]:
    """The first documents as the tokenizer will see them."""
    cleaner = Cleaner(args.cleaning)
    for record in _first_records(shards, args):
        for key in args.json_keys:
            try:
                text = cleaner.clean(record_text(record, key, args.layout))
            except BadRecord:
                continue
            if text:
                yield text


def _require_keys(shards: Iterable[Shard], args: PreprocessArgs) -> None:
    """A wrong key is found at once, not after hours of counting it."""
    for key in args.json_keys:
        missing, seen = 0, Counter[str]()
        for record in islice(_first_records(shards, args), _KEY_RECORDS):
            try:
                record_text(record, key, args.layout)
                break
            except BadRecord as error:
                if not error.reason.startswith("no key"):
                    break
                missing += 1
                seen.update([*readers.json_value(record)])
        else:
            if missing:
                found = ", ".join(f"{name!r}" for name, _ in seen.most_common(20)) or "none"
                raise ValueError(f"--json-keys {key!r}: none of the first {missing} records has it; they have {found}")


# ---------------------------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class _Run:
    """One call, whichever engine it ends up with."""

    args: PreprocessArgs
    tokenizer: Tokenizer
    files: tuple[Path, ...]
    total: int
    start: float

    def with_engine(self, recipe: EngineRecipe, crew: Crew, shards: Iterable[Shard]) -> PreprocessReport:
        """Everything behind the choice of the engine."""
        args, job = self.args, self._job(recipe)
        settings, is_piped = self._settings(job), STDIN in self.files
        resume = args.resume == "auto" and not is_piped
        with partial_run(args.partial_directory, settings, resume=resume, dtype_bytes=job.dtype.itemsize) as partial:
            try:
                ledger = Ledger(args, self.total, partial.directory)
                with ledger:
                    crew.tokenize(shards, job, partial, ledger)
                datasets = self._assemble(partial, job, ledger)
            except (EngineMismatch, NoDocuments):
                partial.clear()
                raise
            except BaseException:
                if is_piped:
                    partial.clear()  # nobody can send the same input again
                raise
            quarantine = ledger.publish_quarantine()
            partial.remove()
        return self._report(job, ledger, datasets, quarantine)

    def _job(self, recipe: EngineRecipe) -> Job:
        args = self.args
        return Job(
            recipe=recipe,
            keys=args.json_keys,
            layout=args.layout,
            txt_document=args.txt_document,
            eod=self.tokenizer.eod if args.append_eod else None,
            max_doc_tokens=args.max_doc_tokens,
            dtype=token_dtype(self.tokenizer.vocab_size),
            cleaning=args.cleaning,
            dedup=args.deduplication,
            on_error=args.on_error,
            directory=str(args.partial_directory),
        )

    def _settings(self, job: Job) -> dict[str, object]:
        """What must be the same for shards of two runs to belong together. Splits and limits come later."""
        inputs = [(str(path), *file_state(path)) for path in self.files]
        names = ("keys", "layout", "txt_document", "eod", "max_doc_tokens")
        return {
            "version": 1,
            "input": inputs,
            "tokenizer": self.tokenizer.fingerprint,
            "engine": f"{job.recipe.name} {job.recipe.version}",
            "dtype": job.dtype.name,
            **{name: getattr(job, name) for name in names},
            "cleaning": asdict(job.cleaning),
            "dedup": asdict(job.dedup),
        }

    def _assemble(self, partial: PartialRun, job: Job, ledger: Ledger) -> tuple[Dataset, ...]:
        ledger.require_few_errors()
        return tuple(
            dataset
            for index, key in enumerate(job.keys)
            for dataset in self._assemble_key(partial.directory, job, ledger, index, key)
        )

    def _assemble_key(self, directory: Path, job: Job, ledger: Ledger, index: int, key: str) -> Iterator[Dataset]:
        documents = read_documents(directory, ledger.shards, index)
        if job.dedup.dedup != "none":
            kept, skipped = without_duplicates(directory, ledger.shards, index, job.dedup)
            documents = documents.take(kept)
            ledger.skip(key, skipped)
        ledger.require_documents(key, len(documents.lengths))
        args = self.args
        for split, order in orders(len(documents.lengths), args.shuffle, args.shares).items():
            prefix = args.dataset_prefix(key, split)
            dataset = write(prefix, directory, documents.take(order), index, job.dtype)
            write_manifest(prefix, self.tokenizer, append_eod=args.append_eod, max_id=dataset.max_id)
            yield dataset

    def _report(
        self, job: Job, ledger: Ledger, datasets: tuple[Dataset, ...], quarantine: str | None
    ) -> PreprocessReport:
        order = [*STEPS, readers.SURROGATE]
        changed = sorted(ledger.changed.items(), key=lambda item: order.index(item[0].rpartition(": ")[2]))
        return PreprocessReport(
            datasets=datasets,
            documents=sum(dataset.documents for dataset in datasets),
            tokens=sum(dataset.tokens for dataset in datasets),
            records=ledger.records,
            bad=ledger.bad.total(),
            skipped=tuple(ledger.skipped.most_common()),
            changed=tuple(changed),
            quarantine=quarantine,
            input_bytes=self.total,
            output_bytes=sum(dataset.output_bytes for dataset in datasets),
            dtype=job.dtype.name,
            engine=f"{job.recipe.name} {job.recipe.version}",
            proof=job.recipe.proof,
            resumed=ledger.resumed,
            shards=len(ledger.shards),
            seconds=time.perf_counter() - self.start,
            notes=_notes(self.args, self.tokenizer),
        )


def file_state(path: Path) -> tuple[int, int]:
    """(size, time of the last change): whether a file is still the same."""
    if path == STDIN:
        return 0, 0
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _notes(args: PreprocessArgs, tokenizer: Tokenizer) -> tuple[str, ...]:
    notes = []
    if not args.append_eod:
        notes.append("no end-of-document tokens: training joins documents unmarked; --append-eod puts them in")
    if 65500 <= tokenizer.vocab_size <= 65536:
        notes.append(
            f"vocabulary {tokenizer.vocab_size} is stored as int32; megatron-core's fast_cache_load would read uint16"
        )
    return tuple(notes)
