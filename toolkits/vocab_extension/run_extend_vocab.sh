#!/usr/bin/env bash
# The whole vocabulary extension: new tokens from your text, a look at what they save, rows for them, continued
# pretraining, bits per character before and after, and a Hugging Face directory at the end.
#
#   bash run_extend_vocab.sh BASE CORPUS HELD_OUT OTHER OUTPUT
#
#   BASE      Hugging Face directory of the model: SentencePiece (Llama 2, Mistral) or byte-level BPE (Qwen, Llama 3)
#   CORPUS    text to learn from: a file, a directory or a quoted glob of .jsonl, .json, .txt (or .gz, .zst of them), .parquet
#   HELD_OUT  text of the same language that is in no other of them
#   OTHER     text of a language that the model must not forget (English)
#   OUTPUT    directory for all that is made; what a step has finished is not done again
#
# Environment, with what is taken without it:
#   NEW_TOKENS=8000  TEXT_KEY=text  WORKERS=2     of the vocabulary and of preprocessing
#   NPROC=1 TP=1 PP=1  TRAIN_ITERS=100  SEQ_LENGTH=512  MICRO_BATCH=1  GLOBAL_BATCH=8  LR=1e-4  PRETRAIN_ARGS=""
#   EVAL_DOCUMENTS=100                            documents of HELD_OUT and OTHER that are scored
set -euo pipefail
if [[ $# -ne 5 ]]; then
    sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p}' "$0"
    echo "error: 5 arguments are needed, $# were given: $*" >&2
    exit 2
fi
base=$1 corpus=$2 held_out=$3 other=$4 out=$5
: "${NEW_TOKENS:=8000}" "${TEXT_KEY:=text}" "${WORKERS:=2}" "${EVAL_DOCUMENTS:=100}" "${PRETRAIN_ARGS:=}"
: "${NPROC:=1}" "${TP:=1}" "${PP:=1}" "${TRAIN_ITERS:=100}" "${SEQ_LENGTH:=512}" "${MICRO_BATCH:=1}"
: "${GLOBAL_BATCH:=8}" "${LR:=1e-4}"
command=${MEGATRON_PATCH:-megatron-patch}
layout=(--nproc-per-node "$NPROC" --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP")
mkdir -p "$out"

# step NAME RESULT COMMAND...: runs the command unless its result is there.
step() {
    local name=$1 result=$2
    shift 2
    echo
    if [[ -e $result ]]; then
        echo "== $name: $result is there"
        return
    fi
    echo "== $name: $*"
    SECONDS=0
    "$@"
    echo "== $name: ${SECONDS} s"
}

# evaluate NAME MODEL [LAYOUT...]: bits per character of a model on the held-out text and on the other.
evaluate() {
    local name=$1 model=$2
    shift 2
    step "evaluate, $name" "$out/eval-$name.json" "$command" evaluate "$@" --load "$model" --data "$held_out" "$other" \
        --text-key "$TEXT_KEY" --max-documents "$EVAL_DOCUMENTS" --seq-length "$SEQ_LENGTH" --stride "$SEQ_LENGTH" \
        --json "$out/eval-$name.json"
}

kind=.json # byte-level BPE: more merges for the base's
train=(--base "$base" --vocab-size "$NEW_TOKENS")
if [[ -f $base/tokenizer.model ]]; then
    kind=.model train=(--vocab-size "$NEW_TOKENS") # a SentencePiece model of its own
fi
step "train the vocabulary" "$out/new$kind" "$command" vocab train "${train[@]}" \
    --input "$corpus" --text-key "$TEXT_KEY" --threads "$WORKERS" --output "$out/new$kind"
step "merge it into the base's" "$out/tokenizer" "$command" vocab merge --base "$base" --new "$out/new$kind" \
    --output "$out/tokenizer" --corpus "$corpus" --text-key "$TEXT_KEY" --min-count 10 --pad-multiple $((128 * TP))
step "what will it save?" "$out/analysis.json" "$command" vocab analyze --base "$base" --new "$out/tokenizer" \
    --held-out "$held_out" "$other" --text-key "$TEXT_KEY" --png "$out/analysis.png" --json "$out/analysis.json"
step "rows for the new tokens" "$out/extended" "$command" vocab init --base "$base" --tokenizer "$out/tokenizer" \
    --output "$out/extended" --pad-multiple $((128 * TP))
step "prove that nothing old has changed" "$out/verified.json" "$command" vocab verify --base "$base" \
    --model "$out/extended" --tensor-model-parallel-size "$TP" --json "$out/verified.json"
step "convert to Megatron" "$out/megatron" "$command" convert --source "$out/extended" --target "$out/megatron"
step "preprocess" "$out/data_${TEXT_KEY}_document.json" "$command" preprocess --input "$corpus" \
    --tokenizer-model "$out/extended" --json-keys "$TEXT_KEY" --output-prefix "$out/data" --append-eod --shuffle 1 \
    --workers "$WORKERS"
evaluate before "$base" "${layout[@]}"
evaluate untrained "$out/megatron" "${layout[@]}"
# shellcheck disable=SC2086  # PRETRAIN_ARGS are several
step "continue pretraining" "$out/trained-hf" "$command" pretrain "${layout[@]}" --load "$out/megatron" \
    --save "$out/trained" --data-path "$out/data_${TEXT_KEY}_document" --split 99,1,0 --seq-length "$SEQ_LENGTH" \
    --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH" --train-iters "$TRAIN_ITERS" \
    --save-interval "$TRAIN_ITERS" --lr "$LR" --min-lr 0 --lr-warmup-iters $((TRAIN_ITERS / 10 + 1)) $PRETRAIN_ARGS
evaluate after "$out/trained" "${layout[@]}"
step "take it home" "$out/trained-hf" "$command" convert --source "$out/trained" --target "$out/trained-hf"

echo
echo "== bits per character: before; with new rows, untrained; after"
python3 - "$out" <<'END'
import json, sys

reports = [json.load(open(f"{sys.argv[1]}/eval-{name}.json"))["rows"] for name in ("before", "untrained", "after")]
for rows in zip(*reports):
    print(f"{rows[0]['name']}: " + " -> ".join(f"{row['bits_per_character']:.3f}" for row in rows))
END
