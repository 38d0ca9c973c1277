#!/bin/sh
# Mistral and Mixtral: Hugging Face -> Megatron (legacy, names of Transformer Engine), and back.
# Order mcore-mistral, 12 or 13 arguments:
#   MODEL_SIZE HG_CKPT_PATH MEGATRON_PATH SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP EXTRA_VOCAB_SIZE NUM_EXPERTS
#   EXPERTS_TOPK EP mg2hf [WS]
#
#   bash hf2mcore_convertor.sh 8x7B mixtral-8x7b-hf Megatron-LM mixtral-8x7b-hf mixtral-8x7b-mcore 2 1 0 8 2 4 false 8
#   bash hf2mcore_convertor.sh 8x7B mixtral-8x7b-hf Megatron-LM mixtral-8x7b-mcore mixtral-8x7b-hf-back 2 1 0 8 2 4 true 8
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" mcore-mistral "$@"
