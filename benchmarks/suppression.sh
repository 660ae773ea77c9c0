#!/bin/sh
# Calibrates toxicity and a topic on a model, compares the ways to suppress them, and keeps the results.
#
#   benchmarks/suppression.sh WORK
#
# WORK holds the material: model/ (a Hugging Face folder), sae/ (examples/train_sae.py makes one), wiki.jsonl (plain text), and
# toxicity_train.csv, toxicity_test.csv, topic_train.csv, topic_test.csv (columns text and label). What is made goes there
# too. Minutes on two cores for a model of 3 M parameters; a run that was stopped goes on where it was.
set -eu
work=$1
here=$(dirname "$0")
compare() { # file's stem, concept, name of the result, and more options
    [ -d "$work/profiles/$1" ] || sae-steer calibrate --model "$work/model" --sae "res=$work/sae" --tokens all \
        --data "$work/$1_train.csv" --concept "$2" --out "$work/profiles/$1"
    # shellcheck disable=SC2086  # several words
    sae-steer evaluate suppression --model "$work/model" --sae "res=$work/sae" --profile "$work/profiles/$1" --concept "$2" \
        --train "$work/$1_train.csv" --data "$work/$1_test.csv" --plain "$work/wiki.jsonl" --samples 1000 --out "$work/$1" ${4:-}
    cp "$work/$1/result.json" "$here/results/$3.json"
    cp "$work/$1/plot.png" "$here/../docs/$3.png"
}
compare toxicity toxic suppression
compare topic travel suppression_topic "--levels 0.5 --strengths 1,2 --plain-texts 50"
python "$here/render.py"
