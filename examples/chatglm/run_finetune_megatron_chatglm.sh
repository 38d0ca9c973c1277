#!/bin/sh
# ChatGLM: finetunes on records (instructions, conversations).
#
#   sh run_finetune_megatron_chatglm.sh dsw none ../.. 6B 1 1024 1024 1e-5 1e-6 bf16 1 1 sel true true false datasets/train.json datasets/valid.json ckpts/chatglm-6B 2 output
#
# Order finetune-chatglm-2023, 21 arguments:
#   ENV MEGATRON_PATH MEGATRON_PATCH_PATH MODEL_SIZE BATCH_SIZE SOURCE_SEQ_LEN TARGET_SEQ_LEN LR MIN_LR PR TP
#   PP AC DO FL SP TRAIN_DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH EPOCH OUTPUT_BASEPATH
#
# --dry-run behind the arguments: show what they mean and the command, and stop.
. "$(dirname -- "$(readlink -f -- "$0")")/../common.sh"
launch finetune-chatglm-2023 "$@"
