#!/bin/sh
# Qwen 2.5: Hugging Face -> Megatron (legacy, names of Transformer Engine), and back.
# Order mcore-pr-te, 8 or 9 arguments:
#   MODEL_SIZE SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP PR USE_TE MG2HF [HF_CKPT_PATH]
#
#   bash hf2mcore_qwen2.5_convertor.sh 7B Qwen2.5-7B Qwen2.5-7B-mcore 4 1 bf16 true false
#   bash hf2mcore_qwen2.5_convertor.sh 7B Qwen2.5-7B-mcore Qwen2.5-7B-back 4 1 bf16 true true Qwen2.5-7B
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" mcore-pr-te "$@"
