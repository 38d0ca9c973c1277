"""Samples of one length: what is cut, what is dropped, what never gets through."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_patch.data.sft.rendering import TRUNCATED, RendererRecipe, marked
from megatron_patch.data.sft.samples import Sample, sample
from megatron_patch.data.sft.templates import Unusable
from megatron_patch.tokenizer import Tokenizer
from tests.data.sft import make

Tokenizers = Callable[..., Tokenizer]
CHAT = make.chat(("user", "question"), ("assistant", "a longer answer"))


@pytest.fixture
def whole(tokenizer: Tokenizers) -> Sample:
    return make.renderer(tokenizer("chatml"), "chatml").sample(CHAT)


@pytest.mark.parametrize("truncation", ["right", "left", "drop"])
def test_a_sample_that_just_fits_is_left_alone(truncation: str, whole: Sample, tokenizer: Tokenizers) -> None:
    render = make.renderer(tokenizer("chatml"), "chatml", len(whole.ids), truncation)
    assert render.sample(CHAT).ids.tolist() == whole.ids.tolist()
    assert render.counts[TRUNCATED] == 0


def test_one_token_more_than_fits_is_cut_off_at_the_end(whole: Sample, tokenizer: Tokenizers) -> None:
    render = make.renderer(tokenizer("chatml"), "chatml", len(whole.ids) - 1)
    cut = render.sample(CHAT)
    assert (cut.ids.tolist(), cut.mask.tolist()) == (whole.ids[:-1].tolist(), whole.mask[:-1].tolist())
    assert render.counts[TRUNCATED] == 1


def test_or_at_the_beginning_where_the_first_token_has_nothing_to_be_foretold_from(
    whole: Sample, tokenizer: Tokenizers
) -> None:
    first = int(whole.mask.argmax())
    kept = len(whole.ids) - first - 1  # it begins in the middle of the answer
    cut = make.renderer(tokenizer("chatml"), "chatml", kept, "left").sample(CHAT)
    assert cut.ids.tolist() == whole.ids[-kept:].tolist()
    assert cut.mask.tolist() == [False, *whole.mask[-kept + 1 :].tolist()]
    assert cut.supervised == whole.supervised - 2


def test_or_the_sample_is_dropped(whole: Sample, tokenizer: Tokenizers) -> None:
    outcome = make.renderer(tokenizer("chatml"), "chatml", len(whole.ids) - 1, "drop").sample(CHAT)
    assert isinstance(outcome, Unusable) and outcome.reason == "longer than --seq-length"


def test_a_sample_whose_answer_is_cut_off_never_gets_through(whole: Sample, tokenizer: Tokenizers) -> None:
    first = int(whole.mask.argmax())
    render = make.renderer(tokenizer("chatml"), "chatml", first)
    outcome = render.sample(CHAT)
    assert isinstance(outcome, Unusable) and outcome.reason == "nothing to learn within --seq-length"
    assert render.counts[TRUNCATED] == 0
    assert isinstance(make.renderer(tokenizer("chatml"), "chatml", first + 1).sample(CHAT), Sample)


def test_outcomes_come_in_the_order_of_the_conversations(tokenizer: Tokenizers) -> None:
    render = make.renderer(tokenizer("llama2"), "llama2")
    refused = make.chat(("tool", "x"), ("assistant", "y"))
    found = render.samples([CHAT, refused, CHAT])
    assert [type(one) for one in found] == [Sample, Unusable, Sample]
    assert found[0].ids.tolist() == found[2].ids.tolist() == render.sample(CHAT).ids.tolist()


def test_a_recipe_can_be_sent_and_makes_the_same(tokenizer: Tokenizers) -> None:
    import pickle

    for family in ("chatml", "chatglm3"):
        recipe = RendererRecipe.of(tokenizer(family), family, 100, "right")
        sent = pickle.loads(pickle.dumps(recipe)).build()
        assert sent.sample(CHAT).ids.tolist() == recipe.build().sample(CHAT).ids.tolist()


def test_a_character_that_stands_for_control_tokens_inside_is_no_text(tokenizer: Tokenizers) -> None:
    render = make.renderer(tokenizer("chatml"), "chatml")
    outcome = render.sample(make.chat(("user", "\U000f0000531\U000f0001"), ("assistant", "b")))
    assert isinstance(outcome, Unusable) and outcome.reason == "private-use character"


def test_a_tokenizer_that_cannot_tell_characters_is_refused(tokenizer: Tokenizers, tmp_path) -> None:
    from megatron_patch.tokenizer import load_tokenizer
    from tests.tokenizer.make import byt5

    loaded = load_tokenizer(byt5(tmp_path / "byt5"))
    with pytest.raises(ValueError, match="cannot tell which characters a token is made of"):
        make.renderer(loaded, "plain")


def test_the_text_is_shown_with_marks(whole: Sample, tokenizer: Tokenizers) -> None:
    text = marked(whole, tokenizer("chatml").decode)
    assert text == ("<|im_start|>user\nquestion<|im_end|>\n<|im_start|>assistant\n[[a longer answer<|im_end|>]]\n")


def test_a_sample_has_a_flag_for_each_token() -> None:
    with pytest.raises(ValueError, match="3 ids cannot have a mask of 2"):
        sample([1, 2, 3], [True, False])
    assert sample([1, 2, 3], [1, 1, 0]).supervised == 1
