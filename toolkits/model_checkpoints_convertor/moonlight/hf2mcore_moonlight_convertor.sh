#!/bin/sh
# Moonlight: Hugging Face -> Megatron (legacy, names of Transformer Engine), and back.
# Order mcore-etp-ep-pr, 9 or 10 arguments:
#   MODEL_SIZE SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP ETP EP PR MG2HF [HF_CKPT_PATH]
#
#   bash hf2mcore_moonlight_convertor.sh A3B Moonlight-16B-A3B Moonlight-16B-A3B-mcore 1 1 1 4 bf16 false
#   bash hf2mcore_moonlight_convertor.sh A3B Moonlight-16B-A3B-mcore Moonlight-16B-A3B-back 1 1 1 4 bf16 true Moonlight-16B-A3B
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" mcore-etp-ep-pr "$@"
