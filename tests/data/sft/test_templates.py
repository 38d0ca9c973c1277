"""Templates of every wicked kind: turns are found and control tokens are the template's own, or there is an error."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from megatron_patch.data.sft.arguments import named_templates
from megatron_patch.data.sft.conversations import Conversation, Message
from megatron_patch.data.sft.rendering import OPEN, marked
from megatron_patch.data.sft.samples import Sample
from megatron_patch.data.sft.templates import ChatTemplate, Unusable, find_template
from megatron_patch.tokenizer import Tokenizer
from tests.data.sft import make
from tests.data.sft.test_masks import source

Tokenizers = Callable[..., Tokenizer]

THINKING = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' and not (m.content.startswith('<tool_response>')) %}
{%- set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set content = m.content %}{% set thoughts = '' %}
        {%- if m.reasoning_content is string %}{% set thoughts = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + m.role + '\\n' }}
        {%- if loop.index0 > ns.last %}{{ '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}
        {{- content.lstrip('\\n') }}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}
        {%- endfor %}{{ '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
"""Drops the thoughts of earlier turns, spells those of the last one anew, writes calls."""


def learned(loaded: Tokenizer, conversation: Conversation, template: str = "tokenizer") -> list[str]:
    """The runs of text that are learned."""
    sample = make.renderer(loaded, template).sample(conversation)
    assert isinstance(sample, Sample), sample
    cuts = np.flatnonzero(np.diff(np.append(sample.mask, False))) + 1
    runs = np.split(np.arange(len(sample.ids)), cuts)
    return [loaded.decode(sample.ids[run].tolist()) for run in runs if len(run) and sample.mask[run[0]]]


def refusal(loaded: Tokenizer, conversation: Conversation, template: str = "tokenizer") -> str:
    outcome = make.renderer(loaded, template).sample(conversation)
    assert isinstance(outcome, Unusable)
    return str(outcome)


def test_thoughts_that_a_template_drops_or_spells_anew_are_followed(tokenizer: Tokenizers) -> None:
    loaded = tokenizer("chatml", THINKING)
    conversation = make.chat(
        ("user", "a"), ("assistant", "<think>\none\n</think>\n\nb"), ("user", "c"), ("assistant", "<think>two</think>d")
    )
    assert learned(loaded, conversation) == ["b<|im_end|>", "<think>\ntwo\n</think>\n\nd<|im_end|>"]
    ids = make.renderer(loaded).sample(conversation).ids.tolist()
    assert ids == make.transformers_ids(loaded, THINKING, conversation)


def test_reasoning_in_a_field_of_its_own_is_learned_with_its_tags(tokenizer: Tokenizers) -> None:
    answer = Message("assistant", "b", True, {"reasoning": "because"})
    conversation = Conversation((Message("user", "a", False), answer))
    loaded = tokenizer("chatml", THINKING)
    assert learned(loaded, conversation) == ["<think>\nbecause\n</think>\n\nb<|im_end|>"]
    assert make.renderer(loaded).sample(conversation).ids.tolist() == make.transformers_ids(
        loaded, THINKING, conversation
    )


CALL = {"type": "function", "function": {"name": "find", "arguments": {"x": 1}}}


@pytest.mark.parametrize("text", ["", "I look."])
def test_a_call_is_learned_from_the_header_to_the_end_of_the_turn(text: str, tokenizer: Tokenizers) -> None:
    call = Message("assistant", text, True, {"tool_calls": [CALL]})
    turns = make.chat(("user", "a"), ("tool", "7"), ("assistant", "It is 7."))
    conversation = Conversation((turns.messages[0], call, *turns.messages[1:]))
    empty = "<think>\n\n</think>\n\n"
    written = f'{empty}{text}\n<tool_call>\n{{"name": "find", "arguments": {{"x": 1}}}}\n</tool_call><|im_end|>'
    assert learned(tokenizer("chatml", THINKING), conversation) == [written, f"{empty}It is 7.<|im_end|>"]


def test_a_template_that_wants_arguments_as_text_gets_them_so(tokenizer: Tokenizers) -> None:
    own = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}"
    own += "{% endfor %}{{ m.content + eos_token }}{% endfor %}"
    conversation = Conversation((Message("user", "a", False), Message("assistant", "", True, {"tool_calls": [CALL]})))
    assert learned(tokenizer("chatml", own), conversation) == ['find{"x": 1}<|im_end|>']


def test_what_a_template_leaves_out_without_a_word_is_told(tokenizer: Tokenizers) -> None:
    loaded = tokenizer("chatml")
    call = Message("assistant", "text", True, {"tool_calls": [CALL]})
    assert "a call lost" in refusal(loaded, Conversation((Message("user", "a", False), call)), "chatml")
    tools = make.chat(("user", "a"), ("assistant", "b"), tools=({"type": "function", "function": {"name": "find"}},))
    assert "tools lost by the chat template" in refusal(loaded, tools, "chatml")


def test_tools_that_a_template_writes_are_there(tokenizer: Tokenizers) -> None:
    own = "{{ tools | tojson }}" + source("chatml")
    loaded = tokenizer("chatml", own)
    tools = make.chat(("user", "a"), ("assistant", "b"), tools=({"type": "function", "function": {"name": "find"}},))
    assert make.renderer(loaded).sample(tools).ids.tolist() == make.transformers_ids(loaded, own, tools)


# ---------------------------------------------------------------------------------------------------------- injection


def texts_with(specials: list[str]) -> list[str]:
    joined = "".join(specials)
    return [
        *specials,
        joined,
        f"a {specials[-1]} b",
        f"\n{specials[0]}user\n",
        f"{specials[-1][:-1]}",
        f"x{joined}\n{joined}y",
    ]


@pytest.mark.parametrize("family", make.BYTE_LEVEL)
def test_what_users_spell_like_a_special_token_is_text(family: str, tokenizer: Tokenizers) -> None:
    """transformers 5 has an option for the same; it cuts such a spelling out of its surroundings, so tokens differ."""
    loaded, render = tokenizer(family), make.renderer(tokenizer(family), family)
    special = set(loaded.hf.convert_tokens_to_ids(make.BYTE_LEVEL[family].split()))
    clean = [one for one in render.sample(make.chat(("user", "a"), ("assistant", "b"))).ids.tolist() if one in special]
    for text in texts_with(make.BYTE_LEVEL[family].split()):
        conversation = make.chat(("user", f"a{text}"), ("assistant", f"b{text}c"))
        ids = render.sample(conversation).ids.tolist()
        assert [one for one in ids if one in special] == clean
        assert loaded.decode(ids).count(f"b{text}c") == 1
        theirs = make.transformers_ids(loaded, source(family), conversation, sanitize_control_tokens=True)
        assert loaded.decode(ids) == loaded.decode(theirs)
        assert [one for one in theirs if one in special] == clean


@pytest.mark.parametrize("family", make.SENTENCEPIECE)
def test_so_it_is_with_sentencepiece(family: str, tokenizer: Tokenizers) -> None:
    loaded, render = tokenizer(family), make.renderer(tokenizer(family), family)
    special = set(loaded.hf.added_tokens_decoder)
    clean = [one for one in render.sample(make.chat(("user", "a"), ("assistant", "b"))).ids.tolist() if one in special]
    for text in texts_with(["<s>", "</s>"]):
        ids = render.sample(make.chat(("user", f"a{text}"), ("assistant", f"b{text}c"))).ids.tolist()
        assert [one for one in ids if one in special] == clean


def test_without_that_the_same_text_would_be_control_tokens(tokenizer: Tokenizers) -> None:
    loaded = tokenizer("chatml")
    conversation = make.chat(("user", "a<|im_end|>"), ("assistant", "b"))
    end = loaded.hf.convert_tokens_to_ids("<|im_end|>")
    assert make.transformers_ids(loaded, source("chatml"), conversation).count(end) == 3
    assert make.renderer(loaded, "chatml").sample(conversation).ids.tolist().count(end) == 2


def test_symbols_that_sentencepiece_finds_everywhere_may_not_be_spelled(tokenizer: Tokenizers) -> None:
    conversation = make.chat(("user", "a<reserved_107>b"), ("assistant", "c"))
    assert "a special token in a text" in refusal(tokenizer("baichuan2"), conversation, "baichuan2")


def test_a_template_that_hides_where_a_text_comes_from_cannot_smuggle(tokenizer: Tokenizers) -> None:
    own = "{% for m in messages %}{{ '%s|' % m.content if m.role == 'user' else m.content + eos_token }}{% endfor %}"
    loaded = tokenizer("chatml", own)
    assert learned(loaded, make.chat(("user", "a"), ("assistant", "b"))) == ["b<|im_end|>"]
    assert "a special token in a text" in refusal(loaded, make.chat(("user", "<|im_end|>"), ("assistant", "b")))


def test_tokens_that_are_not_special_are_tokens_in_an_answer_and_text_in_a_question(tokenizer: Tokenizers) -> None:
    loaded = make.tokenizer_with(tokenizer("chatml"), ["<think>"])
    render = make.renderer(loaded, "chatml")
    think = loaded.hf.convert_tokens_to_ids("<think>")
    conversation = make.chat(("user", "a"), ("assistant", "<think>b"))
    ids = render.sample(conversation).ids.tolist()
    assert ids.count(think) == 1 and ids == make.transformers_ids(loaded, source("chatml"), conversation)


# ------------------------------------------------------------------------------------------------ generation, refusals

GENERATION = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
{% else %}{{ m.content }}<|im_end|>{% endif %}

{% endfor %}"""


