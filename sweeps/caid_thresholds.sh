#!/usr/bin/env bash
# CAID's grid of thresholds b beside its one-shot counterparts, then the grid of two constraints. Three seeds.
# 72 runs, about 2 hours on 2 cores from an empty store, by the plan (append plan=true); debug=tiny for a look at the machinery.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/caid_thresholds}
"$python" main.py -m output_dir="$out" method=mocan,mocaid,pecan,pecaid \
    constraint.thresholds='[-0.2],[0.0],[0.2],[0.4]' seed=0,1,2 "$@"
"$python" main.py -m output_dir="$out" method=mocan,mocaid constraint.utilities='[safety,politeness]' \
    constraint.thresholds='[0.0,0.0],[0.0,0.1],[0.2,0.0],[0.2,0.1]' seed=0,1,2 "$@"
