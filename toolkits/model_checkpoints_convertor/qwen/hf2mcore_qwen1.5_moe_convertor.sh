#!/bin/sh
# Qwen 1.5 MoE: Hugging Face -> Megatron (legacy, names of Transformer Engine), and back.
# Order mcore-ep, 7 or 8 arguments:
#   MODEL_SIZE SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP EP mg2hf [HF_CKPT_PATH]
#
#   bash hf2mcore_qwen1.5_moe_convertor.sh A2.7B Qwen1.5-MoE-A2.7B Qwen1.5-MoE-A2.7B-mcore 1 1 4 false
#   bash hf2mcore_qwen1.5_moe_convertor.sh A2.7B Qwen1.5-MoE-A2.7B-mcore Qwen1.5-MoE-A2.7B-back 1 1 4 true Qwen1.5-MoE-A2.7B
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" mcore-ep "$@"
