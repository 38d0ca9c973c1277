"""Records of users to conversations: alpaca, ShareGPT, OpenAI's messages, prompt and completion.

    layout = detect_layout(first_records, {})                # "sharegpt"
    conversation = read_conversation(record, layout, {})     # BadRecord if it is none

What a user wrote is checked, never guessed at: an unknown role, an answer that is no string, a weight that is neither 0
nor 1 make a BadRecord with a reason to count by. Roles are of a closed set, so that a template may build control tokens
of them. It does not know templates or tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import orjson

from megatron_patch.data.readers import BadRecord, Record, json_value

ASSISTANT, OBSERVATION, SYSTEM, TOOL, USER = "assistant", "observation", "system", "tool", "user"
NOTHING_LEARNED = "no answer to learn"
"""The reason of a record whose answers are empty, or not to be learned."""
_ROLES = {
    **{role: role for role in (SYSTEM, USER, ASSISTANT, TOOL, OBSERVATION, "developer", "ipython")},
    "human": USER,
    **dict.fromkeys(("gpt", "bing", "bard", "bot", "chatbot", "chatgpt", "model", "ai"), ASSISTANT),
    **dict.fromkeys(("function", "function_response", "tool_response"), TOOL),
}
"""What a role may be called -> its name in templates."""
_CALLS = ("function_call", "tool_call")
"""ShareGPT's turns in which the assistant calls a function."""
_LEARNED = ("loss", "weight", "train")
"""Keys by which a message says whether it is to be learned."""

_PLAIN: Mapping[str, Any] = MappingProxyType({})


class Message(NamedTuple):
    """One turn."""

    role: str
    content: str
    learned: bool
    """Whether it is to be learned; of an assistant's turns only."""
    more: Mapping[str, Any] = _PLAIN
    """What else a template may read: tool_calls, reasoning_content, name, ..."""


class Conversation(NamedTuple):
    """Turns in order, and the tools that the assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()


class Layout(NamedTuple):
    """How records of one kind are told, and what is told to somebody whose records are not."""

    keys: tuple[tuple[str, ...], ...]
    """A record is of this kind if it has one key of each."""
    description: str


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "messages": Layout((("messages",),), "messages: [{role, content}, ...]"),
        "sharegpt": Layout((("conversations", "conversation"),), "conversations: [{from, value}, ...]"),
        "prompt": Layout((("prompt",), ("completion",)), "prompt and completion"),
        "alpaca": Layout(
            (("instruction", "query"), ("output", "content", "response")),
            "instruction (or query), input, output (or content, response)",
        ),
    }
)
"""Layout -> how it is told, the surest first."""


# ------------------------------------------------------------------------------------------------------------ detection


def detect_layout(records: Iterable[Record], columns: Mapping[str, str]) -> str:
    """The layout of the first records of a file, by their keys.

    Raises:
        ValueError: none of them is of a known layout, or they are of several.
    """
    found, keys = Counter[str](), Counter[str]()
    for record in records:
        try:
            value = renamed(json_value(record), columns)
        except BadRecord:
            continue
        keys.update([*value])
        layout = _layout_of(value)
        if layout:
            found[layout] += 1
    if len(found) == 1:
        return next(iter(found))
    if found:
        counts = ", ".join(f"{count} x {name}" for name, count in found.most_common())
        raise ValueError(f"the first records are of several layouts ({counts}); name one with --sft-format")
    seen = ", ".join(map(repr, (key for key, _ in keys.most_common(20)))) or "none"
    wanted = "; ".join(f"{name}: {layout.description}" for name, layout in LAYOUTS.items())
    raise ValueError(
        f"the first records are of no known layout; their keys are {seen}. Known are {wanted}. "
        "Rename columns with --columns old=new"
    )


def _layout_of(value: Mapping[str, Any]) -> str | None:
    fits = (name for name, layout in LAYOUTS.items() if all(any(k in value for k in one) for one in layout.keys))
    return next(fits, None)


def renamed(value: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A record with its columns renamed; a column that gives way to another is gone."""
    if not columns:
        return value
    return {k: v for k, v in value.items() if k not in columns and k not in columns.values()} | {
        new: value[old] for old, new in columns.items() if old in value
    }


