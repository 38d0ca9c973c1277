#!/bin/sh
# Falcon 7B: Hugging Face -> Megatron (legacy, names of 2023), and back.
# Order 2023-hf-mg, 8 arguments:
#   MEGATRON_PATH HF_CKPT_PATH MG_CKPT_PATH TP PP MN EXTRA_VOCAB_SIZE mg2hf
#
#   bash model_convertor.sh Megatron-LM falcon-7b-hf falcon-7b-megatron 1 1 falcon-7b 0 false
#   bash model_convertor.sh Megatron-LM falcon-7b-megatron/release falcon-7b-hf-back 1 1 falcon-7b 0 true
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" 2023-hf-mg "$@"
