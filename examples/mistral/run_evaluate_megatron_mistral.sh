#!/bin/sh
# Mistral: loss and perplexity of a checkpoint on text or indexed data.
#
#   sh run_evaluate_megatron_mistral.sh dsw ../.. 7B 1 2048 80 0 bf16 1 1 sel true true false false datasets/held_out.jsonl ckpts/mistral-7B
#   sh run_evaluate_megatron_mistral.sh dsw none ../.. 7B 1 2048 80 0 bf16 1 1 datasets/held_out.jsonl ckpts/mistral-7B
#
# Order evaluate, 17 arguments:
#   ENV MEGATRON_PATCH_PATH MODEL_SIZE BATCH_SIZE SEQ_LEN PAD_LEN EXTRA_VOCAB_SIZE PR TP PP AC DO FL SP TE
#   DATASET_PATH PRETRAIN_CHECKPOINT_PATH
#
# Order evaluate-2023, 13 arguments:
#   ENV MEGATRON_PATH MEGATRON_PATCH_PATH MODEL_SIZE BATCH_SIZE SEQ_LEN PAD_LEN EXTRA_VOCAB_SIZE PR TP PP
#   DATASET_PATH PRETRAIN_CHECKPOINT_PATH
#
# Order evaluate-te-2023, 18 arguments:
#   ENV MEGATRON_PATH MEGATRON_PATCH_PATH MODEL_SIZE BATCH_SIZE SEQ_LEN PAD_LEN EXTRA_VOCAB_SIZE PR TP PP AC
#   DO FL SP TE DATASET_PATH PRETRAIN_CHECKPOINT_PATH
#
# --dry-run behind the arguments: show what they mean and the command, and stop.
. "$(dirname -- "$(readlink -f -- "$0")")/../common.sh"
launch evaluate,evaluate-2023,evaluate-te-2023 "$@"
