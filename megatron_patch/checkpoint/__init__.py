"""Checkpoints: Hugging Face <-> Megatron conversion, its proof, and the layout on disk.

`convert.convert` and `verify.verify` are the two jobs, `megatron.load_weights` fills a model, `directory` knows paths.
"""
