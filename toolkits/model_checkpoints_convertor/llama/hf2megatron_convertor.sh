#!/bin/sh
# Llama: Hugging Face -> Megatron (legacy, names of 2023), and back.
# Order 2023, 8 arguments:
#   MEGATRON_PATH SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP MN EXTRA_VOCAB_SIZE mg2hf
#
#   sh hf2megatron_convertor.sh Megatron-LM llama2-13b-hf llama2-13b-megatron 4 1 llama2-13b 0 false
#   sh hf2megatron_convertor.sh Megatron-LM llama2-13b-megatron/release llama2-13b-hf-back 4 1 llama2-13b 0 true
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" 2023 "$@"
