#!/bin/sh
# Calibrates four concepts on a model, compares the ways to suppress each, and keeps the results.
#
#   python benchmarks/suppression_material.py ASSETS WORK
#   benchmarks/suppression.sh WORK
#
# WORK holds the material: model/, sae/, wiki.jsonl (plain text) and NAME_train.csv, NAME_test.csv (columns text and label).
# What is made goes there too. About an hour on one core for a model of 3 M parameters; a run that was stopped goes on where
# it was. But for toxicity, half of the plain texts and two strengths of APP keep it that short.
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
compare topic travel suppression_topic "--strengths 1,2 --plain-texts 50"
compare sentiment negative suppression_sentiment "--strengths 1,2 --plain-texts 50"
compare emotion anger suppression_emotion "--strengths 1,2 --plain-texts 50"
compare toxicity toxic suppression
python "$here/render.py"
