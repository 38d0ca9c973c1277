"""Directories of published Python tokenizers, read without their code, against sentencepiece and a plain BPE."""

from __future__ import annotations

import json
import pickle
import re
import sys
import unicodedata

import pytest
import regex
from transformers import AutoTokenizer

from megatron_patch.tokenizer import load_tokenizer
from tests.tokenizer import make
from tests.tokenizer.published import HARD, MARKER, plain_bpe, published_class, ranks, sp_model

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = WORDS.replace("DIGITS", r"\p{N}")
GLM4 = WORDS.replace("DIGITS", r"\p{N}{1,3}")
ICE = ("<n>", "<|tab|>", *(f"<|blank_{i}|>" for i in range(2, 81)))


def tiktoken_ids(text: str, found: dict[bytes, int], pattern: str) -> list[int]:
    return [i for word in regex.findall(pattern, text) for i in plain_bpe(word.encode(), found)]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("options", [{}, {"byte_fallback": False, "normalization_rule_name": "nmt_nfkc"}])
def test_a_baichuan_directory_gives_the_ids_of_sentencepiece(tmp_path, model_type, options):
    sp = sp_model(tmp_path / "tokenizer.model", model_type=model_type, **options)
    published_class(tmp_path, "BaichuanTokenizer", add_bos_token=False, pad_token={"content": "<unk>"})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_batch(HARD) == [sp.encode(text) for text in HARD]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (sp.bos_id(), sp.eos_id(), sp.get_piece_size())
    assert not (tmp_path / MARKER).exists()


def test_a_bare_sentencepiece_file_is_read_as_internlm_does_with_a_bos(tmp_path):
    sp = sp_model(tmp_path / "tokenizer.model", add_dummy_prefix=False, remove_extra_whitespaces=False)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_batch(HARD) == [[sp.bos_id(), *sp.encode(text)] for text in HARD]
    assert [tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) for text in HARD] == list(HARD)
    published_class(tmp_path, "InternLMTokenizer", add_eos_token=True)
    assert load_tokenizer(tmp_path).encode("Paris") == [sp.bos_id(), *sp.encode("Paris"), sp.eos_id()]


