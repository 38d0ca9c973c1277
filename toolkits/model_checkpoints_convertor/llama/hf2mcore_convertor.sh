#!/bin/sh
# Llama: Hugging Face -> Megatron (legacy, names of Transformer Engine), and back.
# Order mcore-experts, 13 arguments:
#   MODEL_SIZE HG_CKPT_PATH MEGATRON_PATH SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP EXTRA_VOCAB_SIZE NUM_EXPERTS
#   EXPERTS_TOPK EP NUM_EXPERT_SPLITS mg2hf
#
#   bash hf2mcore_convertor.sh 7B llama2-7b-hf Megatron-LM llama2-7b-hf llama2-7b-mcore 2 1 0 0 0 1 0 false
#   bash hf2mcore_convertor.sh 7B llama2-7b-hf Megatron-LM llama2-7b-mcore llama2-7b-hf-back 2 1 0 0 0 1 0 true
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" mcore-experts "$@"
