"""The modules megatron-core lacks, each put in place by a layer spec. They know megatron.core, and no family."""
