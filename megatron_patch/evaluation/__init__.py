"""Evaluation: how likely a model finds text, which answers it finds likely, and lm-evaluation-harness on top of both.

Modules are imported one by one, so that `--help` pays for none of them. The scoring knows token ids and megatron-core's
GPTModel; text, files and tokenizers are the business of the layer above it.
"""
