#!/bin/sh
# DeepSeek V2: Hugging Face -> Megatron (legacy, names of Transformer Engine), and back.
# Order mcore-ep-pr, 8 or 9 arguments:
#   MODEL_SIZE SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP EP PR MG2HF [HF_CKPT_PATH]
#
#   bash hf2mcore_deepseek_v2_moe_convertor.sh A2.4B DeepSeek-V2-Lite DeepSeek-V2-Lite-mcore 1 1 4 bf16 false
#   bash hf2mcore_deepseek_v2_moe_convertor.sh A2.4B DeepSeek-V2-Lite-mcore DeepSeek-V2-Lite-back 1 1 4 bf16 true DeepSeek-V2-Lite
# Without PR, as it was before: order mcore-ep, told apart by the seventh argument.
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" mcore-ep-pr "$@"
