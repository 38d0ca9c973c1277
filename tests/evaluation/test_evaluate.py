"""The command: text in, figures out, equal to what transformers and arithmetic say, however it is run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_patch.evaluation.arguments import EvaluateArgs
from megatron_patch.evaluation.documents import beginning
from megatron_patch.launch import evaluate as command
from tests.evaluation.runs import theirs
from tests.tokenizer import make
from tests.tokenizer.published import published_class, sp_model

SHORT = ["The capital of France is Paris.", "今天天气很好。", "a literal <|endoftext|> and </s> in the text"]
LONG = [" ".join(make.TEXTS[:2]) * 8, "x y z\n"]
SEQ_LENGTH, STRIDE = 40, 16

Evaluate = Callable[..., dict[str, Any]]


def write(file: Path, texts: list[str]) -> str:
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return str(file)


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    return [write(tmp_path / "short.jsonl", SHORT), write(tmp_path / "long.jsonl", LONG)]


@pytest.fixture
def evaluate(tmp_path: Path) -> Evaluate:
    def run(*argv: object) -> dict[str, Any]:
        output = tmp_path / "report.json"
        assert command.main([*map(str, argv), "--json", str(output)]) == 0
        return json.loads(output.read_text())

    return run


def reference(root: Path, texts: list[str], seq_length: int = SEQ_LENGTH, stride: int = STRIDE) -> tuple[float, int]:
    """transformers' sum of -log p over the tokens of texts, and their number; special tokens in a text are text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(root)
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    return sum(theirs(model, ids, seq_length, stride, begin)), sum(map(len, ids))


