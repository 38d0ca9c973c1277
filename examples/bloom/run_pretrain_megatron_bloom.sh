#!/bin/sh
# BLOOM: pretrains on indexed data, from a checkpoint or from random weights.
#
#   sh run_pretrain_megatron_bloom.sh dsw none ../.. 7.1B 1 8 1e-5 1e-6 2048 0 bf16 1 1 sel true true false 1000 datasets/wudao_text_document ckpts/bloom-7.1B 100000000 1000000 output
#
# Order pretrain-bloom-2023, 23 arguments:
#   ENV MEGATRON_PATH MEGATRON_PATCH_PATH MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN
#   EXTRA_VOCAB_SIZE PR TP PP AC DO FL SP SAVE_INTERVAL DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN_TOKENS
#   WARMUP_TOKENS OUTPUT_BASEPATH
#
# --dry-run behind the arguments: show what they mean and the command, and stop.
. "$(dirname -- "$(readlink -f -- "$0")")/../common.sh"
launch pretrain-bloom-2023 "$@"
