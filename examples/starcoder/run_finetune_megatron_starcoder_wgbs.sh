#!/bin/sh
# StarCoder: finetunes on records (instructions, conversations).
#
#   sh run_finetune_megatron_starcoder_wgbs.sh dsw none ../.. 16B 1 8 1e-5 1e-6 2048 80 0 bf16 1 1 sel true true false 1000 datasets/train.json ckpts/starcoder-16B 1000 100 output
#
# Order finetune-wgbs-2023, 24 arguments:
#   ENV MEGATRON_PATH MEGATRON_PATCH_PATH MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN PAD_LEN
#   EXTRA_VOCAB_SIZE PR TP PP AC DO FL SP SAVE_INTERVAL DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN_ITERS
#   LR_WARMUP_ITERS OUTPUT_BASEPATH
#
# --dry-run behind the arguments: show what they mean and the command, and stop.
. "$(dirname -- "$(readlink -f -- "$0")")/../common.sh"
launch finetune-wgbs-2023 "$@"
