"""What the world hands to `preprocess`: damage of each kind is told, counted and kept, or ends the run."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_patch.data import shards, tokenizing, workers
from megatron_patch.data.preprocess import preprocess
from megatron_patch.data.readers import DamagedInput
from megatron_patch.launch.main import main
from megatron_patch.tokenizer import load_tokenizer
from megatron_patch.tokenizer.engines import EngineMismatch
from tests.data.test_preprocess import TEXTS, arguments, command, contents, jsonl, reference
from tests.tokenizer import make

LONG = "天气很好 " * 300_000
"""A line of some 4 MB."""


def line(text: str) -> bytes:
    return json.dumps({"text": text}, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("raw", "outcome"),
    [
        (b'{"text": "broken', "broken JSON"),
        (b'["text"]', "not a JSON object"),
        (b'{"body": "x"}', "no key 'text'"),
        (b'{"text": 3}', "key 'text' is no string"),
        (b'{"text": null}', "key 'text' is no string"),
        (b'{"text": "caf\xe9"}', "invalid UTF-8"),
        (b'{"text": NaN}', "key 'text' is no string"),
        (b'{"text": "fine", "score": NaN}', "fine"),
        (b"\xef\xbb\xbf" + line("after a byte-order mark"), "after a byte-order mark"),
        (rb'{"text": "half \ud83d"}', "half \ufffd"),
        (line("literal </s> <|endoftext|>"), "literal </s> <|endoftext|>"),
        (b'{"text": ""}', None),
        (b'{"text": " \\n"}', None),
        (b"", None),
    ],
)
def test_every_kind_of_odd_line_is_read_or_told(raw, outcome, bpe, tmp_path):
    """At the first place of the file: a byte-order mark has no other."""
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([raw, line("before"), line("behind")]))
    report = preprocess(arguments(tmp_path, bpe, on_error="quarantine", max_errors="1", engine="hf"))
    good = [load_tokenizer(bpe).decode(document.tolist()) for document in IndexedDataset(report.prefix)]
    is_bad = outcome is not None and outcome in dict(report.skipped)
    assert good == [*([] if is_bad or outcome is None else [outcome]), "before", "behind"]
    assert report.bad == is_bad and (report.quarantine is not None) == is_bad
    if is_bad:
        kept = json.loads((tmp_path / "out.quarantine.jsonl").read_text())
        assert (kept["path"], kept["line"], kept["reason"]) == (f"{tmp_path}/in.jsonl", 1, outcome)


def test_quarantined_records_bear_the_line_that_they_have_in_their_file(bpe, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "LEAST_BYTES", 3000)
    raw = [line(text) for text in TEXTS]
    bad = [7, 50, 51, 180]
    for number in bad:
        raw[number] = b"broken %d" % number
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(raw))
    report = preprocess(arguments(tmp_path, bpe, on_error="quarantine", max_errors="10%", workers=2))
    assert (report.bad, report.records, report.documents) == (4, 208, 204) and report.shards > 5
    kept = [json.loads(text) for text in (tmp_path / "out.quarantine.jsonl").read_text().splitlines()]
    assert [(one["line"], one["record"]) for one in kept] == [(number + 1, f"broken {number}") for number in bad]


def test_the_line_at_which_a_run_stops_is_the_first_bad_one_whoever_finds_it(bpe, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "LEAST_BYTES", 3000)
    raw = [line(text) for text in TEXTS]
    raw[120] = raw[190] = b"{"
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(raw))
    for count in (1, 3):
        with pytest.raises(DamagedInput, match=r"in.jsonl:121: broken JSON"):
            preprocess(arguments(tmp_path, bpe, workers=count))
    report = preprocess(arguments(tmp_path, bpe, on_error="skip", max_errors="2"))
    assert report.resumed > 0, "what was finished is not done again"
    expected = [text for number, text in enumerate(TEXTS) if number not in (120, 190)]
    assert contents(report.prefix) == reference(bpe, expected, f"{tmp_path}/reference", False)


def test_more_bad_records_than_allowed_end_with_code_3_and_a_higher_limit_goes_on(bpe, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([*map(line, TEXTS[:-5]), *[line("")] * 5, b"{", b"{", b"{"]))
    flags = ["--on-error", "quarantine", "--engine", "hf"]
    args = ["preprocess", *command(arguments(tmp_path, bpe), *flags)]
    assert main(args) == 3
    error = capsys.readouterr().err
    assert "3 of 211 records are bad, more than --max-errors 1% (3 x broken JSON)" in error
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.partial", "out.quarantine.jsonl"]
    assert len((tmp_path / "out.quarantine.jsonl").read_text().splitlines()) == 3
    assert main([*args, "--max-errors", "2"]) == 3
    assert main([*args, "--max-errors", "3", "--json", f"{tmp_path}/report.json"]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["resumed"] == 1
    assert contents(f"{tmp_path}/out_text_document") == reference(bpe, TEXTS[:-5], f"{tmp_path}/reference", False)


def test_what_a_lenient_run_had_left_out_is_not_left_out_by_a_strict_one(bpe, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([*map(line, TEXTS), b"{"]))
    assert main(["preprocess", *command(arguments(tmp_path, bpe), "--on-error", "skip", "--max-errors", "0")]) == 3
    with pytest.raises(DamagedInput, match=r"in.jsonl:209: broken JSON"):
        preprocess(arguments(tmp_path, bpe))


def test_no_quarantine_of_an_earlier_run_is_left_beside_good_data(bpe, tmp_path):
    jsonl(tmp_path / "in.jsonl", TEXTS)
    (tmp_path / "out.quarantine.jsonl").write_text('{"record": "mended since"}\n')
    assert preprocess(arguments(tmp_path, bpe, on_error="quarantine")).quarantine is None
    assert not (tmp_path / "out.quarantine.jsonl").exists()


def test_a_number_of_bad_records_is_not_waited_for_to_the_end(bpe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards, "LEAST_BYTES", 1000)
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([b"{"] * 10 + [line(text) for text in TEXTS]))
    args = [
        "preprocess",
        *command(arguments(tmp_path, bpe), "--on-error", "skip", "--max-errors", "5", "--engine", "hf"),
    ]
    assert main(args) == 3
    assert "10 of 1" in capsys.readouterr().err, "of the records of the first shard alone"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"on_error": "skip", "max_errors": "many"}, "--max-errors 'many': give a number of records, or a percentage"),
        ({"on_error": "skip", "max_errors": "120%"}, "--max-errors '120%'"),
        ({"on_error": "skip", "max_errors": "0.5"}, "--max-errors '0.5': a number of records is a whole number"),
        ({"max_errors": "5"}, "--max-errors 5 has no effect without --on-error"),
        ({"shuffle": -1}, "--shuffle -1: a seed lies in"),
        ({"split": "90;10"}, "--split 90;10: give up to three shares"),
        ({"max_doc_tokens": 1}, "--max-doc-tokens 1: must be at least 2"),
        ({"json_keys": ("a", "a")}, "--json-keys 'a': give each key once"),
    ],
)
def test_wrong_arguments_are_told_before_any_work(flags, message, bpe, tmp_path):
    jsonl(tmp_path / "in.jsonl", TEXTS)
    with pytest.raises(ValueError) as caught:
        arguments(tmp_path, bpe, **flags).validate()
    assert message in str(caught.value)


def test_a_line_of_many_megabytes_is_cut_into_documents_of_the_size_asked_for(bpe, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(line("first") + b"\n" + line(LONG) + b"\n" + line("last"))
    args = arguments(tmp_path, bpe, append_eod=True, max_doc_tokens=20_000)
    report = preprocess(args)
    dataset = IndexedDataset(report.prefix)
    lengths = dataset.sequence_lengths
    eod = load_tokenizer(bpe).eod
    assert lengths.max() == 20_000 and report.documents > 30
    assert all(dataset[i][-1] == eod for i in range(len(dataset)))
    joined = np.concatenate([dataset[i][:-1] for i in range(1, len(dataset) - 1)]).tolist()
    assert joined == load_tokenizer(bpe).encode(LONG)


def test_a_duplicate_goes_with_all_the_documents_that_it_was_cut_into(bpe, tmp_path):
    texts = ["short", TEXTS[5], "other", TEXTS[5], "last"]
    jsonl(tmp_path / "in.jsonl", texts)
    report = preprocess(arguments(tmp_path, bpe, max_doc_tokens=5, dedup="exact"))
    tokenizer = load_tokenizer(bpe)
    dataset = IndexedDataset(report.prefix)
    joined = np.concatenate([dataset[i] for i in range(len(dataset))]).tolist()
    assert joined == sum(tokenizer.encode_batch([*texts[:3], "last"]), [])
    assert report.skipped == (("duplicate", 1),) and report.documents > 10


def test_a_compressed_file_that_breaks_off_ends_the_run_with_code_1(bpe, tmp_path, capsys):
    packed = zstandard.ZstdCompressor().compress(b"\n".join(map(line, TEXTS)))
    (tmp_path / "in.jsonl.zst").write_bytes(packed[:-9])
    args = arguments(tmp_path, bpe, input=(f"{tmp_path}/in.jsonl.zst",), on_error="skip")
    with pytest.raises(DamagedInput, match="in.jsonl.zst: cannot decompress, is the file complete"):
        preprocess(args)
    assert os.listdir(tmp_path) == ["in.jsonl.zst"]
    assert issubclass(DamagedInput, OSError), "which the command turns into exit code 1"


def run_limited(argv: list[str], file_size: int) -> subprocess.CompletedProcess:
    """The command where no file may grow beyond a size, which is what a full disk looks like to a program."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))\n"
        "from megatron_patch.launch.main import main; sys.exit(main(['preprocess', *sys.argv[2:]]))"
    )
    return subprocess.run([sys.executable, "-c", script, str(file_size), *argv], capture_output=True, text=True)


