#!/bin/sh
# Text -> the .bin and .idx files of pretraining: mmap_<name>_datasets_<key>_document, a data set a key.
# Order pretraining-megatron, 5 or 6 arguments:
#   input_data_dir tokenizer json_keys output_data_dir load_dir dataset_name
#
#   bash run_make_pretraining_dataset_megatron.sh SlimPajama.json Qwen2Tokenizer text datasets qwen2-7b-hf
#   bash run_make_pretraining_dataset_megatron.sh corpus GPT2BPETokenizer "text,title" datasets gpt2-hf news
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/run_order.sh" pretraining-megatron "$@"
