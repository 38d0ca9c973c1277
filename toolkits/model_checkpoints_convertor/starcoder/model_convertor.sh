#!/bin/sh
# StarCoder: Hugging Face -> Megatron (legacy, names of 2023), and back.
# Order 2023-short, 6 arguments:
#   MEGATRON_PATH SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP mg2hf
#
#   bash model_convertor.sh Megatron-LM starcoder-hf starcoder-megatron 1 1 false
#   bash model_convertor.sh Megatron-LM starcoder-megatron/release starcoder-hf-back 1 1 true
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" 2023-short "$@"