def test_a_full_disk_ends_the_run_with_code_1_and_no_dataset_and_room_lets_it_go_on(bpe, tmp_path):
    jsonl(tmp_path / "in.jsonl", TEXTS * 30)
    argv = command(arguments(tmp_path, bpe), "--engine", "hf")
    size = Path(jsonl(tmp_path / "in.jsonl", TEXTS * 30)).stat().st_size
    run = run_limited(argv, size // 4)
    assert run.returncode == 1 and "File too large" in run.stderr and "Traceback" not in run.stderr
    assert not list(tmp_path.glob("*.idx")) and not list(tmp_path.glob("*.bin"))
    assert run_limited(argv, resource.RLIM_INFINITY).returncode == 0
    assert contents(f"{tmp_path}/out_text_document") == reference(bpe, TEXTS * 30, f"{tmp_path}/reference", False)


def unfinished(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """A run that ended in the middle."""
    monkeypatch.setattr(shards, "LEAST_BYTES", 3000)
    raw = [line(text) for text in TEXTS]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([*raw, b"{"]))
    with pytest.raises(DamagedInput):
        preprocess(arguments(tmp_path, tokenizer, **changes))
    assert (tmp_path / "out.partial").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"append_eod": True}, "eod: None, now 0"),
        ({"clean": ("nfc",)}, "cleaning:"),
        ({"engine": "tiktoken"}, "engine: hf .*, now tiktoken"),
        ({"max_doc_tokens": 7}, "max_doc_tokens: None, now 7"),
    ],
)
def test_shards_of_other_settings_are_never_mixed_in(changes, message, bpe, tmp_path, monkeypatch):
    unfinished(tmp_path, bpe, monkeypatch, engine="hf")
    skipping = {"on_error": "skip", "engine": "hf", "max_errors": "1"} | changes
    with pytest.raises(ValueError, match=f"out.partial holds the finished part of a run with other.*{message}"):
        preprocess(arguments(tmp_path, bpe, **skipping))
    report = preprocess(arguments(tmp_path, bpe, resume="never", **skipping))
    assert report.resumed == 0 and not (tmp_path / "out.partial").exists()


