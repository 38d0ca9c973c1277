"""The merged tokenizer against sentencepiece, transformers and its base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AutoTokenizer

from megatron_patch.tokenizer import load_tokenizer
from megatron_patch.tokenizer.sentencepiece_model import load_proto
from megatron_patch.vocab.arguments import VocabMergeArgs
from megatron_patch.vocab.merge import merge
from megatron_patch.vocab.merge_report import PROBES, Outcome
from megatron_patch.vocab.pieces import extend, reachable, supported
from megatron_patch.vocab.scripts import is_cjk_piece, language
from tests.vocab import make

TEXTS = (*PROBES, *make.mixed(2000, seed=7))


def sp(directory: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


def pieces(directory: Path) -> list[str]:
    return [one.piece for one in load_proto(directory / "tokenizer.model").pieces]


def merge_into(tmp_path: Path, base: Path, proto: ModelProto, **options: object) -> Path:
    (tmp_path / "new.model").write_bytes(proto.SerializeToString())
    options = {"pad_multiple": 1} | options
    merge(VocabMergeArgs(str(base), str(tmp_path / "new.model"), str(tmp_path / "out"), **options))
    return tmp_path / "out"


def proto_of(*wanted: str) -> ModelProto:
    """A model with just these pieces, the best first."""
    proto = make.new_proto()
    del proto.pieces[3:]
    for rank, piece in enumerate(wanted):
        proto.pieces.add(piece=piece, score=-float(rank), type=1)
    return proto


def test_sentencepiece_and_transformers_agree_on_every_document(merged):
    expected = sp(merged).encode(list(TEXTS))
    hf = AutoTokenizer.from_pretrained(merged)
    assert hf(list(TEXTS), add_special_tokens=False, split_special_tokens=True)["input_ids"] == expected
    assert load_tokenizer(merged).encode_batch(TEXTS, add_special_tokens=False) == expected


def test_text_without_chinese_keeps_its_ids_and_chinese_gets_shorter(base, merged):
    before, after = (sp(one).encode(make.english(500, seed=3)) for one in (base, merged))
    assert before == after
    before, after = (sp(one).encode(make.chinese(200, seed=3)) for one in (base, merged))
    assert sum(map(len, after)) < 0.5 * sum(map(len, before))


def test_every_text_comes_back_from_its_ids(merged):
    hf, model = AutoTokenizer.from_pretrained(merged), sp(merged)
    texts = [text for text in TEXTS if "\x00" not in text]
    assert [hf.decode(hf.encode(text, add_special_tokens=False, split_special_tokens=True)) for text in texts] == texts
    assert [model.decode(model.encode(text)) for text in texts] == texts


def test_old_pieces_keep_their_ids_and_new_ones_are_chinese_at_tail_rank(base, merged):
    old, new = load_proto(base / "tokenizer.model").pieces, load_proto(merged / "tokenizer.model").pieces
    assert list(new[: len(old)]) == list(old)
    added = [one for one in new[len(old) :] if one.type == 1]
    assert added and all(is_cjk_piece(one.piece) for one in added)
    assert max(one.score for one in added) < min(one.score for one in old if one.score > -1e8)
    assert [one.score for one in added] == sorted({one.score for one in added}, reverse=True)


def test_the_report_says_what_was_written(merging, merged):
    names = pieces(merged)
    assert merging.vocab_size == len(names) == len(AutoTokenizer.from_pretrained(merged))
    assert merging.vocab_size % 64 == 0
    assert merging.reserved == sum(name.startswith("<|reserved_") for name in names)
    assert merging.vocab_size == merging.base_size + merging.new_pieces + merging.reserved
    seen = {i for ids in sp(merged).encode(make.mixed(600)) for i in ids}
    assert merging.used == sum(i in seen for i in range(merging.base_size, merging.base_size + merging.new_pieces)) > 0
    assert (merging.round_trip_failures, merging.other_changed) == (0, 0)
    assert merging.other_documents >= 200 and merging.dropped["other scripts"] > 0


def test_reserved_rows_are_never_produced_by_their_own_name(merged):
    hf, text = AutoTokenizer.from_pretrained(merged), "<|reserved_0|>"
    assert hf.encode(text, add_special_tokens=False) == sp(merged).encode(text)
    assert len(hf.encode(text, add_special_tokens=False)) > 1
    assert hf.convert_tokens_to_ids(text) == pieces(merged).index(text)


def test_special_tokens_and_the_chat_template_are_the_base_s(base, merged):
    old, new = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(merged)
    for role in ("bos_token_id", "eos_token_id", "unk_token_id", "chat_template"):
        assert getattr(new, role) == getattr(old, role), role
    assert new.encode("the city")[0] == new.bos_token_id == old.encode("the city")[0]
    assert new("a", "b")["input_ids"].count(new.bos_token_id) == 2
    assert new.encode("</s>") == [new.bos_token_id, new.eos_token_id]


def test_a_stale_tokenizer_json_of_the_base_does_not_win(tmp_path, new):
    base = make.base_directory(tmp_path / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(base)
    assert (base / "tokenizer.json").is_file()
    out = merge_into(tmp_path, base, load_proto(new))
    assert len(AutoTokenizer.from_pretrained(out)) == len(pieces(out)) > len(pieces(base))
    assert json.loads((out / "tokenizer.json").read_text())["model"]["vocab"].keys() == set(pieces(out))


def test_added_tokens_after_the_model_keep_their_ids(tmp_path, new):
    base = make.base_directory(tmp_path / "base")
    hf = AutoTokenizer.from_pretrained(base)
    hf.add_special_tokens({"pad_token": "<pad>"})
    hf.add_tokens(["[TOOL]"])
    hf.save_pretrained(base)
    out = AutoTokenizer.from_pretrained(merge_into(tmp_path, base, load_proto(new)))
    size = len(pieces(base))
    assert out.convert_tokens_to_ids(["<pad>", "[TOOL]"]) == [size, size + 1]
    assert is_cjk_piece(out.convert_ids_to_tokens(size + 2))
    assert out.encode("<pad>", add_special_tokens=False) == [size]
    assert "<pad>" in (settings := (tmp_path / "out" / "tokenizer_config.json").read_text()), settings


def test_pieces_that_no_text_reaches_are_dropped(tmp_path, base):
    out = merge_into(tmp_path, base, proto_of("天气", "计算机", "人民中国"))
    assert pieces(out)[len(pieces(base)) :] == ["天气"]


def test_a_piece_that_an_earlier_merge_always_breaks_is_dropped(tmp_path, base):
    # 天气公园 can be made of 天气 and 公园, but 气公 comes first and takes a character of each.
    out = merge_into(tmp_path, base, proto_of("气公", "天气", "公园", "天气公园"))
    assert pieces(out)[len(pieces(base)) :] == ["气公", "天气", "公园"]


def test_unused_pieces_are_dropped_but_not_those_that_used_ones_are_merged_from(tmp_path, base):
    corpus = make.jsonl(tmp_path / "corpus.jsonl", ["天气公园天气公园", "the city"])
    proto = proto_of("天气", "公园", "天气公园", "中国")
    out = merge_into(tmp_path, base, proto, corpus=(corpus,))
    assert pieces(out)[len(pieces(base)) :] == ["天气", "公园", "天气公园"]


def test_support_follows_the_merge_that_is_met_first():
    assert supported(["abcd"], ["ab", "cd", "bcd", "abcd", "x"], set("abcd")) == ["ab", "cd", "abcd"]


def test_reachable_means_that_the_piece_encodes_to_itself():
    base = make.base_proto()
    assert reachable(extend(base, ["天气", "天公气"]), ["天气", "天公气"]) == ["天气"]


def test_a_model_file_alone_is_a_base(tmp_path, base, new):
    out = merge_into(tmp_path, base / "tokenizer.model", load_proto(new))
    hf = AutoTokenizer.from_pretrained(out)
    assert hf.encode("今天天气") == [1, *sp(out).encode("今天天气")]


def test_a_published_baichuan_directory_keeps_its_way_of_being_read(tmp_path, new):
    base = make.base_directory(tmp_path / "base", tokenizer_class="BaichuanTokenizer", add_bos_token=False)
    out = merge_into(tmp_path, base, load_proto(new))
    assert not (out / "tokenizer.json").exists()
    assert load_tokenizer(out).encode_batch(TEXTS[:200]) == sp(out).encode(list(TEXTS[:200]))


def test_any_script_takes_latin_pieces_too(tmp_path, base):
    out = merge_into(tmp_path, base, proto_of("▁weatherandmusic", "天气", "▁thecapital", "▁citywhile"), script="any")
    assert pieces(out)[len(pieces(base))] == "天气"
    assert load_tokenizer(out).encode_batch(TEXTS, add_special_tokens=False) == sp(out).encode(list(TEXTS))


@pytest.mark.parametrize(
    ("problem", "match"),
    [
        ("unigram", "UNIGRAM"),
        ("nothing", "no piece to add"),
        ("garbage", "no SentencePiece model"),
        ("json", "holds no"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_leaves_nothing(tmp_path, base, problem, match):
    new = proto_of("天", "abc") if problem == "nothing" else proto_of("天气")
    if problem == "unigram":
        base = tmp_path / "unigram.model"
        base.write_bytes(make.sp_proto(make.mixed(200), model_type="unigram", vocab_size=150).SerializeToString())
    if problem == "garbage":
        base = tmp_path / "garbage.model"
        base.write_bytes(b"\xff\xff no model")
    if problem == "json":
        base = tmp_path / "json"
        base.mkdir()
    with pytest.raises(ValueError, match=match):
        merge_into(tmp_path, base, new)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_changed_ids_count_where_a_text_has_no_chinese_and_lost_text_everywhere():
    outcome = Outcome()
    outcome.add("the city", broken=False, changed=True)
    outcome.add("the city", broken=True, changed=False)
    outcome.add("天气", broken=True, changed=True)
    assert outcome == Outcome(documents=3, round_trip_failures=2, other_documents=2, other_changed=1)


def test_an_existing_output_is_only_replaced_on_request(tmp_path, base):
    out = merge_into(tmp_path, base, proto_of("天气"))
    with pytest.raises(ValueError, match="--overwrite"):
        merge_into(tmp_path, base, proto_of("公园"))
    assert pieces(merge_into(tmp_path, base, proto_of("公园"), overwrite=True))[-1] == "公园"
    assert pieces(out)[-1] == "公园"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("今天 good 天气", "zh"),
        ("これは日本語の文", "ja"),
        ("한국어 문장", "ko"),
        ("plain text, 中", "other"),
        ("", "other"),
    ],
)
def test_a_document_s_language_is_told_by_its_characters(text, name):
    assert language(text) == name
