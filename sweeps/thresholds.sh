#!/usr/bin/env bash
# All four papers' methods over thresholds on the embedded benchmark: one table of requested against achieved margins,
# one picture. Stages that runs share (SFT, pairs, bank, helpful policy, reference log-probs) are computed once.
# About 17 minutes on 2 cores. With more thresholds and seeds: head_to_head.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" main.py -m output_dir="${OUT:-outputs/thresholds}" method=sacpo,mocan,pecan,mocaid,pd_dpo \
    constraint.thresholds='[0.0],[0.2],[0.4]' "$@"