def test_generation_tags_mean_what_they_mean_to_transformers(tokenizer: Tokenizers) -> None:
    loaded = tokenizer("chatml", GENERATION)
    conversation = make.chat(("user", "Hi"), ("assistant", "天 ok"), ("user", "So"), ("assistant", "no"))
    messages = [{"role": one.role, "content": one.content} for one in conversation.messages]
    expected = loaded.hf.apply_chat_template(
        messages, chat_template=GENERATION, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    sample = make.renderer(loaded).sample(conversation)
    assert sample.ids.tolist() == expected["input_ids"]
    assert sample.mask.astype(int).tolist() == expected["assistant_masks"]
    assert sample.supervised > 4


def test_a_generation_block_of_a_message_that_is_not_to_be_learned_is_left_out(tokenizer: Tokenizers) -> None:
    first, second, *rest = make.chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")).messages
    quiet = Conversation((first, second._replace(learned=False), *rest))
    assert learned(tokenizer("chatml", GENERATION), quiet) == ["d<|im_end|>"]


@pytest.mark.parametrize(
    ("own", "problem"),
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "lost by the chat template"),
        ("{% for m in messages %}{{ '%s.' % m.content }}{% endfor %}", "lost by the chat template"),
        (
            "{% for m in messages %}{{ m.content[0] }}{% endfor %}{{ messages[0].content }}{{ messages[1].content }}",
            "taken apart",
        ),
        ("{% for m in messages %}{{ m.content", "unexpected"),
        (GENERATION.replace("{{ m.content }}<|im_end|>{% endg", "x{% endg"), "no generation block"),
    ],
)
def test_a_template_whose_answers_cannot_be_found_is_refused_by_name(
    own: str, problem: str, tokenizer: Tokenizers
) -> None:
    loaded = tokenizer("chatml", own)
    with pytest.raises(ValueError, match=problem) as error:
        ChatTemplate(find_template(loaded, "tokenizer"))
    assert loaded.directory in str(error.value)


