#!/bin/sh
# DeepSeek-V2: finetunes on records (instructions, conversations).
#
#   sh run_finetune_deepseek.sh dsw A2.4B 1 8 1e-5 1e-6 2048 80 bf16 1 1 1 sel true true false 1000 datasets/train.json datasets/valid.json ckpts/deepseek_v2-A2.4B 1000 100 output
#   sh run_finetune_deepseek.sh dsw A2.4B 1 8 1e-5 1e-6 2048 80 bf16 1 1 1 sel true true false false 1000 datasets/train.json datasets/valid.json ckpts/deepseek_v2-A2.4B 1000 100 output
#
# Order finetune-ep, 23 arguments:
#   ENV MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN PAD_LEN PR TP PP EP AC DO FL SP
#   SAVE_INTERVAL DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN_ITERS LR_WARMUP_ITERS
#   OUTPUT_BASEPATH
#
# Order finetune-ep-te, 24 arguments:
#   ENV MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN PAD_LEN PR TP PP EP AC DO FL SP TE
#   SAVE_INTERVAL DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN_ITERS LR_WARMUP_ITERS
#   OUTPUT_BASEPATH
#
# --dry-run behind the arguments: show what they mean and the command, and stop.
. "$(dirname -- "$(readlink -f -- "$0")")/../common.sh"
launch finetune-ep,finetune-ep-te "$@"
