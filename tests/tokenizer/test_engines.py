"""Every engine against transformers, and the choice among them when one of them is wrong, broken or absent."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from megatron_patch.tokenizer import engines, load_tokenizer
from megatron_patch.tokenizer.byte_letters import letters
from tests.tokenizer import make, published

FAST = ("fastokens", "gigatoken", "tiktoken")
DOCUMENTS = [*make.corpus(30), "", *published.HARD]


def lists(encoded: engines.Encoded) -> list[list[int]]:
    """One list of ids a text."""
    ids, lengths = encoded
    assert ids.dtype == np.uint32 and lengths.dtype == np.int64 and lengths.sum() == ids.size
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def edited(source: str, target: Path, **changes: object) -> str:
    """A copy of a directory whose tokenizer.json has other top-level entries."""
    target.mkdir()
    for file in Path(source).iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    content = json.loads((target / "tokenizer.json").read_text())
    (target / "tokenizer.json").write_text(json.dumps(content | changes))
    return str(target)


def qwen(directory: Path) -> str:
    published.ranks(directory / "qwen.tiktoken")
    return str(published.published_class(directory, "QWenTokenizer"))


def baichuan(directory: Path) -> str:
    published.sp_model(directory / "tokenizer.model")
    return str(published.published_class(directory, "BaichuanTokenizer"))


@pytest.fixture
def crooked(monkeypatch: pytest.MonkeyPatch):
    """Makes an engine's last id wrong in texts that hold a given string."""

    def bend(name: str, where: str) -> None:
        kind = engines._KINDS[name]

        def build(recipe: engines.EngineRecipe):
            encode = kind.build(recipe)

            def wrong(texts: list[str]) -> engines.Encoded:
                ids, lengths = encode(texts)
                ids = ids.copy()
                for end, text in zip(np.cumsum(lengths), texts, strict=True):
                    ids[end - 1] += where in text
                return ids, lengths

            return wrong

        monkeypatch.setitem(engines._KINDS, name, kind._replace(build=build))

    return bend


# ----------------------------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize("name", FAST)
def test_an_engine_of_the_dev_extra_is_installed(name):
    assert engines.installed(name), f"pip install -e '.[dev]' brings {name}: without it nothing here tests it"


@pytest.mark.parametrize("name", [*FAST, "hf"])
def test_an_engine_gives_the_ids_of_transformers_for_a_byte_level_bpe(bpe, name):
    hf = AutoTokenizer.from_pretrained(bpe)
    engine = engines.choose(bpe, name, DOCUMENTS).build()
    assert lists(engine.encode_batch(DOCUMENTS)) == [
        hf(one, split_special_tokens=True)["input_ids"] for one in DOCUMENTS
    ]


@pytest.mark.parametrize("name", ["gigatoken", "hf"])
def test_an_engine_gives_the_ids_of_sentencepiece_for_its_model_with_bos(tmp_path, name):
    directory = make.llama_sentencepiece(tmp_path / "llama")
    model = SentencePieceProcessor(model_file=f"{directory}/tokenizer.model")
    engine = engines.choose(directory, name, DOCUMENTS).build()
    assert lists(engine.encode_batch(DOCUMENTS)) == [[model.bos_id(), *model.encode(one)] for one in DOCUMENTS]


@pytest.mark.parametrize("name", FAST)
def test_an_engine_reads_a_tiktoken_file_that_was_published_with_code(tmp_path, name):
    tokenizer = load_tokenizer(qwen(tmp_path / "qwen"))
    engine = engines.choose(tokenizer, name, DOCUMENTS).build()
    assert lists(engine.encode_batch(DOCUMENTS)) == tokenizer.encode_batch(DOCUMENTS)


def test_sentencepiece_itself_is_taken_where_transformers_calls_it_too(tmp_path):
    tokenizer = load_tokenizer(baichuan(tmp_path / "baichuan"))
    recipe = engines.choose(tokenizer, "auto", DOCUMENTS)
    assert recipe.name == "sentencepiece" and recipe.prefix == (tokenizer.bos,)
    assert lists(recipe.build().encode_batch(DOCUMENTS)) == tokenizer.encode_batch(DOCUMENTS)


