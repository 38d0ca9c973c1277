"""Stop strings end an answer at the token that completes them, wherever tokens begin and end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_patch.generation.stops import Stops, continuation
from megatron_patch.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer import make

TEXT = (
    "The capital of France is Paris.\n\n今天天气很好。 def f(x):\n    return x ** 2\n\nQuestion: x"
    + " far" * 40
    + " end is the ice is"
)


@pytest.fixture(scope="module", params=[make.byte_bpe, make.llama_sentencepiece], ids=["byte-level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    make_one: Callable[[Path], str] = request.param
    return load_tokenizer(make_one(tmp_path_factory.mktemp("stops") / "hf"))


def first_end(tokenizer: Tokenizer, strings: list[str], prompt: list[int], new: list[int]) -> int | None:
    """After how many tokens an answer is finished, asked after each."""
    stops = Stops(tokenizer, strings)
    return next((count for count in range(1, len(new) + 1) if stops.is_finished(prompt, new[:count])), None)


@pytest.mark.parametrize(
    "strings",
    [["\n\n"], ["Question:", "return"], [" far far far far far end"], ["好"], ["is"], [" "], ["e i"], ["nowhere"]],
)
@pytest.mark.parametrize("length", [1, 4, 9])
def test_an_answer_ends_with_the_token_that_completes_a_string(
    tokenizer: Tokenizer, strings: list[str], length: int
) -> None:
    ids = tokenizer.encode(TEXT)
    prompt, new = ids[:length], ids[length:]
    whole = (continuation(tokenizer, prompt, new[:count]) for count in range(1, len(new) + 1))
    expected = next((count for count, text in enumerate(whole, 1) if any(one in text for one in strings)), None)
    assert first_end(tokenizer, strings, prompt, new) == expected
    assert (expected is None) == (strings == ["nowhere"])


def test_what_the_prompt_ends_with_is_no_part_of_a_stop_string(tokenizer: Tokenizer) -> None:
    prompt, new = tokenizer.encode("one\n"), tokenizer.encode("\ntwo\n\n", add_special_tokens=False)
    end = first_end(tokenizer, ["\n\n"], prompt, new)
    assert end is not None and continuation(tokenizer, prompt, new[:end]).endswith("two\n\n")


def test_a_special_token_is_a_stop_string_by_its_id(tokenizer: Tokenizer) -> None:
    new = tokenizer.encode("one two", add_special_tokens=False)
    name = tokenizer.hf.eos_token
    assert first_end(tokenizer, [name], [1], [*new, tokenizer.eos, *new]) == len(new) + 1
    spelled = tokenizer.encode(f"one {name} two", add_special_tokens=False)
    assert tokenizer.eos not in spelled and first_end(tokenizer, [name], [1], spelled) is None


@pytest.mark.parametrize(
    ("strings", "text", "expected"),
    [
        (["b", "c"], "a c b", ("a ", "c")),
        (["bc", "b"], "abc", ("a", "bc")),
        (["x"], "abc", ("abc", None)),
        ([], "abc", ("abc", None)),
        (["a"], "abc", ("", "a")),
    ],
)
def test_a_text_is_cut_before_the_first_string_in_it(
    tokenizer: Tokenizer, strings: list[str], text: str, expected: tuple[str, str | None]
) -> None:
    assert Stops(tokenizer, strings).cut(text) == expected


def test_an_empty_stop_string_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="a stop string is empty"):
        Stops(tokenizer, ["a", ""])
