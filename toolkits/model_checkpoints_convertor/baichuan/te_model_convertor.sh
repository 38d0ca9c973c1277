#!/bin/sh
# Baichuan: Hugging Face -> Megatron (legacy, names of Transformer Engine).
# Order hf2te, 7 arguments:
#   MEGATRON_PATH SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP MN EXTRA_VOCAB_SIZE
#
#   bash te_model_convertor.sh Megatron-LM baichuan-13b-hf baichuan-13b-te 1 1 baichuan-13b 0
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" hf2te "$@"
