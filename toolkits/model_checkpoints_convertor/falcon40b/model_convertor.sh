#!/bin/sh
# Falcon 40B: Hugging Face -> Megatron (legacy, names of 2023), and back.
# Order 2023-hf-mg, 8 arguments:
#   MEGATRON_PATH HF_CKPT_PATH MG_CKPT_PATH TP PP MN EXTRA_VOCAB_SIZE mg2hf
#
#   bash model_convertor.sh Megatron-LM falcon-40b-hf falcon-40b-megatron 8 1 falcon-40b 0 false
#   bash model_convertor.sh Megatron-LM falcon-40b-megatron/release falcon-40b-hf-back 8 1 falcon-40b 0 true
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" 2023-hf-mg "$@"
