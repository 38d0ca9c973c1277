"""Continued pretraining on megatron-core: arguments, parallel state, optimizer, loss, loop, checkpoints, logging."""
