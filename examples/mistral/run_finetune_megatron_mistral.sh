#!/bin/sh
# Mistral: finetunes on records (instructions, conversations).
#
#   sh run_finetune_megatron_mistral.sh dsw ../.. 7B 1 1e-5 1e-6 2048 80 0 bf16 1 1 sel true true false false datasets/train.json datasets/valid.json ckpts/mistral-7B 2 output
#   sh run_finetune_megatron_mistral.sh dsw none ../.. 7B 1 1e-5 1e-6 2048 80 0 bf16 1 1 sel true true false datasets/train.json datasets/valid.json ckpts/mistral-7B 2 output
#
# Order finetune, 22 arguments:
#   ENV MEGATRON_PATCH_PATH MODEL_SIZE BATCH_SIZE LR MIN_LR SEQ_LEN PAD_LEN EXTRA_VOCAB_SIZE PR TP PP AC DO FL
#   SP TE TRAIN_DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH EPOCH OUTPUT_BASEPATH
#
# Order finetune-2023, 22 arguments:
#   ENV MEGATRON_PATH MEGATRON_PATCH_PATH MODEL_SIZE BATCH_SIZE LR MIN_LR SEQ_LEN PAD_LEN EXTRA_VOCAB_SIZE PR
#   TP PP AC DO FL SP TRAIN_DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH EPOCH OUTPUT_BASEPATH
#
# --dry-run behind the arguments: show what they mean and the command, and stop.
. "$(dirname -- "$(readlink -f -- "$0")")/../common.sh"
launch finetune,finetune-2023 "$@"
