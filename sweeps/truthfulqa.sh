#!/usr/bin/env bash
# A whole chain on real data and a real model, small enough for a laptop: TruthfulQA's answers with two human labels each
# (reward = informative, constraint = truthful), a policy of 135M parameters with adapters, a reward and a truthfulness
# model learned from the same labels; MoCAN, SACPO and PD-DPO on one store; generated answers scored by the learned models.
# 120 of the 817 questions, 8 answers and 6 pairs of each, one pass per step: 32 minutes on one CPU core, 3.6 GiB. Kept:
# sweeps/results/truthfulqa/.
#   MODEL=SmolLM2-135M-Instruct DATA=truthfulqa bash sweeps/truthfulqa.sh [OVERRIDE ...]
set -euo pipefail
model=$(realpath "${MODEL:?a folder with SmolLM2-135M-Instruct}")
data=$(realpath "${DATA:?a folder with finetune_truth.jsonl and finetune_info.jsonl}")
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/truthfulqa}
common=(experiment=truthfulqa/smollm2 "model.path=$model" "dataset.files.responses.path=\"$data/finetune_*.jsonl\""
  dataset.files.most_prompts=120 dataset.files.responses_per_prompt=8 dataset.files.pairs_per_prompt=6
  dataset.files.test_share=0.25 evaluate.samples_per_prompt=2 scorers.learned_truthfulqa.train.epochs=1
  scorers.learned_truthfulqa.train.batch_size=8 scorers.learned_truthfulqa.train.learning_rate=3e-4 output_dir="$out")
options=("$@")
# a step's optimiser, by its name
steps() { for step in "$@"; do echo "method.$step.train.batch_size=8" "method.$step.train.learning_rate=2e-4"; done; }
run() { "$python" main.py "${common[@]}" "$@" "${options[@]}"; }

# shellcheck disable=SC2046 # words
run method=mocan method.dual.scorer=data $(steps step)
# shellcheck disable=SC2046
run method=sacpo method.dual.scorer=data $(steps reward_step safety_step)
# shellcheck disable=SC2046
run method=pd_dpo method.cost.annotator=learned_truthfulqa method.rounds=1 method.cost_step.train.epochs=1 \
  $(steps reward_step cost_step)

# a plan makes no records
case " ${options[*]} " in *" plan=true "*) exit 0 ;; esac
"$python" -m alignbench.report compare "$out"
"$python" -m alignbench.report plots "$out"
"$python" -m alignbench.report dashboard "$out"
