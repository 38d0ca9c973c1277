"""Byte-level bases: merges against a plain loop, merged tokenizers against `tokenizers`, transformers and the base."""

from __future__ import annotations

import json
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megatron_patch.launch.main import main
from megatron_patch.tokenizer import load_tokenizer
from megatron_patch.vocab.arguments import VocabMergeArgs, VocabTrainArgs
from megatron_patch.vocab.byte_level import (
    ByteLevel,
    bytes_of,
    dump_merges,
    is_cjk_token,
    letters,
    load_merges,
    open_byte_level,
    spell,
)
from megatron_patch.vocab.byte_level_choice import Choice, idlers, supported
from megatron_patch.vocab.byte_level_merge import check_names
from megatron_patch.vocab.byte_level_train import learn, sample_lines
from megatron_patch.vocab.byte_level_words import Words
from megatron_patch.vocab.merge import merge
from megatron_patch.vocab.merge_report import PROBES, MergeReport
from megatron_patch.vocab.subpieces import compare
from megatron_patch.vocab.train import train
from tests.tokenizer.make import TEXTS as HARD
from tests.tokenizer.published import ranks
from tests.vocab import make
from tests.vocab import make_byte_level as byte

TEXTS = [*PROBES, *HARD, "<|eot_id|> and [TOOL] 天气", *make.mixed(600, seed=7)]
Run = tuple[Path, MergeReport]


@pytest.fixture(scope="module", params=byte.STYLES)
def style(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, style: str) -> Path:
    return byte.directory(tmp_path_factory.mktemp("byte") / "base", style)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Run:
    """The base with what was learned from a corpus, and the report."""
    folder = tmp_path_factory.mktemp("byte")
    corpus = make.jsonl(folder / "corpus.jsonl", make.mixed(600))
    train(VocabTrainArgs((corpus,), str(folder / "new.json"), base=str(base), vocab_size=250))
    out = folder / "merged"
    return out, merge(VocabMergeArgs(str(base), str(folder / "new.json"), str(out), corpus=(corpus,), pad_multiple=64))


def opened(path: Path) -> ByteLevel:
    found = open_byte_level(path)
    assert found is not None
    return found


def tokenizers_ids(directory: Path, texts: list[str]) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return [one.ids for one in tokenizer.encode_batch(texts, add_special_tokens=False)]


def vocabulary(directory: Path) -> dict[str, int]:
    return json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]


def merge_into(tmp_path: Path, base: Path, pairs: list[tuple[str, str]], **options: object) -> MergeReport:
    (tmp_path / "new.json").write_text(dump_merges(opened(base), pairs))
    options = {"pad_multiple": 1} | options
    return merge(VocabMergeArgs(str(base), str(tmp_path / "new.json"), str(tmp_path / "out"), **options))


# ------------------------------------------------------------------------------------------------------------- training


def plain_merges(base: ByteLevel, texts: list[str], count: int) -> list[tuple[str, str]]:
    """The loop itself: count pairs in all words, merge the first, count again."""
    backend, words = base.backend(), Counter()
    for text in texts:
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(text):
            words[tuple(one.value for one in backend.model.tokenize(word))] += 1
    order, learned = dict(base.vocab), []
    for number in range(count):
        pairs = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times if len("".join(pair)) <= 48 else 0
        if not pairs or max(pairs.values()) < 2:
            break
        left, right = min(pairs, key=lambda pair: (-pairs[pair], order[pair[0]], order[pair[1]]))
        learned.append((left, right))
        order.setdefault(left + right, base.size + number)
        words = Counter({merged_word(word, left, right): times for word, times in words.items()})
    return learned


def merged_word(word: tuple[str, ...], left: str, right: str) -> tuple[str, ...]:
    out: list[str] = []
    for part in word:
        if out and (out[-1], part) == (left, right):
            out[-1] = left + right + "\0"  # not to be merged again in this pass
        else:
            out.append(part)
    return tuple(part.removesuffix("\0") for part in out)


def test_the_learned_merges_are_those_of_the_plain_loop(base):
    texts = make.mixed(150)
    expected = plain_merges(opened(base), texts, 120)
    assert len(expected) == 120 and learn(opened(base), texts, 120) == expected


