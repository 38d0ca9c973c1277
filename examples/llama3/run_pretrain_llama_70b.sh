#!/bin/sh
# Llama 3: pretrains on indexed data, from a checkpoint or from random weights.
#
#   sh run_pretrain_llama_70b.sh dsw 8B 1 8 1e-5 1e-6 2048 80 bf16 1 1 1 sel true true false false 1000 datasets/wudao_text_document ckpts/llama3-8B 100000000 1000000 output
#
# Order pretrain-ep-te, 23 arguments:
#   ENV MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN PAD_LEN PR TP PP EP AC DO FL SP TE
#   SAVE_INTERVAL DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN_TOKENS WARMUP_TOKENS OUTPUT_BASEPATH
#
# --dry-run behind the arguments: show what they mean and the command, and stop.
. "$(dirname -- "$(readlink -f -- "$0")")/../common.sh"
launch pretrain-ep-te "$@"
