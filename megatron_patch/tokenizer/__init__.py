"""Tokenizers of Hugging Face directories: text to ids and back, and what megatron-core's datasets ask of a tokenizer.

`load_tokenizer(directory)` is the way in. Importing this package imports neither torch nor transformers; loading does.
It knows nothing of models or checkpoints.
"""

from __future__ import annotations

from megatron_patch.tokenizer.hf import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
