#!/usr/bin/env bash
# The whole life of a small model: pretrain, fine-tune, evaluate, export, compare, report.
# Interrupt it whenever you like; run it again and it goes on where it stopped.
# Arguments are overrides for every stage, such as: launch/digits.sh trainer.precision=fp32
set -euo pipefail
cd "$(dirname "$0")/.."

pretrain=(experiment=digits_pretrain "$@")
sft=(experiment=digits_sft model.pretrained=runs/digits_pretrain/export "$@")
started=$SECONDS
stage() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - started)); }

stage "1/6 pretraining a tiny Idefics3 from scratch on interleaved documents"
m4train train "${pretrain[@]}"
m4train export "${pretrain[@]}"

stage "2/6 fine-tuning on conversations: LoRA on the text model, connector in full, vision frozen"
m4train train "${sft[@]}"

stage "3/6 answering questions about held-out scans"
m4train evaluate "${sft[@]}"

stage "4/6 exporting to a Hugging Face folder, LoRA merged"
m4train export "${sft[@]}"

stage "5/6 loading the export with m4train and with transformers"
python launch/compare_with_transformers.py runs/digits_sft/export

stage "6/6 writing the report"
m4train report "${sft[@]}"
printf '\nDone in %d s.\n' $((SECONDS - started))
