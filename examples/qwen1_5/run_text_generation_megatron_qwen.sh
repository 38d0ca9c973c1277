#!/bin/sh
# Qwen1.5: continues the prompts of a file.
#
#   sh run_text_generation_megatron_qwen.sh dsw ../.. ckpts/qwen1_5-7B 7B 1 1 2048 80 0 bf16 10 512 512 datasets/prompts.jsonl output.jsonl 0 1.0 1.2
#   sh run_text_generation_megatron_qwen.sh dsw none ../.. ckpts/qwen1_5-7B 7B 1 1 2048 80 0 bf16 10 512 512 datasets/prompts.jsonl output.jsonl 0 1.0 1.2
#
# Order generate, 18 arguments:
#   ENV MEGATRON_PATCH_PATH CHECKPOINT_PATH MODEL_SIZE TP BS SEQ_LEN PAD_LEN EXTRA_VOCAB_SIZE PR TOP_K
#   INPUT_SEQ_LEN OUTPUT_SEQ_LEN INPUT_FILE OUTPUT_FILE TOP_P TEMPERATURE REPETITION_PENALTY
#
# Order generate-2023, 19 arguments:
#   ENV MEGATRON_PATH MEGATRON_PATCH_PATH CHECKPOINT_PATH MODEL_SIZE TP BS SEQ_LEN PAD_LEN EXTRA_VOCAB_SIZE PR
#   TOP_K INPUT_SEQ_LEN OUTPUT_SEQ_LEN INPUT_FILE OUTPUT_FILE TOP_P TEMPERATURE REPETITION_PENALTY
#
# --dry-run behind the arguments: show what they mean and the command, and stop.
. "$(dirname -- "$(readlink -f -- "$0")")/../common.sh"
launch generate,generate-2023 "$@"
