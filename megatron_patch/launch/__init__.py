"""Entry points: the one command `megatron-patch` and a thin main per sub-command. No logic of its own."""
