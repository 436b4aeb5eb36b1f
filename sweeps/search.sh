#!/usr/bin/env bash
# Hyper-parameter search, reward up and the asked margin a constraint, on validation prompts: SACPO's two learning rates
# and beta/lambda, 16 trials of Optuna's TPE. About 30 minutes on 2 cores from an empty store, by the plan (append
# plan=true); debug=tiny hydra.sweeper.n_trials=4 for a look at the machinery. Killed, the same command goes on; more trials:
# hydra.sweeper.n_trials=32. Several at a time: hydra/launcher=submitit_local hydra.sweeper.n_jobs=2 hardware.share_node=true
# hardware.threads=1. It ends with the command that runs the best trial on test prompts.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" main.py -m hydra/sweeper=optuna hydra.sweeper.n_trials=16 output_dir="${OUT:-outputs/search}" method=sacpo \
    evaluate.split=validation evaluate.samples_per_prompt=8 tracking=disabled tuned_by=null \
    'method.reward_step.train.learning_rate=tag(log,interval(3e-5,3e-4))' \
    'method.safety_step.train.learning_rate=tag(log,interval(5e-5,5e-4))' \
    'method.beta_over_lambda=[0.5],[0.3],[0.2],[0.1]' "$@"
