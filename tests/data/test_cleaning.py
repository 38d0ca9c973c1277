"""Every cleaning step: what it changes, what it must leave alone, what it drops; and that the counts are right."""

from __future__ import annotations

import random
import sys
import unicodedata
from typing import get_args

import pytest

from megatron_patch.data import cleaning
from megatron_patch.data.arguments import CleaningArgs, CleaningStep
from megatron_patch.data.cleaning import STEPS, Cleaner
from tests.tokenizer import make

CHANGING = ("nfc", "control", "zero-width", "repeated-lines")


def apply(step: str, text: str, **thresholds: object) -> str | None:
    """What one step alone makes of a text."""
    return STEPS[step](CleaningArgs(clean=(step,), **thresholds))(text)


@pytest.mark.parametrize(
    ("step", "text", "expected"),
    [
        ("nfc", "cafe\u0301 \uf900１２", "caf\u00e9 \u8c48１２"),
        ("control", "a\x00b\x7fc\x9fd\te\nf", "abcd\te\nf"),
        ("control", "CRLF\r\nCR\rFF\x0cVT\x0bNEL\x85end", "CRLF\nCR\nFF\nVT\nNEL\nend"),
        ("zero-width", "\ufeff天\u200b气\u2060好\u200d。", "天气好。"),
        ("zero-width", "\u200dplain\n\u200ctext\u200b\u200d!\u180e", "plain\ntext!"),
        ("repeated-lines", "菜单\n菜单 \n\n菜单\n正文\n\n\n菜单", "菜单\n\n正文\n\n\n菜单"),
        ("pai", "价格=3<5；见 𠮷野家、龦", "价格35见 野家、"),
        ("pai", "see  https://a.org/x?y=1&z  and\n１２:?", "see and"),
        ("pai", 'http://a"b#c', "bc"),
        ("pai", "见http://a.org/路径，完", "见路径，完"),
    ],
)
def test_a_step_changes_what_it_should(step, text, expected):
    assert apply(step, text) == expected


@pytest.mark.parametrize("step", CHANGING)
def test_newlines_full_width_digits_and_rare_characters_survive(step):
    text = "\n\n第１２章\n\n  价格=３<５；见 𠮷野家、龦｜ＡＢ％\n\t缩进\u2028行\n"
    assert apply(step, text) == text


@pytest.mark.parametrize("text", ["👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈", "می\u200cخواهم", "क्\u200dष ന്\u200d "])
def test_joiners_stay_where_a_script_or_an_emoji_needs_them(text):
    assert apply("zero-width", text) == text


@pytest.mark.parametrize("step", [*CHANGING, "pai"])
def test_a_step_finds_nothing_left_to_do_in_what_it_made(step):
    draw = random.Random(7)
    pieces = ["\r", "\n", "\x00", "\u200b", "\u200d", "\ufeff", "\u0301", "e", " ", "天", "👩", "http://", "；", "a\n"]
    texts = ["".join(draw.choices(pieces, k=30)) for _ in range(300)]
    if step == "pai":  # removing a character can make two spaces, or a URL, of what stood around it: the original too
        texts = [text.replace(" ", "").replace("http://", "") for text in texts]
    once = [apply(step, text) for text in texts]
    assert [apply(step, text) for text in once] == once
    assert once != texts


def test_nfc_is_unicodes_for_every_character():
    assert all(apply("nfc", chr(code)) == unicodedata.normalize("NFC", chr(code)) for code in range(0x3000, 0x3400))


