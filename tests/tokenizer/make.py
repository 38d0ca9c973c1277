"""Small real tokenizers, made on the spot, each a Hugging Face directory; and text that is hard on them."""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_end|>", "<|pad|>"]

TEXTS = (
    "The capital of France is Paris.",
    "今天天气很好，我们去公园散步。价格=３<５；见 𠮷野家",
    "a literal <|endoftext|> and </s> and <s> in the text<|im_end|>",
    "emoji 👩‍👩‍👧 and\r\nline\nends\ttabs  and   spaces ",
    "\ufeffbyte-order mark, NUL \x00, separators \u2028\u2029, accents e\u0301 é",
    "x" * 3000,
    " leading and trailing ",
    "def f(x):\n    return x ** 2  # 12345.678\n",
)


def corpus(documents: int) -> list[str]:
    """Documents of different lengths, every one different."""
    return [
        f"Document {i}. " + " ".join(TEXTS[j % len(TEXTS)][:200] for j in range(i, i + 1 + i % 9))
        for i in range(documents)
    ]


def byte_bpe(directory: Path, **special: str) -> str:
    """A byte-level BPE of a few hundred ids, as in GPT-2, Llama 3 and Qwen; loads as a fast tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(60), trainer)
    special = special or {"eos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
    return str(directory)


def llama_sentencepiece(directory: Path) -> str:
    """A SentencePiece model with BOS and byte fallback, as in Llama 2; no tokenizer.json: transformers builds it."""
    directory.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(60)), model_prefix=str(directory / "tokenizer"), vocab_size=500, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _config(directory, tokenizer_class="LlamaTokenizer", add_bos_token=True, **names)


def byt5(directory: Path) -> str:
    """A tokenizer in pure Python, with no backend to ship; it ends every text with </s> by itself."""
    directory.mkdir(parents=True, exist_ok=True)
    return _config(directory, tokenizer_class="ByT5Tokenizer")


def _config(directory: Path, **config: object) -> str:
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return str(directory)