# -------------------------------------------------------------------------------------------------------------- reading


def read_turns(record: Record, layout: str, columns: Mapping[str, str]) -> Conversation:
    """The conversation of one record, whether or not there is anything to learn. Raises BadRecord if it is none."""
    source = _Source(record, renamed(json_value(record), columns))
    return Conversation((*_system(source), *_READERS[layout](source)), _tools(source))


def read_conversation(record: Record, layout: str, columns: Mapping[str, str]) -> Conversation:
    """The conversation of one record. Raises BadRecord if it is none, or holds no answer to learn."""
    conversation = read_turns(record, layout, columns)
    if not any(message.learned for message in conversation.messages):
        raise BadRecord(record, NOTHING_LEARNED, "no message of an assistant with text that is to be learned")
    return conversation


class _Source(NamedTuple):
    """A record and its object."""

    record: Record
    value: dict[str, Any]

    def first(self, *keys: str) -> str | None:
        """The first of these keys that is there and not null."""
        return next((key for key in keys if self.value.get(key) is not None), None)

    def text(self, *keys: str) -> str:
        """The string under the first of these keys that is there."""
        key = self.first(*keys)
        if key is None:
            there = next((key for key in keys if key in self.value), None)
            if there:
                self.refuse(f"key {there!r} is null")
            self.refuse(f"no key {keys[0]!r}", f"the keys are {', '.join(map(repr, self.value)) or 'none'}")
        return self.string(self.value[key], f"key {key!r}")

    def string(self, value: Any, what: str) -> str:
        if not isinstance(value, str):
            self.refuse(f"{what} is no string", f"it is {type(value).__name__}")
        return _mended(value)

    def items(self, value: Any, what: str) -> list[Any]:
        if not isinstance(value, list) or not value:
            self.refuse(f"{what} is no list of turns", f"it is {type(value).__name__}, or empty")
        return value

    def refuse(self, reason: str, detail: str = "") -> NoReturn:
        raise BadRecord(self.record, reason, detail)


