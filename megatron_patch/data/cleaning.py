"""Cleaning of documents: each step a pure function from text to text, or to None where the document is to be dropped.

    cleaner = Cleaner(CleaningArgs(clean=("nfc", "control", "length"), min_chars=100))
    text = cleaner.clean(text)          # None: dropped
    cleaner.take_counts()               # what each step changed and dropped since the last call

Newlines and full-width digits survive every step but `pai`, which is there for those who must repeat the predecessor's
data. Steps run in the order of `CleaningStep`, whatever the order given: shares are taken of what is left.
It does not know files, tokenizers or duplicates of whole documents.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, get_args

import numpy as np

from megatron_patch.data.arguments import CleaningArgs, CleaningStep
from megatron_patch.data.dedup import code_points, shingles

Step = Callable[[str], str | None]

REPEATED_PIECE = 10
"""Characters of a piece that `repetition_ratio` looks for."""

# ------------------------------------------------------------------------------------------------- steps that change


def nfc(text: str) -> str:
    """Unicode's composed form. NFKC would also rewrite full-width digits and punctuation of Chinese text."""
    return unicodedata.normalize("NFC", text)


_LINE_END = re.compile("\r\n|[\r\x0b\x0c\x85]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]")


def control(text: str) -> str:
    """Removes control characters but tab and newline; other line and page ends (CR LF, CR, VT, FF, NEL) become it."""
    return _CONTROL.sub("", _LINE_END.sub("\n", text))


_INVISIBLE = "\u180e\u200b\u2060-\u2064\ufeff"
# After these a joiner joins nothing: ASCII, Chinese, kana, Hangul, their punctuation and full-width forms.
_UNJOINED = "\x00-\x7f\u2e80-\u312f\u3130-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_ZERO_WIDTH = re.compile(f"[{_INVISIBLE}]|(?:(?<=[{_UNJOINED}{_INVISIBLE}])|^)[\u200c\u200d]+")


def zero_width(text: str) -> str:
    """Removes byte-order marks and characters of no width.

    Joiners (U+200C, U+200D) stay where they follow an emoji or a letter of a script that needs them (Persian, Hindi).
    """
    return _ZERO_WIDTH.sub("", text)


def repeated_lines(text: str) -> str:
    """Removes each line that repeats the line before it; blank lines stay, and are no line here."""
    kept, last = [], ""
    for line in text.split("\n"):
        core = line.strip()
        if core and core == last:
            continue
        kept.append(line)
        last = core or last
    return "\n".join(kept)


_PAI_URL = re.compile("https?://[!$-_a-z]+")
_PAI_REMOVED = re.compile(r"[^0-9A-Za-z\u4e00-\u9fa5 !%&()*+,\-./·—“”•、。《》！＆（），：？]+")


def pai(text: str) -> str:
    """What the predecessor's clean_raw_text.py and preprocess_wudao2.py leave of a text.

    URLs go with all ASCII that follows them, then runs of spaces, then everything outside a whitelist: newlines,
    full-width digits, `；`, `=`, `<` and Chinese characters beyond U+9FA5 among it.
    """
    return _PAI_REMOVED.sub("", re.sub(" +", " ", _PAI_URL.sub("", text))).strip()


def opencc(config: str) -> Step:
    """Conversion between traditional and simplified Chinese by the OpenCC package, `config` being one of its own."""
    try:
        from opencc import OpenCC
    except ImportError:
        raise ValueError("--clean opencc: the package is not installed; pip install opencc") from None
    return OpenCC(config).convert


# -------------------------------------------------------------------------------------------- measures, and who drops

_LETTER, _CHINESE, _SPACE, _SYMBOL = range(4)
_CHINESE_BLOCKS = ((0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))


