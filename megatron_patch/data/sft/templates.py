"""Chat templates: a conversation to text, and which of its characters an assistant is to learn to write.

    template = ChatTemplate(find_template(tokenizer, "tokenizer"))
    rendered = template.render(conversation)      # one rendering; text, learned characters, control tokens

The text is that of transformers' apply_chat_template, character for character. Where the characters came from is known
of each (tracing.py), so nothing is searched for in the text and nothing depends on how a template is written:

* An assistant's turn begins behind what the template writes to prompt for one (its generation prompt, or where it has
  none what it writes behind a user's text) and ends with the control token that follows it, if any; white space before
  that token is part of the turn, what follows it is not. Where a template says {% generation %}, that is the turn.
* A control token is one that the template wrote. In what users wrote its spelling is text. (Tokens that are not
  special, such as <think>, are tokens in an assistant's text too.)

Where a turn cannot be found there is an error that names the template. It does not know token ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import numpy as np

from megatron_patch.data.sft.arguments import OWN_TEMPLATE, TEMPLATE_FOLDER, named_templates, template_choices
from megatron_patch.data.sft.conversations import ASSISTANT, USER, Conversation, Message
from megatron_patch.data.sft.tracing import DATA, GENERATED, TEMPLATE, Traced, compile_template, trace_all

if TYPE_CHECKING:
    from megatron_patch.tokenizer import Tokenizer

_NEEDS = re.compile(r"needs: (.*?)\s*-?#\}")
"""How a template of ours names the control tokens that it writes, for a tokenizer that may lack them."""
_TAG = re.compile(r"<[^<>\s]+>")
"""What a piece that stands for a role looks like."""
_FIRST = 2
"""Code of the first message's characters; those below belong to none."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""What a message's reasoning may be called; transformers gives it to templates under the first two."""


class Unusable(ValueError):
    """A conversation that makes no sample. `reason` is one of a few phrases to count by; `detail` tells the rest."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}{detail and f': {detail}'}")
        self.reason, self.detail = reason, detail


class Control(NamedTuple):
    """A token that is looked for in a text before all else."""

    content: str
    special: bool
    alone: bool = False
    """Whether it counts only where nothing else stands between two others, as "sop", which is no token in words."""


@dataclass(frozen=True)
class TemplateRecipe:
    """A template and what it reads besides conversations; plain data that a process can be sent."""

    name: str
    """What to call it in messages."""
    source: str
    """Its text."""
    tools_source: str | None
    """That for conversations with tools, where it is another."""
    variables: Mapping[str, str]
    """bos_token and the like."""
    controls: tuple[Control, ...]
    """Tokens that are looked for in a text."""
    reserved: tuple[str, ...] = ()
    """Pieces of a SentencePiece model that the template uses as such tokens. The model finds them wherever they are, so
    no user may spell them."""


# ------------------------------------------------------------------------------------------------------------ finding


