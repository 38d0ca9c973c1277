"""Data for training: text to megatron-core's indexed datasets, and those to batches.

Modules are imported one by one, so that preprocessing never pays for torch. Nothing here knows models or checkpoints.
"""
