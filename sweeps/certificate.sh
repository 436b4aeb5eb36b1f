#!/usr/bin/env bash
# Methods x thresholds x seeds against the exact optimum (dataset=enumerable): one table, one picture, CAID's claim.
# Stages that runs share (SFT, pairs, the helpful policy, log-probs on the list) are computed once, and the three sweeps
# may run at the same time on one store. About an hour and a half on 2 cores in two processes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/certificate}
grid='[-0.4],[-0.2],[0.0],[0.2],[0.4]'
"$python" main.py -m output_dir="$out" experiment=certificate/mocan,certificate/sacpo,certificate/pd_dpo \
    constraint.thresholds="$grid" seed=0,1,2 "$@"
"$python" main.py -m output_dir="$out" experiment=certificate/mocaid constraint.thresholds="$grid" seed=0,1,2 "$@"
# CAID's claim on five seeds, all four iterations together visiting as many pairs as MoCAN's one alignment
"$python" main.py -m output_dir="$out" experiment=certificate/mocaid method.step.train.epochs=0.5 \
    constraint.thresholds="$grid" seed=0,1,2,3,4 "$@"
"$python" -m alignbench.report certificates "$out" --split train
