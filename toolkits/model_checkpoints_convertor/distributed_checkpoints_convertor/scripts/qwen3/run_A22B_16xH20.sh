#!/bin/sh
# Qwen 3 235B: Hugging Face -> Megatron (torch_dist), and back.
# Order distributed, 6 or 7 arguments:
#   MODEL_SIZE LOAD_DIR SAVE_DIR MG2HF USE_CUDA PR [HF_DIR]
#
#   bash run_A22B_16xH20.sh A22B Qwen3-235B-A22B Qwen3-235B-A22B-mcore false false bf16
#   bash run_A22B_16xH20.sh A22B Qwen3-235B-A22B-mcore Qwen3-235B-A22B-back true false bf16 Qwen3-235B-A22B
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../../../run_order.sh" distributed "$@"