def test_training_learns_what_occurs_twice_and_no_more(base):
    assert learn(opened(base), ["龘龘 龘"], 50)
    with pytest.raises(ValueError, match="too small"):
        learn(opened(base), ["龘"], 50)


def test_words_too_long_are_cut_and_new_tokens_hold_sixteen_characters_at_most(base):
    found = learn(opened(base), ["天气" * 3000], 40)
    assert 8 * 3 < max(len(left + right) for left, right in found) <= 16 * 3
    word = "weatherandmusicinthiscitywhileothersworkandhavetimeforquestions"
    found = learn(opened(base), [word] * 3, 60)
    assert len(word) > 48 and 24 < max(len(left + right) for left, right in found) <= 48


def test_tokens_that_are_no_part_of_words_are_not_learned(base):
    found = learn(opened(base), ["[TOOL]天[TOOL]天[TOOL]天"] * 5, 20)
    assert found and not [pair for pair in found if "TOOL" in "".join(pair)]


def test_the_number_of_threads_changes_nothing_and_is_forgotten(base, monkeypatch):
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert learn(opened(base), make.mixed(100), 30, threads=2) == learn(opened(base), make.mixed(100), 30)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false" and "RAYON_NUM_THREADS" not in os.environ


def test_a_sample_of_lines_is_the_same_each_time_and_has_lines_from_everywhere():
    texts = [f"{i}\n{i}b" for i in range(500)]
    found = sample_lines(iter(texts), 100)
    assert found == sample_lines(texts, 100) and len(set(found)) == 100
    assert 20 < sum(int(line.rstrip("b\n")) < 250 for line in found) < 80
    assert sample_lines(texts, 5000) == [line for i in range(500) for line in (f"{i}\n", f"{i}b")]


def test_uses_are_what_the_extended_tokenizer_gives(base):
    texts, one = make.mixed(200), opened(base)
    tokens = {left + right: (left, right) for left, right in learn(one, texts, 100)}
    words = Words(one)
    words.add(texts)
    content, _ = one.extended(list(tokens.values()))
    tokenizer = Tokenizer.from_str(json.dumps(content))
    expected = Counter(token for text in texts for token in tokenizer.encode(text, add_special_tokens=False).tokens)
    assert words.uses(tokens) == {token: expected[token] for token in tokens}


# -------------------------------------------------------------------------------------------------------------- merging


def test_tokenizers_and_transformers_agree_on_every_document(run):
    out, report = run
    expected = tokenizers_ids(out, TEXTS)
    assert load_tokenizer(out).encode_batch(TEXTS, add_special_tokens=False) == expected
    assert report.documents >= 600


def test_text_without_chinese_keeps_its_ids_and_chinese_gets_shorter(base, run):
    texts = [*make.english(500, seed=3), "ไทย العربية ᄀ́ é 😀 ䷀ \u2581 \xad ½"]
    assert tokenizers_ids(base, texts) == tokenizers_ids(run[0], texts)
    before, after = (tokenizers_ids(one, make.chinese(200, seed=3)) for one in (base, run[0]))
    assert sum(map(len, after)) < 0.5 * sum(map(len, before))


def test_every_text_that_came_back_from_its_ids_still_does(base, run):
    old, new = load_tokenizer(base), load_tokenizer(run[0])
    back = [[one.decode(one.encode(text, add_special_tokens=False)) for text in TEXTS] for one in (old, new)]
    assert back[0] == back[1]
    assert sum(text == again for text, again in zip(TEXTS, back[1], strict=True)) > len(TEXTS) - 3


def test_old_tokens_and_special_ones_keep_their_ids_and_new_ones_follow_them_all(base, run):
    out, report = run
    old, new = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(out)
    assert new.get_vocab().items() >= old.get_vocab().items()
    first = max(old.get_vocab().values()) + 1
    assert (report.base_size, report.vocab_size % 64) == (first, 0)
    names = {number: token for token, number in vocabulary(out).items()}
    added = [names[first + i] for i in range(report.new_pieces)]
    assert all(map(is_cjk_token, added))
    filling = [names[i] for i in range(first + report.new_pieces, report.vocab_size)]
    assert len(filling) == report.reserved and all(one.startswith("<|reserved_") for one in filling)
    assert sorted(names) == list(range(report.vocab_size)) and len(new) == report.vocab_size


