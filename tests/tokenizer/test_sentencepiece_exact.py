"""Directories with a tokenizer.model alone: every id against the sentencepiece library, whatever the model does."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AutoTokenizer

from megatron_patch.tokenizer import load_tokenizer
from megatron_patch.tokenizer.sentencepiece_fast import obstacle
from megatron_patch.tokenizer.sentencepiece_model import NORMAL, load_proto
from tests.tokenizer import make
from tests.tokenizer.published import HARD, sp_model

SYMBOLS = ("<tool>", "<tool_end>", "==>")
SPACES = tuple(f"a{' ' * i}b{' ' * (i // 2)}" for i in range(40))
TEXTS = (
    *HARD, *SPACES, *make.corpus(120), " ", "   ", "▁", " ▁a▁ ", "<s>", "</s> x", "<unk>", "\n a \n", "\ta  ",
    "<tool>x<tool_end>", "x <tool> y ==> z", "==>==>", "<tool", "ㄱㅏㄱ 각 ﬁ Å １２", "\u1100\u1161\u11a8",
)  # fmt: skip
LLAMA = {"remove_extra_whitespaces": False}


def directory(tmp_path: Path, symbols: tuple[str, ...] = (), settings: Any = None, **options: Any) -> Path:
    """A directory as Llama's, with a tokenizer.model that is trained with these options."""
    sp_model(tmp_path / "tokenizer.model", symbols, **(LLAMA | options))
    content = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    content["add_bos_token"] = True
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content | (settings or {})))
    return tmp_path


def change(path: Path, scores: dict[str, float]) -> None:
    """Gives pieces of a model other scores; those it has not are put at the front, where ids are low."""
    proto = load_proto(path / "tokenizer.model")
    known = {one.piece: one for one in proto.pieces}
    for piece, score in scores.items():
        if piece not in known:
            proto.pieces.insert(3, ModelProto.SentencePiece(piece=piece, score=score, type=NORMAL))
        else:
            known[piece].score = score
    (path / "tokenizer.model").write_bytes(proto.SerializeToString())


LENGTHS = (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11, 15)
"""Of Mistral's pieces of spaces, by id."""


def spaces_as_llama_has_them(path: Path, lengths: Sequence[int] = LENGTHS) -> None:
    change(path, {"▁" * length: -1e9 for length in (*reversed(lengths), 1)})


def check(path: Path, texts: tuple[str, ...] = TEXTS, bos: bool = True) -> None:
    """Every text has the ids of sentencepiece, comes back as from sentencepiece, and has them in a worker too."""
    model, tokenizer = SentencePieceProcessor(model_file=str(path / "tokenizer.model")), load_tokenizer(path)
    expected = model.encode(list(texts))
    assert tokenizer.encode_batch(texts, add_special_tokens=False) == expected
    with_bos = [[model.bos_id()] * bos + ids for ids in expected]
    assert tokenizer.encode_batch(texts) == with_bos
    assert pickle.loads(pickle.dumps(tokenizer.encoder_recipe())).build()(texts) == with_bos
    round_trips = [(text, ids) for text, ids in zip(texts, expected, strict=True) if model.decode(ids) == text]
    assert all(tokenizer.decode(ids) == text for text, ids in round_trips)


@pytest.mark.parametrize("legacy", [None, False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"remove_extra_whitespaces": True}, {"add_dummy_prefix": False}, {"byte_fallback": False}],
    ids=["as llama", "spaces taken away", "nothing put before", "no bytes"],
)
def test_every_document_has_the_ids_of_sentencepiece(tmp_path, options, legacy):
    path = directory(tmp_path, settings={} if legacy is None else {"legacy": legacy}, **options)
    spaces_as_llama_has_them(path)
    check(path)
    assert load_tokenizer(path).hf.is_fast


def test_a_model_of_single_characters_is_read_too(tmp_path):
    path = directory(tmp_path, max_sentencepiece_length=1)
    check(path)
    assert load_tokenizer(path).hf.is_fast


def test_transformers_alone_gives_others(tmp_path):
    path = directory(tmp_path)
    spaces_as_llama_has_them(path)
    ids = AutoTokenizer.from_pretrained(path)(list(TEXTS), add_special_tokens=False, split_special_tokens=True)
    model = SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    assert sum(a != b for a, b in zip(ids["input_ids"], model.encode(list(TEXTS)), strict=True)) > 10


@pytest.mark.parametrize("lengths", [(2, 3), (2, 3, 4), (4, 2, 3), (2, 3, 4, 5, 6, 7)])
def test_runs_of_spaces_fall_to_the_leftmost_piece_whatever_lengths_there_are(tmp_path, lengths):
    path = directory(tmp_path)
    spaces_as_llama_has_them(path, lengths)
    check(path, SPACES)
    assert load_tokenizer(path).hf.is_fast


