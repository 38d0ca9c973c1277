#!/bin/sh
# Baichuan 2: finetunes on records (instructions, conversations).
#
#   sh run_finetune_megatron_baichuan_wgbs.sh dsw none ../.. 7B 1 8 1e-5 1e-6 2048 80 0 bf16 1 1 sel true true false false 1000 datasets/train.json ckpts/baichuan2-7B 1000 100 output
#   sh run_finetune_megatron_baichuan_wgbs.sh dsw ../.. 7B 1 8 1e-5 1e-6 2048 80 0 bf16 1 1 sel true true false false 1000 datasets/train.json datasets/valid.json ckpts/baichuan2-7B 1000 100 output
#
# Order finetune-wgbs-te-2023, 25 arguments:
#   ENV MEGATRON_PATH MEGATRON_PATCH_PATH MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN PAD_LEN
#   EXTRA_VOCAB_SIZE PR TP PP AC DO FL SP TE SAVE_INTERVAL DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN_ITERS
#   LR_WARMUP_ITERS OUTPUT_BASEPATH
#
# Order finetune-ga, 25 arguments:
#   ENV MEGATRON_PATCH_PATH MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN PAD_LEN EXTRA_VOCAB_SIZE
#   PR TP PP AC DO FL SP TE SAVE_INTERVAL DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN_ITERS
#   LR_WARMUP_ITERS OUTPUT_BASEPATH
#
# --dry-run behind the arguments: show what they mean and the command, and stop.
. "$(dirname -- "$(readlink -f -- "$0")")/../common.sh"
launch finetune-wgbs-te-2023,finetune-ga "$@"
