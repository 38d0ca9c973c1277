"""Which tokens are learned, token by token, for the chat templates of families; and that ids are transformers' own."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from megatron_patch.data.sft.arguments import TEMPLATE_FOLDER
from megatron_patch.data.sft.conversations import Conversation
from megatron_patch.data.sft.samples import Sample
from megatron_patch.tokenizer import Tokenizer
from tests.data.sft import make

Tokenizers = Callable[..., Tokenizer]

CHAT = make.chat(("user", "Hi"), ("assistant", "天 ok"), ("user", "So?"), ("assistant", "no!"))
GOLDEN = {
    "llama2": """
        <s> <0x5B> <0x49> N <0x53> T <0x5D> ▁ <0x48> i ▁ <0x5B> <0x2F> <0x49> N <0x53> T <0x5D>
        +▁ +天 +▁ +o +k +▁ +</s>
        <s> <0x5B> <0x49> N <0x53> T <0x5D> ▁ <0x53> o <0x3F> ▁ <0x5B> <0x2F> <0x49> N <0x53> T <0x5D>
        +▁ +n +o +<0x21> +▁ +</s>
    """,
    "llama3": """
        <|begin_of_text|> <|start_header_id|> u s e r <|end_header_id|> Ċ Ċ H i <|eot_id|>
        <|start_header_id|> a s s is ta nt <|end_header_id|> Ċ Ċ +å¤© +Ġ +o +k +<|eot_id|>
        <|start_header_id|> u s e r <|end_header_id|> Ċ Ċ S o ? <|eot_id|>
        <|start_header_id|> a s s is ta nt <|end_header_id|> Ċ Ċ +n +o +! +<|eot_id|>
    """,
    "chatml": """
        <|im_start|> u s e r Ċ H i <|im_end|> Ċ
        <|im_start|> a s s is ta nt Ċ +å¤© +Ġ +o +k +<|im_end|> Ċ
        <|im_start|> u s e r Ċ S o ? <|im_end|> Ċ
        <|im_start|> a s s is ta nt Ċ +n +o +! +<|im_end|> Ċ
    """,
    "qwen": """
        <|im_start|> s y s te m Ċ Y o u Ġa r e Ġa Ġ he l p f u l Ġa s s is ta nt . <|im_end|> Ċ
        <|im_start|> u s e r Ċ H i <|im_end|> Ċ
        <|im_start|> a s s is ta nt Ċ +å¤© +Ġ +o +k +<|im_end|> Ċ
        <|im_start|> u s e r Ċ S o ? <|im_end|> Ċ
        <|im_start|> a s s is ta nt Ċ +n +o +! +<|im_end|> Ċ
    """,
    "baichuan2": """
        ▁ <reserved_106> <0x48> i <reserved_107> +天 +▁ +o +k +</s>
        ▁ <reserved_106> <0x53> o <0x3F> <reserved_107> +n +o +<0x21> +</s>
    """,
    "chatglm3": """
        [gMASK] sop <|user|> ▁ <n> ▁ <0x48> i <|assistant|> +▁ +<n> +▁ +天 +▁ +o +k +<|user|>
        ▁ <n> ▁ <0x53> o <0x3F> <|assistant|> +▁ +<n> +▁ +n +o +<0x21> +</s>
    """,
    "mistral": """
        <s> <0x5B> <0x49> N <0x53> T <0x5D> ▁ <0x48> i <0x5B> <0x2F> <0x49> N <0x53> T <0x5D>
        +▁ +天 +▁ +o +k +</s>
        <0x5B> <0x49> N <0x53> T <0x5D> ▁ <0x53> o <0x3F> <0x5B> <0x2F> <0x49> N <0x53> T <0x5D>
        +▁ +n +o +<0x21> +</s>
    """,
    "deepseek": """
        <｜begin▁of▁sentence｜> U s e r : Ġ H i Ċ Ċ A s s is ta nt : +Ġ +å¤© +Ġ +o +k +<｜end▁of▁sentence｜>
        U s e r : Ġ S o ? Ċ Ċ A s s is ta nt : +Ġ +n +o +! +<｜end▁of▁sentence｜>
    """,
}
"""Every token of CHAT; those to be learned after a '+'. A turn's first token is the first that its prompt lacks."""

LETTERS = (
    "a",
    "天",
    "🎉",
    "é",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "<|",
    "|>",
    "[INST]",
    "sop",
    "philosophy",
    "<s",
    "</think>",
    "1",
)


def source(family: str) -> str:
    return (TEMPLATE_FOLDER / f"{family}.jinja").read_text()


