#!/bin/sh
# LLaVA (its language model only): Hugging Face -> Megatron (legacy, names of Transformer Engine), and back.
# Order mcore-llava, 8 or 9 arguments:
#   MODEL_SIZE SOURCE_LLM_CKPT_PATH SOURCE_CLIP_CKPT_PATH TARGET_CKPT_PATH TP PP mg2hf PR [HF_CKPT_PATH]
#
#   bash hf2mcore_convertor_llava.sh 7B vicuna-7b none vicuna-7b-mcore 2 1 false bf16
#   bash hf2mcore_convertor_llava.sh 7B vicuna-7b-mcore none vicuna-7b-back 2 1 true bf16 vicuna-7b
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" mcore-llava "$@"