def test_a_template_may_refuse_a_conversation(tokenizer: Tokenizers) -> None:
    text = refusal(tokenizer("llama2"), make.chat(("user", "a"), ("tool", "b"), ("assistant", "c")), "llama2")
    assert text == "refused by the chat template: llama2: only one system message, users and assistants: not tool"


def test_a_text_may_stand_before_its_turn(tokenizer: Tokenizers) -> None:
    """A template that puts the system message into the last question moves it; answers stay where they are."""
    own = "{% for m in messages %}{% if m.role != 'system' %}{% if loop.index0 == 3 %}{{ messages[0].content }}"
    own += "{% endif %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    conversation = make.chat(("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert learned(tokenizer("chatml", own), conversation) == ["b<|im_end|>", "d<|im_end|>"]


def test_answers_behind_which_nothing_ends_them_are_counted(tokenizer: Tokenizers) -> None:
    own = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    render = make.renderer(tokenizer("chatml", own))
    sample = render.sample(make.chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
    assert render.counts[OPEN] == 2
    assert marked(sample, tokenizer("chatml").decode) == "user: a\n[[assistant: b]]\nuser: c\n[[assistant: d]]\n"


def test_a_named_template_wants_its_tokens(tokenizer: Tokenizers) -> None:
    with pytest.raises(ValueError, match=r"--chat-template chatml: it writes <\|im_start\|>, for which"):
        find_template(tokenizer("llama3"), "chatml")


def test_a_tokenizer_without_a_template_is_told_the_names(tokenizer: Tokenizers) -> None:
    with pytest.raises(ValueError, match="has no chat template; name the family's") as error:
        find_template(tokenizer("glm4"), "tokenizer")
    assert all(name in str(error.value) for name in named_templates())


def test_every_named_template_is_tried_here() -> None:
    assert {*make.FAMILIES, "plain", "instruction"} == {*named_templates()}


@pytest.mark.parametrize("name", ["plain", "instruction"])
def test_templates_without_control_tokens_end_answers_with_the_tokenizers_own(name: str, tokenizer: Tokenizers) -> None:
    loaded = tokenizer("chatml")
    conversation = make.chat(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert learned(loaded, conversation, name) == ["b<|im_end|>", "d<|im_end|>"]
    assert make.renderer(loaded, name).sample(conversation).ids.tolist() == make.transformers_ids(
        loaded, source(name), conversation
    )
