"""`preprocess` against the plain loop of transformers and megatron-core's builder, and under every kind of failure."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from megatron_patch.data import preprocess as module
from megatron_patch.data import shards
from megatron_patch.data.arguments import PreprocessArgs
from megatron_patch.data.preprocess import preprocess
from megatron_patch.data.readers import DamagedInput
from megatron_patch.launch.preprocess import main
from tests.tokenizer import make

TEXTS = make.corpus(200) + list(make.TEXTS)


def jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return str(path)


def arguments(tmp_path: Path, tokenizer: str, **changes: Any) -> PreprocessArgs:
    """Arguments for tmp_path/in.jsonl -> tmp_path/out."""
    base = {"input": (f"{tmp_path}/in.jsonl",), "output_prefix": f"{tmp_path}/out", "tokenizer_model": tokenizer}
    return PreprocessArgs(**(base | changes))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of a few documents."""
    monkeypatch.setattr(shards, "LEAST_BYTES", 5000)


def contents(prefix: str) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def plain_tokenizer(directory: Path) -> tuple[Callable[[str], list[int]], int, int]:
    """(text to ids, id of the end, number of ids): of transformers, or of sentencepiece for its own models."""
    if not (directory / "tokenizer.model").is_file():
        hf = AutoTokenizer.from_pretrained(directory)
        return lambda text: hf(text, split_special_tokens=True)["input_ids"], hf.eos_token_id, len(hf)
    sp = SentencePieceProcessor(model_file=f"{directory}/tokenizer.model")
    return lambda text: [sp.bos_id(), *sp.encode(text)], sp.eos_id(), len(sp)


def reference(tokenizer: str, texts: list[str], prefix: str, append_eod: bool) -> tuple[bytes, bytes]:
    """What Megatron-LM's loop writes: a tokenizer one document at a time, megatron-core's builder."""
    encode, eos, size = plain_tokenizer(Path(tokenizer))
    builder = IndexedDatasetBuilder(f"{prefix}.bin", DType.optimal_dtype(size))
    for text in texts:
        ids = encode(text)
        ids += [eos] if append_eod and ids[-1] != eos else []
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return contents(prefix)


