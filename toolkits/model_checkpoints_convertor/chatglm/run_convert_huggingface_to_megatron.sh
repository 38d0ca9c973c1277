#!/bin/sh
# ChatGLM: Hugging Face -> Megatron (legacy, names of 2023).
# Order 2023-one-way, 5 arguments:
#   MEGATRON_PATH HF_CKPT_PATH MG_CKPT_PATH TP PP
#
#   bash run_convert_huggingface_to_megatron.sh Megatron-LM chatglm-6b-hf chatglm-6b-megatron 1 1
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" 2023-one-way "$@"
