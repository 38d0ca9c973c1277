"""Every layout that users bring becomes the same conversation; what is none says why."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_patch.data.readers import BadRecord, Record
from megatron_patch.data.sft.conversations import LAYOUTS, Conversation, detect_layout, read_conversation


def record(value: Any, line: int = 1) -> Record:
    return Record("chats.jsonl", line, json.dumps(value).encode())


def read(value: Any, layout: str | None = None, **columns: str) -> Conversation:
    one = record(value)
    return read_conversation(one, layout or detect_layout([one], columns), columns)


def turns(value: Any, **columns: str) -> list[tuple[str, str, bool]]:
    return [(one.role, one.content, one.learned) for one in read(value, **columns).messages]


S, A, B, C, D = (
    ("system", "s", False),
    ("user", "a", False),
    ("assistant", "b", True),
    ("user", "c", False),
    ("assistant", "d", True),
)
SAME = {
    "alpaca": {"system": "s", "history": [["a", "b"]], "instruction": "c", "input": "", "output": "d"},
    "alpaca, query and response": {"system": "s", "history": [["a", "b"]], "query": "c", "response": "d"},
    "alpaca, content": {"system": "s", "history": [("a", "b")], "instruction": "c", "content": "d"},
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
            {"from": "human", "value": "c"}, {"from": "gpt", "value": "d"},
        ]
    },
    "ms-swift": {"system": "s", "conversation": [{"human": "a", "assistant": "b"}, {"human": "c", "assistant": "d"}]},
    "messages": {
        "messages": [
            {"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "b", "loss": True}, {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d", "weight": 1},
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_every_layout_is_told_by_its_keys_and_read(name: str) -> None:
    assert turns(SAME[name]) == [S, A, B, C, D]


def test_instruction_and_input_are_two_lines() -> None:
    assert turns({"instruction": "a", "input": "x", "output": "b"})[0] == ("user", "a\nx", False)


def test_prompt_and_completion_are_a_question_and_an_answer() -> None:
    assert turns({"prompt": "a", "completion": "b"}) == [A, B]


def test_prompts_of_messages_are_not_learned() -> None:
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    found = turns({"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]})
    assert found == [A, ("assistant", "b", False), C, D]


def test_a_message_may_say_that_it_is_not_to_be_learned() -> None:
    messages = [{"role": "assistant", "content": "b", "weight": 0}, {"role": "assistant", "content": "d", "loss": True}]
    assert [one.learned for one in read({"messages": messages}).messages] == [False, True]


def test_calls_come_with_their_arguments_as_objects() -> None:
    function = {"name": "f", "arguments": '{"x": 1}'}
    openai = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    share = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    wanted = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    for value in ({"messages": [openai]}, {"conversations": [share]}):
        (message,) = read(value).messages
        assert (message.content, message.learned, message.more["tool_calls"]) == ("", True, wanted)


def test_an_observation_is_what_a_tool_said() -> None:
    value = {
        "conversations": [{"from": "observation", "value": "7"}, {"from": "gpt", "value": "b"}],
        "tools": '[{"name": "f"}]',
    }
    conversation = read(value)
    assert conversation.messages[0].role == "tool"
    assert conversation.tools == ({"name": "f"},)


def test_columns_may_have_other_names() -> None:
    value = {"q": "a", "answer": "b", "instruction": "not this"}
    assert turns(value, q="instruction", answer="output") == [A, B]


BAD = {
    "unknown role": {"messages": [{"role": "boss", "content": "a"}]},
    "no answer to learn": {"instruction": "a", "output": "  "},
    "key 'output' is null": {"instruction": "a", "output": None},
    "key 'instruction' is no string": {"instruction": 7, "output": "b"},
    "history is no list of pairs": {"instruction": "a", "output": "b", "history": [["x"]]},
    "a turn's content is no string": {"messages": [{"role": "user", "content": None}]},
    "content that is no text": {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
    "weight is neither 0 nor 1": {"messages": [{"role": "assistant", "content": "b", "weight": 0.5}]},
    "loss of a turn that is not the assistant's": {"messages": [{"role": "user", "content": "b", "loss": True}]},
    "key 'messages' is no list of turns": {"messages": []},
    "a turn is no object": {"conversations": ["a"]},
    "tools are no list of objects": {"messages": [{"role": "assistant", "content": "b"}], "tools": "words"},
    "tool_calls are no list of objects": {"messages": [{"role": "assistant", "content": "b", "tool_calls": {"a": 1}}]},
}


@pytest.mark.parametrize("history", [7, True, "ab", {"a": "b"}])
def test_a_history_that_is_no_list_is_refused(history: Any) -> None:
    with pytest.raises(BadRecord) as error:
        read({"instruction": "a", "output": "b", "history": history})
    assert error.value.reason == "history is no list of pairs"


@pytest.mark.parametrize("reason", BAD)
def test_a_record_that_is_no_conversation_says_why_and_where(reason: str) -> None:
    with pytest.raises(BadRecord, match="chats.jsonl:1: ") as error:
        read(BAD[reason])
    assert error.value.reason == reason


def test_a_missing_key_names_those_that_are_there() -> None:
    with pytest.raises(BadRecord, match="no key 'output': the keys are 'instruction', 'answer'"):
        read({"instruction": "a", "answer": "b"}, "alpaca")


def test_half_a_character_is_replaced() -> None:
    one = Record("c.jsonl", 1, b'{"prompt": "a\\ud800", "completion": "b"}')
    assert read_conversation(one, "prompt", {}).messages[0].content == "a\ufffd"


def test_records_of_no_known_layout_are_told_what_is_known() -> None:
    with pytest.raises(ValueError, match="their keys are 'text'") as error:
        detect_layout([record({"text": "a"})], {})
    assert all(layout.description in str(error.value) for layout in LAYOUTS.values())


def test_records_of_several_layouts_want_a_name() -> None:
    mixed = [record({"messages": []}), record({"prompt": "a", "completion": "b"})]
    with pytest.raises(ValueError, match="1 x messages, 1 x prompt.*--sft-format"):
        detect_layout(mixed, {})
