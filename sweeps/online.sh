#!/usr/bin/env bash
# What exploration is worth to online PD-DPO where the offline pairs miss the good region: without a bonus, with the bonus
# in what is gathered, and with the bonus in the losses; exact distance from the optimum by round, paired by seed.
# 24 runs of about 100 s on one core each; kept result: sweeps/results/online/.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/online}
for bonus in "sampling 0" "sampling 5" "objectives 5"; do
    read -r where alpha <<<"$bonus"
    "$python" main.py -m output_dir="$out" experiment=certificate/online seed=0,1,2,3,4,5,6,7 \
        method.online.bonus="$where" method.online.alpha_reward="$alpha" method.online.alpha_cost="$alpha" "$@"
done
"$python" -m alignbench.report rounds "$out" --split train
