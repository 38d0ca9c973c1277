#!/bin/sh
# BLOOM: continues the prompts of a file.
#
#   sh run_text_generation_megatron_bloom.sh dsw none ../.. bloombpe-h ckpts/bloom-7.1B 7.1B 1 1 2048 bf16 10 512 512 datasets/prompts.jsonl output.jsonl 0 1.0 1.2
#
# Order generate-bloom-2023, 18 arguments:
#   ENV MEGATRON_PATH MEGATRON_PATCH_PATH TOKENIZER CHECKPOINT_PATH MODEL_SIZE TP BS SEQ_LEN PR TOP_K
#   INPUT_SEQ_LEN OUTPUT_SEQ_LEN INPUT_FILE OUTPUT_FILE TOP_P TEMPERATURE REPETITION_PENALTY
#
# --dry-run behind the arguments: show what they mean and the command, and stop.
. "$(dirname -- "$(readlink -f -- "$0")")/../common.sh"
launch generate-bloom-2023 "$@"
