"""What merging tells, whatever the kind of tokenizer: its report, what it counts, and text that is hard on tokenizers.

It knows no kind of tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice

from megatron_patch.vocab.scripts import has_cjk

PROBES = (
    "The capital of France is Paris.",
    "今天天气很好，我们去公园散步。价格=３<５；见 𠮷野家",
    "a literal </s> and <s>, <unk>, <|reserved_0|>, <0x0A> in the text",
    "emoji 👩‍👩‍👧 and\r\nline\nends\ttabs  and   spaces ",
    "NUL \x00, separators \u2028\u2029, accents e\u0301 é, full\u3000width",
    "日本語のテキスト、한국어 텍스트, ไทย, العربية",
    "啊啊啊啊啊啊啊aaaaaaaaaaa  哈哈哈哈哈",
    " leading and trailing ",
    "def f(x):\n    return x ** 2  # 12345.678\n",
)
"""Text that is hard on tokenizers; both libraries must agree on it, whatever the corpus."""


def compared_texts(corpus: Iterable[str] | None, limit: int) -> Iterator[str]:
    """What two libraries are compared on: PROBES and so many documents of the corpus (0: all)."""
    return chain(PROBES, islice(corpus or (), limit or None))


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    output: str
    libraries: str
    """The two that were compared."""
    base_size: int
    """Ids of the base, its added tokens included."""
    vocab_size: int
    """Ids of the result, reserved rows included."""
    new_pieces: int
    reserved: int
    """Rows that only fill up."""
    dropped: Mapping[str, int]
    """Reason -> number of learned pieces that were not taken."""
    used: int | None
    """New pieces that the corpus uses; None without a corpus."""
    documents: int
    """On which the libraries were compared and agree, built-in ones included."""
    round_trip_failures: int
    """Documents that do not come back from their ids, though they do with the base."""
    other_documents: int
    """Compared documents without CJK characters."""
    other_changed: int
    """Those of them whose ids are not those of the base."""
    skipped: Mapping[str, int]
    """Reason -> number of records of the corpus that are no document."""
    seconds: float

    def table(self) -> Iterator[tuple[str, str]]:
        """Names and values for a table."""
        yield "vocabulary", f"{self.base_size:,} -> {self.vocab_size:,} ({self.reserved} reserved)"
        yield "new pieces", f"{self.new_pieces:,}"
        yield from ((f"dropped: {reason}", f"{count:,}") for reason, count in self.dropped.items())
        if self.used is not None:
            dead = self.new_pieces - self.used
            yield "new pieces the corpus never uses", f"{dead:,} ({dead / max(1, self.new_pieces):.2%})"
        yield self.libraries, f"on all of {self.documents:,} documents"
        yield "round trips that fail, unlike the base's", f"{self.round_trip_failures:,}"
        same = self.other_documents - self.other_changed
        yield "documents without CJK that keep their ids", f"{same:,} of {self.other_documents:,}"
        yield from ((f"skipped: {reason}", f"{count:,}") for reason, count in self.skipped.items())
        yield "time", f"{self.seconds:.1f} s"


@dataclass
class Outcome:
    """What comparing a written tokenizer with another library and with the base found."""

    documents: int = 0
    round_trip_failures: int = 0
    other_documents: int = 0
    other_changed: int = 0

    def add(self, text: str, *, broken: bool, changed: bool) -> None:
        """Counts a document; see `MergeReport`."""
        other = not has_cjk(text)
        self.documents += 1
        self.round_trip_failures += broken
        self.other_documents += other
        self.other_changed += other and changed
