#!/bin/sh
# Qwen 2.5: Hugging Face -> Megatron (torch_dist), and back.
# Order distributed, 6 or 7 arguments:
#   MODEL_SIZE LOAD_DIR SAVE_DIR MG2HF USE_CUDA PR [HF_DIR]
#
#   bash run_8xH20.sh 7B Qwen2.5-7B Qwen2.5-7B-mcore false false bf16
#   bash run_8xH20.sh 7B Qwen2.5-7B-mcore Qwen2.5-7B-back true false bf16 Qwen2.5-7B
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../../../run_order.sh" distributed "$@"