def test_a_changed_input_file_is_never_mixed_with_what_it_was(bpe, tmp_path, monkeypatch):
    unfinished(tmp_path, bpe, monkeypatch)
    jsonl(tmp_path / "in.jsonl", TEXTS)
    with pytest.raises(ValueError, match=r"other settings \(input: \['.*in.jsonl', \d+, \d+\], now"):
        preprocess(arguments(tmp_path, bpe))


def test_a_shard_whose_files_were_damaged_is_made_again(bpe, tmp_path, monkeypatch):
    unfinished(tmp_path, bpe, monkeypatch)
    with open(tokenizing.key_file(tmp_path / "out.partial", 3, 0, "bin"), "ab") as file:
        file.write(b"\0")
    report = preprocess(arguments(tmp_path, bpe, on_error="skip", max_errors="1"))
    assert report.resumed == report.shards - 2
    assert contents(report.prefix) == reference(bpe, TEXTS, f"{tmp_path}/reference", False)


def test_a_second_run_at_the_same_time_is_refused(bpe, tmp_path, monkeypatch):
    jsonl(tmp_path / "in.jsonl", TEXTS)
    original = workers.Crew.tokenize

    def meanwhile(*args: Any) -> None:
        monkeypatch.setattr(workers.Crew, "tokenize", original)
        with pytest.raises(ValueError, match="out.partial is being written by another process"):
            preprocess(arguments(tmp_path, bpe))
        original(*args)

    monkeypatch.setattr(workers.Crew, "tokenize", meanwhile)
    assert preprocess(arguments(tmp_path, bpe)).documents == len(TEXTS)


def test_several_keys_make_a_dataset_each(bpe, tmp_path):
    records = [{"title": f"title {i}", "text": text} for i, text in enumerate(TEXTS)]
    (tmp_path / "in.json").write_text(json.dumps([*records, {"text": "without a title"}], ensure_ascii=False))
    args = arguments(tmp_path, bpe, input=(f"{tmp_path}/in.json",), json_keys=("text", "title"), on_error="skip")
    report = preprocess(args)
    titles = reference(bpe, [record["title"] for record in records], f"{tmp_path}/r1", False)
    assert contents(f"{tmp_path}/out_title_document") == titles
    texts = reference(bpe, [*TEXTS, "without a title"], f"{tmp_path}/r2", False)
    assert contents(f"{tmp_path}/out_text_document") == texts
    assert report.skipped == (("title: no key 'title'", 1),)


