#!/bin/sh
# Conversations -> tokenized samples of fine-tuning, with a mask of what is to be learned.
# Order sft, 5 or 6 arguments:
#   input_data_path tokenizer seq_len output_data_path load_dir default_packing
#
#   bash run_build_idxmap_sft_dataset.sh alpaca_zh-train.json Qwen2Tokenizer 2048 datasets/alpaca qwen2-7b-hf
#   bash run_build_idxmap_sft_dataset.sh chats LLama3Tokenizer 4096 datasets/chats llama3-8b-hf true
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/run_order.sh" sft "$@"
