#!/usr/bin/env bash
# The search behind the embedded settings, on validation prompts: learning rate and epochs of the reward step, then
# learning rate and beta/lambda of the safety step. About 10 minutes on 2 cores; writes sweeps/handbook_search.json.
# The reward step's choice is the best objective gain E r - beta KL of one pass (two would not fit four minutes); the
# safety step's is the least forceful setting whose point estimate meets the default threshold.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/handbook_search}
common=(output_dir="$out" evaluate.split=validation evaluate.samples_per_prompt=8 tracking=disabled tuned_by=null)
"$python" main.py -m "${common[@]}" method=dpo_helpful \
  method.step.train.learning_rate=5e-5,1e-4,3e-4 method.step.train.epochs=1,2 "$@"
"$python" main.py -m "${common[@]}" method=dpo_safe method.step.train.learning_rate=1e-4,2e-4 "$@"
"$python" main.py -m "${common[@]}" method=sacpo \
  method.safety_step.train.learning_rate=1e-4,2e-4 "method.beta_over_lambda=[0.5],[0.2],[0.1]" "$@"
"$python" -m alignbench.report.search "$out" sweeps/handbook_search.json
