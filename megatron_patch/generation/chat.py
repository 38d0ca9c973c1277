"""Conversations to the token ids after which an assistant answers.

    chat = Chat(tokenizer, "tokenizer")
    ids = chat.encode(conversation)

The template is rendered with its generation prompt; what it writes itself are control tokens, what users wrote is text
however it is spelled (data/sft/templates.py, data/sft/encoding.py). It knows no files and no models.
"""

from __future__ import annotations

from megatron_patch.data.sft.conversations import Conversation
from megatron_patch.data.sft.encoding import encode_recipe
from megatron_patch.data.sft.templates import ChatTemplate, Unusable, find_template
from megatron_patch.tokenizer import Tokenizer


class Chat:
    """A tokenizer with a chat template: its own (``tokenizer``), a named one, or that of a file.

    Raises ValueError if there is none of that name, or if it cannot be followed.
    """

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        recipe = find_template(tokenizer, template)
        encoding = encode_recipe(tokenizer, recipe)
        self.source = recipe.source
        """The template's text."""
        self._template, self._encode = ChatTemplate(recipe), encoding.build()
        ends = dict(encoding.controls).get(self._template.closing)
        self.end_ids = () if ends is None else (ends,)
        """What ends an assistant's turn."""

    def encode(self, conversation: Conversation) -> list[int]:
        """Token ids up to where the assistant is to speak. Raises ValueError if the template refuses the turns."""
        (found,) = self._encode([self._template.render(conversation, prompting=True)])
        if isinstance(found, Unusable):
            raise found
        return found.ids.tolist()
