#!/usr/bin/env bash
# Every method so far on the embedded benchmark, three seeds: one table, one picture. (Timed on 2 cores: safe-only DPO and
# SACPO on three seeds, about 12 minutes beside other work; the whole was not timed.) Stages that runs
# share (SFT, pairs, reference log-probs, the helpful policy) are computed once.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/head_to_head}
"$python" main.py -m output_dir="$out" method=sft,dpo_helpful,dpo_safe,sacpo,p_sacpo seed=0,1,2 "$@"
"$python" -m alignbench.report "$out"
