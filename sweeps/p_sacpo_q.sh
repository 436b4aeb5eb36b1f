#!/usr/bin/env bash
# P-SACPO's grid of q: every q is a merge of the same two policies, so one run per seed trains twice and gives all rows.
# 3 runs, about 15 minutes on 2 cores from an empty store, by the plan (append plan=true); debug=tiny for a look at the machinery.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" main.py -m output_dir="${OUT:-outputs/p_sacpo_q}" method=p_sacpo \
    method.q='[0.0,0.125,0.25,0.375,0.5,0.625,0.75,0.875,1.0]' seed=0,1,2 "$@"
