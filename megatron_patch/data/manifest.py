"""PREFIX.json beside an indexed dataset: which tokenizer made it, so that training can tell its own from another's.

`write_manifest` is called once the dataset stands under its own name. The manifest holds the digest of the .idx: one
that was left behind by an earlier dataset of the same prefix is never taken for the present one's. A dataset without
one, such as Megatron-LM's script writes, is as good; only nothing can be told of it but what its ids show.

It does not know text, models or the flags of training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_patch.data.indexed import IndexInfo, replacing

if TYPE_CHECKING:
    from megatron_patch.tokenizer import Tokenizer

SAMPLE_TOKENS = 1 << 20
"""Tokens that are read of a dataset to see whether its ids fit."""
_BLOCKS = 64


@dataclass(frozen=True)
class Manifest:
    """What made a dataset."""

    tokenizer: str
    """Digest of the tokenizer's files."""
    encoding: str
    """Digest of what encodes: equal for directories that differ in a chat template alone."""
    vocab_size: int
    """Number of the tokenizer's ids, added tokens included."""
    eod: int | None
    """Id of the tokenizer's end-of-document token."""
    append_eod: bool
    """Whether every document ends with it."""
    index_sha256: str
    """Digest of the .idx file that this belongs to."""
    max_id: int | None = None
    """Largest id in the dataset, if it was counted."""


def manifest_path(prefix: str) -> Path:
    """Where the manifest of a dataset lies."""
    return Path(f"{prefix}.json")


def index_digest(prefix: str) -> str:
    """sha256 of PREFIX.idx: the number, lengths and order of documents, all that sample indices depend on."""
    with open(f"{prefix}.idx", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encoding_digest(tokenizer: Tokenizer) -> str:
    """Digest of the part of a tokenizer that turns text into ids."""
    backend = tokenizer.encoder_recipe().backend_json
    return tokenizer.fingerprint if backend is None else hashlib.sha256(backend.encode()).hexdigest()


def write_manifest(prefix: str, tokenizer: Tokenizer, *, append_eod: bool, max_id: int | None = None) -> Path:
    """Writes PREFIX.json for the dataset at `prefix`, atomically, in place of any older one; returns its path."""
    manifest = Manifest(
        tokenizer=tokenizer.fingerprint,
        encoding=encoding_digest(tokenizer),
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        append_eod=append_eod,
        index_sha256=index_digest(prefix),
        max_id=max_id,
    )
    return _write(prefix, manifest)


def merge_manifests(prefixes: Sequence[str], prefix: str) -> Path | None:
    """Writes the manifest of a dataset that these were merged into, or None if one of them has none.

    Raises ValueError if they were made with different tokenizers.
    """
    found = {one: read_manifest(one) for one in prefixes}
    manifests = [manifest for manifest in found.values() if manifest is not None]
    if len(manifests) < len(found):
        manifest_path(prefix).unlink(missing_ok=True)
        return None
    for name in ("encoding", "vocab_size", "eod"):
        values = {one: getattr(manifest, name) for one, manifest in found.items()}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{one}: {value}" for one, value in values.items())
            raise ValueError(f"datasets of different tokenizers cannot be merged; {name} differs ({listed})")
    largest = [manifest.max_id for manifest in manifests]
    changes = {
        "append_eod": all(manifest.append_eod for manifest in manifests),
        "index_sha256": index_digest(prefix),
        "max_id": None if None in largest else max(largest),
    }
    return _write(prefix, Manifest(**{**asdict(manifests[0]), **changes}))


def _write(prefix: str, manifest: Manifest) -> Path:
    path = manifest_path(prefix)
    with replacing(path) as file:
        file.write(json.dumps(asdict(manifest), indent=2).encode() + b"\n")
    return path


def read_manifest(prefix: str) -> Manifest | None:
    """The manifest of a dataset; None if it has none, or only one that an earlier dataset left behind.

    Raises ValueError if the file is no manifest.
    """
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text("utf-8"))
        names = {field.name for field in fields(Manifest)}
        manifest = Manifest(**{name: value for name, value in values.items() if name in names})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not the manifest of a dataset ({error}); remove it if it is another file"
        ) from None
    return manifest if manifest.index_sha256 == index_digest(prefix) else None


