"""Text in Chinese and English, a small SentencePiece base as Llama has one, new pieces for it, and a tiny Llama."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from tests.tiny import hf_llama

_NOUN_TEXT = "天气 公园 中国 人民 经济 发展 社会 主义 文化 城市 学校 老师 学生 科学 技术 音乐 历史 语言 计算机 互联网"
_VERB_TEXT = "喜欢 研究 建设 保护 学习 改变 讨论 支持 介绍 参加 观察 理解 越来越重视 一直在"
_ENDS = ("。", "，因为今天很好。", "！", "，而且明年会更好。", "？")
_WORD_TEXT = "the capital of many people have time for questions about weather and music in this city while others work"
_NOUNS, _VERBS, _WORDS = _NOUN_TEXT.split(), _VERB_TEXT.split(), _WORD_TEXT.split()


def chinese(count: int, seed: int = 0) -> list[str]:
    """Documents, every one different from most others."""
    pick = random.Random(seed)
    sentence = lambda: pick.choice(_NOUNS) + "的" * pick.randint(0, 1) + pick.choice(_VERBS) + pick.choice(_NOUNS)  # noqa: E731
    return ["".join(sentence() + pick.choice(_ENDS) for _ in range(pick.randint(1, 4))) for _ in range(count)]


def english(count: int, seed: int = 0) -> list[str]:
    """Documents with runs of spaces, line ends and numbers."""
    pick = random.Random(seed)
    gap = lambda: pick.choice((" ", " ", " ", " ", "  ", "\n    ", ", ", f" {pick.randint(0, 999)} "))  # noqa: E731
    return ["".join(pick.choice(_WORDS) + gap() for _ in range(pick.randint(3, 25))) for _ in range(count)]


def mixed(count: int, seed: int = 0) -> list[str]:
    """Both in turn, and some of both in one document."""
    pairs = zip(chinese(count, seed), english(count, seed), strict=True)
    return [text for a, b in pairs for text in (a, b, f"{b[:30]}{a}{b[:9]}")][:count]


def jsonl(file: Path, texts: Iterable[str]) -> str:
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return str(file)


def sp_proto(texts: Sequence[str], **options: Any) -> ModelProto:
    """A trained SentencePiece model."""
    settings = (
        dict(model_type="bpe", normalization_rule_name="identity", minloglevel=2, hard_vocab_limit=False) | options
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **settings)
    return ModelProto.FromString(model.getvalue())


@cache
def base_proto() -> ModelProto:
    """English with bytes and a few Chinese characters; pieces of spaces as Llama has them: low ids, lowest score."""
    texts = [*english(200), *(" ".join(word) for word in _NOUNS[:12])]
    proto = sp_proto(
        texts, vocab_size=500, byte_fallback=True, remove_extra_whitespaces=False, character_coverage=1.0,
        split_by_whitespace=True,
    )  # fmt: skip
    first = 3 + 256
    for length in (2, 3, 4):
        piece = "▁" * length
        found = next((one for one in proto.pieces if one.piece == piece), None)
        if found is None:
            proto.pieces.insert(first, ModelProto.SentencePiece(piece=piece, score=-1e9, type=1))
        else:
            found.score = -1e9
    next(one for one in proto.pieces if one.piece == "▁").score = -1e9
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto


def new_proto() -> ModelProto:
    """Pieces of Chinese words, and some English ones."""
    return ModelProto.FromString(_new_model())


@cache
def _new_model() -> bytes:
    return sp_proto(mixed(300), vocab_size=260, character_coverage=1.0).SerializeToString()


def base_directory(directory: Path, **settings: Any) -> Path:
    """A Hugging Face directory as Llama 2 was published, without a tokenizer.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(base_proto().SerializeToString())
    content = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    content |= {"tokenizer_class": "LlamaTokenizer", "chat_template": "{{ messages }}"} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    return directory


def llama(directory: Path, rows: int, *, dtype: str = "float32", shard: str = "5GB", **changes: Any) -> None:
    """Adds a tiny Llama to a tokenizer's directory."""
    import torch

    model = hf_llama(vocab_size=rows, num_hidden_layers=2, **changes).to(getattr(torch, dtype))
    model.save_pretrained(directory, max_shard_size=shard)
