#!/bin/sh
# Qwen 3: Hugging Face -> Megatron (legacy, names of Transformer Engine), and back.
# Order mcore-etp-ep-pr, 9 or 10 arguments:
#   MODEL_SIZE SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP ETP EP PR MG2HF [HF_CKPT_PATH]
#
#   bash hf2mcore_qwen3_convertor.sh A3B Qwen3-30B-A3B Qwen3-30B-A3B-mcore 1 2 1 4 bf16 false
#   bash hf2mcore_qwen3_convertor.sh A3B Qwen3-30B-A3B-mcore Qwen3-30B-A3B-back 1 2 1 4 bf16 true Qwen3-30B-A3B
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" mcore-etp-ep-pr "$@"