@pytest.mark.parametrize("model", ["spoken", "spoken_llama"])
def test_figures_are_transformers_sums_over_tokens_bytes_and_characters(
    model: str, data: list[str], evaluate: Evaluate, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(model)
    report = evaluate("--load", root, "--data", *data, "--seq-length", SEQ_LENGTH, "--stride", STRIDE)
    found = {row["name"]: row for row in (*report["rows"], report["total"])}
    for name, texts in zip((*data, "total"), (SHORT, LONG, SHORT + LONG), strict=True):
        (total, tokens), row, whole = reference(root, texts), found[name], "".join(texts)
        assert row["negative_log_likelihood"] == pytest.approx(total, rel=1e-5)
        assert (row["documents"], row["tokens"]) == (len(texts), tokens)
        assert (row["characters"], row["bytes"]) == (len(whole), len(whole.encode()))
        assert row["loss_per_token"] == pytest.approx(total / tokens, rel=1e-5)
        assert row["perplexity_per_token"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
        assert row["perplexity_per_character"] == pytest.approx(math.exp(total / len(whole)), rel=1e-4)
        assert row["perplexity_per_byte"] == pytest.approx(math.exp(total / len(whole.encode())), rel=1e-4)
        assert row["bits_per_byte"] == pytest.approx(total / math.log(2) / len(whole.encode()), rel=1e-5)
        assert row["bits_per_character"] == pytest.approx(total / math.log(2) / len(whole), rel=1e-5)
    assert report["windows"] > len(SHORT + LONG)


@pytest.fixture(scope="module")
def converted(spoken: Path) -> dict[str, Path]:
    """The model in the two Megatron formats."""
    from megatron_patch.checkpoint.convert import convert
    from megatron_patch.checkpoint.opening import Wanted

    places = {kind: spoken.parent / kind for kind in ("torch_dist", "legacy")}
    for kind, place in places.items():
        convert(spoken, place, Wanted(format=kind))
    return places


@pytest.mark.parametrize("kind", ["torch_dist", "legacy"])
def test_a_megatron_checkpoint_has_the_figures_of_its_model(
    spoken: Path, converted: dict[str, Path], data: list[str], evaluate: Evaluate, kind: str
) -> None:
    first, second = (evaluate("--load", place, "--data", *data)["total"] for place in (spoken, converted[kind]))
    assert first == second


PARALLEL = ["--tensor-model-parallel-size", "2", "--sequence-parallel"], []


@pytest.mark.parametrize(("source", "layout"), zip(("huggingface", "torch_dist"), PARALLEL, strict=True))
def test_two_processes_find_what_one_finds(
    spoken: Path, converted: dict[str, Path], data: list[str], evaluate: Evaluate, tmp_path: Path, source: str,
    layout: list[str],
) -> None:  # fmt: skip
    load = str({**converted, "huggingface": spoken}[source])
    argv = ["--load", load, "--data", *data, "--seq-length", "40", "--micro-batch-size", "3"]
    one = evaluate(*argv)
    start = [sys.executable, "-m", "megatron_patch", "evaluate", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*start, *layout, *argv, "--json", tmp_path / "two"], check=True, env=environment)
    two = json.loads((tmp_path / "two").read_text())
    assert two["processes"] == 2
    for first, second in zip((*one["rows"], one["total"]), (*two["rows"], two["total"]), strict=True):
        near = {key: pytest.approx(value, rel=1e-5) for key, value in first.items() if isinstance(value, float)}
        assert second == {**first, **near}


# -------------------------------------------------------------------------------------------------------- indexed data


def index(prefix: Path, documents: list[list[int]]) -> str:
    """An indexed dataset by megatron-core's own writer."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for ids in documents:
        builder.add_document(torch.tensor(ids, dtype=torch.int32), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize("model", ["spoken", "spoken_llama"])
def test_indexed_data_have_the_figures_of_their_text(
    model: str, append_eod: bool, data: list[str], evaluate: Evaluate, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoTokenizer

    root = request.getfixturevalue(model)
    tokenizer = AutoTokenizer.from_pretrained(root)
    texts = [*SHORT[:2], *LONG]  # whose special tokens, spelled out, would be dropped by its decoder
    ids = [[*tokenizer(text)["input_ids"], *[tokenizer.eos_token_id] * append_eod] for text in texts]
    prefix = index(tmp_path / "ids", ids)
    text = write(tmp_path / "texts.jsonl", texts)
    for flag in ([], ["--append-eod"]):  # what the data have is not what is asked for
        report = evaluate("--load", root, "--data", text, "--data-path", prefix, *flag)
        first, second = ({**row, "name": ""} for row in report["rows"])
        assert first == second
        assert report["append_eod"] == bool(flag)


def test_the_end_of_document_token_is_paid_for_if_it_is_asked_for(
    spoken: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = write(tmp_path / "one.jsonl", SHORT[:1])
    plain, ended = (evaluate("--load", spoken, "--data", file, *flag)["total"] for flag in ([], ["--append-eod"]))
    eos = (tokenizer := AutoTokenizer.from_pretrained(spoken)).eos_token_id
    ids = torch.tensor([[eos, *tokenizer(SHORT[0])["input_ids"]]])
    with torch.no_grad():
        log_p = AutoModelForCausalLM.from_pretrained(spoken).eval()(ids).logits[0, -1].log_softmax(-1)[eos].item()
    assert ended["tokens"] == plain["tokens"] + 1
    assert ended["characters"] == plain["characters"]
    assert ended["negative_log_likelihood"] - plain["negative_log_likelihood"] == pytest.approx(-log_p, rel=1e-4)


# ------------------------------------------------------------------------------------------------------ what is scored


def test_what_begins_a_document_is_the_tokenizers_own_or_bos_or_eod(
    spoken: Path, spoken_llama: Path, tmp_path: Path
) -> None:
    from megatron_patch.tokenizer import load_tokenizer

    without, llama = load_tokenizer(spoken), load_tokenizer(spoken_llama)
    both = load_tokenizer(make.byte_bpe(tmp_path, eos_token="<|endoftext|>", bos_token="<|im_end|>"))
    assert (beginning(without), beginning(llama), beginning(both)) == ((without.eos,), (llama.bos,), (both.bos,))
    sp = sp_model(tmp_path / "chatglm2" / "tokenizer.model")
    chatglm2 = load_tokenizer(published_class(tmp_path / "chatglm2", "ChatGLMTokenizer", pad_token="<unk>"))
    assert beginning(chatglm2) == (sp.get_piece_size() + 1, sp.get_piece_size() + 3)  # [gMASK] sop
    assert (beginning(llama, "eod"), beginning(both, "eod")) == ((llama.eos,), (both.eos,))
    with pytest.raises(ValueError, match="--begin-with bos: the tokenizer in .* has no such token"):
        beginning(without, "bos")


def test_records_that_are_no_document_are_counted(spoken: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "good"}\n{"other": 1}\n{"text": "   "}\nnot json\n{"text": "also good"}\n{"text": "x"}\n')
    report = evaluate("--load", spoken, "--data", file, "--max-documents", 2)
    assert report["total"]["documents"] == 2
    assert report["total"]["characters"] == len("good" + "also good")
    assert sum(count for _, count in report["rows"][0]["left_out"]) == 2


def test_the_report_is_printed(spoken: Path, data: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--load", str(spoken), "--data", *data, "--append-eod"]) == 0
    out = capsys.readouterr().out
    assert "total" in out
    assert "bits/char" in out
    assert "windows of 128 tokens, stride 128; end-of-document tokens scored, too" in out


# ----------------------------------------------------------------------------------------------------------- arguments


@pytest.fixture
def valid(spoken: Path, data: list[str]) -> Callable[..., EvaluateArgs]:
    return lambda **changes: EvaluateArgs(**{"load": str(spoken), "data": tuple(data), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(load="nowhere"), "--load nowhere: no such directory"),
        (dict(load="."), "neither a Hugging Face directory"),
        (dict(data=()), "give what to score: --data FILE for text, --data-path PREFIX"),
        (dict(data=("a", "b", "a")), "a is given 2 times"),
        (dict(data_path=("missing",)), r"--data-path: missing\.idx does not exist"),
        (dict(tokenizer_model="nowhere"), "--tokenizer-model nowhere: no such directory"),
        (dict(json="no/such/place"), "must be a file in a directory that exists"),
        (dict(hf_config="nowhere"), "--hf-config is for a Megatron checkpoint"),
        (dict(seq_length=8, stride=9), "--stride 9: must be at most --seq-length 8"),
        (dict(micro_batch_size=0), "--micro-batch-size 0: must be at least 1"),
        (dict(max_documents=0), "--max-documents 0: must be at least 1"),
        (dict(sequence_parallel=True), "--sequence-parallel: needs --tensor-model-parallel-size"),
        (
            dict(sequence_parallel=True, tensor_model_parallel_size=2, seq_length=9),
            "--seq-length 9: --sequence-parallel needs a multiple of --tensor-model-parallel-size 2",
        ),
    ],
)
def test_wrong_arguments_are_refused(valid: Callable[..., EvaluateArgs], changes: dict[str, Any], message: str) -> None:
    valid().validate()
    with pytest.raises(ValueError, match=message):
        valid(**changes).validate()


def test_the_number_of_processes_must_fit_the_layout(spoken: Path, data: list[str]) -> None:
    argv = ["--load", str(spoken), "--data", *data, "--tensor-model-parallel-size", "2"]
    command.check(argv, 4)
    with pytest.raises(ValueError, match="takes 2 processes, or a multiple of that, not 3; choose --nproc-per-node 2"):
        command.check(argv, 3)
    with pytest.raises(ValueError, match="not 1"):
        command.main(argv)
    with pytest.raises(ValueError, match="the experts take 3 processes, which must divide the 4 of a pipeline stage"):
        command.check(["--load", str(spoken), "--data", *data, "--expert-model-parallel-size", "3"], 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seq-length", "129"], "--seq-length 129: the model has 128 positions; choose 128 or less"),
        (["--stride", "129"], "--stride 129: must be at most the window of 128 tokens"),
    ],
)
def test_a_window_beyond_the_model_is_refused(spoken: Path, data: list[str], flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command.main(["--load", str(spoken), "--data", *data, *flags])


def test_ids_that_the_model_does_not_have_are_refused_before_weights_are_read(
    spoken: Path, spoken_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is beyond the model's vocabulary of 512; is .* the tokenizer of this model"):
        prefix = index(tmp_path / "ids", [[5, 520]])
        command.main(["--load", str(spoken_llama), "--tokenizer-model", str(spoken), "--data-path", prefix])
    prefix = index(tmp_path / "foreign", [[5, 700]])
    with pytest.raises(ValueError, match=r"document 0 of .*foreign: id 700 is not the tokenizer's"):
        command.main(["--load", str(spoken), "--data-path", prefix])
