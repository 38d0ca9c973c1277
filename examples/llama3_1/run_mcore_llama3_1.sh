#!/bin/sh
# Llama 3.1: pretrains on indexed data, or with SFT=true finetunes on records.
#
#   sh run_mcore_llama3_1.sh dsw 8B 1 8 1e-5 1e-6 4096 4096 bf16 1 1 1 false true true false sel false 1000 datasets/wudao_text_document none ckpts/llama3_1-8B 100000000 1000000 output
#
# Order mcore, 25 arguments:
#   ENV MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN PAD_LEN PR TP PP CP SP DO FL SFT AC
#   OPTIMIZER_OFFLOAD SAVE_INTERVAL DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH
#   TRAIN_TOKENS_OR_ITERS WARMUP_TOKENS_OR_ITERS OUTPUT_BASEPATH
#
# --dry-run behind the arguments: show what they mean and the command, and stop.
. "$(dirname -- "$(readlink -f -- "$0")")/../common.sh"
launch mcore "$@"
