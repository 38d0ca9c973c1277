"""Byte-level bases as they are published: GPT-2's, Llama 3's with its specials behind the model, and one in between."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.vocab import make

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
STYLES = ("gpt2", "llama3", "qwen")
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def directory(path: Path, style: str = "llama3", **settings: Any) -> Path:
    """A Hugging Face directory.

    gpt2: specials first, merges as strings, vocab.json and merges.txt beside tokenizer.json. llama3: ignores merges for
    whole words, specials behind the model and not in it, puts BOS before a text. qwen: NFC, merges as pairs.
    """
    path.mkdir(parents=True, exist_ok=True)
    content = json.loads(_tokenizer(style))
    model = content["model"]
    if style == "gpt2":
        model["merges"] = [" ".join(pair) for pair in model["merges"]]
        (path / "vocab.json").write_text(json.dumps(model["vocab"]))
        (path / "merges.txt").write_text("\n".join(["#version: 0.2", *model["merges"]]) + "\n")
    (path / "tokenizer.json").write_text(json.dumps(content))
    roles = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "chat_template": "{{ messages }}"}
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (path / "tokenizer_config.json").write_text(json.dumps({**roles, **own, **settings}))
    return path


@cache
def _tokenizer(style: str) -> str:
    """English, and Chinese so little that few characters are tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=style == "llama3"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if style != "gpt2":
        words = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    if style == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=list(SPECIAL) if style == "gpt2" else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*make.english(300), "天气 公园 中国 的 , 中国"] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in SPECIAL])
    tokenizer.add_tokens([AddedToken("[TOOL]", special=False, normalized=False)])
    if style == "llama3":
        bos = (SPECIAL[0], tokenizer.token_to_id(SPECIAL[0]))
        tokenizer.post_processor = processors.TemplateProcessing(single=[bos[0], "$A"], special_tokens=[bos])
    return tokenizer.to_str()
