"""What an extended tokenizer saves on held-out text: `megatron-patch vocab analyze`.

    report = analyze(VocabAnalyzeArgs(base="model/", new="merged/", held_out=("held_out.jsonl",)))

Tokens per character for each language (told by the characters of a document), and the share of the new rows that the
text uses at all. It knows tokenizers of every kind, and no weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from megatron_patch.tokenizer import Tokenizer, load_tokenizer
from megatron_patch.tokenizer.sentencepiece_model import is_proto, load_proto, processor
from megatron_patch.vocab.arguments import VocabAnalyzeArgs
from megatron_patch.vocab.corpus import Corpus, batches
from megatron_patch.vocab.note import EXTENSION, read_note
from megatron_patch.vocab.scripts import language


@dataclass(frozen=True)
class Language:
    """What was counted in the documents of one language."""

    documents: int = 0
    characters: int = 0
    old_tokens: int = 0
    new_tokens: int = 0
    unchanged: int = 0
    """Documents whose ids are the same."""
    broken: int = 0
    """Documents that the old tokenizer gives back from their ids and the new one does not."""

    def __add__(self, other: Language) -> Language:
        return Language(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    @property
    def old_rate(self) -> float:
        """Tokens per character of the old tokenizer."""
        return self.old_tokens / max(1, self.characters)

    @property
    def new_rate(self) -> float:
        """Tokens per character of the new tokenizer."""
        return self.new_tokens / max(1, self.characters)

    @property
    def saving(self) -> float:
        """Share of the old tokens that the new tokenizer does without."""
        return 1 - self.new_tokens / max(1, self.old_tokens)


@dataclass(frozen=True)
class AnalyzeReport:
    """What was measured."""

    languages: Mapping[str, Language]
    """zh, ja, ko and other, as far as there are any, and all."""
    old_size: int
    """Ids of the old tokenizer."""
    new_size: int
    new_tokens: int
    """New tokens that a text can hold; reserved rows are none."""
    used: int
    """Those of them that the text holds."""
    misread: int
    """Documents to which transformers gives other ids than the tokenizer.model of the base, whose ids count here."""
    skipped: Mapping[str, int]
    """Reason -> number of records that are no document."""
    seconds: float

    def table(self) -> Iterator[tuple[str, str]]:
        """Names and values for a table."""
        yield "vocabulary", f"{self.old_size:,} -> {self.new_size:,}"
        for name, one in self.languages.items():
            yield f"{name}: {one.documents:,} documents", f"{one.characters:,} characters, {one.unchanged:,} unchanged"
            rates = f"{one.old_rate:.3f} -> {one.new_rate:.3f} tokens per character"
            yield "", f"{rates}, {one.saving:+.1%} of the tokens saved"
            if one.broken:
                yield "", f"{one.broken:,} documents no longer come back from their ids"
        yield "new rows in use", f"{self.used:,} of {self.new_tokens:,} ({self.used / max(1, self.new_tokens):.1%})"
        if self.misread:
            yield "note", f"transformers reads {self.misread:,} documents otherwise than the base's tokenizer.model"
        yield from ((f"skipped: {reason}", f"{count:,}") for reason, count in self.skipped.items())
        yield "time", f"{self.seconds:.1f} s"


def analyze(args: VocabAnalyzeArgs) -> AnalyzeReport:
    """Encodes the text with both tokenizers; ValueError if one cannot be loaded or there is no text."""
    start = time.perf_counter()
    args.validate()
    old, new = load_tokenizer(args.base), load_tokenizer(args.new)
    corpus = Corpus(args.held_out, args.text_key, args.max_documents)
    languages, seen, misread = _count(old, new, corpus)
    reserved = set(read_note(args.new, EXTENSION).get("reserved", ()))
    vocabulary, known = new.hf.get_vocab(), old.hf.get_vocab()
    fresh = {number for token, number in vocabulary.items() if token not in known and token not in reserved}
    report = AnalyzeReport(
        languages=languages,
        old_size=old.vocab_size,
        new_size=new.vocab_size,
        new_tokens=len(fresh),
        used=len(fresh & seen),
        misread=misread,
        skipped=dict(corpus.skipped),
        seconds=time.perf_counter() - start,
    )
    if args.png:
        draw(report, Path(args.png))
    return report


def _count(old: Tokenizer, new: Tokenizer, corpus: Corpus) -> tuple[dict[str, Language], set[int], int]:
    """What each language has, the new tokenizer's ids that occur, and how many documents transformers misreads."""
    found: dict[str, Language] = {}
    seen: set[int] = set()
    model, misread = _sentencepiece(old), 0
    for texts in batches(corpus):
        read, encoded = (tokenizer.encode_batch(texts, add_special_tokens=False) for tokenizer in (old, new))
        own = model.encode(texts) if model else read
        for text, before, after in zip(texts, own, encoded, strict=True):
            broken = new.decode(after) != text and old.decode(before) == text
            one = Language(1, len(text), len(before), len(after), int(before == after), int(broken))
            name = language(text)
            found[name] = found.get(name, Language()) + one
            seen.update(after)
        misread += sum(a != b for a, b in zip(own, read, strict=True))
    ordered = dict(sorted(found.items(), key=lambda item: -item[1].characters))
    return ordered | {"all": sum(found.values(), Language())}, seen, misread


def _sentencepiece(tokenizer: Tokenizer) -> SentencePieceProcessor | None:
    """The model that a tokenizer was made from, if it lies beside it: transformers does not always read it rightly."""
    file = Path(tokenizer.directory) / "tokenizer.model"
    return processor(load_proto(file)) if tokenizer.hf.is_fast and file.is_file() and is_proto(file) else None


def draw(report: AnalyzeReport, path: Path) -> None:
    """A bar chart of tokens per character, old beside new, for each language."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 1.5 * len(report.languages), 3.5), layout="constrained")
    axes, places = figure.subplots(), range(len(report.languages))
    rates = [(one.old_rate, one.new_rate) for one in report.languages.values()]
    for shift, side, size in ((-0.2, 0, report.old_size), (0.2, 1, report.new_size)):
        values = [rate[side] for rate in rates]
        bars = axes.bar([place + shift for place in places], values, width=0.38, label=f"{size:,} ids")
        axes.bar_label(bars, fmt="%.3f", fontsize=8)
    axes.set_xticks(list(places), [f"{name}\n{one.saving:+.1%}" for name, one in report.languages.items()])
    axes.set_ylabel("tokens per character")
    axes.set_title("held-out text, old and new tokenizer; share of tokens saved below", fontsize=9)
    axes.margins(y=0.15)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