def test_a_tokenizer_in_pure_python_is_left_to_transformers(tmp_path):
    directory = make.byt5(tmp_path / "byt5")
    recipe = engines.choose(directory, "auto", DOCUMENTS)
    assert recipe.name == "hf"
    assert lists(recipe.build().encode_batch(DOCUMENTS)) == load_tokenizer(directory).encode_batch(DOCUMENTS)


@pytest.mark.parametrize("name", FAST)
def test_special_tokens_are_text_and_other_added_tokens_are_not(bpe, tmp_path, name):
    added = json.loads((Path(bpe) / "tokenizer.json").read_text())["added_tokens"]
    tool = added[0] | {"id": 600, "content": "<tool>", "special": False}
    directory = edited(bpe, tmp_path / "tool", added_tokens=[*added, tool])
    tokenizer = load_tokenizer(directory)
    ids, _ = engines.choose(tokenizer, name).build().encode_batch(["a<tool>b<|endoftext|>"])
    assert tokenizer.hf.convert_tokens_to_ids("<tool>") in ids and tokenizer.eos not in ids


@pytest.mark.parametrize("name", FAST)
def test_text_with_a_byte_that_the_vocabulary_lacks_is_encoded_as_transformers_does(bpe, tmp_path, name):
    model = json.loads((Path(bpe) / "tokenizer.json").read_text())["model"]
    lacking = [letter for byte, letter in enumerate(letters()) if byte in (0x00, 0x04, 0xF7)]
    kept = [token for token in sorted(model["vocab"], key=model["vocab"].get) if not set(lacking) & set(token)]
    vocabulary = {token: i for i, token in enumerate(kept)}
    merges = [merge for merge in model["merges"] if not set(lacking) & set("".join(merge))]
    directory = edited(bpe, tmp_path / "lacking", model=model | {"vocab": vocabulary, "merges": merges})
    texts = ["plain", "Fra\x04nce and NUL \x00", "", "\x04", *DOCUMENTS]
    expected = load_tokenizer(directory).encode_batch(texts)
    assert expected[3] == []  # transformers drops the byte
    assert lists(engines.choose(directory, name, texts).build().encode_batch(texts)) == expected


def test_no_text_gives_no_id(bpe):
    for name in (*FAST, "hf"):
        engine = engines.choose(bpe, name).build()
        assert [part.size for part in engine.encode_batch([])] == [0, 0]
        assert lists(engine.encode_batch([""])) == [[]]


def test_prefix_and_suffix_go_around_every_text_even_an_empty_one():
    ids, lengths = engines._wrap(np.array([5, 6, 7], np.uint32), np.array([0, 2, 0, 1]), (1, 2), (9,))
    assert lists((ids, lengths)) == [[1, 2, 9], [1, 2, 5, 6, 9], [1, 2, 9], [1, 2, 7, 9]]


