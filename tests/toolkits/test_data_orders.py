"""Every positional data script, and preprocess_data.py: their own examples become a command that the real parser takes,
each wrong value is named, nothing is deleted. That the data is right is tested in tests/data; a few runs are here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_patch.data.arguments import PreprocessArgs
from tests.guards import readme
from tests.guards.cli_surface import parse
from tests.guards.imports import ROOT
from tests.tokenizer import make
from toolkits import positional
from toolkits.pretrain_data_preprocessing import command, flags, make_dataset, orders, preprocess_data, tokenizer_names

FOLDER = ROOT / "toolkits/pretrain_data_preprocessing"
SCRIPTS = sorted(path for path in FOLDER.glob("*.sh") if path.name != "run_order.sh")
LINES = [{"text": "你好，世界", "title": "甲", "content": "正文"}, {"text": "hello", "title": "b", "content": "c"}]


def order_of(script: Path) -> str:
    return re.search(r'run_order\.sh" (\S+) "\$@"', script.read_text())[1]


def examples(script: Path) -> list[list[str]]:
    """The calls in a script's own comment, without the script's name."""
    lines = (shlex.split(line[1:]) for line in script.read_text().splitlines() if line.startswith("#   "))
    return [words[2:] for words in lines if words[1:2] == [script.name]]


EXAMPLES = [(order_of(script), words) for script in SCRIPTS for words in examples(script)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte-level BPE that says nothing about its kind."""
    return Path(make.byte_bpe(tmp_path_factory.mktemp("tokenizers") / "bpe"))


