"""What `--train-data` names, as samples: a tokenized set, or files of conversations, tokenized once and kept.

    source = find_source("chats.jsonl", formats, tokenizer, seq_length=4096, cache=None, workers=2)
    store = open_samples(source.tokenize(print))    # does nothing more if it was done before

Tokenized files lie under a digest of the files' content, the tokenizer with its chat template, the flags, and the code
that tokenizes: change any of these and it is done anew. It does not know rows, models or other processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_patch.data.readers import expand_inputs
from megatron_patch.data.sft.arguments import SftDataArgs, SftFormatArgs
from megatron_patch.data.sft.building import build
from megatron_patch.data.sft.storage import is_sample_store, open_samples
from megatron_patch.tokenizer import Tokenizer

CACHE = "sft-cache"
"""Where tokenized files go, beside the first of them."""


@dataclass(frozen=True)
class Source:
    """One name that a user gave."""

    prefix: str
    """Where the tokenized set lies, or will."""
    work: SftDataArgs | None = None
    """How to make it; None if the user gave the set itself."""
    note: str = ""
    """What the user should know about it."""

    def tokenize(self, say: Callable[[str], None]) -> str:
        """Write the tokenized set, unless it is there; where it lies."""
        if self.note:
            say(self.note)
        if self.work is None or is_sample_store(self.prefix):
            return self.prefix
        report = build(self.work, say)
        skipped = "".join(f"; {count:,} left out: {reason}" for reason, count in report.skipped)
        say(
            f"{report.samples:,} samples of {report.records:,} records, {report.supervised:,} of {report.tokens:,} "
            f"tokens are to be learned; {report.truncated:,} samples cut to {self.work.seq_length:,} tokens{skipped}"
        )
        for note in report.notes:
            say(note)
        return self.prefix


def find_source(
    name: str, formats: SftFormatArgs, tokenizer: Tokenizer, *, seq_length: int, cache: str | None, workers: int
) -> Source:
    """What a name stands for. Nothing is read but to know it again.

    Raises ValueError if it stands for nothing, or for what was tokenized for another vocabulary.
    """
    if is_sample_store(name):
        return Source(name, note=_doubt(name, tokenizer))
    files = expand_inputs((name,))
    directory = _made(Path(cache) if cache else files[0].parent / CACHE)
    settings = f"{asdict(formats)} {seq_length} {tokenizer.fingerprint} {_content(formats.chat_template)}"
    work = SftDataArgs(
        input=(name,),
        output_prefix=str(directory / _digest(files, settings)),
        tokenizer_model=tokenizer.directory,
        seq_length=seq_length,
        **asdict(formats),
        workers=workers,
        examples=0,
        overwrite=True,
        trust_remote_code=tokenizer.trust_remote_code,
    )
    return Source(work.output_prefix, work)


def _doubt(prefix: str, tokenizer: Tokenizer) -> str:
    """Whether a set may be of another tokenizer; the predecessor's layout does not tell."""
    info = open_samples(prefix).info
    if info is None or info.tokenizer == tokenizer.fingerprint:
        return ""
    if info.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"{prefix}: made with another tokenizer, of a vocabulary of {info.vocab_size}, the run's has "
            f"{tokenizer.vocab_size}; tokenize the conversations again"
        )
    return f"{prefix}: made with a tokenizer (or chat template) other than the run's, of the same vocabulary"


def _made(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot keep tokenized files in {directory} ({error}); give --data-cache-path") from error
    return directory


def _content(template: str) -> str:
    return Path(template).read_text("utf-8") if Path(template).is_file() else ""


def _digest(files: tuple[Path, ...], settings: str) -> str:
    code = sorted(Path(__file__).parent.rglob("*.py")) + sorted(Path(__file__).parent.rglob("*.jinja"))
    digest = hashlib.sha256(settings.encode())
    for file in (*code, *files):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
