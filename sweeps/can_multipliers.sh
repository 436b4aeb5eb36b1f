#!/usr/bin/env bash
# MoCAN's and PeCAN's grid of stated multipliers (CAN, Fig. 2): what a multiplier predicts and what it gives. Three seeds.
# 30 runs, about 41 minutes on 2 cores from an empty store, by the plan (append plan=true); debug=tiny for a look at the machinery.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" main.py -m output_dir="${OUT:-outputs/can_multipliers}" method=mocan,pecan \
    method.multipliers='[0.1],[0.5],[1.0],[1.5],[2.0]' seed=0,1,2 "$@"
