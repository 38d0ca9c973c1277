"""`sft-data` from files to samples: counted, the same for any number of workers, there as a whole or not at all."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.data.ledger import TooManyErrors
from megatron_patch.data.readers import DamagedInput
from megatron_patch.data.sft import building
from megatron_patch.data.sft.arguments import SftDataArgs
from megatron_patch.data.sft.building import SftReport, build
from megatron_patch.data.sft.storage import open_samples
from megatron_patch.launch import main as command
from megatron_patch.tokenizer import Tokenizer
from tests.data.sft import make

Tokenizers = Callable[..., Tokenizer]
Run = Callable[..., SftReport]


def records(count: int) -> list[dict[str, Any]]:
    return [{"instruction": f"Question {i}?", "output": "word " * (i % 40 + 1)} for i in range(count)]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture
def arguments(tmp_path: Path, tokenizer: Tokenizers) -> Callable[..., SftDataArgs]:
    """arguments(file, ...): for a run that writes to out."""

    def made(*files: Path, **more: Any) -> SftDataArgs:
        names = tuple(map(str, files))
        settings = {"chat_template": "chatml", "seq_length": 100, **more}
        directory = tokenizer("chatml").directory
        return SftDataArgs(input=names, output_prefix=str(tmp_path / "out"), tokenizer_model=directory, **settings)

    return made


@pytest.fixture
def run(arguments: Callable[..., SftDataArgs]) -> Run:
    """run(file, ...): what becomes of it."""
    return lambda *files, **more: build(arguments(*files, **more), say=lambda text: None)


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("out*")) if path.is_file()}


def test_every_record_becomes_the_sample_that_the_library_makes(
    tmp_path: Path, run: Run, tokenizer: Tokenizers
) -> None:
    report = run(write_jsonl(tmp_path / "a.jsonl", rows := records(30)))
    render = make.renderer(tokenizer("chatml"), "chatml", 100)
    expected = [render.sample(make.chat(("user", one["instruction"]), ("assistant", one["output"]))) for one in rows]
    found = list(make.all_samples(open_samples(report.prefix)))
    assert [one.ids.tolist() for one in found] == [one.ids.tolist() for one in expected]
    assert [one.mask.tolist() for one in found] == [one.mask.tolist() for one in expected]
    assert (report.samples, report.packs, report.records, report.bad) == (30, 30, 30, 0)
    assert report.tokens == sum(len(one.ids) for one in expected)
    assert report.supervised == sum(one.supervised for one in expected)
    assert report.examples == ("<|im_start|>user\nQuestion 0?<|im_end|>\n<|im_start|>assistant\n[[word <|im_end|>]]\n",)
    assert not (tmp_path / "out.partial").exists()


def test_the_output_does_not_depend_on_the_number_of_workers(tmp_path: Path, run: Run, monkeypatch) -> None:
    monkeypatch.setattr(building, "shard_bytes", lambda total: 2000)
    file = write_jsonl(tmp_path / "a.jsonl", records(200))
    assert run(file, packing=True).shards > 3
    alone = bytes_of(tmp_path)
    run(file, packing=True, workers=2, overwrite=True)
    assert bytes_of(tmp_path) == alone


def test_every_kind_of_file_and_layout_may_come_together(tmp_path: Path, run: Run) -> None:
    import pyarrow
    import pyarrow.parquet

    messages = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    share = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    plain = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    array = tmp_path / "b.json"
    array.write_text(json.dumps(share))
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(messages[0]).encode()))
    table = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(messages), table)
    report = run(plain, array, packed, table)
    samples = list(make.all_samples(open_samples(report.prefix)))
    assert [layout for _, layout in report.layouts] == ["prompt", "sharegpt", "messages", "messages"]
    assert [one.ids.tolist() for one in samples] == [samples[0].ids.tolist()] * 4
    assert samples[0].supervised == 2


def test_packs_are_full_and_their_efficiency_is_told(tmp_path: Path, run: Run) -> None:
    report = run(write_jsonl(tmp_path / "a.jsonl", records(400)), packing=True, seq_length=400)
    store = open_samples(report.prefix)
    sums = [sum(len(one.ids) for one in store.pack(number)) for number in range(store.num_packs)]
    assert max(sums) <= 400
    assert report.efficiency == pytest.approx(sum(sums) / (400 * len(sums)))
    assert report.efficiency > 0.97 and report.packs < report.samples / 3


def test_what_is_cut_dropped_or_skipped_is_counted(tmp_path: Path, run: Run) -> None:
    rows = [*records(3), {"instruction": "a", "output": ""}, {"instruction": "long " * 200, "output": "b"}]
    rows.append({"instruction": "a", "output": "word " * 300})
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    report = run(file)
    assert dict(report.skipped) == {"no answer to learn": 1, "nothing to learn within --seq-length": 1}
    assert (report.samples, report.truncated, report.bad) == (4, 1, 0)
    report = run(file, truncation="drop", overwrite=True)
    assert dict(report.skipped) == {"no answer to learn": 1, "longer than --seq-length": 2}
    assert (report.samples, report.truncated) == (3, 0)


def test_a_bad_record_stops_the_run_with_its_place(tmp_path: Path, run: Run) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [*records(3), {"instruction": 1, "output": "x"}])
    with pytest.raises(DamagedInput, match=r"a.jsonl:4: key 'instruction' is no string: it is int"):
        run(file)
    assert not list(tmp_path.glob("out_*")) and not list(tmp_path.glob("out.json"))


def test_or_goes_into_quarantine(tmp_path: Path, run: Run) -> None:
    bad = {"instruction": 1, "output": "x"}
    report = run(write_jsonl(tmp_path / "a.jsonl", [*records(3), bad]), on_error="quarantine", max_errors="50%")
    (line,) = map(json.loads, Path(report.quarantine).read_text().splitlines())
    assert (line["line"], line["reason"], json.loads(line["record"])) == (4, "key 'instruction' is no string", bad)
    assert (report.samples, report.bad) == (3, 1)


def test_too_many_of_them_write_nothing_and_the_next_run_goes_on(tmp_path: Path, run: Run) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [*records(3), {"instruction": 1, "output": "x"}])
    with pytest.raises(TooManyErrors):
        run(file, on_error="skip", max_errors="0")
    assert not list(tmp_path.glob("out_*"))
    report = run(file, on_error="skip", max_errors="1")
    assert (report.samples, report.resumed) == (3, 1)


def test_a_run_that_was_ended_goes_on_where_it_was(tmp_path: Path, run: Run, monkeypatch) -> None:
    monkeypatch.setattr(building, "shard_bytes", lambda total: 2000)
    file = write_jsonl(tmp_path / "a.jsonl", records(200))
    whole = run(file, packing=True)
    expected = bytes_of(tmp_path)

    def full_disk(*args: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(building, "write_samples", full_disk)
        with pytest.raises(OSError, match="no space"):
            run(file, packing=True, overwrite=True)
    assert bytes_of(tmp_path) == expected
    report = run(file, packing=True, overwrite=True)
    assert (report.resumed, bytes_of(tmp_path)) == (whole.shards, expected)


def test_shards_of_another_template_are_not_mixed_in(tmp_path: Path, run: Run) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [*records(3), {"instruction": 1, "output": "x"}])
    with pytest.raises(TooManyErrors):
        run(file, on_error="skip", max_errors="0")
    with pytest.raises(ValueError, match=r"other settings \(template: "):
        run(file, on_error="skip", max_errors="1", chat_template="qwen")


def test_a_column_that_is_not_there_is_told_at_once(tmp_path: Path, run: Run) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", records(2))
    with pytest.raises(
        ValueError, match="no column 'question' in the first records; there are 'instruction', 'output'"
    ):
        run(file, columns=("question=instruction",))


def test_ids_that_differ_from_those_of_transformers_stop_the_run(tmp_path: Path, run: Run, monkeypatch) -> None:
    monkeypatch.setattr(building, "_transformers_ids", lambda *args: [1, 2, 3])
    with pytest.raises(ValueError, match="its text is not what transformers makes of it"):
        run(write_jsonl(tmp_path / "a.jsonl", records(2)))


def test_a_template_that_ends_no_answer_is_warned_of(tmp_path: Path, run: Run) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    report = run(write_jsonl(tmp_path / "a.jsonl", records(4)), chat_template=str(own))
    assert report.open_answers == 4
    assert "nothing teaches the model to stop" in report.notes[0]


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"chat_template": "nobody"}, "--chat-template 'nobody': no such file or name; give tokenizer (its own), a f"),
        ({"columns": ("a",)}, "--columns 'a': give OLD=NEW"),
        ({"seq_length": 1}, "--seq-length 1: must be at least 2"),
        ({"workers": 0}, "--workers 0: must be at least 1"),
        ({"max_errors": "5"}, "--max-errors 5 has no effect without --on-error"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(more: dict[str, Any], problem: str, arguments, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        arguments(write_jsonl(tmp_path / "a.jsonl", records(1)), **more).validate()
    assert problem in str(error.value)


def test_plain_text_and_existing_output_are_refused(arguments, tmp_path: Path, run: Run) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="conversations are no plain text"):
        arguments(tmp_path / "a.txt").validate()
    file = write_jsonl(tmp_path / "a.jsonl", records(2))
    run(file)
    with pytest.raises(ValueError, match="out.json exists; --overwrite replaces it"):
        run(file)


def test_the_command_prints_the_report_and_writes_it(tmp_path: Path, tokenizer: Tokenizers, capsys) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", records(40))
    flags = f"--input {file} --output-prefix {tmp_path}/out --tokenizer-model {tokenizer('chatml').directory}"
    flags += f" --seq-length 100 --chat-template chatml --packing --json {tmp_path}/report.json"
    assert command.main(["sft-data", *flags.split()]) == 0
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text())
    assert "alpaca records, chat template chatml" in printed
    assert "[[word <|im_end|>]]" in printed
    assert (report["samples"], report["packs"] < 40, report["efficiency"] > 0.5) == (40, True, True)
