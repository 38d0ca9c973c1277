"""The tokenizer record against transformers, and the worker's encoder against both."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from megatron_patch.tokenizer import load_tokenizer
from tests.tokenizer import make


def test_documents_get_the_ids_of_transformers_with_special_tokens_as_text(any_tokenizer):
    hf = AutoTokenizer.from_pretrained(any_tokenizer)
    expected = [hf(text, split_special_tokens=True)["input_ids"] for text in make.TEXTS]
    if (model := Path(any_tokenizer) / "tokenizer.model").exists():  # transformers reads it otherwise than its maker
        expected = [[1, *SentencePieceProcessor(model_file=str(model)).encode(text)] for text in make.TEXTS]
    tokenizer = load_tokenizer(any_tokenizer)
    assert tokenizer.encode_batch(make.TEXTS) == expected
    assert [tokenizer.encode(text) for text in make.TEXTS] == expected


def test_the_worker_encoder_gives_the_same_ids_after_a_journey(any_tokenizer):
    tokenizer = load_tokenizer(any_tokenizer)
    encode = pickle.loads(pickle.dumps(tokenizer.encoder_recipe())).build()
    assert encode(make.TEXTS) == tokenizer.encode_batch(make.TEXTS)


def test_a_prompt_may_ask_for_its_special_tokens_to_be_parsed(any_tokenizer):
    tokenizer, hf = load_tokenizer(any_tokenizer), AutoTokenizer.from_pretrained(any_tokenizer)
    prompt = f"Hello{hf.eos_token}there"
    assert tokenizer.encode(prompt, parse_special_tokens=True) == hf(prompt)["input_ids"]
    assert tokenizer.encode(prompt, parse_special_tokens=True) != tokenizer.encode(prompt)
    assert (
        tokenizer.encode(prompt, add_special_tokens=False)
        == hf(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    )


def test_decoding_gives_the_text_back(bpe):
    tokenizer = load_tokenizer(bpe)
    assert [tokenizer.decode(tokenizer.encode(text)) for text in make.TEXTS] == list(make.TEXTS)
    assert tokenizer.decode([*tokenizer.encode("end"), tokenizer.eod], skip_special_tokens=True) == "end"


def test_a_truncating_and_padding_tokenizer_file_changes_nothing(bpe, tmp_path):
    clone = tmp_path / "clone"
    clone.mkdir()
    for file in Path(bpe).iterdir():
        (clone / file.name).write_bytes(file.read_bytes())
    content = json.loads((clone / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 5000}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 2, "pad_type_id": 0, "pad_token": "<|pad|>",
    }  # fmt: skip
    (clone / "tokenizer.json").write_text(json.dumps(content))
    expected, tokenizer = load_tokenizer(bpe).encode_batch(make.TEXTS), load_tokenizer(clone)
    # First, since encoding resets these settings in the tokenizer that the recipe is taken from.
    assert tokenizer.encoder_recipe().build()(make.TEXTS) == expected
    assert tokenizer.encode_batch(make.TEXTS) == expected


def test_vocab_size_counts_added_tokens_and_bounds_every_id(any_tokenizer):
    tokenizer = load_tokenizer(any_tokenizer)
    assert tokenizer.vocab_size == len(tokenizer.hf)
    ids = [i for text in make.TEXTS for i in tokenizer.encode(text, parse_special_tokens=True)]
    assert max(ids) < tokenizer.vocab_size


def test_the_fingerprint_follows_content_not_location(bpe, tmp_path):
    same, other = tmp_path / "same", tmp_path / "other"
    for clone in (same, other):
        clone.mkdir()
        for file in Path(bpe).iterdir():
            (clone / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|im_end|>"}))
    original = load_tokenizer(bpe)
    assert load_tokenizer(same).unique_identifiers == original.unique_identifiers
    assert load_tokenizer(other).unique_identifiers != original.unique_identifiers
    assert original.eod != load_tokenizer(other).eod


def test_a_missing_or_empty_directory_is_named(tmp_path):
    with pytest.raises(ValueError, match="'/no/such/place' does not exist"):
        load_tokenizer("/no/such/place")
    with pytest.raises(ValueError, match=f"{tmp_path}.* holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_with_code_of_its_own_is_refused_and_its_code_not_run(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "tokenization_evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    auto_map = {"AutoTokenizer": ["tokenization_evil.Evil", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": auto_map}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_tokenizer(tmp_path)
    assert not marker.exists()


def test_a_worker_of_a_fast_tokenizer_needs_neither_torch_nor_transformers(bpe, tmp_path):
    recipe = tmp_path / "recipe"
    recipe.write_bytes(pickle.dumps(load_tokenizer(bpe).encoder_recipe()))
    script = (
        "import pickle, sys, megatron_patch.data.preprocess\n"
        f"ids = pickle.load(open({str(recipe)!r}, 'rb')).build()(['Paris'])\n"
        "assert ids and not {'torch', 'transformers'} & set(sys.modules), ids\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