def test_special_tokens_are_read_put_in_and_shown_as_the_base_does(base, run):
    old, new = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(run[0])
    text = "<|begin_of_text|>the city<|eot_id|> [TOOL]<|end_of_text|>"
    assert new.encode(text) == old.encode(text) and new.encode("the city") == old.encode("the city")
    assert (new.bos_token, new.eos_token_id, new.chat_template) == (old.bos_token, old.eos_token_id, old.chat_template)
    assert tokenizers_ids(run[0], [text]) == tokenizers_ids(base, [text])  # as text


def test_merges_are_written_as_the_base_writes_them_behind_its_own(base, run):
    old, new = (json.loads((one / "tokenizer.json").read_text())["model"] for one in (base, run[0]))
    assert new["merges"][: len(old["merges"])] == old["merges"]
    assert {type(one) for one in new["merges"]} == {type(old["merges"][0])}


def test_no_file_of_the_base_s_vocabulary_is_left_stale(tmp_path, style, run):
    files = {path.name for path in run[0].iterdir()}
    expected = {"tokenizer.json", "tokenizer_config.json", "extension.json"}
    assert files == expected | ({"vocab.json", "merges.txt"} if style == "gpt2" else set())
    if style == "gpt2":
        vocab, merges = (str(run[0] / name) for name in ("vocab.json", "merges.txt"))
        model = Tokenizer.from_file(str(run[0] / "tokenizer.json"))
        model.model = type(model.model).from_file(vocab, merges)
        assert [model.encode(text, add_special_tokens=False).ids for text in TEXTS[20:]] == [
            Tokenizer.from_file(str(run[0] / "tokenizer.json")).encode(text, add_special_tokens=False).ids
            for text in TEXTS[20:]
        ]


def test_the_report_counts_what_the_corpus_uses(run):
    out, report = run
    seen = {i for ids in tokenizers_ids(out, make.mixed(600)) for i in ids}
    assert report.used == sum(i in seen for i in range(report.base_size, report.base_size + report.new_pieces))
    assert report.used > 0 and report.dropped["other scripts"] > 0
    assert (report.round_trip_failures, report.other_changed) == (0, 0) and report.other_documents >= 200


def test_a_new_token_s_row_is_made_of_the_leaves_of_its_merges(base, run):
    old = load_tokenizer(base)
    note = json.loads((run[0] / "extension.json").read_text())
    growth = compare(old, load_tokenizer(run[0]), old.vocab_size, note["reserved"])
    new, whole = opened(run[0]), opened(base)
    merges = (pair if isinstance(pair, list) else pair.split(" ") for pair in new.content["model"]["merges"])
    pairs = {left + right: (left, right) for left, right in merges if left + right not in whole.vocab}

    def leaves(token: str) -> list[int]:
        return [i for half in pairs[token] for i in leaves(half)] if token in pairs else [whole.vocab[token]]

    assert {i: list(parts) for i, parts in growth.sources.items() if parts} == {
        new.vocab[token]: leaves(token) for token in pairs
    }
    assert any("\ufffd" in old.decode(parts) for parts in growth.sources.values())  # cut characters are among them


def test_an_added_control_token_is_made_of_the_bytes_of_its_name(tmp_path, base):
    hf = AutoTokenizer.from_pretrained(base)
    hf.add_special_tokens({"pad_token": "<the 天>"})
    hf.save_pretrained(tmp_path / "new")
    old = load_tokenizer(base)
    growth = compare(old, load_tokenizer(tmp_path / "new"), rows=old.vocab_size)
    (parts,) = growth.sources.values()
    assert old.decode(parts) == "<the 天>"


# ------------------------------------------------------------------------------------------------ which tokens to take