# ------------------------------------------------------------------------------------------------- does it fit a run?


@dataclass(frozen=True)
class Fit:
    """Whether a dataset can be trained on."""

    problems: tuple[str, ...]
    """Why not."""
    notes: tuple[str, ...]
    """What the user should know."""


def check_fit(
    prefix: str, info: IndexInfo, tokenizer: Tokenizer, vocab_size: int | None, document_flags: Sequence[str] = ()
) -> Fit:
    """Compares a dataset with what a run will make of it, by its manifest and by a sample of its ids.

    Args:
        vocab_size: ids that the model knows, or None if nobody can say.
        document_flags: flags of the run that go by the end-of-document token.
    """
    manifest, ids = read_manifest(prefix), sample_ids(prefix, info)
    problems, notes, flags = [], [], " and ".join(document_flags)
    if manifest is None:
        why = "of an earlier dataset" if manifest_path(prefix).is_file() else "missing"
        notes.append(f"{prefix}: {manifest_path(prefix).name} is {why}, so which tokenizer made it is taken on trust")
        if flags and tokenizer.eod not in ids:
            notes.append(f"{prefix}: no end-of-document id {tokenizer.eod} in a sample of it: {flags} may do nothing")
    else:
        problems += _other_tokenizer(prefix, manifest, tokenizer)
        if flags and not manifest.append_eod:
            problems.append(
                f"{prefix}: made without --append-eod, so nothing marks where a document ends; leave out {flags}"
            )
    largest = max(int(ids.max(initial=0)), (manifest and manifest.max_id) or 0)
    if vocab_size is not None and largest >= vocab_size:
        end = f"the vocabulary ends at {vocab_size - 1}"
        problems.append(f"{prefix}: holds token id {largest}, {end}: it was made with another tokenizer")
    return Fit(tuple(problems), tuple(notes))


def _other_tokenizer(prefix: str, manifest: Manifest, tokenizer: Tokenizer) -> list[str]:
    advice = (
        f"preprocess the text again with {tokenizer.directory}, or remove {manifest_path(prefix)} if you are sure "
        "that the ids are right"
    )
    if manifest.vocab_size != tokenizer.vocab_size:
        sizes = f"a vocabulary of {manifest.vocab_size}, the run's has {tokenizer.vocab_size}"
        return [f"{prefix}: made with another tokenizer, of {sizes}; {advice}"]
    if manifest.eod != tokenizer.eod:
        return [f"{prefix}: its end-of-document id is {manifest.eod}, the run's is {tokenizer.eod}; {advice}"]
    if manifest.tokenizer == tokenizer.fingerprint or manifest.encoding == encoding_digest(tokenizer):
        return []
    digests = f"digest {manifest.tokenizer[:12]}, the run's is {tokenizer.fingerprint[:12]}"
    return [f"{prefix}: made with another tokenizer ({digests}); {advice}"]


def sample_ids(prefix: str, info: IndexInfo) -> np.ndarray:
    """The distinct ids of a dataset, or of blocks spread over it that make up SAMPLE_TOKENS."""
    total = info.num_tokens
    if not total:
        return np.empty(0, info.dtype)
    tokens = np.memmap(f"{prefix}.bin", info.dtype, "r", shape=(total,))
    if total <= SAMPLE_TOKENS:
        return np.unique(tokens)
    size = SAMPLE_TOKENS // _BLOCKS
    starts = np.linspace(0, total - size, _BLOCKS).astype(np.int64)
    return np.unique(np.concatenate([tokens[start : start + size] for start in starts]))
