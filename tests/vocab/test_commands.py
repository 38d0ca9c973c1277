"""The command from training to verification, training and analysis by themselves, and what users do wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_patch.launch.main import main
from megatron_patch.tokenizer.sentencepiece_model import load_proto
from megatron_patch.vocab.analyze import analyze
from megatron_patch.vocab.arguments import VocabAnalyzeArgs, VocabInitArgs, VocabTrainArgs
from megatron_patch.vocab.train import train
from tests.vocab import make


def test_the_command_leads_from_text_to_a_verified_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make.jsonl(tmp_path / "corpus.jsonl", make.mixed(400))
    make.jsonl(tmp_path / "held.jsonl", make.mixed(100, seed=5))
    make.llama(make.base_directory(tmp_path / "base"), len(make.base_proto().pieces))
    steps = (
        "train --input corpus.jsonl --output new.model --vocab-size 220 --character-coverage 1.0",
        "merge --base base --new new.model --output merged --corpus corpus.jsonl",
        "analyze --base base --new merged --held-out held.jsonl --json analysis.json --png plot.png",
        "init --base base --tokenizer merged --output grown",
        "verify --base base --model grown --tensor-model-parallel-size 2 --json proof.json",
    )
    for step in steps:
        assert main(["vocab", *step.split()]) == 0, step
    assert all(check["ok"] for check in json.loads(Path("proof.json").read_text())["checks"])
    assert json.loads(Path("analysis.json").read_text())["languages"]["zh"]["documents"] > 20
    assert Path("plot.png").read_bytes().startswith(b"\x89PNG")
    assert "tokens per character" in capsys.readouterr().out
    config = json.loads(Path("grown/config.json").read_text())
    assert main(["vocab", *steps[3].split()]) == 2  # it exists
    Path("grown/config.json").write_text(json.dumps(config | {"vocab_size": 1}))
    assert main(["vocab", *steps[4].split(), "--level", "rows"]) == 1


def test_training_does_not_normalise_and_splits_digits(tmp_path):
    corpus = make.jsonl(tmp_path / "c.jsonl", ["ＡＢ１２ 2024 2024 2024 天气 天气"] * 30 + ["x" * 10000, ""])
    report = train(VocabTrainArgs((corpus,), str(tmp_path / "sub" / "new.model"), vocab_size=30))
    proto = load_proto(report.output)
    names = [one.piece for one in proto.pieces]
    assert proto.normalizer_spec.name == "identity" and not proto.trainer_spec.byte_fallback
    assert "天气" in names or "▁天气" in names
    assert not [one for one in names if len(one.strip("▁")) > 1 and any(c.isdigit() for c in one)]
    assert (report.pieces, report.lines, report.characters) == (len(names), 30 + 10, 30 * 25 + 10000)
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["new.model"]


def test_records_that_are_no_document_are_counted(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "天气 很好 the city"}\n{"other": 1}\nbroken\n' * 20)
    report = train(VocabTrainArgs((str(tmp_path / "c.jsonl"),), str(tmp_path / "new.model"), vocab_size=20))
    assert report.skipped == {"no key 'text'": 20, "broken JSON": 20}


@pytest.mark.parametrize(("text", "match"), [("天气", "cannot train --vocab-size 5000"), ("", "no document in")])
def test_a_corpus_too_small_leaves_no_model(tmp_path, text, match):
    corpus = make.jsonl(tmp_path / "c.jsonl", [text])
    with pytest.raises(ValueError, match=match):
        train(VocabTrainArgs((corpus,), str(tmp_path / "new.model"), vocab_size=5000))
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_the_analysis_counts_tokens_characters_and_rows_in_use(tmp_path, base, merged, merging):
    texts = ["天气天气", "the city, 12", "天气公园"]
    held = make.jsonl(tmp_path / "held.jsonl", texts)
    report = analyze(VocabAnalyzeArgs(str(base), str(merged), (held,)))
    zh, other = report.languages["zh"], report.languages["other"]
    assert (zh.documents, zh.characters, zh.unchanged) == (2, 8, 0)
    assert (other.documents, other.unchanged, other.saving) == (1, 1, 0.0)
    assert zh.old_tokens == 8 + 2 and zh.new_tokens < zh.old_tokens  # a character each, and the space before
    assert report.languages["all"].old_tokens == zh.old_tokens + other.old_tokens
    assert report.new_tokens == merging.new_pieces and 0 < report.used <= zh.new_tokens
    assert zh.broken == other.broken == 0


def test_the_base_counts_as_its_model_reads_it_and_what_transformers_misreads_is_told(tmp_path, base, merged):
    held = make.jsonl(tmp_path / "held.jsonl", ["two  spaces\n    and four", "the city"])
    stale = make.base_directory(tmp_path / "stale")
    AutoTokenizer.from_pretrained(base).save_pretrained(stale)  # its tokenizer.json wins over tokenizer.model
    assert analyze(VocabAnalyzeArgs(str(base), str(merged), (held,))).misread == 0
    report = analyze(VocabAnalyzeArgs(str(stale), str(merged), (held,)))
    assert (report.languages["other"].unchanged, report.misread) == (2, 1)


def test_problems_are_named_all_at_once(tmp_path):
    with pytest.raises(ValueError) as caught:
        VocabInitArgs(str(tmp_path), "nowhere", str(tmp_path / "x"), method="weighted", pad_multiple=0).validate()
    text = str(caught.value)
    assert all(one in text for one in ("config.json", "'nowhere'", "--pad-multiple 0", "--corpus")), text
    with pytest.raises(ValueError, match="no meaning with --method mean"):
        VocabInitArgs(str(tmp_path), str(tmp_path), str(tmp_path / "x"), corpus=(str(tmp_path),)).validate()
