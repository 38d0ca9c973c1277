#!/bin/sh
# Galactica: Hugging Face -> Megatron (legacy, names of 2023).
# Order 2023-one-way-mn, 7 arguments:
#   MEGATRON_PATH HF_CKPT_PATH MG_CKPT_PATH TP PP MN EXTRA_VOCAB_SIZE
#
#   bash run_convert_huggingface_to_megatron.sh Megatron-LM galactica-6.7b-hf galactica-6.7b-megatron 1 1 galactica-6.7b 0
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" 2023-one-way-mn "$@"
