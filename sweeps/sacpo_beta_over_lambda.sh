#!/usr/bin/env bash
# SACPO's grid of beta / lambda, the paper's way to state lambda: a smaller number weighs safety more. Three seeds.
# 12 runs, about 17 minutes on 2 cores from an empty store, by the plan (append plan=true); debug=tiny for a look at the machinery.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" main.py -m output_dir="${OUT:-outputs/sacpo_beta_over_lambda}" method=sacpo \
    method.beta_over_lambda='[0.1],[0.2],[0.5],[1.0]' seed=0,1,2 "$@"
