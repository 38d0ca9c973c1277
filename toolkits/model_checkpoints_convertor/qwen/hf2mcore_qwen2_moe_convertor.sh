#!/bin/sh
# Qwen 2 MoE: Hugging Face -> Megatron (legacy, names of Transformer Engine), and back.
# Order mcore-etp-ep-pr, 9 or 10 arguments:
#   MODEL_SIZE SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP ETP EP PR MG2HF [HF_CKPT_PATH]
#
#   bash hf2mcore_qwen2_moe_convertor.sh A14B Qwen2-57B-A14B Qwen2-57B-A14B-mcore 2 2 1 4 bf16 false
#   bash hf2mcore_qwen2_moe_convertor.sh A14B Qwen2-57B-A14B-mcore Qwen2-57B-A14B-back 2 2 1 4 bf16 true Qwen2-57B-A14B
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" mcore-etp-ep-pr "$@"
