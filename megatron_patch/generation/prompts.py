"""Prompts from the command line or a file: texts or conversations, and what is said about each of them.

    prompts = Reader(chat=True).read((), "prompts.jsonl")

Everything is checked before a model is loaded, and whatever is wrong is named by file and line. It knows neither tokens
nor templates.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_patch.data.readers import Record
from megatron_patch.data.sft.conversations import ASSISTANT, SYSTEM, USER, Conversation, Message, read_turns

ANSWER = ("completion", "num_tokens", "finish_reason")
"""What an answer adds to the fields of its prompt."""
LOGPROBS = ("tokens", "logprobs")
"""And if they are asked for."""
_OWN = {"max_new_tokens": 1, "seed": 0}
"""Numbers that an object may say of its prompt, and the least they may be."""


@dataclass(frozen=True)
class Prompt:
    """What a model is to continue or to answer."""

    content: str | Conversation
    fields: dict[str, Any]
    """The whole JSON object it stood in, or just the text under its key."""
    index: int = 0
    """Which of all the prompts it is; random draws depend on it."""
    place: str = "--prompt"
    """Where it was read, for messages."""
    max_new_tokens: int | None = None
    """Its own limit."""
    stop: tuple[str, ...] = ()
    """Its own stop strings."""
    seed: int | None = None
    """Its own seed."""

    @property
    def text(self) -> str:
        """What stands before the completion when it is shown: the text, or the last turn and an empty line."""
        return self.content if isinstance(self.content, str) else f"{self.content.messages[-1].content}\n\n"


@dataclass(frozen=True)
class Reader:
    """What prompts look like."""

    key: str = "prompt"
    """Where the text is in a JSON object."""
    chat: bool = False
    """Whether a text is a user's turn, and an object may hold a conversation."""
    messages_key: str = "messages"
    """Where that is."""
    system: str | None = None
    """System message of conversations that have none."""
    logprobs: bool = False
    """Whether answers are to have `LOGPROBS` as well."""

    def read(self, texts: Sequence[str], file: str | None) -> list[Prompt]:
        """The texts, or the prompts of a .txt (one in a line) or .jsonl file; empty lines are no prompts.

        Raises:
            ValueError: a line without a prompt, or with something else than it should hold.
        """
        if file is None:
            return [Prompt(self._turn(text), {self.key: text}, index) for index, text in enumerate(texts)]
        parse = self._object if file.endswith(".jsonl") else self._text
        lines = Path(file).read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
        filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if not filled:
            raise ValueError(f"{file} holds no prompt")
        return [parse(line, index, Record(file, number)) for index, (number, line) in enumerate(filled)]

    def _text(self, line: bytes, index: int, record: Record) -> Prompt:
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{record.place}: is not UTF-8: {error}") from None
        return Prompt(self._turn(text), {self.key: text}, index, record.place)

    def _object(self, line: bytes, index: int, record: Record) -> Prompt:
        place = record.place
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"{place}: is no valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError(f"{place}: must be a JSON object, not {type(value).__name__}")
        if taken := [name for name in (*ANSWER, *LOGPROBS * self.logprobs) if name in value]:
            raise ValueError(f"{place}: has the field {taken[0]!r} already, which the output writes; rename it")
        stop = value.get("stop") or ()
        stop = (stop,) if isinstance(stop, str) else stop
        if not isinstance(stop, list | tuple) or not all(isinstance(one, str) and one for one in stop):
            raise ValueError(f"{place}: 'stop' must be a string or a list of strings, none of them empty")
        content = self._content(value, record._replace(value=value))
        own = {name: _count(value, name, least, place) for name, least in _OWN.items()}
        return Prompt(content, value, index, place, stop=tuple(stop), **own)

    def _content(self, value: dict[str, Any], record: Record) -> str | Conversation:
        if self.chat and self.messages_key in value:
            return self._conversation(read_turns(record, "messages", {self.messages_key: "messages"}), record.place)
        if not isinstance(value.get(self.key), str):
            other = f", or messages under {self.messages_key!r}" * self.chat
            raise ValueError(f"{record.place}: must be a JSON object with a string under {self.key!r}{other}")
        return self._turn(value[self.key])

    def _conversation(self, said: Conversation, place: str) -> Conversation:
        if said.messages[-1].role == ASSISTANT:
            raise ValueError(f"{place}: the last turn is the assistant's; there is nothing to answer")
        turns = [turn._replace(learned=False) for turn in said.messages]
        system = [] if said.messages[0].role == SYSTEM else self._system()
        return Conversation((*system, *turns), said.tools)

    def _turn(self, text: str) -> str | Conversation:
        return Conversation((*self._system(), Message(USER, text, False))) if self.chat else text

    def _system(self) -> list[Message]:
        return [] if self.system is None else [Message(SYSTEM, self.system, False)]


def _count(value: dict[str, Any], name: str, least: int, place: str) -> int | None:
    number = value.get(name)
    if number is not None and (type(number) is not int or not least <= number < 2**63):
        raise ValueError(f"{place}: {name!r} is {number!r}; it must be a whole number from {least} to 2^63-1")
    return number
