"""Files of conversations are tokenized once, and again when anything that matters has changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_patch.data.sft.arguments import SftFormatArgs
from megatron_patch.data.sft.sources import CACHE, Source, find_source
from megatron_patch.data.sft.storage import open_samples
from megatron_patch.tokenizer import Tokenizer, load_tokenizer
from tests.training.runs import make_tokenizer

FORMATS = SftFormatArgs(chat_template="instruction")
Find = Callable[..., Source]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return load_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    file = tmp_path / "data" / "chats.jsonl"
    file.parent.mkdir()
    records = [{"instruction": f"the fox {i}", "output": f"jumps over {i}"} for i in range(5)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture
def find(tokenizer: Tokenizer, chats: Path) -> Find:
    def find(name: str | Path = chats, formats: SftFormatArgs = FORMATS, **changes: object) -> Source:
        options = dict(tokenizer=tokenizer, seq_length=128, cache=None, workers=1) | changes
        return find_source(str(name), formats, **options)

    return find


def test_a_file_is_tokenized_beside_itself_and_only_once(find: Find, chats: Path) -> None:
    source, said = find(), []
    assert source.tokenize(said.append) == source.prefix
    assert Path(source.prefix).parent == chats.parent / CACHE
    assert any("5 samples of 5 records" in line for line in said)
    store, before = open_samples(source.prefix), Path(f"{source.prefix}_ids.bin").stat().st_mtime_ns
    assert store.num_samples == 5 and all(store.sample(i).supervised for i in range(5))
    find().tokenize(said.append)
    assert Path(f"{source.prefix}_ids.bin").stat().st_mtime_ns == before


def test_whatever_changes_the_samples_has_a_place_of_its_own(
    find: Find, chats: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    found = [find(), find(seq_length=64), find(tokenizer=replace(tokenizer, fingerprint="other"))]
    found += [find(formats=replace(FORMATS, **one)) for one in ({"truncation": "drop"}, {"chat_template": "plain"})]
    found.append(find(formats=replace(FORMATS, chat_template=str(template))))
    template.write_text("{{ messages[1]['content'] }}")
    found.append(find(formats=replace(FORMATS, chat_template=str(template))))
    chats.write_text(chats.read_text().replace("fox", "dog"))
    found.append(find())
    assert len({source.prefix for source in found}) == len(found)


def test_the_cache_can_lie_elsewhere(find: Find, tmp_path: Path) -> None:
    assert Path(find(cache=str(tmp_path / "cache")).prefix).parent == tmp_path / "cache"


def test_a_tokenized_set_is_taken_as_it_is(find: Find) -> None:
    source = find()
    source.tokenize(lambda line: None)
    again = find(source.prefix)
    assert again == Source(source.prefix)
    assert open_samples(again.tokenize(pytest.fail)).num_samples == 5


def test_a_set_of_another_tokenizer_is_refused_or_told(find: Find, tokenizer: Tokenizer) -> None:
    prefix, said = find().tokenize(lambda line: None), []
    find(prefix, tokenizer=replace(tokenizer, fingerprint="other")).tokenize(said.append)
    assert ["other than the run's" in line for line in said] == [True]
    with pytest.raises(ValueError, match="of a vocabulary of .*, the run's has 7; tokenize the conversations again"):
        find(prefix, tokenizer=replace(tokenizer, fingerprint="other", vocab_size=7))


def test_a_place_that_cannot_hold_the_tokens_is_told_with_the_way_out(find: Find, chats: Path) -> None:
    (chats.parent / CACHE).touch()
    with pytest.raises(ValueError, match="cannot keep tokenized files in .*; give --data-cache-path"):
        find()


def test_a_name_that_stands_for_nothing_is_refused(find: Find, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="matches no file"):
        find(tmp_path / "gone.jsonl")