@pytest.mark.parametrize("prefix", [True, False])
def test_symbols_of_the_model_itself_are_read_as_sentencepiece_reads_them(tmp_path, prefix):
    path = directory(tmp_path, SYMBOLS, add_dummy_prefix=prefix)
    assert "symbols" in obstacle(load_proto(path / "tokenizer.model"))
    check(path)


def test_a_model_that_fast_tokenizers_cannot_repeat_is_read_by_sentencepiece_itself(tmp_path):
    path = directory(tmp_path)
    tied = [one.piece for one in load_proto(path / "tokenizer.model").pieces if one.type == NORMAL][:40]
    change(path, dict.fromkeys(tied, 0.0))
    assert "one score" in obstacle(load_proto(path / "tokenizer.model"))
    check(path)
    assert not load_tokenizer(path).hf.is_fast


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "no BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "table"),
        ({"treat_whitespace_as_suffix": True}, "spaces"),
    ],
)
def test_so_is_one_that_is_no_plain_bpe(tmp_path, options, reason):
    path = directory(tmp_path, settings={"chat_template": "{{ messages }}"}, **options)
    assert reason in obstacle(load_proto(path / "tokenizer.model"))
    check(path)
    tokenizer = load_tokenizer(path)
    assert not tokenizer.hf.is_fast and tokenizer.hf.chat_template == "{{ messages }}"
    ids = tokenizer.encode("</s>", parse_special_tokens=True)
    assert ids == [tokenizer.bos, tokenizer.eos]


def test_settings_are_those_of_the_directory(tmp_path):
    pad = {"content": "<pad>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings = {
        "chat_template": "{% for m in messages %}<s>{{ m.content }}{% endfor %}",
        "add_bos_token": False,
        "add_eos_token": True,
        "pad_token": "<pad>",
        "model_max_length": 321,
    }
    path = directory(tmp_path, settings=settings)
    size = len(load_proto(path / "tokenizer.model").pieces)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(size): pad | {"special": True}, str(size + 1): pad | {"content": "[TOOL]"}}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, model = load_tokenizer(path), SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    assert tokenizer.encode("Paris <pad>") == [*model.encode("Paris <pad>"), tokenizer.eos]
    assert tokenizer.encode("<pad>", parse_special_tokens=True) == [size, tokenizer.eos]
    assert tokenizer.encode("[TOOL]x")[0] == size + 1  # not special: text holds it, as transformers has it
    assert tokenizer.encoder_recipe().build()(["a[TOOL]x"]) == [tokenizer.encode("a[TOOL]x")]
    assert (tokenizer.vocab_size, tokenizer.hf.pad_token_id, tokenizer.hf.model_max_length) == (size + 2, size, 321)
    messages = [{"role": "user", "content": "Paris"}]
    text = tokenizer.hf.apply_chat_template(messages, tokenize=False)
    ids = tokenizer.hf.apply_chat_template(messages, return_dict=False)
    assert text == "<s>Paris" and tokenizer.decode(ids) == "<s>Paris"


@pytest.mark.parametrize(("legacy", "spaces"), [(False, 1), (True, 2)])
def test_a_space_stands_before_the_first_text_or_before_each_between_special_tokens(tmp_path, legacy, spaces):
    path = directory(tmp_path, settings={"legacy": legacy, "add_bos_token": False})
    tokens = load_tokenizer(path).encode("x</s>x", parse_special_tokens=True)
    tokens = load_tokenizer(path).hf.convert_ids_to_tokens(tokens)
    assert "".join(tokens) == ("▁x</s>x" if spaces == 1 else "▁x</s>▁x")


def test_a_tokenizer_json_beside_the_model_wins_as_in_transformers(tmp_path):
    path = directory(tmp_path)
    spaces_as_llama_has_them(path)
    exact = load_tokenizer(path).encode_batch(TEXTS)
    AutoTokenizer.from_pretrained(path).save_pretrained(path)
    assert (path / "tokenizer.json").is_file()
    theirs = AutoTokenizer.from_pretrained(path)(list(TEXTS), split_special_tokens=True)["input_ids"]
    assert load_tokenizer(path).encode_batch(TEXTS) == theirs != exact


def test_saving_what_was_loaded_keeps_the_ids(tmp_path):
    path = directory(tmp_path)
    spaces_as_llama_has_them(path)
    tokenizer = load_tokenizer(path)
    tokenizer.hf.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    (tmp_path / "saved" / "tokenizer_config.json").write_text(
        json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    assert load_tokenizer(tmp_path / "saved").encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_a_directory_without_settings_but_a_model_type_is_read_exactly_too(tmp_path):
    path = directory(tmp_path)
    spaces_as_llama_has_them(path)
    (path / "tokenizer_config.json").unlink()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    check(path, bos=False)
