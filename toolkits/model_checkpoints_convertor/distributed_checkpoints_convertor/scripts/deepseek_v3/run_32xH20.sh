#!/bin/sh
# DeepSeek V3: Hugging Face -> Megatron (torch_dist), and back.
# Order distributed, 6 or 7 arguments:
#   MODEL_SIZE LOAD_DIR SAVE_DIR MG2HF USE_CUDA PR [HF_DIR]
#
#   bash run_32xH20.sh A37B DeepSeek-V3 DeepSeek-V3-mcore false false bf16
#   bash run_32xH20.sh A37B DeepSeek-V3-mcore DeepSeek-V3-back true false bf16 DeepSeek-V3
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../../../run_order.sh" distributed "$@"