def some_chats(count: int) -> list[Conversation]:
    """Conversations of texts that are hard on tokenizers, but spell no special token."""
    draw = random.Random(7)

    def text() -> str:
        return "x" + "".join(draw.choices(LETTERS, k=draw.randrange(9))) + draw.choice(("", "y"))

    turns = (
        [(role, text()) for _ in range(draw.randrange(1, 4)) for role in ("user", "assistant")] for _ in range(count)
    )
    return [make.chat(*([("system", text())] if draw.random() < 0.5 else []), *one) for one in turns]


@pytest.mark.parametrize("family", GOLDEN)
def test_the_answers_and_their_ends_are_learned_and_nothing_else(family: str, tokenizer: Tokenizers) -> None:
    loaded = tokenizer(family)
    assert make.pieces(loaded, make.renderer(loaded, family).sample(CHAT)) == GOLDEN[family].split()


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("family", GOLDEN)
def test_a_mask_that_is_shifted_by_one_is_noticed(family: str, shift: int, tokenizer: Tokenizers) -> None:
    loaded = tokenizer(family)
    sample = make.renderer(loaded, family).sample(CHAT)
    moved = Sample(sample.ids, np.roll(sample.mask, shift))
    assert make.pieces(loaded, moved) != GOLDEN[family].split()


@pytest.mark.parametrize("family", make.FAMILIES)
def test_ids_are_those_of_transformers(family: str, tokenizer: Tokenizers) -> None:
    loaded = tokenizer(family)
    made = make.renderer(loaded, family).samples(chats := some_chats(60))
    for conversation, sample in zip(chats, made, strict=True):
        assert sample.ids.tolist() == make.transformers_ids(loaded, source(family), conversation), conversation


@pytest.mark.parametrize("family", make.FAMILIES)
def test_a_turn_begins_where_the_prompt_for_it_ends(family: str, tokenizer: Tokenizers) -> None:
    """The prompt is transformers' own; the model has to write the first token that differs from it, and all after."""
    loaded, render = tokenizer(family), make.renderer(tokenizer(family), family)
    for question, answer in (("Hi", "天 ok"), ("天?", "ok"), ("a b", "1 2\n3")):
        sample = render.sample(make.chat(("user", question), ("assistant", answer)))
        asked = make.transformers_ids(loaded, source(family), make.chat(("user", question)), add_generation_prompt=True)
        pairs = zip(asked, sample.ids.tolist(), strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(asked))
        assert sample.mask.tolist().index(True) == same


@pytest.mark.parametrize("family", [family for family in make.FAMILIES if family != "chatglm3"])
def test_what_is_learned_reads_like_the_answer_and_its_end(family: str, tokenizer: Tokenizers) -> None:
    loaded, render = tokenizer(family), make.renderer(tokenizer(family), family)
    for conversation in some_chats(20):
        sample = render.sample(conversation)
        learned = loaded.decode(sample.ids[sample.mask].tolist(), skip_special_tokens=True)
        said = "".join(one.content for one in conversation.messages if one.learned)
        assert "".join(learned.split()) == "".join(said.split())


def test_a_token_that_straddles_the_beginning_of_an_answer_is_learned(tokenizer: Tokenizers) -> None:
    """After "Assistant:" comes a blank that is one token with the word: the model writes it, so it has to learn it."""
    loaded = tokenizer("deepseek")
    sample = make.renderer(loaded, "deepseek").sample(make.chat(("user", "Hi"), ("assistant", "text")))
    assert make.pieces(loaded, sample)[-2:] == ["+Ġtext", "+<｜end▁of▁sentence｜>"]


def test_an_answer_that_begins_with_a_line_end_keeps_it_though_the_header_ends_with_one(tokenizer: Tokenizers) -> None:
    loaded = tokenizer("chatml")
    sample = make.renderer(loaded, "chatml").sample(make.chat(("user", "a"), ("assistant", "\nb")))
    assert make.pieces(loaded, sample)[-5:] == ["Ċ", "+Ċ", "+b", "+<|im_end|>", "Ċ"]


def test_a_message_that_is_not_to_be_learned_is_left_out(tokenizer: Tokenizers) -> None:
    loaded = tokenizer("chatml")
    first, *rest = CHAT.messages
    quiet = Conversation((first, rest[0]._replace(learned=False), *rest[1:]))
    pieces = make.pieces(loaded, make.renderer(loaded, "chatml").sample(quiet))
    expected = GOLDEN["chatml"].split()
    cut = expected.index("S")
    assert pieces == [one.removeprefix("+") for one in expected[:cut]] + expected[cut:]
