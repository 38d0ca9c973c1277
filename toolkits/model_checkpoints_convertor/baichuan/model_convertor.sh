#!/bin/sh
# Baichuan: Hugging Face -> Megatron (legacy, names of 2023), and back.
# Order 2023, 8 arguments:
#   MEGATRON_PATH SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP MN EXTRA_VOCAB_SIZE mg2hf
#
#   bash model_convertor.sh Megatron-LM baichuan-13b-hf baichuan-13b-megatron 1 1 baichuan-13b 0 false
#   bash model_convertor.sh Megatron-LM baichuan-13b-megatron/release baichuan-13b-hf-back 1 1 baichuan-13b 0 true
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" 2023 "$@"
