#!/usr/bin/env bash
# The whole life of a small model: pretrain, fine-tune, evaluate, export, compare, report.
# It ends with an error if fewer answers are right than is promised.
# Interrupt it whenever you like; run it again and it goes on where it stopped.
# Arguments are overrides for every stage, such as: launch/digits.sh trainer.precision=fp32
set -euo pipefail
cd "$(dirname "$0")/.."

run=(experiment=digits "$@")
started=$SECONDS
part() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - started)); }

part "1/5 a tiny Idefics3 from scratch on documents, then LoRA on conversations with the connector in full, vision frozen"
m4train train "${run[@]}"

part "2/5 answering questions about held-out scans"
m4train evaluate "${run[@]}"

part "3/5 exporting to a Hugging Face folder, LoRA merged"
m4train export "${run[@]}"

part "4/5 loading the export with m4train and with transformers"
python launch/compare_with_transformers.py runs/digits/sft/export

part "5/5 writing the report"
m4train report "${run[@]}"
printf '\nDone in %d s.\n' $((SECONDS - started))
python launch/promise.py runs/digits/sft/evaluation.json single=96 multi=92
