#!/bin/sh
# Qwen 1.5: Hugging Face -> Megatron (legacy, names of Transformer Engine), and back.
# Order mcore-dense, 6 or 7 arguments:
#   MODEL_SIZE SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP mg2hf [HF_CKPT_PATH]
#
#   bash hf2mcore_qwen1.5_dense_convertor.sh 1.8B Qwen1.5-1.8B Qwen1.5-1.8B-mcore 2 1 false
#   bash hf2mcore_qwen1.5_dense_convertor.sh 1.8B Qwen1.5-1.8B-mcore Qwen1.5-1.8B-back 2 1 true Qwen1.5-1.8B
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" mcore-dense "$@"
