"""Vocabulary extension: train pieces, merge them into a tokenizer, measure the gain, give the new tokens their rows.

Modules are imported one by one, so that `--help` pays for none of them. Nothing here knows megatron-core or training.
"""