def test_chatglm2_puts_its_special_tokens_after_the_vocabulary_and_two_before_a_text(tmp_path):
    sp = sp_model(tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(published_class(tmp_path, "ChatGLMTokenizer", pad_token="<unk>"))
    size = sp.get_piece_size()
    assert tokenizer.encode_batch(HARD) == [[size + 1, size + 3, *sp.encode(text)] for text in HARD]
    assert tokenizer.hf.convert_tokens_to_ids(["[MASK]", "[sMASK]", "eop", "<|user|>"]) == [
        size + i for i in (0, 2, 4, 6)
    ]
    prompt = tokenizer.encode("[gMASK]sop<|user|>philosophy", add_special_tokens=False, parse_special_tokens=True)
    assert prompt == [size + 1, size + 3, size + 6, *sp.encode("philosophy")]
    assert tokenizer.decode(prompt) == "[gMASK]sop<|user|>philosophy"
    assert tokenizer.eos == sp.eos_id()


@pytest.mark.parametrize("images", [0, None])
def test_chatglm_6b_spells_line_ends_tabs_and_blanks_and_starts_after_its_image_tokens(tmp_path, images):
    special = ("[MASK]", "[gMASK]", "<sop>", "<eop>", *ICE)
    sp = sp_model(tmp_path / "ice_text.model", special, remove_extra_whitespaces=False)
    config = {} if images is None else {"num_image_tokens": images}
    tokenizer = load_tokenizer(published_class(tmp_path, "ChatGLMTokenizer", do_lower_case=False, **config))
    offset = 20000 if images is None else images

    def expected(text: str) -> list[int]:
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        for length in range(80, 1, -1):
            text = text.replace(" " * length, f"<|blank_{length}|>")
        return [i + offset for i in sp.encode(text)]

    tail = [sp.piece_to_id("[gMASK]") + offset, sp.piece_to_id("<sop>") + offset]
    assert tokenizer.encode_batch(HARD) == [expected(text) + tail for text in HARD]
    assert tokenizer.eos == sp.piece_to_id("<eop>") + offset
    text = "def f():\n\treturn   1" + " " * 90
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_glm_chinese_takes_the_ids_of_its_special_tokens_from_the_directory(tmp_path):
    sp = sp_model(tmp_path / "cog-pretrain.model")
    published_class(tmp_path, "GLMChineseTokenizer", mask_token={"content": "[MASK]", "lstrip": True})
    with pytest.raises(ValueError, match=r"'\[CLS\]' has no id: neither cog-pretrain.model nor added_tokens.json"):
        load_tokenizer(tmp_path)
    end = sp.get_piece_size()
    cls, mask = end + 2, end + 3
    added = {"<|endoftext|>": end, "[CLS]": cls, "[MASK]": mask, "<|startofpiece|>": end + 6, "[gMASK]": end + 9}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_batch(HARD) == [[cls, *sp.encode(text), end] for text in HARD]
    assert tokenizer.eos == end and tokenizer.vocab_size == end + 10
    assert tokenizer.encode("散步 [MASK]", parse_special_tokens=True) == [cls, *sp.encode("散步"), mask, end]


def test_glm_10b_gives_the_ids_of_gpt2_between_cls_and_end_of_text(tmp_path):
    hf = AutoTokenizer.from_pretrained(make.byte_bpe(tmp_path / "gpt2"))
    model = json.loads(hf.backend_tokenizer.to_str())["model"]
    glm = published_class(tmp_path / "glm", "GLMGPT2Tokenizer")
    (glm / "vocab.json").write_text(json.dumps(model["vocab"]))
    (glm / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
    size = len(model["vocab"])
    (glm / "added_tokens.json").write_text(
        json.dumps({"<|startofpiece|>": size, "[MASK]": size + 2, "[CLS]": size + 1})
    )
    tokenizer, expected = load_tokenizer(glm), hf(list(HARD), split_special_tokens=True)["input_ids"]
    assert tokenizer.encode_batch(HARD) == [[size + 1, *ids, hf.eos_token_id] for ids in expected]
    assert tokenizer.encode("[MASK]", parse_special_tokens=True) == [size + 1, size + 2, hf.eos_token_id]


@pytest.mark.parametrize("name", ["QWenTokenizer", None])
def test_qwen_gives_the_ids_of_a_plain_bpe(tmp_path, name):
    found = ranks(tmp_path / "qwen.tiktoken")
    tokenizer = load_tokenizer(published_class(tmp_path, name) if name else tmp_path)
    texts = [*HARD, *(letters * count for letters in ("a", "abcd", "bcd", "xx ") for count in range(1, 9))]
    expected = [tiktoken_ids(unicodedata.normalize("NFC", text), found, QWEN) for text in texts]
    assert tokenizer.encode_batch(texts) == expected
    assert tokenizer.eos == len(found) and tokenizer.vocab_size == len(found) + 208
    prompt = tokenizer.encode("<|im_start|>Paris<|extra_204|>", parse_special_tokens=True)
    assert prompt == [len(found) + 1, *tiktoken_ids("Paris", found, QWEN), len(found) + 207]
    assert tokenizer.decode(prompt) == "<|im_start|>Paris<|extra_204|>"


def test_glm4_gives_the_ids_of_a_plain_bpe_after_its_two_tokens(tmp_path):
    found = ranks(tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(published_class(tmp_path, "ChatGLM4Tokenizer", eos_token="<|endoftext|>"))
    front = [len(found) + 2, len(found) + 4]
    assert tokenizer.encode_batch(HARD) == [front + tiktoken_ids(text, found, GLM4) for text in HARD]
    assert tokenizer.eos == len(found) and tokenizer.vocab_size == len(found) + 14


@pytest.mark.parametrize("name", ["ChatGLMTokenizer", "ChatGLM4Tokenizer"])
def test_the_workers_encoder_gives_the_same_ids(tmp_path, name):
    (sp_model if name == "ChatGLMTokenizer" else ranks)(tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(published_class(tmp_path, name))
    encode = pickle.loads(pickle.dumps(tokenizer.encoder_recipe())).build()
    assert encode(HARD) == tokenizer.encode_batch(HARD)
    assert not (tmp_path / MARKER).exists()


def test_special_tokens_with_gaps_between_their_ids_are_refused_where_they_cannot_be_had(tmp_path):
    found = ranks(tmp_path / "qwen.tiktoken")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|far|>": len(found) + 500}))
    with pytest.raises(ValueError, match=r"'<\|far\|>' has id \d+, which does not follow the vocabulary"):
        load_tokenizer(tmp_path)


def test_code_without_known_files_is_refused_by_its_class_and_file_with_the_way_out(tmp_path):
    published_class(tmp_path, "OwnTokenizer")
    (tmp_path / "own.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"OwnTokenizer \(tokenization_own.py\) .* --trust-remote-code"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / MARKER).exists()


def test_a_known_class_without_its_file_is_refused_with_the_file_it_needs(tmp_path):
    published_class(tmp_path, "QWenTokenizer")
    with pytest.raises(ValueError, match=re.escape("QWenTokenizer: *.tiktoken")):
        load_tokenizer(tmp_path)


def test_an_option_that_only_the_code_knows_is_refused(tmp_path):
    ranks(tmp_path / "qwen.tiktoken")
    published_class(tmp_path, "QWenTokenizer", extra_vocab_file="extra.tiktoken")
    with pytest.raises(ValueError, match="extra_vocab_file='extra.tiktoken'.*--trust-remote-code"):
        load_tokenizer(tmp_path)


def test_the_code_runs_when_the_user_trusts_it_even_where_the_files_are_known(tmp_path, monkeypatch):
    # transformers copies such code into a folder of its own and puts that on sys.path.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    ranks(tmp_path / "qwen.tiktoken")
    published_class(tmp_path, "QWenTokenizer")
    with pytest.raises(ValueError):  # the class of this test is empty
        load_tokenizer(tmp_path, trust_remote_code=True)
    assert (tmp_path / MARKER).exists()


def test_a_class_of_transformers_is_left_to_transformers(tmp_path):
    directory = make.llama_sentencepiece(tmp_path / "llama")
    expected = type(AutoTokenizer.from_pretrained(directory))
    assert type(load_tokenizer(directory).hf) is expected
