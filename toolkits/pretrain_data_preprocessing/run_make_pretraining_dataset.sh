#!/bin/sh
# Text -> the .bin and .idx files of pretraining: wudao_<tokenizer>_<key>_document.
# Order pretraining, 5 arguments:
#   MEGATRON_PATCH_PATH input_data_dir tokenizer output_data_dir load_dir
# Order pretraining-2023, 6 arguments:
#   MEGATRON_PATH MEGATRON_PATCH_PATH input_data_dir tokenizer output_data_dir load_dir
#
#   bash run_make_pretraining_dataset.sh none wudao-sample llamabpe datasets llama3-8b-hf
#   bash run_make_pretraining_dataset.sh Megatron-LM none wudao-sample qwenbpe datasets qwen-7b-hf
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/run_order.sh" pretraining "$@"
