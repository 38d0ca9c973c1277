#!/bin/sh
# Qwen 1.5: Hugging Face -> Megatron (legacy, names of Transformer Engine).
# Order mcore-upcycle, 9 arguments:
#   MODEL_SIZE SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP EP NUM_EXPERTS NUM_SPLITS MOE_INTERMEDIATE_SIZE
#
#   bash hf2mcore_qwen1.5_dense_to_moe_convertor.sh 1.8B Qwen1.5-1.8B Qwen1.5-1.8B-mcore 1 1 1 0 1 0
# Making a mixture of experts of a dense model is not supported: refused, not ignored.
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/../run_order.sh" mcore-upcycle "$@"
