#!/bin/sh
# GLM-130B: loss and perplexity of a checkpoint on text or indexed data.
#
#   sh run_evaluate_megatron_glm130b.sh dsw none ../.. 130B 1 2048 128 bf16 1 1 datasets/held_out.jsonl ckpts/glm130b-130B
#
# Order evaluate-glm130b-2023, 12 arguments:
#   ENV MEGATRON_PATH MEGATRON_PATCH_PATH MODEL_SIZE BATCH_SIZE SEQ_LEN GEN_LEN PR TP PP DATASET_PATH
#   PRETRAIN_CHECKPOINT_PATH
#
# --dry-run behind the arguments: show what they mean and the command, and stop.
. "$(dirname -- "$(readlink -f -- "$0")")/../common.sh"
launch evaluate-glm130b-2023 "$@"