def test_wudao_works_by_name(bpe, tmp_path):
    records = [{"uniqueKey": str(i), "title": f"题 {i}", "content": text} for i, text in enumerate(TEXTS)]
    (tmp_path / "part-1.json").write_text(json.dumps(records, ensure_ascii=False))
    report = preprocess(arguments(tmp_path, bpe, input=(str(tmp_path),), layout="wudao"))
    texts = [f"题 {i}\n{text}" for i, text in enumerate(TEXTS)]
    assert contents(report.prefix) == reference(bpe, texts, f"{tmp_path}/reference", False)


def test_splits_and_shuffling_lose_no_document(bpe, tmp_path):
    jsonl(tmp_path / "in.jsonl", TEXTS)
    report = preprocess(arguments(tmp_path, bpe, shuffle=3, split="80,15,5"))
    names = [Path(dataset.prefix).name for dataset in report.datasets]
    assert names == [f"out_text_{split}_document" for split in ("train", "valid", "test")]
    tokenizer = load_tokenizer(bpe)
    found = [tokenizer.decode(ids.tolist()) for dataset in report.datasets for ids in IndexedDataset(dataset.prefix)]
    assert sorted(found) == sorted(TEXTS) and found != TEXTS
    assert [dataset.documents for dataset in report.datasets] == [166, 32, 10]


def test_standard_input_is_read_to_its_end(bpe, tmp_path):
    script = "import sys; from megatron_patch.launch.main import main; sys.exit(main(sys.argv[1:]))"
    args = command(arguments(tmp_path, bpe, input=("-",)), "--engine", "hf")
    argv = [sys.executable, "-c", script, "preprocess", *args]
    run = subprocess.run(argv, input=b"\n".join(map(line, TEXTS)), capture_output=True)
    assert run.returncode == 0, run.stderr
    assert contents(f"{tmp_path}/out_text_document") == reference(bpe, TEXTS, f"{tmp_path}/reference", False)


def test_an_engine_that_errs_in_the_middle_is_replaced_loudly(bpe, tmp_path, monkeypatch, capsys):
    jsonl(tmp_path / "in.jsonl", TEXTS)
    original, runs = workers.Crew.tokenize, []

    def erring(*args: Any) -> None:
        runs.append(args[2].recipe.name)
        if runs[-1] != "hf":
            raise EngineMismatch(f"engine {runs[-1]} gives other ids")
        original(*args)

    monkeypatch.setattr(workers.Crew, "tokenize", erring)
    report = preprocess(arguments(tmp_path, bpe))
    assert runs[0] != "hf" and runs[-1] == "hf" and report.engine.startswith("hf ")
    assert "gives other ids; starting again with transformers' own" in capsys.readouterr().err
    assert contents(report.prefix) == reference(bpe, TEXTS, f"{tmp_path}/reference", False)
    with pytest.raises(ValueError, match="tiktoken gives other ids"):
        preprocess(arguments(tmp_path, bpe, engine="tiktoken", overwrite=True))


def _crash(*args: Any) -> None:
    os._exit(1)


def test_an_engine_that_crashes_under_its_proof_ends_no_run(bpe, tmp_path, monkeypatch, capsys):
    jsonl(tmp_path / "in.jsonl", TEXTS)
    monkeypatch.setattr(workers, "fault", _crash)
    report = preprocess(arguments(tmp_path, bpe))
    assert report.engine.startswith("hf ") and "is not used: it ends its process" in capsys.readouterr().err
    assert contents(report.prefix) == reference(bpe, TEXTS, f"{tmp_path}/reference", False)


def test_shards_of_another_tokenizer_are_never_mixed_in(bpe, tmp_path, monkeypatch):
    unfinished(tmp_path, bpe, monkeypatch, engine="hf")
    other = make.byte_bpe(tmp_path / "other", pad_token="<|pad|>")
    with pytest.raises(ValueError, match="run with other settings .*tokenizer: "):
        preprocess(arguments(tmp_path, other, on_error="skip", engine="hf", max_errors="1"))


def test_reports_are_taken_in_the_order_of_the_shards_whichever_is_finished_first(tmp_path):
    taken: list[int] = []

    class Watching:
        def take(self, report: tokenizing.ShardReport) -> None:
            taken.append(report.number)

    desk = workers._Desk(None, None, tmp_path, 1, Watching())
    for number, expected in ((2, []), (0, [0]), (3, [0]), (1, [0, 1, 2, 3])):
        desk._take(tokenizing.ShardReport(number))
        assert taken == expected
