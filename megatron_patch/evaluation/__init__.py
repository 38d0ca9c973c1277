"""Evaluation: how likely a model finds text, as sums of -log p, and what that is per token, byte and character.

Modules are imported one by one, so that `--help` pays for none of them. The scoring knows token ids and megatron-core's
GPTModel; text, files and tokenizers are the business of the layer above it.
"""
