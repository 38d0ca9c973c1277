#!/bin/sh
# Qwen and Qwen 1.5: Hugging Face -> Megatron (legacy, names of 2023), and back.
# Order 2023, 8 arguments:
#   MEGATRON_PATH SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP MN EXTRA_VOCAB_SIZE mg2hf
#
#   bash hf2megatron_convertor.sh Megatron-LM qwen1.5-0.5b-hf qwen1.5-0.5b-megatron 1 1 qwen1.5-0.5b 85 false
#   bash hf2megatron_convertor.sh Megatron-LM qwen1.5-0.5b-megatron/release qwen1.5-0.5b-hf-back 1 1 qwen1.5-0.5b 85 true
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" 2023 "$@"