def test_a_worker_needs_neither_torch_nor_transformers(bpe, tmp_path):
    file = tmp_path / "recipes"
    file.write_bytes(pickle.dumps([engines.choose(bpe, name) for name in FAST]))
    script = (
        "import pickle, sys\n"
        f"for recipe in pickle.load(open({str(file)!r}, 'rb')):\n"
        "    assert recipe.build().encode_batch(['Paris'])[0].size, recipe.name\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | engines.ONE_THREAD)


# -------------------------------------------------------------------------------------------------------------- choice


def test_auto_takes_the_fastest_that_is_installed(bpe, monkeypatch):
    said = []
    assert engines.choose(bpe, "auto", DOCUMENTS, warn=said.append).name == "fastokens"
    monkeypatch.setattr(engines, "installed", lambda name: name not in ("fastokens", "gigatoken"))
    assert engines.choose(bpe, "auto", DOCUMENTS, warn=said.append).name == "tiktoken"
    assert said == []
    with pytest.raises(ValueError, match="engine gigatoken is not installed: pip install gigatoken"):
        engines.choose(bpe, "gigatoken")


def test_auto_falls_back_loudly_from_an_engine_that_errs_on_a_document(bpe, crooked, capsys):
    crooked("fastokens", "Document 17.")
    recipe = engines.choose(bpe, "auto", DOCUMENTS)
    right = load_tokenizer(bpe).encode(DOCUMENTS[17])
    assert recipe.name == "gigatoken" and f"first {len(DOCUMENTS)} documents" in recipe.proof
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: engine fastokens is not used: it gives")
    assert f"[{right[-1] + 1}] instead of [{right[-1]}]" in line and "'Document 17. " in line


@pytest.mark.parametrize(
    "where", ["天气", "１", "\r\n", "👩‍👩‍👧", "   ", "\x04", "\ufffd", "<|im_end|>", "x" * 5000, "<own>"]
)
def test_the_hard_texts_alone_find_an_engine_that_errs_on(bpe, tmp_path, crooked, where):
    added = json.loads((Path(bpe) / "tokenizer.json").read_text())["added_tokens"]
    own = added[0] | {"id": 600, "content": "<own>"}
    directory = edited(bpe, tmp_path / "own", added_tokens=[*added, own])
    crooked("fastokens", where)
    with pytest.raises(ValueError, match="engine fastokens gives .* instead of .*; choose auto"):
        engines.choose(directory, "fastokens")


def test_an_engine_that_reads_special_tokens_in_text_is_refused(bpe, monkeypatch):
    import fastokens

    def build(recipe: engines.EngineRecipe):
        backend = fastokens.Tokenizer.from_json_str(recipe.reference.backend_json)
        return lambda texts: engines._flat([one.ids for one in backend.encode_batch(texts)])

    monkeypatch.setitem(engines._KINDS, "fastokens", engines._KINDS["fastokens"]._replace(build=build))
    with pytest.raises(ValueError, match=r"engine fastokens gives .*<\|endoftext\|>"):
        engines.choose(bpe, "fastokens")


def test_an_engine_that_cannot_read_the_tokenizer_is_named_with_its_reason(bpe, tmp_path):
    digits = {"type": "Digits", "individual_digits": True}
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    sequence = {"type": "Sequence", "pretokenizers": [digits, words]}
    directory = edited(bpe, tmp_path / "digits", pre_tokenizer=sequence)
    with pytest.raises(ValueError, match="engine tiktoken cannot read this tokenizer .*single regular expression"):
        engines.choose(directory, "tiktoken")
    with pytest.raises(ValueError, match="engine sentencepiece cannot read .*no SentencePiece model"):
        engines.choose(directory, "sentencepiece")
    with pytest.raises(ValueError, match="engine 'fast' is unknown; choose auto, fastokens"):
        engines.choose(directory, "fast")


def test_the_proof_ends_after_two_thousand_documents_or_enough_characters():
    documents = iter(f"{i}" for i in range(10_000))
    assert len(engines._first(documents)) == 2000 and next(documents) == "2000"
    assert len(engines._first("x" * 200_000 for _ in range(10))) == 2


# --------------------------------------------------------------------------------------------------------- spot checks


def test_one_document_in_a_thousand_is_checked_across_batches_and_an_error_ends_the_run(bpe, crooked):
    recipe = engines.choose(bpe, "fastokens")
    crooked("fastokens", "late")
    engine = recipe.build()
    engine.encode_batch(["fine"] * 700 + ["late"] + ["fine"] * 298)  # documents 1 to 999
    with pytest.raises(engines.EngineMismatch, match=r"engine fastokens gives .* for 'late'; .*--engine hf"):
        engine.encode_batch(["late"])


def test_every_checked_document_of_a_large_batch_is_checked(bpe, crooked):
    crooked("gigatoken", "late")
    recipe = engines.choose(bpe, "hf")
    engine = engines.replace(recipe, name="gigatoken").build()
    with pytest.raises(engines.EngineMismatch, match="late"):
        engine.encode_batch(["fine"] * 2999 + ["late"])


def test_an_engine_that_fails_in_a_run_says_so_and_what_to_do(bpe, monkeypatch):
    def build(recipe: engines.EngineRecipe):
        def encode(texts: list[str]) -> engines.Encoded:
            raise type("PanicException", (BaseException,), {})("index out of bounds")

        return encode

    recipe = engines.choose(bpe, "fastokens")
    monkeypatch.setitem(engines._KINDS, "fastokens", engines._KINDS["fastokens"]._replace(build=build))
    with pytest.raises(engines.EngineMismatch, match="engine fastokens failed: index out of bounds; --engine hf"):
        recipe.build().encode_batch(["text"])


def test_an_error_of_the_reference_itself_is_shown_as_it_is(bpe):
    with pytest.raises((TypeError, UnicodeEncodeError)):
        engines.choose(bpe, "hf").build().encode_batch(["a lone surrogate \ud800"])
