"""Tokenizers of chat models, made small on the spot, and conversations for them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import sentencepiece
from transformers import PreTrainedTokenizerFast

from megatron_patch.data.sft.conversations import Conversation, Message
from megatron_patch.data.sft.rendering import Renderer, RendererRecipe
from megatron_patch.data.sft.samples import Sample
from megatron_patch.data.sft.storage import Samples
from megatron_patch.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer import make

BYTE_LEVEL = {
    "chatml": "<|endoftext|> <|im_start|> <|im_end|>",
    "qwen": "<|endoftext|> <|im_start|> <|im_end|>",
    "llama3": "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
    "deepseek": "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜>",
    "deepseek3": "<｜begin▁of▁sentence｜> <｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜>",
    "glm4": "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>",
}
"""Template -> special tokens of a byte-level BPE for it; the first begins a text, the last ends it."""
SENTENCEPIECE = {
    "llama2": ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, ()),
    "mistral": ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, ()),
    "baichuan": ({"tokenizer_class": "BaichuanTokenizer"}, ("<reserved_102>", "<reserved_103>")),
    "baichuan2": ({"tokenizer_class": "BaichuanTokenizer"}, ("<reserved_106>", "<reserved_107>")),
    "chatglm3": ({"tokenizer_class": "ChatGLMTokenizer"}, ()),
}
"""Template -> what tokenizer_config.json says, and the model's own symbols."""
FAMILIES = (*BYTE_LEVEL, *SENTENCEPIECE)


def tokenizer(directory: Path, family: str, chat_template: str | None = None) -> Tokenizer:
    """A tokenizer with the control tokens that a family's template writes."""
    if not directory.is_dir():
        directory.mkdir(parents=True)
        (_byte_level if family in BYTE_LEVEL else _sentencepiece)(directory, family)
    loaded = load_tokenizer(directory)
    if chat_template is not None:
        loaded.hf.chat_template = chat_template
    return loaded


def _byte_level(directory: Path, family: str) -> None:
    special = BYTE_LEVEL[family].split()
    backend = load_tokenizer(make.byte_bpe(directory)).hf.backend_tokenizer
    backend.add_special_tokens(special)
    roles = {"bos_token": special[0], "eos_token": special[-1]}
    PreTrainedTokenizerFast(tokenizer_object=backend, **roles).save_pretrained(directory)


def _sentencepiece(directory: Path, family: str) -> None:
    config, symbols = SENTENCEPIECE[family]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make.corpus(60)), model_prefix=str(directory / "tokenizer"), vocab_size=500,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=list(symbols), minloglevel=2,
    )  # fmt: skip
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(roles | config))


def tokenizer_with(loaded: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    """A copy with more tokens, none of them special."""
    hf = copy.deepcopy(loaded.hf)
    hf.add_tokens(list(tokens))
    return replace(loaded, hf=hf)


def chat(*turns: tuple[str, str], tools: tuple[object, ...] = ()) -> Conversation:
    """A conversation of (role, text); assistants' turns are learned."""
    messages = tuple(Message(role, text, role == "assistant") for role, text in turns)
    return Conversation(messages, tools)


def renderer(
    loaded: Tokenizer, template: str = "tokenizer", seq_length: int = 10_000, truncation: str = "right"
) -> Renderer:
    """What makes samples with a tokenizer."""
    return RendererRecipe.of(loaded, template, seq_length, truncation).build()


def pieces(loaded: Tokenizer, sample: Sample) -> list[str]:
    """Every token of a sample; those to be learned after a '+'."""
    tokens = (token.replace("\n", "<n>") for token in loaded.hf.convert_ids_to_tokens(sample.ids.tolist()))
    return [("+" if learned else "") + token for token, learned in zip(tokens, sample.mask.tolist(), strict=True)]


def transformers_ids(loaded: Tokenizer, source: str, conversation: Conversation, **options: object) -> list[int]:
    """The ids that transformers gives a conversation."""
    messages = [{"role": one.role, "content": one.content, **one.more} for one in conversation.messages]
    return loaded.hf.apply_chat_template(
        messages,
        tools=list(conversation.tools) or None,
        chat_template=source,
        tokenize=True,
        return_dict=False,
        **options,
    )


def sample_of(ids: Sequence[int], learned: Sequence[int]) -> Sample:
    """A sample of these ids, those at some places to be learned."""
    mask = np.zeros(len(ids), bool)
    mask[list(learned)] = True
    return Sample(np.array(ids, np.int32), mask)


def all_samples(store: Samples) -> Iterator[Sample]:
    """Every sample of a store, in order."""
    return (store.sample(number) for number in range(store.num_samples))