def test_pai_keeps_its_whitelist_and_nothing_else():
    kept = {
        chr(code) for code in range(0x30000) if not 0xD800 <= code < 0xE000 and cleaning.pai(f"a{chr(code)}b") != "ab"
    }
    chinese = {chr(code) for code in range(0x4E00, 0x9FA6)}
    letters = set("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert kept - chinese - letters == set(".， ,-。%《*》/•、&＆(—)（+）：？!！“”·")
    assert chinese | letters <= kept


def test_chinese_characters_are_counted_in_every_extension_and_white_space_is_not():
    assert cleaning.cjk_ratio("今天 天气\n\u3000") == 1
    assert cleaning.cjk_ratio("㐀𠮷〇々ab") == pytest.approx(4 / 6)
    assert cleaning.cjk_ratio("カナ한글abc，。") == 0
    assert cleaning.cjk_ratio("\U0003fffd\ufadf") == 0  # no characters yet
    assert cleaning.cjk_ratio("") == 0


def test_letters_and_marks_of_any_script_are_no_symbols():
    assert cleaning.symbol_ratio("हिन्दी العَرَبِيَّة 天气１２ abc") == 0
    assert cleaning.symbol_ratio("ab!? 。=") == pytest.approx(4 / 6)


def test_repetition_is_the_share_of_pieces_seen_before():
    text = "".join(random.Random(3).choices("天地玄黄宇宙洪荒日月盈昃", k=400)) * 2 + "short"
    pieces = [text[start : start + 10] for start in range(len(text) - 9)]
    assert cleaning.repetition_ratio(text) == pytest.approx(1 - len(set(pieces)) / len(pieces))
    assert cleaning.repetition_ratio("天") == 0
    assert cleaning.repetition_ratio("哈" * 500) > 0.99


@pytest.mark.parametrize(
    ("step", "thresholds", "kept", "dropped"),
    [
        ("length", {"min_chars": 3}, "天气好", " \n天气\n "),
        ("length", {"min_chars": 0, "max_chars": 3}, " 天气好 ", "天气好。"),
        ("cjk-ratio", {"min_cjk_ratio": 0.5}, "天气ab", "天气abc"),
        ("symbol-ratio", {"max_symbol_ratio": 0.5}, "ab!!", "ab!!!"),
        ("repetition-ratio", {"max_repetition_ratio": 0.5}, "abcdefghij" * 2, "abcdefghij" * 3),
    ],
)
def test_a_filter_keeps_what_lies_on_its_threshold_and_drops_what_lies_beyond(step, thresholds, kept, dropped):
    assert apply(step, kept, **thresholds) == kept
    assert apply(step, dropped, **thresholds) is None


def test_the_counts_say_what_each_step_changed_and_dropped():
    cleaner = Cleaner(CleaningArgs(clean=("length", "control", "nfc"), min_chars=3))
    texts = ["e\u0301\x00", "e\u0301toile", "a\x00bc", "plain", "\x01\x02", "ab"]
    assert list(map(cleaner.clean, texts)) == [None, "\u00e9toile", "abc", "plain", None, None]
    changed, dropped = cleaner.take_counts()
    assert changed == {"nfc": 2, "control": 2}
    assert dropped == {"length": 2, "control": 1}
    assert cleaner.take_counts() == ({}, {})


def test_filters_see_what_the_other_steps_left_whatever_the_order_given():
    text = "天气" + "\x00" * 40
    cleaner = Cleaner(CleaningArgs(clean=("length", "cjk-ratio", "control"), min_chars=3))
    assert cleaner.clean(text) is None
    assert cleaner.take_counts().dropped == {"length": 1}


def test_without_steps_nothing_is_touched():
    cleaner = Cleaner(CleaningArgs())
    assert [cleaner.clean(text) for text in make.TEXTS] == list(make.TEXTS)
    assert cleaner.take_counts() == ({}, {})


def test_every_step_of_the_command_line_exists_and_an_unknown_one_is_refused():
    assert tuple(STEPS) == get_args(CleaningStep)
    with pytest.raises(ValueError, match="--clean soap: choose from nfc, control"):
        Cleaner(CleaningArgs(clean=("soap",)))


def test_opencc_converts_and_leaves_newlines_and_full_width_digits():
    cleaner = Cleaner(CleaningArgs(clean=("opencc",)))
    assert cleaner.clean("漢語與電腦，１２\n") == "汉语与电脑，１２\n"
    assert cleaner.take_counts().changed == {"opencc": 1}


def test_opencc_that_is_not_installed_is_refused_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "opencc", None)
    with pytest.raises(ValueError, match="pip install opencc"):
        Cleaner(CleaningArgs(clean=("opencc",)))
    monkeypatch.setattr("megatron_patch.data.arguments.find_spec", lambda name: None)
    assert CleaningArgs(clean=("opencc",)).cleaning_problems() == [
        "--clean opencc: the package is not installed; pip install opencc"
    ]


def test_thresholds_out_of_range_or_without_their_step_are_refused():
    args = CleaningArgs(
        clean=("length", "cjk-ratio"),
        min_chars=9,
        max_chars=3,
        min_cjk_ratio=1.5,
        max_symbol_ratio=0.2,
        opencc_config="s2t",
    )
    problems = "\n".join(args.cleaning_problems())
    assert "--max-chars 3: must be at least 1 and --min-chars (9)" in problems
    assert "--min-cjk-ratio 1.5: a share lies in 0..1" in problems
    assert "--max-symbol-ratio 0.2 has no effect without --clean symbol-ratio" in problems
    assert "--opencc-config s2t has no effect without --clean opencc" in problems
    assert len(args.cleaning_problems()) == 4 and CleaningArgs().cleaning_problems() == []
