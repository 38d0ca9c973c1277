"""Documents of text files, one after another; records that are no document are left out and counted.

It does not know tokenizers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

from megatron_patch.data.readers import BadRecord, Record, expand_inputs, open_stream, read_records, record_text
from megatron_patch.progress import Progress

_Item = TypeVar("_Item")


class Corpus:
    """The documents of some files, read anew each time they are iterated over.

    Args:
        inputs: files, directories or globs, as `preprocess` takes them; paragraphs of a .txt are its documents.
        limit: of documents (0: none).
        name: what lines about the progress of a pass begin with; without it there are none.
    """

    def __init__(self, inputs: Iterable[str], text_key: str, limit: int = 0, name: str = "") -> None:
        self._files = expand_inputs(inputs)
        self._key, self._limit, self._name = text_key, limit, name
        self.skipped: Counter[str] = Counter()
        """Reason -> number of records left out in the last pass."""

    def __iter__(self) -> Iterator[str]:
        self.skipped.clear()
        return islice(self._texts(), self._limit or None)

    def _texts(self) -> Iterator[str]:
        found, last = 0, None
        for record in self._records():
            try:
                text = record_text(record, self._key)
            except BadRecord as error:
                self.skipped[error.reason] += 1
                last = error
                continue
            if text.strip():
                found += 1
                yield text
        if not found:
            raise ValueError(f"no document in {', '.join(map(str, self._files))}{f'; {last}' if last else ''}")

    def _records(self) -> Iterator[Record]:
        sizes = [path.stat().st_size for path in self._files]
        with Progress(self._name, sum(sizes), "B", quiet=not self._name) as progress:
            for path, size in zip(self._files, sizes, strict=True):
                read = 0
                with path.open("rb") as raw, open_stream(raw, path) as stream:
                    for record in read_records(path, stream, "paragraph"):
                        position = raw.tell()
                        progress(max(0, position - read))  # rows are not read from the first byte to the last
                        read = max(read, position)
                        yield record
                progress(size - read)


def batches(items: Iterable[_Item], size: int = 512) -> Iterator[list[_Item]]:
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