def test_a_letter_for_each_byte_is_gpt2_s():
    assert dict(enumerate(letters())) == bytes_to_unicode()
    assert bytes_of(spell("天 é")) == "天 é".encode() and bytes_of("天") is None


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ("天气".encode(), True),
        (" 天".encode(), True),
        ("한국".encode(), True),
        ("，".encode(), True),
        ("𠮷".encode(), True),
        ("天".encode() + b"\xe6", True),
        (b"\xe5\xa4", True),
        (b"\xe6", True),
        (b"\xa4\xa9" + "气".encode(), True),
        (b" \xe6\xb0", True),
        (b"\xe4", False),  # hexagrams begin so too
        (b"\xef", False),
        (b"\xf0\x9f", False),  # emoji
        (b"\xf0\xa0", True),
        (b"\xed", False),  # what would be surrogates
        (b"\xa4\xa9", False),  # any character may end so
        (b" \xa4\xa9" + "气".encode(), False),
        ("天a".encode(), False),
        ("\u2581天".encode(), False),
        ("天 气".encode(), False),
        ("。\n".encode(), False),
        (b"the", False),
        (b" ", False),
        (b"\xa4\xa9\xa4\xa9" + "气".encode(), False),
    ],
)
def test_a_token_is_cjk_if_only_cjk_text_can_hold_it(data, wanted):
    assert is_cjk_token("".join(letters()[byte] for byte in data)) is wanted


def test_special_tokens_are_no_cjk_tokens():
    assert not is_cjk_token("<｜天｜>") and not is_cjk_token("天")  # not spelled in bytes


def bytes_pairs(text: str) -> list[str]:
    return [letters()[byte] for byte in text.encode()]


def test_a_character_whose_last_bytes_were_merged_first_is_put_together_from_its_beginning(tmp_path, base):
    one, two, three = bytes_pairs("龘")
    choice = Choice(opened(base), "cjk")
    choice.choose([(two, three), (one, two + three), (one + two + three, one + two + three)])
    assert choice.merges == [(one, two), (one + two, three), (one + two + three,) * 2]
    assert choice.dropped["no text reaches them"] == 0
    merge_into(tmp_path, base, [(two, three), (one, two + three)])
    assert opened(base).size + 1 in tokenizers_ids(tmp_path / "out", ["龘"])[0]


def test_a_character_that_begins_like_others_that_are_not_cjk_is_left_as_it_is(base):
    one, two, three = bytes_pairs("￥")  # begins as the replacement character does
    choice = Choice(opened(base), "cjk")
    choice.choose([(two, three), (one, two + three), *pairs_of(opened(base), "龘")])
    assert one + two not in choice.tokens and one + two + three not in choice.tokens


def test_tokens_whose_parts_are_gone_or_that_an_earlier_merge_breaks_are_dropped(base):
    sky, air, park = spell("天"), spell("气"), spell("园")
    chars = [*pairs_of(opened(base), "天"), *pairs_of(opened(base), "气"), *pairs_of(opened(base), "园")]
    choice = Choice(opened(base), "cjk")
    choice.choose([*chars, (air, park), (sky, air), (sky + air, park), (spell("好"), sky)])
    assert {sky + air, air + park} <= choice.tokens.keys()
    assert not {sky + air + park, spell("好") + sky} & choice.tokens.keys()
    assert choice.dropped["no text reaches them"] == 2


def pairs_of(base: ByteLevel, character: str) -> list[tuple[str, str]]:
    """The merges that put a character together from what the base has of it."""
    values = [one.value for one in base.bare().model.tokenize(spell(character))]
    return [("".join(values[:end]), values[end]) for end in range(1, len(values))]


def test_unused_tokens_go_but_not_those_that_used_ones_are_merged_from(base):
    one, text = opened(base), "天气公园"
    chars = [pair for character in (*text, "中", "国") for pair in pairs_of(one, character)]
    a, b, c, d = map(spell, text)
    learned = [*chars, (a, b), (c, d), (a + b, c + d), (spell("中"), spell("国"))]
    words = Words(one)
    words.add([text, "天气。公园。"])
    choice = Choice(one, "cjk")
    choice.choose(learned)
    choice.drop_unused(words, 1)
    assert {a + b, c + d, a + b + c + d} <= choice.tokens.keys()
    assert spell("中国") not in choice.tokens.keys() - one.vocab.keys()


def test_what_is_made_of_a_token_that_never_stands_alone_goes_and_characters_stay(base):
    one = opened(base)
    words, choice = Words(one), Choice(one, "cjk")
    words.add(["天气公园"] * 3)
    learned = [pair for character in "天气公园" for pair in pairs_of(one, character)]
    a, b, c, d = map(spell, "天气公园")
    choice.choose([*learned, (a, b), (a + b, c), (a + b + c, d)])
    choice.drop_unused(words, 1)
    assert a + b in choice.tokens and words.uses(choice.tokens)[a + b] == 3
    assert not {a + b + c, a + b + c + d} & choice.tokens.keys()
    tokens = {"ab": ("a", "b"), "abc": ("ab", "c"), "xy": ("x", "y"), "xyz": ("xy", "z")}
    assert idlers(tokens, {"ab": 0, "abc": 5, "xy": 0, "xyz": 7}) == ["xy", "ab"]
    assert supported(tokens, ["abc"]) == {"ab", "abc"}


