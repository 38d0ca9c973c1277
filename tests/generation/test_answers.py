"""The file of answers: whole or not there, in the order of the prompts, and gone on with only where it is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.generation.answers import Answers
from megatron_patch.generation.prompts import Prompt

PLAN = {"max_new_tokens": 8, "prompts": "1a2b", "stop": ("x",)}
PROMPTS = [Prompt(text, {"id": text}, index) for index, text in enumerate("天bc")]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def begun(output: Path, *indices: int) -> Path:
    """What a run leaves that ends after some answers."""
    with Answers(output, PLAN) as answers:
        for index in indices:
            answers.add(index, {"completion": f"answer {index}"})
    return output.with_name(".out.jsonl.partial")


def test_lines_are_in_the_order_of_the_prompts_with_their_fields_first(output: Path) -> None:
    with Answers(output, PLAN) as answers:
        for index in (2, 0, 1):
            assert not output.exists()
            answers.add(index, {"completion": index})
        answers.write(PROMPTS)
    assert output.read_text().splitlines()[0] == '{"id": "天", "completion": 0}'
    assert [json.loads(line)["completion"] for line in output.read_text().splitlines()] == [0, 1, 2]
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("torn", ["", "[1", '[1, {"completion": "天'])
def test_a_run_goes_on_behind_what_is_whole(output: Path, torn: str) -> None:
    partial = begun(output, 2, 0)
    whole = partial.read_bytes()
    partial.write_bytes(whole + torn.encode()[: -1 if torn.endswith("天") else None])
    with Answers(output, PLAN) as answers:
        assert answers.done == {index: {"completion": f"answer {index}"} for index in (2, 0)}
        answers.add(1, {})
    assert partial.read_bytes() == whole + b"[1, {}]\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(max_new_tokens=9), "was begun with something else: max_new_tokens was 8, now is 9. --overwrite begins"),
        (dict(prompts="3c", stop=[]), r"prompts was 1a2b, now is 3c; stop was \['x'\], now is \[\]"),
    ],
)
def test_another_plan_is_refused_by_what_differs(output: Path, change: dict[str, Any], message: str) -> None:
    before = begun(output, 0).read_bytes()
    with pytest.raises(ValueError, match=message), Answers(output, {**PLAN, **change}):
        pass
    assert begun(output).read_bytes() == before
    with Answers(output, {**PLAN, **change}, overwrite=True) as answers:
        assert answers.done == {}


def test_a_damaged_line_is_named(output: Path) -> None:
    partial = begun(output, 0)
    partial.write_bytes(partial.read_bytes() + b"[1\n[2, {}]\n")
    with pytest.raises(ValueError, match=r"\.out\.jsonl\.partial:3: is damaged"), Answers(output, PLAN):
        pass


def test_two_runs_do_not_share_a_file(output: Path) -> None:
    with Answers(output, PLAN), pytest.raises(ValueError, match="another process is writing"), Answers(output, PLAN):
        pass
    begun(output)  # as the first one is gone


def test_without_an_output_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Answers(None, PLAN) as answers:
        answers.add(0, {})
        answers.write(PROMPTS[:1])
    assert answers.done == {0: {}} and not any(tmp_path.iterdir())
