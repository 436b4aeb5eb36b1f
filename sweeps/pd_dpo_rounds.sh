#!/usr/bin/env bash
# PD-DPO over thresholds and numbers of rounds, beside v1's fixed multiplier. Three seeds.
# 21 runs, about 40 minutes on 2 cores from an empty store, by the plan (append plan=true); debug=tiny for a look at the machinery.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/pd_dpo_rounds}
"$python" main.py -m output_dir="$out" method=pd_dpo method.rounds=3,6 constraint.thresholds='[0.0],[0.2],[0.4]' \
    seed=0,1,2 "$@"
"$python" main.py -m output_dir="$out" method=pd_dpo_v1 seed=0,1,2 "$@"
