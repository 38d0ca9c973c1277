#!/bin/sh
# Moonlight: Hugging Face -> Megatron (torch_dist), and back.
# Order distributed, 6 or 7 arguments:
#   MODEL_SIZE LOAD_DIR SAVE_DIR MG2HF USE_CUDA PR [HF_DIR]
#
#   bash run_2xH20.sh A3B Moonlight-16B-A3B Moonlight-16B-A3B-mcore false false bf16
#   bash run_2xH20.sh A3B Moonlight-16B-A3B-mcore Moonlight-16B-A3B-back true false bf16 Moonlight-16B-A3B
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../../../run_order.sh" distributed "$@"