def _mended(text: str) -> str:
    """Half a character (a lone surrogate) becomes U+FFFD: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _answer(text: str, more: Mapping[str, Any] = _PLAIN) -> Message:
    return Message(ASSISTANT, text, bool(text.strip() or more), more)


def _system(source: _Source) -> Iterator[Message]:
    if source.first("system"):
        text = source.text("system")
        if text:
            yield Message(SYSTEM, text, False)


def _tools(source: _Source) -> tuple[Any, ...]:
    tools = _json_if_text(source.value.get("tools"))
    if tools is None or tools == "":
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        source.refuse("tools are no list of objects", f"they are {type(tools).__name__}")
    return tuple(tools)


def _json_if_text(value: Any) -> Any:
    """What a string says in JSON; anything else as it is."""
    if isinstance(value, str):
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError:
            return value
    return value


# ---------------------------------------------------------------------------------------------------------- the layouts


def _alpaca(source: _Source) -> Iterator[Message]:
    history = source.value.get("history") or []
    if not isinstance(history, list):
        source.refuse("history is no list of pairs", f"it is {type(history).__name__}")
    for turn in history:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            source.refuse("history is no list of pairs", f"one of them is {turn!r:.60}")
        yield Message(USER, source.string(turn[0], "a question of the history"), False)
        yield _answer(source.string(turn[1], "an answer of the history"))
    question = source.text("instruction", "query")
    if source.first("input"):
        question = "\n".join(part for part in (question, source.text("input")) if part)
    yield Message(USER, question, False)
    yield _answer(source.text("output", "content", "response"))


def _prompt(source: _Source) -> Iterator[Message]:
    prompt, completion = source.value.get("prompt"), source.value.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        for message in _read_messages(source, prompt):
            yield message._replace(learned=False)
        yield from _read_messages(source, completion)
    else:
        yield Message(USER, source.text("prompt"), False)
        yield _answer(source.text("completion"))


def _sharegpt(source: _Source) -> Iterator[Message]:
    key = source.first("conversations", "conversation") or "conversations"
    for turn in source.items(source.value.get(key), f"key {key!r}"):
        if isinstance(turn, dict) and "human" in turn and "assistant" in turn:
            yield Message(USER, source.string(turn["human"], "'human'"), False)
            yield _answer(source.string(turn["assistant"], "'assistant'"))
        elif isinstance(turn, dict) and turn.get("from") in _CALLS:
            yield _function_call(source, turn)
        else:
            message = _message(source, turn)
            yield message._replace(role=TOOL) if message.role == OBSERVATION else message


def _function_call(source: _Source, turn: dict[str, Any]) -> Message:
    """A turn whose text is a call in JSON, or several; else it is text that the model is to write."""
    text = source.string(turn.get("value"), "'value'")
    calls = _json_if_text(text)
    calls = calls if isinstance(calls, list) else [calls]
    if all(isinstance(call, dict) and "name" in call for call in calls):
        functions = [{"type": "function", "function": {"arguments": {}, **call}} for call in calls]
        return _answer("", {"tool_calls": _calls(source, functions)})
    return _answer(text)


def _messages(source: _Source) -> Iterator[Message]:
    return _read_messages(source, source.items(source.value.get("messages"), "key 'messages'"))


def _read_messages(source: _Source, turns: list[Any]) -> Iterator[Message]:
    return (_message(source, turn) for turn in turns)


def _message(source: _Source, turn: Any) -> Message:
    """One turn with a role (or `from`) and content (or `value`)."""
    if not isinstance(turn, dict):
        source.refuse("a turn is no object", f"it is {type(turn).__name__}")
    name = turn.get("role", turn.get("from"))
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        source.refuse("unknown role", f"{name!r}; known are {', '.join(_ROLES)}")
    more = {
        key: value for key, value in turn.items()
        if key not in ("role", "from", "content", "value", *_LEARNED) and value is not None
    }  # fmt: skip
    if "tool_calls" in more:
        more["tool_calls"] = _calls(source, more["tool_calls"])
    calls = bool(more.get("tool_calls"))
    content = _content(source, turn.get("content", turn.get("value")), calls)
    learned = _is_learned(source, turn, role) and bool(content.strip() or calls or more.get("reasoning_content"))
    return Message(role, content, learned, more)


def _content(source: _Source, content: Any, may_miss: bool) -> str:
    """The text of a turn; that of parts is joined."""
    if content is None and may_miss:
        return ""
    if isinstance(content, list):
        others = [part.get("type") if isinstance(part, dict) else part for part in content if not _is_text(part)]
        if others:
            source.refuse("content that is no text", f"{others[0]!r:.60}")
        return "".join(source.string(part["text"], "a part's text") for part in content)
    return source.string(content, "a turn's content")


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type", "text") == "text" and "text" in part


def _is_learned(source: _Source, turn: dict[str, Any], role: str) -> bool:
    key = next((key for key in _LEARNED if turn.get(key) is not None), None)
    if key is None:
        return role == ASSISTANT
    if turn[key] not in (0, 1):
        source.refuse(f"{key} is neither 0 nor 1", f"it is {turn[key]!r:.60}")
    if turn[key] and role != ASSISTANT:
        source.refuse(f"{key} of a turn that is not the assistant's", f"the role is {role}")
    return bool(turn[key])


def _calls(source: _Source, calls: Any) -> list[Any]:
    """Calls of functions; arguments in JSON become objects, which is what most templates want."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        source.refuse("tool_calls are no list of objects", f"they are {type(calls).__name__}")
    made = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and "arguments" in function:
            call = {**call, "function": {**function, "arguments": _json_if_text(function["arguments"])}}
        made.append(call)
    return made


_READERS = {"alpaca": _alpaca, "sharegpt": _sharegpt, "messages": _messages, "prompt": _prompt}
