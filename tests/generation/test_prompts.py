"""Prompts as they are read: texts, lines and objects, conversations, and what is wrong with one by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_patch.data.sft.conversations import Conversation, Message
from megatron_patch.generation.prompts import Prompt, Reader


def test_a_text_file_has_a_prompt_in_each_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfone \r\n\n  \ntwo\n")
    expected = [Prompt("one ", {"p": "one "}, 0, f"{file}:1"), Prompt("two", {"p": "two"}, 1, f"{file}:4")]
    assert Reader("p").read((), str(file)) == expected


def test_an_object_says_more_about_its_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    one, two = {"prompt": "x", "max_new_tokens": 3, "stop": "a", "seed": 0}, {"prompt": "y", "stop": ["b", "c"]}
    file.write_text(f"{json.dumps(one)}\n{json.dumps(two)}\n")
    first, second = Reader().read((), str(file))
    assert (first.max_new_tokens, first.stop, first.seed, first.fields) == (3, ("a",), 0, one)
    assert (second.max_new_tokens, second.stop, second.seed, second.fields) == (None, ("b", "c"), None, two)


def test_a_chat_is_a_users_turn_or_a_conversation(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    said = [{"role": "system", "content": "s"}, {"role": "user", "content": "天"}]
    file.write_text(f'{{"prompt": "x"}}\n{json.dumps({"turns": said, "prompt": 3})}\n')
    reader = Reader(chat=True, messages_key="turns", system="Be kind.")
    kind, asked = Message("system", "Be kind.", False), Message("user", "x", False)
    first, second = reader.read((), str(file))
    assert first.content == reader.read(("x",), None)[0].content == Conversation((kind, asked))
    assert second.content == Conversation((Message("system", "s", False), Message("user", "天", False)))
    assert (first.text, second.text) == ("x\n\n", "天\n\n")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": 1}\n', r"a\.jsonl:2: must be a JSON object with a string under 'pro"),
        ("a.jsonl", "\n[]\n", r"a\.jsonl:2: must be a JSON object, not list"),
        ("a.jsonl", "{\n", r"a\.jsonl:1: is no valid JSON"),
        ("a.jsonl", '{"prompt": "x", "completion": "y"}\n', r"a\.jsonl:1: has the field 'completion' already"),
        ("a.jsonl", '{"prompt": "x", "tokens": []}\n', r"a\.jsonl:1: has the field 'tokens' already"),
        (
            "a.jsonl",
            '{"prompt": "x", "max_new_tokens": 0}\n',
            r":1: 'max_new_tokens' is 0; it must be a whole number f",
        ),
        ("a.jsonl", '{"prompt": "x", "max_new_tokens": true}\n', r":1: 'max_new_tokens' is True"),
        ("a.jsonl", '{"prompt": "x", "seed": 9223372036854775808}\n', r":1: 'seed' is 9223372036854775808; .*2\^63-1"),
        ("a.jsonl", '{"prompt": "x", "stop": ["a", ""]}\n', r":1: 'stop' must be a string or a list of strings"),
        ("a.txt", "ok\n\udcff\n", r"a\.txt:2: is not UTF-8"),
        ("a.txt", "\n\n", "holds no prompt"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        Reader(logprobs=True).read((), str(tmp_path / name))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": []}', r"p\.jsonl:1: key 'messages' is no list of turns"),
        ('{"messages": [{"role": "boss", "content": "x"}]}', r"p\.jsonl:1: unknown role: 'boss'"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', r"p\.jsonl:1: the last turn is the assistant's"),
        ('{"text": "x"}', r"p\.jsonl:1: .* a string under 'prompt', or messages under 'messages'"),
    ],
)
def test_a_broken_conversation_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        Reader(chat=True).read((), str(tmp_path / "p.jsonl"))