@pytest.fixture(autouse=True)
def place(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: an empty one with what the examples of the scripts name."""
    for name in command.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Megatron-LM/megatron").mkdir(parents=True)
    for name, kind in {"llama3-8b-hf": "llama", "qwen-7b-hf": "qwen", "qwen2-7b-hf": "qwen2", "gpt2-hf": None}.items():
        shutil.copytree(tokenizer, tmp_path / name)
        if kind:
            (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))
    for name in ("wudao-sample", "corpus"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "part0.jsonl")
    write_lines(tmp_path / "SlimPajama.json")
    write_lines(tmp_path / "wudao.jsonl")
    (tmp_path / "WuDaoCorpus2.0_base_200G").mkdir()
    (tmp_path / "WuDaoCorpus2.0_base_200G/part-0.json").write_text(json.dumps(LINES, ensure_ascii=False))
    return tmp_path


def write_lines(path: Path) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES))


def planned(word: str, *values: str) -> PreprocessArgs:
    """What the real parser makes of the command for a call."""
    order, by_role = positional.read(orders.ORDERS, word, values)
    return parse(list(command.command(order, by_role, os.environ).argv))


def shown(text: str) -> PreprocessArgs:
    """What the real parser makes of the command that was printed."""
    (line,) = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
    return parse(shlex.split(line)[1:])


# ------------------------------------------------------------------------------------------- every script and order


def test_every_order_has_a_script_and_every_script_an_order() -> None:
    named = {order_of(script) for script in SCRIPTS}
    assert named | {orders.ORDERS[word].older for word in named} - {""} == set(orders.ORDERS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_names_its_arguments_and_shows_an_example_of_each_order(script: Path) -> None:
    comment = " ".join(line.removeprefix("#").strip() for line in script.read_text().splitlines() if line[0] == "#")
    newest = orders.ORDERS[order_of(script)]
    for order in filter(None, (newest, orders.ORDERS.get(newest.older))):
        names = " ".join(one.name for one in order.arguments)
        assert f"Order {order.word}, {order.counts} arguments: {names}" in comment
        assert any(order.fits_count(words) for words in examples(script))


@pytest.mark.parametrize(
    ("word", "words"), EXAMPLES, ids=lambda value: value if isinstance(value, str) else str(len(value))
)
def test_an_example_becomes_a_command_that_the_real_parser_takes(word: str, words: list[str], capsys) -> None:
    assert make_dataset.main([word, *words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    args = shown(out)
    assert args.append_eod and args.workers == len(os.sched_getaffinity(0))
    if len(words) == 1:
        assert "nothing to prepare" in out and "nothing was written or deleted" in out
    else:
        args.validate()
        assert "dry run: nothing is done" in out and not Path("datasets").exists()


@pytest.mark.parametrize(
    ("call", "prefix", "keys"),
    [
        ("pretraining-2023 Megatron-LM none wudao-sample llamabpe out/ llama3-8b-hf", "out/wudao_llamabpe", ["text"]),
        ("pretraining none wudao-sample llamabpe out llama3-8b-hf", "out/wudao_llama3bpe", ["content"]),
        ("pretraining none wudao-sample mistralbpe out gpt2-hf", "out/SlimPajama_mistralbpe", ["content"]),
        ("pretraining none wudao-sample qwenbpe out qwen2-7b-hf", "out/wudao_qwenbpe", ["content"]),
        ("pretraining-megatron corpus Qwen2Tokenizer text out qwen2-7b-hf", "out/mmap_qwen2_datasets", ["text"]),
        ("pretraining-megatron corpus LLama3Tokenizer text out llama3-8b-hf x", "out/mmap_llama3_datasets", ["text"]),
        ("pretraining-megatron corpus DeepSeekV2Tokenizer text out gpt2-hf", "out/mmap_deepseekv2_datasets", ["text"]),
        ("pretraining-megatron corpus GPT2BPETokenizer text out gpt2-hf news", "out/mmap_news_datasets", ["text"]),
        ("wudao WuDaoCorpus2.0_base_200G out qwen2-7b-hf", "out/wudao", ["text"]),
    ],
)
def test_the_output_is_called_as_its_users_expect(call: str, prefix: str, keys: list[str]) -> None:
    args = planned(*call.split())
    args.validate()
    assert (args.output_prefix, list(args.json_keys)) == (prefix, keys)


@pytest.mark.parametrize("several", ["text title", "text,title", "text, title"])
def test_several_keys_stand_between_commas_or_blanks(several: str) -> None:
    args = planned("pretraining-megatron", "corpus", "Qwen2Tokenizer", several, "out", "qwen2-7b-hf")
    assert list(args.json_keys) == ["text", "title"]


def test_the_two_orders_of_one_script_are_told_apart_by_their_number(capsys) -> None:
    tail = ["wudao-sample", "llamabpe", "out", "llama3-8b-hf"]
    for before, word, key in ((["none"], "pretraining", "content"), (["none", "none"], "pretraining-2023", "text")):
        assert make_dataset.main(["pretraining", *before, *tail, "--dry-run"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"order {word}\n") and list(shown(out).json_keys) == [key]


def test_wudao_is_read_by_title_and_content_and_cleaned_without_loss() -> None:
    args = planned("wudao", "WuDaoCorpus2.0_base_200G", "out", "qwen2-7b-hf")
    assert (args.layout, args.clean, args.input) == (
        "wudao",
        ("nfc", "control", "zero-width"),
        ("WuDaoCorpus2.0_base_200G",),
    )
    others = planned("pretraining", "none", "wudao-sample", "qwenbpe", "out", "qwen2-7b-hf")
    assert (others.layout, others.clean) == ("records", ())


# ---------------------------------------------------------------------------------------------------- what is refused

NEW = ["none", "wudao-sample", "llamabpe", "out", "llama3-8b-hf"]
OLD = ["Megatron-LM", *NEW]
MEGATRON = ["corpus", "GPT2BPETokenizer", "text", "out", "gpt2-hf", "news"]
WUDAO = ["WuDaoCorpus2.0_base_200G", "out", "qwen2-7b-hf"]


@pytest.mark.parametrize(
    ("word", "good", "number", "value", "message"),
    [
        ("pretraining", NEW, 1, "corpus", "argument 1 MEGATRON_PATCH_PATH='corpus': must be a directory with"),
        ("pretraining", NEW, 2, "gone", "argument 2 input_data_dir='gone': must be a file or directory that exists"),
        ("pretraining", NEW, 3, "llama", "argument 3 tokenizer='llama': choose jiebabpe, bloombpe,"),
        ("pretraining", NEW, 3, "Qwen2Tokenizer", "argument 3 tokenizer='Qwen2Tokenizer': choose jiebabpe, bloombpe,"),
        ("pretraining", NEW, 3, "qwenbpe", "argument 3 tokenizer='qwenbpe', but llama3-8b-hf holds the"),
        ("pretraining", NEW, 4, "SlimPajama.json", "argument 4 output_data_dir='SlimPajama.json': must not be a file"),
        ("pretraining", NEW, 5, "corpus", "argument 5 load_dir='corpus': must be a directory with a tokenizer in it"),
        ("pretraining", NEW, 5, "", "argument 5 load_dir='': is empty"),
        ("pretraining-2023", OLD, 1, "corpus", "argument 1 MEGATRON_PATH='corpus': must be a directory with megatron/"),
        ("pretraining-2023", OLD, 2, "gone", "argument 2 MEGATRON_PATCH_PATH='gone': must be a directory with"),
        ("pretraining-megatron", MEGATRON, 2, "qwenbpe", "argument 2 tokenizer='qwenbpe': choose Qwen2Tokenizer, "),
        ("pretraining-megatron", MEGATRON, 3, "text,text", "argument 3 json_keys='text,text': must be one key or"),
        ("pretraining-megatron", MEGATRON, 3, "a/b", "argument 3 json_keys='a/b': must be one key or several"),
        ("pretraining-megatron", MEGATRON, 3, " , ", "argument 3 json_keys=' , ': must be one key or several"),
        ("pretraining-megatron", MEGATRON, 6, "a/b", "argument 6 dataset_name='a/b': must be a name without '/'"),
        ("wudao", WUDAO, 1, "SlimPajama.json", "argument 1 data_dir='SlimPajama.json': must be a directory"),
        ("wudao", WUDAO, 3, "gone", "argument 3 load_dir='gone': must be a directory with a tokenizer in it"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(word: str, good: list[str], number: int, value: str, message: str, capsys) -> None:
    assert make_dataset.main([word, *good, "--dry-run"]) == 0
    capsys.readouterr()
    assert make_dataset.main([word, *good[: number - 1], value, *good[number:], "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert f"make_dataset.py {word}: error: " in captured.err and message in captured.err
    assert "$ megatron-patch" not in captured.out


@pytest.mark.parametrize(
    ("word", "values", "message"),
    [
        ("pretraining", NEW[:4], "order pretraining takes 5 arguments, not 4; missing: 5 load_dir"),
        ("pretraining", [*OLD, "x"], "order pretraining-2023 takes 6 arguments, not 7; too many: x"),
        ("pretraining", [*OLD, "x"], "under the same name: order pretraining takes 5"),
        ("pretraining-megatron", MEGATRON[:4], "takes 5 or 6 arguments, not 4; missing: 5 load_dir"),
        ("pretraining-megatron", [*MEGATRON, "x"], "takes 5 or 6 arguments, not 7; too many: x"),
        ("pretraining-megatron", MEGATRON[:5], "argument 6 dataset_name is missing: with GPT2BPETokenizer it names"),
        ("wudao", [], "order wudao takes 1, 2 or 3 arguments, not 0; missing: 1 data_dir (the directory is an"),
        ("wudao", WUDAO[:2], "argument 3 load_dir is missing: tokens are written to argument 2 output_data_dir='out'"),
    ],
)  # fmt: skip
def test_a_wrong_number_of_arguments_is_named(word: str, values: list[str], message: str, capsys) -> None:
    assert make_dataset.main([word, *values]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_all_wrong_arguments_are_named_at_once_and_marked(capsys) -> None:
    assert make_dataset.main(["pretraining", "none", "gone", "llama", "out", "gone"]) == 2
    err = capsys.readouterr().err
    assert re.findall(r"error: argument (\d+)", err) == ["2", "3", "5"] and err.count("<- wrong") == 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("LAYOUT", "json", "LAYOUT='json': choose records or wudao"),
        ("CLEAN", "all", "CLEAN='all': choose basic, pai or none"),
        ("DRY_RUN", "yes", "DRY_RUN='yes': choose 0 or 1"),
        ("WORKERS", "0", "WORKERS='0': must be a whole number of at least 1"),
        ("JSON_KEYS", "a/b", "JSON_KEYS='a/b': must be one key or several"),
        ("PREPROCESS_ARGS", "'", "PREPROCESS_ARGS: No closing quotation"),
    ],
)
def test_a_wrong_environment_variable_is_named(name: str, value: str, message: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv(name, value)
    assert make_dataset.main(["pretraining", *NEW]) == 2
    assert f"environment variable {message}" in capsys.readouterr().err


def test_the_environment_changes_keys_layout_cleaning_workers_and_more(monkeypatch) -> None:
    for name, value in {"JSON_KEYS": "title", "CLEAN": "pai", "WORKERS": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PREPROCESS_ARGS", "--on-error skip --overwrite")
    args = planned("pretraining", *NEW)
    assert (args.json_keys, args.clean, args.workers) == (("title",), ("pai",), 3)
    assert args.on_error == "skip" and args.overwrite
    monkeypatch.setenv("LAYOUT", "wudao")
    args = planned("pretraining", *NEW)
    assert (args.layout, args.json_keys) == ("wudao", ("text",))


# ------------------------------------------------------------------------------------- names of tokenizers, directories


@pytest.mark.parametrize(
    ("name", "files", "certain", "text"),
    [
        ("qwenbpe", {"config.json": {"model_type": "qwen3_moe"}}, False, ""),
        ("qwenbpe", {"config.json": {"model_type": "llama"}}, True, "of a llama model; give llamabpe"),
        ("falconbpe", {"config.json": {"model_type": "RefinedWebModel"}}, False, ""),
        ("llamabpe", {"config.json": {"model_type": "internlm2"}}, False, "internlm2 model; that tokenizer is used"),
        ("llamabpe", {"tokenizer_config.json": {"tokenizer_class": "Qwen2TokenizerFast"}}, True, "model; give qwenbpe"),
        ("qwenbpe", {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast"}}, False, ""),
        ("qwenbpe", {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}}, False, ""),
        ("jiebabpe", {"config.json": {"model_type": "llama"}}, False, ""),
        ("qwenbpe", {}, False, ""),
    ],
)  # fmt: skip
def test_a_name_is_refused_only_where_the_files_contradict_it(
    name: str, files: dict[str, dict[str, str]], certain: bool, text: str, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    for file, content in files.items():
        (tmp_path / "model" / file).write_text(json.dumps(content))
    found = tokenizer_names.contradiction(name, str(tmp_path / "model"), tokenizer_names.BPE_NAMES)
    assert found[0] is certain and found[1].endswith(text) and bool(found[1]) is bool(text)


def test_a_kind_without_a_name_is_a_warning_and_the_directory_decides(place: Path, capsys) -> None:
    (place / "gpt2-hf/config.json").write_text('{"model_type": "internlm2"}')
    assert make_dataset.main(["pretraining", *NEW[:4], "gpt2-hf", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "warning: argument 3 tokenizer='llamabpe', but gpt2-hf holds" in out
    assert shown(out).tokenizer_model == "gpt2-hf"


def test_a_checkpoint_lends_the_tokenizer_that_it_carries(place: Path) -> None:
    shutil.copytree(place / "llama3-8b-hf", place / "checkpoint/huggingface")
    assert planned("pretraining", *NEW[:4], "checkpoint").tokenizer_model == "checkpoint/huggingface"


# --------------------------------------------------------------------------------------------- flags of preprocess_data

FLAGS = "--input wudao.jsonl --output-prefix out/wudao --json-keys text --load llama3-8b-hf --append-eod"


def test_flags_of_others_become_ours(capsys) -> None:
    theirs = "--patch-tokenizer-type LLamaTokenizer --dataset-impl mmap --workers 2 --log-interval 5 --seq-length 2048"
    more = "--extra-vocab-size 0 --partitions 2 --keep-sequential-samples --clean nfc control --overwrite"
    assert preprocess_data.main(f"{FLAGS} {theirs} {more} --dry-run".split()) == 0
    out = capsys.readouterr().out
    assert shown(out) == PreprocessArgs(
        input=("wudao.jsonl",),
        output_prefix="out/wudao",
        tokenizer_model="llama3-8b-hf",
        append_eod=True,
        workers=2,
        log_interval=5,
        clean=("nfc", "control"),
        overwrite=True,
    )
    assert out.count("not needed") == 5 and "dry run" in out


@pytest.mark.parametrize("flag", flags.FLAGS, ids=lambda flag: flag.name)
@pytest.mark.parametrize("spelling", [0, -1])
def test_every_flag_of_theirs_is_passed_on_explained_or_refused(flag: flags.Flag, spelling: int, capsys) -> None:
    name, base = flag.names.split()[spelling], FLAGS.split()
    value = {"--input": "SlimPajama.json", "--dataset-impl": "mmap", "--tokenizer-type": "LLamaTokenizer"}
    value |= {"--tokenizer-model": "gpt2-hf", "--load": "gpt2-hf"}
    words = [name, *([] if flag.values == "0" else [value.get(flag.name, "2")])]
    code = preprocess_data.main([*base, *words, "--dry-run"])
    captured = capsys.readouterr()
    assert code == (2 if flag.refused else 0)
    assert (f"error: {flag.name}: {flag.refused}" if flag.refused else flag.name) in captured.err + captured.out
    assert len([kind for kind in (flag.becomes, flag.unused, flag.refused) if kind]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (FLAGS + " --dataset-impl lazy", "--dataset-impl lazy: choose mmap"),
        (FLAGS + " --tokenizer-type BertWordPieceCase", "--tokenizer-type BertWordPieceCase: a vocabulary of BERT"),
        (FLAGS + " --tokenizer-type Qwen2Tokenizer", "--tokenizer-type Qwen2Tokenizer, but llama3-8b-hf holds the"),
        (FLAGS + " --no-such-flag 1", "--no-such-flag: neither a flag of preprocess_data.py nor of megatron-patch"),
        ("stray " + FLAGS, "stray: neither a flag"),
        (FLAGS + " --workers", "argument --workers: expected one argument"),
        ("--input a --output-prefix b", "the tokenizer is missing: give --tokenizer-model (or --load)"),
        ("--input a --output-prefix b --load gone", "--load 'gone': no tokenizer of Hugging Face there"),
        ("--input a --output-prefix b --tokenizer-model meta/x", "--tokenizer-model 'meta/x': no tokenizer of Hugging"),
        ("--load llama3-8b-hf", "--input is missing"),
        ("--load llama3-8b-hf", "--output-prefix is missing"),
    ],
)
def test_a_wrong_flag_is_named(words: str, message: str, capsys) -> None:
    assert preprocess_data.main([*words.split(), "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_a_file_of_the_tokenizer_stands_for_its_directory(tokenizer: Path, capsys) -> None:
    file = next(tokenizer.glob("tokenizer.json"))
    assert (
        preprocess_data.main([*FLAGS.replace("--load llama3-8b-hf", f"--vocab-file {file}").split(), "--dry-run"]) == 0
    )
    assert shown(capsys.readouterr().out).tokenizer_model == str(tokenizer)


def test_without_keys_the_text_is_under_text_and_that_is_said(capsys) -> None:
    assert preprocess_data.main([*FLAGS.replace("--json-keys text", "").split(), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "warning: --json-keys is not given: text" in out and shown(out).json_keys == ("text",)


# ------------------------------------------------------------------------------------------------------- the real thing


def shell(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix, **environment}
    return subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_runs_from_anywhere_in_sh_and_bash(script: Path, place: Path) -> None:
    words = examples(script)[-1]
    done = shell("sh", str(script), *words, cwd=place, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    assert "$ megatron-patch preprocess --input" in done.stdout and "dry run" in done.stdout
    absolute = [str(place / word) if (place / word).exists() else word for word in words]
    beside = shell("bash", script.name, *absolute, "--dry-run", cwd=script.parent)
    assert beside.returncode == 0, beside.stderr
    assert not (place / "datasets").exists()


def test_a_script_passes_on_words_as_they_are_and_the_exit_code(place: Path) -> None:
    done = shell("sh", str(FOLDER / "run_make_pretraining_dataset.sh"), "none", "a b", "*", "", "x", cwd=place)
    assert done.returncode == 2
    assert "argument 2 input_data_dir='a b'" in done.stderr and "argument 3 tokenizer='*'" in done.stderr


def test_without_a_directory_the_preparing_scripts_say_that_they_want_one(place: Path) -> None:
    for name in ("run_prepare_wudao.sh", "run_prepare_dataset.sh"):
        done = shell("bash", str(FOLDER / name), cwd=place)
        assert done.returncode == 2 and "missing: 1 data_dir" in done.stderr


def test_no_script_names_a_program_that_deletes_moves_or_packs() -> None:
    for script in SCRIPTS:
        assert not re.search(r"\b(rm|mv|zstd|split|unlink)\b", re.sub(r"^#.*$", "", script.read_text(), flags=re.M))


def texts_of(prefix: str, tokenizer: Path) -> list[str]:
    """The documents of a data set, read by megatron-core and decoded by transformers."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from transformers import AutoTokenizer

    hf, data = AutoTokenizer.from_pretrained(tokenizer), IndexedDataset(prefix)
    documents = [data[i].copy() for i in range(len(data))]
    assert all(document[-1] == hf.eos_token_id for document in documents)
    return [hf.decode(document[:-1], clean_up_tokenization_spaces=False) for document in documents]


def test_a_call_makes_a_data_set_of_each_key(place: Path, tokenizer: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORKERS", "1")
    monkeypatch.setenv("PREPROCESS_ARGS", "--engine hf")
    assert make_dataset.main(["pretraining-megatron", *MEGATRON[:2], "text,title", "datasets", *MEGATRON[4:]]) == 0
    for key in ("text", "title"):
        found = texts_of(str(place / f"datasets/mmap_news_datasets_{key}_document"), tokenizer)
        assert found == [line[key] for line in LINES]


def test_a_corpus_as_it_was_published_becomes_a_data_set_and_stays_as_it_was(place: Path, tokenizer: Path) -> None:
    before = {path: path.read_bytes() for path in place.joinpath(WUDAO[0]).rglob("*")}
    done = shell("sh", str(FOLDER / "run_prepare_wudao.sh"), *WUDAO, cwd=place, WORKERS="1")
    assert done.returncode == 0, done.stderr
    found = texts_of(str(place / "out/wudao_text_document"), tokenizer)
    assert found == [f"{line['title']}\n{line['content']}" for line in LINES]
    assert {path: path.read_bytes() for path in place.joinpath(WUDAO[0]).rglob("*")} == before


# --------------------------------------------------------------------------------------------------------- the READMEs

READMES = ["README.md", "README.zh-CN.md"]


@pytest.mark.parametrize("name", READMES)
def test_the_table_of_orders_is_that_of_the_program(name: str) -> None:
    lines = [line for line in (FOLDER / name).read_text().splitlines() if line.startswith("| `")]
    rows = {cells[0].strip("`"): cells[1:] for cells in (line.strip("| ").split(" | ") for line in lines)}
    assert set(rows) == set(orders.ORDERS) | set(command.ENVIRONMENT)
    for order in orders.ORDERS.values():
        signature, _, scripts = rows[order.word]
        words = {order.word} | {one.word for one in orders.ORDERS.values() if one.older == order.word}
        assert signature == order.signature
        assert set(re.findall(r"`([^`]+)`", scripts)) == {one.name for one in SCRIPTS if order_of(one) in words}


@pytest.mark.parametrize("name", READMES)
def test_every_command_in_a_readme_is_one_that_is_accepted(name: str, capsys) -> None:
    text = (FOLDER / name).read_text()
    for words in (words for block in readme.blocks(text) for words in readme.commands(block)):
        parse(words)
    calls = re.findall(r"^(?:[A-Z_]+=\S+ |[A-Z_]+=\".*?\" )?bash (\w+\.sh) ([^#\n]+)", text, re.MULTILINE)
    assert len(calls) == 8
    for script, words in calls:
        words = shlex.split(words.replace("../", ""))
        assert make_dataset.main([order_of(FOLDER / script), *words, "--dry-run"]) == 0
    (flags_line,) = re.findall(r"^python preprocess_data\.py (.+)", text, re.MULTILINE)
    assert preprocess_data.main([*shlex.split(flags_line), "--dry-run"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("name", READMES)
def test_what_a_readme_shows_is_what_is_printed(name: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORKERS", "16")
    assert make_dataset.main(["pretraining", *NEW[:3], "datasets", NEW[4], "--dry-run"]) == 0
    said = re.sub(r"^ +env .*\n", "", capsys.readouterr().out.partition("\ndry run")[0], flags=re.MULTILINE)
    said = re.sub(r"^  (\d|env)  +", lambda match: f"  {match[1]}  ", said, flags=re.MULTILINE)
    assert said in (FOLDER / name).read_text()
    monkeypatch.delenv("WORKERS")
    assert make_dataset.main(["pretraining", "none", "wudao", "qwen", "datasets", "llama3-8b-hf"]) == 2
    assert capsys.readouterr().err.partition("\n\n")[2] in (FOLDER / name).read_text()


def test_both_languages_have_the_same_sections_and_code() -> None:
    english, chinese = ((FOLDER / name).read_text() for name in READMES)
    assert readme.headings(english) == readme.headings(chinese)
    code = [[readme.without_comments(block) for block in readme.blocks(text)] for text in (english, chinese)]
    assert code[0] == code[1]