def find_template(tokenizer: Tokenizer, name: str) -> TemplateRecipe:
    """The template of a name; ValueError if there is none, or if the tokenizer lacks tokens of a named one."""
    hf, tools_source = tokenizer.hf, None
    if name == OWN_TEMPLATE:
        source, tools_source = _own_template(tokenizer)
    elif name in named_templates():
        source = (TEMPLATE_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
        _require_tokens(tokenizer, name, source)
    elif Path(name).is_file():
        source = Path(name).read_text(encoding="utf-8")
    else:
        raise ValueError(f"--chat-template {name!r}: there is none of this name; give {template_choices()}")
    added = sorted(hf.added_tokens_decoder.items())
    known = tuple(
        Control(token.content, token.special, not hf.is_fast and token.content.isalpha())
        for _, token in added
        if token.content.strip()
    )
    variables = {role: str(token) for role, token in hf.special_tokens_map.items() if isinstance(token, str)}
    # One that is neither is a token wherever it stands, as the backend finds it.
    controls = tuple(one for one in known if one.special or one.content in source or not hf.is_fast)
    label = f"of {tokenizer.directory}" if name == OWN_TEMPLATE else name
    return TemplateRecipe(label, source, tools_source, variables, controls, _reserved(tokenizer, source))


def _own_template(tokenizer: Tokenizer) -> tuple[str, str | None]:
    own = tokenizer.hf.chat_template
    source, tools_source = (own.get("default"), own.get("tool_use")) if isinstance(own, dict) else (own, None)
    if not source:
        raise ValueError(
            f"the tokenizer in {tokenizer.directory} has no chat template; name the family's with --chat-template: "
            f"{template_choices()}"
        )
    return source, tools_source


def _require_tokens(tokenizer: Tokenizer, name: str, source: str) -> None:
    needed = _NEEDS.search(source)
    missing = [token for token in needed[1].split() if not _is_one_token(tokenizer, token)] if needed else []
    if missing:
        raise ValueError(
            f"--chat-template {name}: it writes {', '.join(missing)}, for which the tokenizer in {tokenizer.directory} "
            "has no tokens; choose another template, or extend the tokenizer (megatron-patch vocab)"
        )


def _reserved(tokenizer: Tokenizer, source: str) -> tuple[str, ...]:
    if tokenizer.hf.is_fast:
        return ()
    added = {token.content for token in tokenizer.hf.added_tokens_decoder.values()}
    return tuple(sorted(one for one in set(_TAG.findall(source)) - added if _is_one_token(tokenizer, one)))


def _is_one_token(tokenizer: Tokenizer, token: str) -> bool:
    number = tokenizer.hf.convert_tokens_to_ids(token)
    return number is not None and tokenizer.hf.convert_ids_to_tokens(number) == token


# ----------------------------------------------------------------------------------------------------------- rendering


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    learned: np.ndarray
    """bool [characters]: what an assistant is to learn to write."""
    controls: tuple[tuple[int, int], ...]
    """Start and end of each control token."""
    open_turns: int
    """Assistant's turns that no control token ends."""


class ChatTemplate:
    """A compiled template.

    Raises ValueError if it is no template, or if it writes an assistant's answer in a way that cannot be followed.
    """

    def __init__(self, recipe: TemplateRecipe) -> None:
        self.recipe = recipe
        try:
            self._plain = compile_template(recipe.source)
            self._tools = self._plain if recipe.tools_source is None else compile_template(recipe.tools_source)
        except jinja2.TemplateError as error:
            raise ValueError(f"chat template {recipe.name}: {error}") from None
        self._all = _pattern(one for one in recipe.controls if not one.alone)
        self._special = _pattern(one for one in recipe.controls if one.special and not one.alone)
        self._not_special = _pattern(one for one in recipe.controls if not one.special)
        self._alone = frozenset(one.content for one in recipe.controls if one.alone)
        self._marks = _Marks("", "")
        self._marks = self._probe()

    @property
    def closing(self) -> str:
        """The control token that ends an assistant's turn; empty if there is none."""
        return self._marks.closing

    def render(self, conversation: Conversation, *, prompting: bool = False) -> Rendered:
        """The text of a conversation. Raises Unusable if the template refuses it, or loses an answer.

        Args:
            prompting: with what asks the assistant for its next turn (the template's generation prompt).
        """
        options = {"add_generation_prompt": prompting}
        written = self._run(conversation, **options)
        strings = [*_strings(conversation)]
        for piece in self.recipe.reserved:
            if any(piece in text for text in strings):
                raise Unusable("a special token in a text", f"the tokenizer takes {piece!r} for one wherever it stands")
        if any(map(self._special.search, strings)):
            self._require_no_leak(conversation, written, options)
        return self._rendered(conversation, written)

    def _rendered(self, conversation: Conversation, written: _Written) -> Rendered:
        controls = tuple(sorted(self._controls(written, conversation)))
        page = _Page(conversation, written, controls, self._marks)
        page.require_tools()
        learned, open_turns = page.generated() if page.has_generation else page.turns()
        return Rendered(written.text, learned, controls, open_turns)

    # ------------------------------------------------------------------------------------------------------- one run

    def _run(self, conversation: Conversation, **options: bool) -> _Written:
        """What the template writes."""
        try:
            return self._attempt(conversation, options)
        except TypeError:  # some templates want the arguments of calls as text
            spelled = _with_spelled_arguments(conversation)
        try:
            return self._attempt(spelled, options)
        except TypeError as error:
            raise self._failure(error) from None

    def _attempt(self, conversation: Conversation, options: Mapping[str, bool]) -> _Written:
        tools = trace_all(conversation.tools, DATA) or None
        messages = [_as_template_sees(one, chr(_FIRST + i)) for i, one in enumerate(conversation.messages)]
        settings = {"add_generation_prompt": False, "documents": None, **self.recipe.variables, **options}
        template = self._tools if tools else self._plain
        try:
            text = template.render(messages=messages, tools=tools, **settings)
        except jinja2.TemplateError as error:
            raise Unusable("refused by the chat template", f"{self.recipe.name}: {error}") from None
        except (ValueError, LookupError, AttributeError) as error:
            raise self._failure(error) from None
        assert isinstance(text, Traced)
        return _Written(str.__str__(text), np.frombuffer(text.origin.encode("utf-32-le", "surrogatepass"), np.uint32))

    def _failure(self, error: Exception) -> Unusable:
        return Unusable("the chat template fails", f"{self.recipe.name}: {type(error).__name__}: {error}")

    def _controls(self, written: _Written, conversation: Conversation) -> Iterator[tuple[int, int]]:
        """Control tokens by what wrote them: all of the template's, and in an assistant's text those not special."""
        assistants = {_FIRST + i for i, one in enumerate(conversation.messages) if one.role == ASSISTANT}
        trusted = []
        for code, start, end in written.runs():
            if code == ord(TEMPLATE):
                trusted += [match.span() for match in self._all.finditer(written.text, start, end)]
            elif code in assistants:
                yield from (match.span() for match in self._not_special.finditer(written.text, start, end))
        yield from trusted
        if self._alone:
            yield from self._between(written, trusted)

    def _between(self, written: _Written, trusted: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Tokens such as "sop" that count only where nothing else stands between two others."""
        starts = [0, *(end for _, end in trusted)]
        ends = [*(start for start, _ in trusted), len(written.text)]
        for start, end in zip(starts, ends, strict=True):
            if written.text[start:end] in self._alone and not written.sources[start:end].any():
                yield start, end

    def _require_no_leak(self, conversation: Conversation, written: _Written, options: Mapping[str, bool]) -> None:
        """What users spelled like special tokens must not be what the template seems to have written."""
        neutral = self._run(_rewrite(conversation, lambda text: self._special.sub(_blank, text)), **options)
        if self._trusted(written) != self._trusted(neutral):
            raise Unusable(
                "a special token in a text that the chat template rewrites",
                f"{self.recipe.name} writes it in a way that cannot be told from its own tokens",
            )

    def _trusted(self, written: _Written) -> list[str]:
        runs = ((start, end) for code, start, end in written.runs() if code == ord(TEMPLATE))
        return [match[0] for start, end in runs for match in self._special.finditer(written.text, start, end)]

    # --------------------------------------------------------------------------------------------------- what it writes

    def _probe(self) -> _Marks:
        """What stands before and behind an answer, seen on a question and an answer."""
        question = Conversation((Message(USER, "question", False),))
        answered = Conversation((*question.messages, Message(ASSISTANT, "answer", True)))
        try:
            whole = self._run(answered)
        except Unusable:  # it wants more than that, a system prompt for example
            return _Marks("", "")
        try:
            self._rendered(answered, whole)
        except Unusable as error:
            raise ValueError(f"chat template {self.recipe.name}: {error}") from None
        behind = [whole.text[start:end] for start, end in self._controls(whole, answered) if start >= whole.last(3)]
        return _Marks(self._opening(question), behind[0] if behind else "")

    def _opening(self, question: Conversation) -> str:
        try:
            bare, prompt = self._run(question), self._run(question, add_generation_prompt=True)
        except Unusable:
            return ""
        if prompt.text != bare.text and prompt.text.startswith(bare.text):
            return prompt.text[len(bare.text) :]
        return prompt.text[prompt.last(_FIRST) :]


def _pattern(controls: Iterable[Control]) -> re.Pattern[str]:
    """Finds any of some tokens, the longest first."""
    contents = sorted((one.content for one in controls), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, contents)) or r"(?!)")


# ---------------------------------------------------------------------------------------------------- what was written


class _Marks(NamedTuple):
    """What a template writes around an assistant's turn."""

    opening: str
    closing: str


@dataclass(frozen=True)
class _Written:
    """A text and the codes of its characters."""

    text: str
    codes: np.ndarray
    """uint32 [characters]"""

    @cached_property
    def sources(self) -> np.ndarray:
        """The codes without the mark of {% generation %}."""
        return self.codes & np.uint32(GENERATED - 1)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Code, start and end of each run of characters from one source."""
        yield from _runs(self.sources)

    def last(self, code: int) -> int:
        """The end of the last character from one source; 0 if there is none."""
        found = np.flatnonzero(self.sources == code)
        return int(found[-1]) + 1 if len(found) else 0


def _runs(codes: np.ndarray) -> Iterator[tuple[int, int, int]]:
    cuts = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
    return ((int(codes[start]), start, end) for start, end in zip(cuts, cuts[1:], strict=False) if start < end)


@dataclass(frozen=True)
class _Page:
    """A written conversation, in which turns are looked for."""

    conversation: Conversation
    written: _Written
    controls: tuple[tuple[int, int], ...]
    marks: _Marks

    @property
    def has_generation(self) -> bool:
        """Whether the template itself says what is to be learned."""
        return bool((self.written.codes >= GENERATED).any())

    def require_tools(self) -> None:
        """What a template does not know it leaves out without a word: a call or a tool must be in the text by name."""
        names = [_tool_name(tool) for tool in self.conversation.tools]
        if any(names) and not any(name and name in self.written.text for name in names):
            raise Unusable("tools lost by the chat template", f"it writes nothing of {names[0]!r}")
        for number, message in enumerate(self.conversation.messages):
            for call in message.more.get("tool_calls") or ():
                name = _tool_name(call)
                if name and name not in self._text_of(number):
                    raise Unusable("a call lost by the chat template", f"it writes nothing of {name!r}")

    def _text_of(self, number: int) -> str:
        """What came from one message."""
        spans = (self.written.text[start:end] for code, start, end in self.written.runs() if code == _FIRST + number)
        return "\n".join(spans)

    def turns(self) -> tuple[np.ndarray, int]:
        """bool [characters]: those to be learned; and how many turns have no end."""
        learned, open_turns = np.zeros(len(self.written.text), bool), 0
        for number, message in enumerate(self.conversation.messages):
            if message.learned:
                first, last = self._own(number)
                end = self._end(last)
                learned[self._start(first) : last if end is None else end] = True
                open_turns += end is None
        return learned, open_turns

    def _own(self, number: int) -> tuple[int, int]:
        """First and last character of a message, the latter exclusive."""
        sources, code = self.written.sources, _FIRST + number
        found = np.flatnonzero(sources == code)
        if not len(found):
            raise Unusable("an answer lost by the chat template", f"message {number + 1} is not in the text it writes")
        first, last = int(found[0]), int(found[-1]) + 1
        inside = sources[first:last]
        if ((inside >= _FIRST) & (inside != code)).any():
            raise Unusable("an answer taken apart by the chat template", f"message {number + 1} holds others")
        return first, last

    def _start(self, first: int) -> int:
        """Behind the prompt for an answer, if that is what the template wrote before it."""
        before = np.flatnonzero(self.written.sources[:first])
        begin = int(before[-1]) + 1 if len(before) else 0
        found = self.written.text.rfind(self.marks.opening, begin, first) if self.marks.opening else -1
        return first if found < 0 else found + len(self.marks.opening)

    def _end(self, last: int) -> int | None:
        """Behind the token that ends a turn: the next one, with white space before it; else the template's usual."""
        behind = np.flatnonzero(self.written.sources[last:] >= _FIRST)
        limit = last + int(behind[0]) if len(behind) else len(self.written.text)
        for start, end in self.controls:
            if last <= start < limit:
                between = self.written.text[last:start]
                if not between.strip() or self.written.text[start:end] == self.marks.closing:
                    return end
        return None

    def generated(self) -> tuple[np.ndarray, int]:
        """As `turns`, by what the template says; a block of messages that are not to be learned is left out."""
        learned, open_turns, seen = self.written.codes >= GENERATED, 0, set[int]()
        ends = {end for _, end in self.controls}
        for is_block, start, end in list(_runs(learned.astype(np.uint8))):
            if not is_block:
                continue
            numbers = {int(code) - _FIRST for code in np.unique(self.written.sources[start:end]) if code >= _FIRST}
            wanted = {self.conversation.messages[number].learned for number in numbers}
            if len(wanted) > 1:
                raise Unusable("an answer taken apart by the chat template", "one generation block holds several")
            if False in wanted:
                learned[start:end] = False
            else:
                seen |= numbers
                open_turns += end not in ends
        lost = [i + 1 for i, one in enumerate(self.conversation.messages) if one.learned and i not in seen]
        if lost:
            raise Unusable("an answer lost by the chat template", f"message {lost[0]} is in no generation block")
        return learned, open_turns


# -------------------------------------------------------------------------------------------------------- conversations


def _as_template_sees(message: Message, code: str) -> dict[str, Any]:
    """A message as transformers hands it to templates, every string of it traced but the role."""
    seen = {"role": message.role, **trace_all({"content": message.content, **message.more}, code)}
    reasoning = next((seen[key] for key in _REASONING if seen.get(key) is not None), None)
    return seen if reasoning is None else {"thinking": reasoning, **seen, "reasoning_content": reasoning}


def _tool_name(tool: Any) -> str:
    """The name in a tool, or in a call of one; empty if there is none."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else ""


def _strings(value: Any) -> Iterator[str]:
    """Every string in a conversation but keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Message):
        yield value.content
        yield from _strings(value.more)
    elif isinstance(value, Mapping):
        yield from (text for item in value.values() for text in _strings(item))
    elif isinstance(value, list | tuple):
        yield from (text for item in value for text in _strings(item))


def _rewrite(conversation: Conversation, change: Callable[[str], str]) -> Conversation:
    def rewritten(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, Mapping):
            return {key: rewritten(item) for key, item in value.items()}
        return [rewritten(item) for item in value] if isinstance(value, list | tuple) else value

    messages = (one._replace(content=change(one.content), more=rewritten(one.more)) for one in conversation.messages)
    return Conversation(tuple(messages), tuple(rewritten(conversation.tools)))


def _blank(match: re.Match[str]) -> str:
    return "\ue000" * len(match[0])


def _with_spelled_arguments(conversation: Conversation) -> Conversation:
    """The conversation with the arguments of calls as JSON text."""

    def spelled(call: Any) -> Any:
        function = call.get("function")
        if not isinstance(function, Mapping) or isinstance(function.get("arguments", ""), str):
            return call
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    def changed(message: Message) -> Message:
        calls = message.more.get("tool_calls")
        return message._replace(more={**message.more, "tool_calls": list(map(spelled, calls))}) if calls else message

    return Conversation(tuple(map(changed, conversation.messages)), conversation.tools)
