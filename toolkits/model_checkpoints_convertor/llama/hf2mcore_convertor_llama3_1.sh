#!/bin/sh
# Llama 3.1: Hugging Face -> Megatron (legacy, names of Transformer Engine), and back.
# Order mcore-llama3_1, 9 or 10 arguments:
#   MODEL_SIZE SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP mg2hf CHECK CHECK_ONLY PR [HF_CKPT_PATH]
#
#   bash hf2mcore_convertor_llama3_1.sh 8B llama3.1-8b-hf llama3.1-8b-mcore 4 2 false true false bf16
#   bash hf2mcore_convertor_llama3_1.sh 8B llama3.1-8b-mcore llama3.1-8b-hf-back 4 2 true true false bf16 llama3.1-8b-hf
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" mcore-llama3_1 "$@"
