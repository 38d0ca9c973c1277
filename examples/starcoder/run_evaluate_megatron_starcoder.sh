#!/bin/sh
# StarCoder: loss and perplexity of a checkpoint on text or indexed data.
#
#   sh run_evaluate_megatron_starcoder.sh dsw none ../.. 16B 1 2048 bf16 1 1 datasets/held_out.jsonl ckpts/starcoder-16B
#
# Order evaluate-short-2023, 11 arguments:
#   ENV MEGATRON_PATH MEGATRON_PATCH_PATH MODEL_SIZE BATCH_SIZE SEQ_LEN PR TP PP DATASET_PATH
#   PRETRAIN_CHECKPOINT_PATH
#
# --dry-run behind the arguments: show what they mean and the command, and stop.
. "$(dirname -- "$(readlink -f -- "$0")")/../common.sh"
launch evaluate-short-2023 "$@"