def test_the_first_tokens_are_taken_where_only_so_many_are_wanted(tmp_path, base, run):
    corpus = make.jsonl(tmp_path / "c.jsonl", make.mixed(200))
    train(VocabTrainArgs((corpus,), str(tmp_path / "new.json"), base=str(base), vocab_size=200, max_lines=500))
    report = merge(VocabMergeArgs(str(base), str(tmp_path / "new.json"), str(tmp_path / "out"), max_new=25))
    assert report.new_pieces == 25 and report.used is None and report.dropped["beyond --max-new"] > 0


def test_any_script_takes_latin_tokens_too(tmp_path, base):
    report = merge_into(tmp_path, base, [("t", "w"), ("q", "q")], script="any")
    ids = tokenizers_ids(tmp_path / "out", ["qqtw"])
    assert report.new_pieces == 2 and {report.base_size, report.base_size + 1} <= set(ids[0])
    assert load_tokenizer(tmp_path / "out").encode_batch(TEXTS, add_special_tokens=False) == tokenizers_ids(
        tmp_path / "out", TEXTS
    )


# ------------------------------------------------------------------------------------------------ bases of other kinds


def test_a_gap_between_ids_becomes_a_reserved_row(tmp_path):
    base = byte.directory(tmp_path / "base")
    content = json.loads((base / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    free = vocab.pop(max(vocab, key=vocab.get))  # its last token, before the special ones
    content["model"]["merges"].pop()
    for token in content["added_tokens"]:
        vocab[token["content"]] = token["id"]
    (base / "tokenizer.json").write_text(json.dumps(content))
    report = merge_into(tmp_path, base, pairs_of(opened(base), "龘"))
    assert vocabulary(tmp_path / "out")["<|reserved_0|>"] == free and report.reserved == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<|eot_id|>") == free + 3


def test_gpt2_s_two_files_alone_are_a_base(tmp_path):
    base = byte.directory(tmp_path / "base", "gpt2", tokenizer_class="GPT2Tokenizer")
    (base / "tokenizer.json").unlink()
    merge_into(tmp_path, base, pairs_of(opened(base), "龘"))
    old, new = load_tokenizer(base), load_tokenizer(tmp_path / "out")
    assert new.encode_batch(make.english(50)) == old.encode_batch(make.english(50))
    assert new.encode("龘")[-1] >= old.vocab_size and not (tmp_path / "out" / "vocab.json").exists()


def test_a_published_tiktoken_file_is_a_base_and_becomes_a_tokenizer_json(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    ranks(base / "qwen.tiktoken")
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "QWenTokenizer", "model_max_length": 77}')
    merge_into(tmp_path, base, pairs_of(opened(base), "龘"))
    old, new = load_tokenizer(base), load_tokenizer(tmp_path / "out")
    texts = make.english(50)
    assert new.encode_batch(texts) == old.encode_batch(texts) and new.eos == old.eos
    assert new.encode("龘")[-1] >= old.vocab_size and new.decode(new.encode("龘")) == "龘"
    assert not list((tmp_path / "out").glob("*.tiktoken"))


def test_where_transformers_class_reads_otherwise_the_file_gets_the_generic_one(tmp_path):
    base = byte.directory(tmp_path / "base", "llama3", tokenizer_class="GPT2Tokenizer")
    merge_into(tmp_path, base, pairs_of(opened(base), "龘"))
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    texts = [*TEXTS, "1234567 IT'S"]
    assert load_tokenizer(tmp_path / "out").encode_batch(texts, add_special_tokens=False) == tokenizers_ids(
        tmp_path / "out", texts
    )


def test_a_model_that_would_find_names_of_rows_in_a_text_is_refused(tmp_path):
    base = byte.directory(tmp_path / "base")
    content = json.loads((base / "tokenizer.json").read_text())
    content["pre_tokenizer"] = content["pre_tokenizer"]["pretokenizers"][1]  # a text is one word
    (base / "tokenizer.json").write_text(json.dumps(content))
    extended, reserved = opened(base).extended([], 64)
    with pytest.raises(ValueError, match="names of rows"):
        check_names(opened(base), extended, reserved)


@pytest.mark.parametrize("option", ["end_of_word_suffix", "dropout"])
def test_a_model_with_other_rules_is_refused(tmp_path, option):
    base = byte.directory(tmp_path / "base")
    content = json.loads((base / "tokenizer.json").read_text())
    content["model"][option] = "</w>" if option == "end_of_word_suffix" else 0.1
    (base / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=option):
        open_byte_level(base)


def test_a_sentencepiece_directory_is_none(tmp_path):
    base = make.base_directory(tmp_path / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(base)
    assert open_byte_level(base) is None and open_byte_level(base / "tokenizer.model") is None


def test_merges_of_another_base_and_files_of_another_kind_are_refused(tmp_path):
    one, other = (opened(byte.directory(tmp_path / name, name)) for name in ("gpt2", "llama3"))
    file = tmp_path / "new.json"
    file.write_text(dump_merges(one, [("a", "b")]))
    assert load_merges(file, one) == [("a", "b")]
    with pytest.raises(ValueError, match="merges of another tokenizer"):
        load_merges(file, other)
    for content in ("no json", "[]", '{"merges": []}', '{"format": "byte-level merges", "merges": [["a"]]}'):
        file.write_text(content)
        with pytest.raises(ValueError, match="no list of merges"):
            load_merges(file, one)


def test_the_same_model_with_other_special_tokens_and_spelling_is_the_same_base(tmp_path):
    base = byte.directory(tmp_path / "base")
    digest, content = opened(base).digest, json.loads((base / "tokenizer.json").read_text())
    content["added_tokens"].pop()
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (base / "tokenizer.json").write_text(json.dumps(content))
    assert opened(base).digest == digest


@pytest.mark.parametrize(
    ("options", "match"),
    [({"output": "new.model"}, "must end in .json"), ({"model_type": "unigram"}, "continued with bpe")],
)
def test_options_of_sentencepiece_are_refused_with_a_byte_level_base(tmp_path, options, match):
    base, corpus = byte.directory(tmp_path / "base"), make.jsonl(tmp_path / "c.jsonl", make.mixed(9))
    options = {"output": "new.json"} | options
    output = str(tmp_path / options.pop("output"))
    with pytest.raises(ValueError, match=match):
        train(VocabTrainArgs((corpus,), output, base=str(base), **options))


def test_sentencepiece_is_trained_alike_with_its_base_and_without(tmp_path):
    base, corpus = make.base_directory(tmp_path / "base"), make.jsonl(tmp_path / "c.jsonl", make.mixed(60))
    for name, given in (("a.model", None), ("b.model", str(base))):
        train(VocabTrainArgs((corpus,), str(tmp_path / name), base=given, vocab_size=150))
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    with pytest.raises(ValueError, match="must end in .model"):
        VocabTrainArgs((corpus,), str(tmp_path / "new.json")).validate()


def test_the_command_leads_from_text_to_a_verified_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make.jsonl(tmp_path / "corpus.jsonl", make.mixed(300))
    make.jsonl(tmp_path / "held.jsonl", make.mixed(100, seed=5))
    base = byte.directory(tmp_path / "base")
    make.llama(base, opened(base).size)
    steps = (
        "train --input corpus.jsonl --output new.json --base base --vocab-size 200",
        "merge --base base --new new.json --output merged --corpus corpus.jsonl",
        "analyze --base base --new merged --held-out held.jsonl --json analysis.json",
        "init --base base --tokenizer merged --output grown",
        "verify --base base --model grown --json proof.json",
    )
    for step in steps:
        assert main(["vocab", *step.split()]) == 0, step
    checks = json.loads(Path("proof.json").read_text())["checks"]
    assert all(check["ok"] for check in checks) and "new logits" in [check["name"] for check in checks]
    report = json.loads(Path("analysis.json").read_text())
    zh, other = report["languages"]["zh"], report["languages"]["other"]
    assert zh["new_tokens"] < 0.6 * zh["old_tokens"] and other["unchanged"] == other["documents"] > 0
    assert report["new_tokens"] >= report["used"] > 0
