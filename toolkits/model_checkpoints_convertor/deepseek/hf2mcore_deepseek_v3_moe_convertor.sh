#!/bin/sh
# DeepSeek V3: Hugging Face -> Megatron (legacy, names of Transformer Engine), and back.
# Order mcore-etp-ep-pr, 9 or 10 arguments:
#   MODEL_SIZE SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP ETP EP PR MG2HF [HF_CKPT_PATH]
#
#   bash hf2mcore_deepseek_v3_moe_convertor.sh A37B DeepSeek-V3 DeepSeek-V3-mcore 8 16 1 8 bf16 false
#   bash hf2mcore_deepseek_v3_moe_convertor.sh A37B DeepSeek-V3-mcore DeepSeek-V3-back 8 16 1 8 bf16 true DeepSeek-V3
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" mcore-etp-ep-pr "$@"