@pytest.mark.parametrize("kind", ["byte_bpe", "llama_sentencepiece", "byt5"])
@pytest.mark.parametrize("append_eod", [True, False])
def test_the_dataset_is_the_reference_loops_byte_for_byte(kind, append_eod, tmp_path):
    tokenizer = getattr(make, kind)(tmp_path / "tokenizer")
    jsonl(tmp_path / "in.jsonl", TEXTS)
    report = preprocess(arguments(tmp_path, tokenizer, append_eod=append_eod))
    expected = reference(tokenizer, TEXTS, f"{tmp_path}/reference", append_eod)
    assert contents(report.prefix) == expected
    assert report.prefix == f"{tmp_path}/out_text_document"
    assert (report.documents, report.tokens, report.dtype) == (len(TEXTS), len(expected[0]) // 2, "uint16")
    assert report.output_bytes == sum(map(len, expected)) and report.skipped == ()
    assert any("end-of-document" in note for note in report.notes) is not append_eod


def test_the_output_does_not_depend_on_workers_or_shards(bpe, tmp_path, monkeypatch):
    jsonl(tmp_path / "in.jsonl", TEXTS)
    one = preprocess(arguments(tmp_path, bpe, append_eod=True))
    monkeypatch.setattr(shards, "LEAST_BYTES", 2000)
    three = preprocess(arguments(tmp_path, bpe, append_eod=True, workers=3, output_prefix=f"{tmp_path}/three"))
    assert contents(one.prefix) == contents(three.prefix)
    assert (one.shards, three.shards > 30) == (1, True)


def test_several_files_of_several_kinds_follow_one_another(bpe, tmp_path):
    first = jsonl(tmp_path / "a.jsonl", TEXTS[:3])
    second = tmp_path / "b.txt"
    second.write_text("A paragraph\nof two lines.\n\nAnother.\n")
    args = arguments(tmp_path, bpe, input=(str(second), first), txt_document="paragraph")
    texts = ["A paragraph\nof two lines.", "Another.", *TEXTS[:3]]
    assert contents(preprocess(args).prefix) == reference(bpe, texts, f"{tmp_path}/reference", False)


BROKEN = [json.dumps({"text": "fine"}), '{"text": "broken', '{"body": "x"}', "", json.dumps({"text": "also fine"})]


def test_a_broken_line_stops_the_run_with_file_and_line_and_leaves_nothing(bpe, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n".join(BROKEN))
    with pytest.raises(DamagedInput, match=r"in.jsonl:2: broken JSON: .*--on-error skip"):
        preprocess(arguments(tmp_path, bpe))
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_skipped_lines_are_told_one_by_one_and_counted(bpe, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text("\n".join([*BROKEN, '{"text": " \\n"}', *['{"text": 1}'] * 30]))
    report = preprocess(arguments(tmp_path, bpe, on_error="skip", max_errors="95%"))
    assert dict(report.skipped) == {
        "broken JSON": 1, "no key 'text'": 1, "empty text": 1, "key 'text' is no string": 30,
    }  # fmt: skip
    assert contents(report.prefix) == reference(bpe, ["fine", "also fine"], f"{tmp_path}/reference", False)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped ")]
    assert "in.jsonl:2: broken JSON" in told[0] and "in.jsonl:3: no key 'text': the keys are 'body'" in told[1]
    assert len(told) == 20 and told[-1].endswith("only counted")


def test_a_wrong_key_never_gives_an_empty_dataset(bpe, tmp_path):
    lines = [json.dumps({"text": text, "id": i, "tags": None}) for i, text in enumerate(TEXTS)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="'content': none of the first 208 records has it; they have 'text', 'id'"):
        preprocess(arguments(tmp_path, bpe, json_keys=("content",), on_error="skip"))
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_a_literal_special_token_stays_text(bpe, tmp_path):
    jsonl(tmp_path / "in.jsonl", ["end <|endoftext|> of <|im_end|>"])
    dataset = IndexedDataset(preprocess(arguments(tmp_path, bpe, append_eod=True)).prefix)
    assert np.flatnonzero(dataset[0] < len(make.SPECIAL)).tolist() == [len(dataset[0]) - 1]


def test_append_eod_needs_a_tokenizer_that_has_one(tmp_path):
    jsonl(tmp_path / "in.jsonl", TEXTS)
    tokenizer = make.byte_bpe(tmp_path / "no_eos", pad_token="<|pad|>")
    with pytest.raises(ValueError, match="--append-eod: the tokenizer in .*no_eos' has no end-of-sequence token"):
        preprocess(arguments(tmp_path, tokenizer, append_eod=True))


def test_a_killed_worker_fails_the_run_and_the_next_one_goes_on_from_there(bpe, tmp_path, small_shards):
    jsonl(tmp_path / "in.jsonl", TEXTS * 30)
    others = set(multiprocessing.active_children())

    def kill_a_worker() -> None:
        while not list((tmp_path / "out.partial").glob("00000*.json")):
            time.sleep(0.001)
        os.kill((set(multiprocessing.active_children()) - others).pop().pid, signal.SIGKILL)

    threading.Thread(target=kill_a_worker, daemon=True).start()
    with pytest.raises(ChildProcessError, match=r"a worker process died .* at or after .*in.jsonl"):
        preprocess(arguments(tmp_path, bpe, workers=2, engine="hf"))
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.partial"]
    report = preprocess(arguments(tmp_path, bpe, workers=1, engine="hf"))
    assert 0 < report.resumed < report.shards and not (tmp_path / "out.partial").exists()
    assert contents(report.prefix) == reference(bpe, TEXTS * 30, f"{tmp_path}/reference", False)


def test_an_exception_in_a_worker_fails_the_run_and_says_where(bpe, tmp_path, monkeypatch):
    jsonl(tmp_path / "in.jsonl", TEXTS)
    # Ids that do not fit their type.
    monkeypatch.setattr(module, "token_dtype", lambda vocab_size: np.dtype(np.uint8))
    with pytest.raises(RuntimeError, match=r"a worker failed within .*in.jsonl: OverflowError: token id \d+ does not"):
        preprocess(arguments(tmp_path, bpe))
    assert os.listdir(tmp_path) == ["in.jsonl"]


def command(args: PreprocessArgs, *flags: str) -> list[str]:
    """The command line of these arguments."""
    options = ["--output-prefix", args.output_prefix, "--tokenizer-model", args.tokenizer_model]
    return ["--input", *args.input, *options, *flags]


def run_command(*argv: str, **options: Any) -> subprocess.Popen:
    """The command in a process of its own, with shards of a few documents."""
    script = (
        "import sys; from megatron_patch.data import shards; shards.LEAST_BYTES = 5000\n"
        "from megatron_patch.launch.main import main; sys.exit(main(['preprocess', *sys.argv[1:]]))"
    )
    return subprocess.Popen([sys.executable, "-c", script, *argv], **options)


def finished(partial: Path) -> int:
    return len(list(partial.glob("0*.json")))


def test_a_run_killed_outright_at_any_moment_leaves_no_dataset_and_no_process_and_can_be_resumed(bpe, tmp_path):
    jsonl(tmp_path / "in.jsonl", TEXTS * 60)
    args = arguments(tmp_path, bpe, append_eod=True, dedup="exact", shuffle=7)
    flags = ["--append-eod", "--dedup", "exact", "--shuffle", "7", "--workers", "2", "--engine", "hf"]
    draw, before = random.Random(1), 0
    for _ in range(2):
        run = run_command(*command(args, *flags))
        wanted = before + draw.randint(1, 30)
        while finished(tmp_path / "out.partial") < wanted:
            assert run.poll() is None
            time.sleep(0.002)
        workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        run.kill()
        run.wait()
        assert len(workers) >= 2 and _gone(workers)
        assert not list(tmp_path.glob("*.idx")) and not list(tmp_path.glob("*.bin"))
        before = finished(tmp_path / "out.partial")
    assert run_command(*command(args, *flags, "--json", f"{tmp_path}/report.json")).wait() == 0
    assert json.loads((tmp_path / "report.json").read_text())["resumed"] == before
    undisturbed = preprocess(
        arguments(tmp_path, bpe, append_eod=True, dedup="exact", shuffle=7, output_prefix=f"{tmp_path}/u")
    )
    assert contents(f"{tmp_path}/out_text_document") == contents(undisturbed.prefix)
    assert not (tmp_path / "out.partial").exists()


def _gone(pids: list[str], seconds: float = 10.0) -> bool:
    """Whether processes end by themselves."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(_alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _alive(pid: str) -> bool:
    try:
        # Field 3 of stat: a zombie has ended and waits for whoever adopted it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_no_more_shards_are_handed_out_than_workers_can_hold(bpe, tmp_path, small_shards, monkeypatch):
    jsonl(tmp_path / "in.jsonl", TEXTS * 2)
    original, unfinished = shards.plan, []

    def watched(*args: Any) -> Any:
        for shard in original(*args):
            unfinished.append(shard.number - finished(tmp_path / "out.partial"))
            yield shard

    monkeypatch.setattr(module, "plan", watched)
    report = preprocess(arguments(tmp_path, bpe, workers=2))
    assert report.shards > 20 and max(unfinished) <= 2 * 2


def test_the_command_prints_its_report(bpe, tmp_path, capsys):
    jsonl(tmp_path / "in.jsonl", TEXTS)
    assert main(command(arguments(tmp_path, bpe), "--append-eod", "--log-interval", "100")) == 0
    captured = capsys.readouterr()
    assert "208" in captured.out and "tokens/s" in captured.out
    assert "208 documents" in captured.err


def test_all_wrong_arguments_are_reported_at_once_before_any_work(tmp_path, bpe):
    args = arguments(
        tmp_path, f"{tmp_path}/none", workers=0, json_keys=("a/b",), log_interval=0, output_prefix=f"{tmp_path}/"
    )
    with pytest.raises(ValueError) as caught:
        args.validate()
    for flag in (
        "--workers 0",
        "--json-keys 'a/b'",
        "--log-interval 0",
        "--tokenizer-model",
        "--output-prefix",
        "--input",
    ):
        assert flag in str(caught.value)


def test_an_existing_dataset_is_kept_unless_overwrite_is_given(bpe, tmp_path):
    jsonl(tmp_path / "in.jsonl", TEXTS)
    first = preprocess(arguments(tmp_path, bpe))
    jsonl(tmp_path / "in.jsonl", TEXTS[:5])
    with pytest.raises(ValueError, match="out_text_document.bin and .*already there; give --overwrite"):
        preprocess(arguments(tmp_path, bpe))
    assert len(IndexedDataset(first.prefix)) == len(TEXTS)
    preprocess(arguments(tmp_path, bpe, overwrite=True))
    assert len(IndexedDataset(first.prefix)) == 5


def dirty_corpus() -> tuple[list[str], list[str], dict[str, int], dict[str, int]]:
    """Documents, those that should be left of them, how many are skipped for which reason, changed by which step."""
    draw = random.Random(4)
    good = ["".join(draw.choices("天地玄黄宇宙洪荒日月盈昃辰宿列张１２３\n", k=200)).strip() for _ in range(60)]
    texts, kept = [], []
    for index, text in enumerate(good):
        kept.append(text)
        texts.append(f"\ufeff{text}\x00" if index % 3 == 0 else text)  # changed
        texts.append(" ".join(good[index // 2]))  # an exact copy but for white space, mostly from another batch
        texts.append(f"{good[index // 2][:-3]}玄玄玄")  # a near copy
        texts.append(f"short\x07{index}")  # dropped, and changed before
    skipped = {"duplicate": 60, "near duplicate": 60, "cleaning: length": 60, "empty text": 1}
    return [*texts, "  \n"], kept, skipped, {"control": 80, "zero-width": 20}


@pytest.mark.parametrize("workers", [1, 3])
def test_cleaned_and_deduplicated_data_and_its_counts_do_not_depend_on_workers(workers, bpe, tmp_path, small_shards):
    texts, kept, skipped, changed = dirty_corpus()
    jsonl(tmp_path / "in.jsonl", texts)
    steps = {"clean": ("length", "zero-width", "control"), "dedup": "near"}
    report = preprocess(arguments(tmp_path, bpe, append_eod=True, workers=workers, **steps))
    assert contents(report.prefix) == reference(bpe, kept, f"{tmp_path}/reference", True)
    assert (report.documents, dict(report.skipped)) == (len(kept), skipped)
    assert list(report.changed) == list(changed.items())


def test_exact_duplicates_are_left_out_across_files_and_near_ones_stay(bpe, tmp_path):
    _, kept, *_ = dirty_corpus()
    first, second = jsonl(tmp_path / "a.jsonl", kept[:9]), jsonl(tmp_path / "b.jsonl", [*kept[5:15], kept[0] + "。"])
    report = preprocess(arguments(tmp_path, bpe, input=(first, second), dedup="exact"))
    assert contents(report.prefix) == reference(bpe, [*kept[:15], kept[0] + "。"], f"{tmp_path}/reference", False)
    assert report.skipped == (("duplicate", 4),) and report.changed == ()


def test_the_table_and_the_json_tell_what_cleaning_and_deduplication_did(bpe, tmp_path, capsys):
    texts, kept, skipped, changed = dirty_corpus()
    args = arguments(tmp_path, bpe, input=(jsonl(tmp_path / "in.jsonl", texts),))
    flags = ["--clean", "control", "zero-width", "length", "--min-chars", "30", "--dedup", "near"]
    assert main(command(args, *flags, "--dedup-threshold", "0.75", "--json", f"{tmp_path}/report.json")) == 0
    table = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for row in ("skipped: near duplicate 60", "skipped: cleaning: length 60", "changed by control 80"):
        assert row in table
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["documents"], dict(report["skipped"])) == (len(kept), skipped)
    assert dict(report["changed"]) == changed


def test_what_cleaning_leaves_nothing_of_gives_no_dataset(bpe, tmp_path):
    jsonl(tmp_path / "in.jsonl", ["Latin only", "and again"])
    with pytest.raises(ValueError, match=r"no document in .*in.jsonl \(2 x cleaning: cjk-ratio\): nothing written"):
        preprocess(arguments(tmp_path, bpe, clean=("cjk-ratio",)))
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_wrong_cleaning_and_deduplication_flags_are_refused_with_the_others(bpe, tmp_path):
    jsonl(tmp_path / "in.jsonl", TEXTS)
    changes = {"min_chars": 5, "dedup_threshold": 2.0, "json": f"{tmp_path}/none/report.json", "workers": 0}
    with pytest.raises(ValueError) as caught:
        arguments(tmp_path, bpe, **changes).validate()
    for flag in ("--min-chars 5 has no effect", "--dedup-threshold 2:", "--json", "--workers 0"):
        assert flag in str(caught.value)
