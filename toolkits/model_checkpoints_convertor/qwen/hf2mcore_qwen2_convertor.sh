#!/bin/sh
# Qwen 2: Hugging Face -> Megatron (legacy, names of Transformer Engine), and back.
# Order mcore-ep-pr-te, 9 or 10 arguments:
#   MODEL_SIZE SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP EP PR USE_TE MG2HF [HF_CKPT_PATH]
#
#   bash hf2mcore_qwen2_convertor.sh 0.5B Qwen2-0.5B Qwen2-0.5B-mcore 1 1 1 bf16 true false
#   bash hf2mcore_qwen2_convertor.sh 0.5B Qwen2-0.5B-mcore Qwen2-0.5B-back 1 1 1 bf16 true true Qwen2-0.5B
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" mcore-ep-pr-te "$@"
