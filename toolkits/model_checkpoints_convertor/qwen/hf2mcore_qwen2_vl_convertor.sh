#!/bin/sh
# Qwen 2 VL: Hugging Face -> Megatron (legacy, names of Transformer Engine), and back.
# Order mcore-vl, 7 or 8 arguments:
#   MODEL_SIZE SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP MG2HF PR [HF_CKPT_PATH]
#
#   bash hf2mcore_qwen2_vl_convertor.sh 7B Qwen2-VL-7B Qwen2-VL-7B-mcore 2 1 false bf16
#   bash hf2mcore_qwen2_vl_convertor.sh 7B Qwen2-VL-7B-mcore Qwen2-VL-7B-back 2 1 true bf16 Qwen2-VL-7B
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" mcore-vl "$@"
