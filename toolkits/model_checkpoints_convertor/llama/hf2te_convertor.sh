#!/bin/sh
# Llama: Hugging Face -> Megatron (legacy, names of Transformer Engine).
# Order hf2te, 7 arguments:
#   MEGATRON_PATH SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP MN EXTRA_VOCAB_SIZE
#
#   bash hf2te_convertor.sh Megatron-LM llama2-7b-hf llama2-7b-te 2 2 llama2-7b 0
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" hf2te "$@"