@cache
def _classes() -> np.ndarray:
    """uint8[0x110000]: the class of each character."""
    kinds = {"L": _LETTER, "M": _LETTER, "N": _LETTER, "Z": _SPACE, "P": _SYMBOL, "S": _SYMBOL, "C": _SYMBOL}
    table = np.array([kinds[unicodedata.category(chr(code))[0]] for code in range(0x110000)], np.uint8)
    table[[ord(mark) for mark in "\t\n\r\x0b\x0c\x85"]] = _SPACE
    for first, last in _CHINESE_BLOCKS:
        table[first : last + 1][table[first : last + 1] == _LETTER] = _CHINESE
    return table


def _shares(text: str) -> np.ndarray:
    """float[4]: share of each class among the characters that are not white space."""
    counts = np.bincount(_classes()[code_points(text)], minlength=4)
    return counts / max(1, counts.sum() - counts[_SPACE])


def cjk_ratio(text: str) -> float:
    """Share of Chinese characters (every extension) among those that are not white space. Kana and Hangul are not."""
    return float(_shares(text)[_CHINESE])


def symbol_ratio(text: str) -> float:
    """Share of characters that are no letters, marks or digits of any script among those that are not white space."""
    return float(_shares(text)[_SYMBOL])


def repetition_ratio(text: str) -> float:
    """Share of the text's 10-character pieces, one at every character, that the text has had before."""
    pieces = shingles(text, REPEATED_PIECE)
    return 1 - len(np.unique(pieces)) / len(pieces)


def length_step(min_chars: int, max_chars: int | None) -> Step:
    """Drops a text of fewer or more characters, white space around it not counted."""

    def step(text: str) -> str | None:
        chars = len(text.strip())
        return text if min_chars <= chars and (max_chars is None or chars <= max_chars) else None

    return step


def at_least(measure: Callable[[str], float], threshold: float) -> Step:
    """Drops a text that measures less."""
    return lambda text: text if measure(text) >= threshold else None


def at_most(measure: Callable[[str], float], threshold: float) -> Step:
    """Drops a text that measures more."""
    return lambda text: text if measure(text) <= threshold else None


# ------------------------------------------------------------------------------------------------------------- cleaner

STEPS: dict[str, Callable[[CleaningArgs], Step]] = {
    "nfc": lambda args: nfc,
    "control": lambda args: control,
    "zero-width": lambda args: zero_width,
    "opencc": lambda args: opencc(args.opencc_config),
    "pai": lambda args: pai,
    "repeated-lines": lambda args: repeated_lines,
    "length": lambda args: length_step(args.min_chars, args.max_chars),
    "cjk-ratio": lambda args: at_least(cjk_ratio, args.min_cjk_ratio),
    "symbol-ratio": lambda args: at_most(symbol_ratio, args.max_symbol_ratio),
    "repetition-ratio": lambda args: at_most(repetition_ratio, args.max_repetition_ratio),
}


class CleaningCounts(NamedTuple):
    """Documents that each step changed, and those that it dropped."""

    changed: Counter[str]
    dropped: Counter[str]


class Cleaner:
    """The chosen steps, one after another, and what they did."""

    def __init__(self, args: CleaningArgs) -> None:
        unknown = [name for name in args.clean if name not in STEPS]
        if unknown:
            raise ValueError(f"--clean {unknown[0]}: choose from {', '.join(get_args(CleaningStep))}")
        self._steps = [(name, STEPS[name](args)) for name in get_args(CleaningStep) if name in args.clean]
        self._counts = CleaningCounts(Counter(), Counter())

    def clean(self, text: str) -> str | None:
        """The cleaned text; None if a step dropped it or left nothing but white space."""
        for name, step in self._steps:
            cleaned = step(text)
            if cleaned is None or not cleaned.strip():
                self._counts.dropped[name] += 1
                return None
            self._counts.changed[name] += cleaned != text
            text = cleaned
        return text

    def take_counts(self) -> CleaningCounts:
        """The counts since the last call. A document changed by one step and dropped by a later one is in both."""
        counts, self._counts = self._counts, CleaningCounts(Counter(), Counter())
        return CleaningCounts(+counts.changed, +counts.dropped)
