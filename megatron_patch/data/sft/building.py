"""Conversations to tokenized samples on disk, by several processes: `megatron-patch sft-data`.

    report = build(SftDataArgs(input=("chats.jsonl",), output_prefix="out", tokenizer_model="model/", seq_length=4096))

The input is cut into shards that workers render and tokenize (working.py); once all are there the samples are packed
and written in one go (storage.py). The output depends on the input alone, not on the number of workers, and whatever
ends a run early, what it had finished is there for the next one.

Workers are started by "spawn": a script that calls `build` needs an `if __name__ == "__main__"` guard.
It does not know the flags of training, nor models.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_patch.data.ledger import Ledger, NoDocuments
from megatron_patch.data.partial import partial_run
from megatron_patch.data.preprocess import file_state
from megatron_patch.data.readers import BadRecord, Record, expand_inputs, json_value, open_stream, read_records
from megatron_patch.data.sft.arguments import SftDataArgs
from megatron_patch.data.sft.conversations import Conversation, detect_layout, read_conversation
from megatron_patch.data.sft.packing import efficiency, pack
from megatron_patch.data.sft.rendering import OPEN, TRUNCATED, RendererRecipe, marked
from megatron_patch.data.sft.samples import Sample
from megatron_patch.data.sft.storage import StoreInfo, open_samples, write_samples
from megatron_patch.data.sft.working import SUPERVISED, SftJob, mask_file, render_shard, start_worker
from megatron_patch.data.shards import plan, shard_bytes
from megatron_patch.data.tokenizing import key_file
from megatron_patch.data.workers import Crew
from megatron_patch.tokenizer import Tokenizer, load_tokenizer

_FIRST_RECORDS = 100
"""Records of a file by which it is judged."""
_COMPARED = 20
"""Conversations of a file whose ids are compared with those of transformers."""
_UNCUT = 1 << 40


@dataclass(frozen=True)
class SftReport:
    """What a run did."""

    prefix: str
    """Where the samples are."""
    samples: int
    """Samples written."""
    packs: int
    """Packs they are in."""
    tokens: int
    """Their tokens."""
    supervised: int
    """Tokens to be learned."""
    efficiency: float
    """Share of the slots of all packs that hold a token."""
    truncated: int
    """Samples that were cut to --seq-length."""
    open_answers: int
    """Answers behind which the template writes no control token."""
    records: int
    """Records read."""
    bad: int
    """Records that were no conversation, or that the template refused."""
    skipped: tuple[tuple[str, int], ...]
    """Reason and number of the records that made no sample, the most frequent reason first."""
    quarantine: str | None
    """File of the bad records, if they were kept."""
    layouts: tuple[tuple[str, str], ...]
    """File and what its records are."""
    template: str
    """Name of the chat template."""
    resumed: int
    """Shards that an earlier run had finished."""
    shards: int
    """All shards."""
    seconds: float
    """Wall time, start-up included."""
    notes: tuple[str, ...]
    """What the user should know about these samples."""
    examples: tuple[str, ...]
    """The first samples as text, what is to be learned between [[ and ]]."""


def build(args: SftDataArgs, say: Callable[[str], None] = print) -> SftReport:
    """Tokenizes the input into samples.

    Raises ValueError for wrong arguments, an unknown layout or template and an input without a sample, DamagedInput for
    a bad record under --on-error stop and for a file that breaks off, TooManyErrors above --max-errors,
    ChildProcessError if a worker died. Nothing is written then; what was finished is kept beside its place.
    """
    start = time.perf_counter()
    args.validate()
    files = expand_inputs(args.input)
    tokenizer = load_tokenizer(args.tokenizer_model, args.trust_remote_code)
    recipe = RendererRecipe.of(tokenizer, args.chat_template, args.seq_length, args.truncation)
    layouts = {str(path): _layout(path, args) for path in files}
    for path, layout in layouts.items():
        say(f"{path}: {layout} records, chat template {recipe.template.name}")
    _require_same_ids(recipe, tokenizer, layouts, args)
    job = SftJob(recipe, layouts, args.column_names, args.on_error, str(args.partial_directory))
    return _Run(args, tokenizer, files, job, start).report()


# ---------------------------------------------------------------------------------------------------------- before it


def _first_records(path: Path) -> Iterator[Record]:
    with open(path, "rb") as raw, open_stream(raw, path) as stream:
        yield from islice(read_records(path, stream, "file"), _FIRST_RECORDS)


def _layout(path: Path, args: SftDataArgs) -> str:
    """What the records of a file are; a column that is renamed must be there."""
    try:
        keys = {key for record in _first_records(path) for key in _keys(record)}
        missing = sorted(set(args.column_names) - keys)
        if missing and keys:
            found = ", ".join(map(repr, sorted(keys)))
            raise ValueError(f"--columns: no column {missing[0]!r} in the first records; there are {found}")
        if args.sft_format != "auto":
            return args.sft_format
        return detect_layout(_first_records(path), args.column_names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _keys(record: Record) -> Iterable[str]:
    try:
        return json_value(record)
    except BadRecord:
        return ()


def _require_same_ids(
    recipe: RendererRecipe, tokenizer: Tokenizer, layouts: Mapping[str, str], args: SftDataArgs
) -> None:
    """The first conversations must have the ids that transformers gives them, wherever it gives any."""
    uncut = RendererRecipe(recipe.template, recipe.encode, _UNCUT, "drop").build()
    for path, layout in layouts.items():
        for conversation in _first_conversations(Path(path), layout, args.column_names):
            sample = uncut.sample(conversation)
            expected = _transformers_ids(tokenizer, recipe, conversation)
            if isinstance(sample, Sample) and expected is not None and sample.ids.tolist() != expected:
                raise ValueError(
                    f"chat template {recipe.template.name}: its text is not what transformers makes of it (in {path}); "
                    "please report it with the template"
                )


def _first_conversations(path: Path, layout: str, columns: Mapping[str, str]) -> Iterator[Conversation]:
    for record in islice(_first_records(path), _COMPARED):
        try:
            yield read_conversation(record, layout, columns)
        except BadRecord:
            continue


def _transformers_ids(tokenizer: Tokenizer, recipe: RendererRecipe, conversation: Conversation) -> list[int] | None:
    """Ids of transformers; None where special tokens are spelled in the text, or where it fails."""
    messages = [{"role": one.role, "content": one.content, **one.more} for one in conversation.messages]
    spelled = str(messages) + str(conversation.tools)
    if any(control.content in spelled for control in recipe.template.controls):
        return None
    source = (conversation.tools and recipe.template.tools_source) or recipe.template.source
    try:
        return tokenizer.hf.apply_chat_template(
            messages, tools=list(conversation.tools) or None, chat_template=source, tokenize=True, return_dict=False
        )
    except Exception:  # whatever a template raises; ours says what it does not take
        return None


# ---------------------------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class _Run:
    """One call."""

    args: SftDataArgs
    tokenizer: Tokenizer
    files: tuple[Path, ...]
    job: SftJob
    start: float

    def report(self) -> SftReport:
        """Everything behind the choice of layouts and template."""
        args, total = self.args, sum(os.path.getsize(path) for path in self.files)
        resume = args.resume == "auto"
        with partial_run(args.partial_directory, self._settings(), resume=resume, dtype_bytes=4) as partial:
            try:
                ledger = Ledger(args, total, partial.directory, "sft-data")
                with ledger, Crew(args.workers) as crew:
                    shards = plan(self.files, "file", shard_bytes(total))
                    crew.tokenize(shards, self.job, partial, ledger, start_worker, render_shard)
                ledger.require_few_errors()
                lengths = self._write(_Shards(partial.directory, ledger.shards), ledger)
            except NoDocuments:
                partial.clear()
                raise
            quarantine = ledger.publish_quarantine()
            partial.remove()
        return self._report(ledger, lengths, quarantine)

    def _settings(self) -> dict[str, object]:
        """What must be the same for shards of two runs to belong together. Packing comes later."""
        recipe = self.job.recipe
        return {
            "version": 1,
            "input": [(str(path), *file_state(path)) for path in self.files],
            "tokenizer": self.tokenizer.fingerprint,
            "template": asdict(recipe.template),
            "seq_length": recipe.seq_length,
            "truncation": recipe.truncation,
            "layouts": self.job.layouts,
            "columns": self.job.columns,
        }

    def _write(self, shards: _Shards, ledger: Ledger) -> np.ndarray:
        args, template = self.args, self.job.recipe.template
        ledger.require_documents("conversation", len(shards.lengths))
        packs = pack(shards.lengths, args.seq_length) if args.packing else [[one] for one in range(len(shards.lengths))]
        info = StoreInfo(
            tokenizer=self.tokenizer.fingerprint,
            vocab_size=self.tokenizer.vocab_size,
            template=template.name,
            template_sha256=hashlib.sha256(template.source.encode()).hexdigest(),
            seq_length=args.seq_length,
            truncation=args.truncation,
            packing=args.packing,
        )
        write_samples(args.output_prefix, (map(shards.sample, one) for one in packs), info)
        return shards.lengths

    def _report(self, ledger: Ledger, lengths: np.ndarray, quarantine: str | None) -> SftReport:
        args, store = self.args, open_samples(self.args.output_prefix)
        first = (store.sample(number) for number in range(min(args.examples, store.num_samples)))
        return SftReport(
            prefix=args.output_prefix,
            samples=store.num_samples,
            packs=store.num_packs,
            tokens=int(lengths.sum(dtype=np.int64)),
            supervised=ledger.changed[SUPERVISED],
            efficiency=efficiency(lengths, store.num_packs, args.seq_length),
            truncated=ledger.changed[TRUNCATED],
            open_answers=ledger.changed[OPEN],
            records=ledger.records,
            bad=ledger.bad.total(),
            skipped=tuple(ledger.skipped.most_common()),
            quarantine=quarantine,
            layouts=tuple(self.job.layouts.items()),
            template=self.job.recipe.template.name,
            resumed=ledger.resumed,
            shards=len(ledger.shards),
            seconds=time.perf_counter() - self.start,
            notes=_notes(ledger),
            examples=tuple(marked(sample, self.tokenizer.decode) for sample in first),
        )


def _notes(ledger: Ledger) -> tuple[str, ...]:
    count = ledger.changed[OPEN]
    text = (
        f"the chat template writes no control token behind {count} answers: nothing teaches the model to stop there; "
        "give another with --chat-template"
    )
    return (text,) if count else ()


class _Shards:
    """The samples of all shards, in the order of the input."""

    def __init__(self, directory: Path, numbers: Sequence[int]) -> None:
        of_shards = [np.fromfile(key_file(directory, number, 0, "len"), np.int32) for number in numbers]
        self.lengths = np.concatenate([np.empty(0, np.int32), *of_shards])
        self._shard = np.repeat(np.arange(len(of_shards)), [len(one) for one in of_shards])
        self._start = np.concatenate([np.cumsum(one, dtype=np.int64) - one for one in (np.empty(0, int), *of_shards)])
        self._files: list[Any] = [
            (_mapped(key_file(directory, number, 0, "bin"), np.int32), _mapped(mask_file(directory, number), np.bool_))
            for number in numbers
        ]

    def sample(self, number: int) -> Sample:
        """One sample."""
        ids, mask = self._files[self._shard[number]]
        part = slice(int(self._start[number]), int(self._start[number]) + int(self.lengths[number]))
        return Sample(ids[part], mask[part])


def _mapped(path: Path, dtype: type) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
