#!/bin/sh
# WuDao's corpus as it was published -> the .bin and .idx files of pretraining: wudao_text_document.
# With data_dir alone, only the command is shown: nothing needs preparing, and nothing is ever deleted.
# Order wudao, 1, 2 or 3 arguments:
#   data_dir output_data_dir load_dir
#
#   bash run_prepare_dataset.sh WuDaoCorpus2.0_base_200G
#   bash run_prepare_dataset.sh WuDaoCorpus2.0_base_200G datasets qwen2-7b-hf
set -eu
here=$(dirname -- "$(readlink -f -- "$0")")
exec sh "$here/run_order.sh" wudao "$@"
