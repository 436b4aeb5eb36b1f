#!/usr/bin/env bash
# All methods on the embedded benchmark over five thresholds and three seeds, from an empty store to the report: tables,
# pictures and one page to filter and search. Two sweeps side by side, of one thread each, on one store; they begin with
# different seeds, so that neither waits for what the other makes. 59 minutes on 2 cores; what came out is kept in
# sweeps/results/head_to_head/.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/head_to_head}
options=("$@")
. sweeps/lib/side_by_side.sh
grid='[-0.2],[0.0],[0.1],[0.2],[0.4]'

# what the last policy achieved is measured on test prompts, like everybody's: no dual step follows its slack; each of
# the others is measured on as many responses as PD-DPO's
iterated() {
    local each
    for each in mocaid pecaid; do
        sweep seed=2,1,0 method="$each" method.measure_last=false method.on_policy_samples=4 \
            constraint.thresholds="$grid"
    done
    last
}

others() {
    sweep seed=0,1,2 method=sacpo,mocan,pecan,pd_dpo constraint.thresholds="$grid"
    last
}

last() {
    local each
    for each in p_sacpo naive_merge sft,dpo_helpful,dpo_safe; do
        if first "$each"; then sweep seed=0,1,2 method="$each"; fi
    done
    return "$status"
}

side_by_side iterated others || status=$?
if planned; then exit "$status"; fi # a plan makes no records
"$python" -m alignbench.report dashboard "$out" &
"$python" -m alignbench.report compare "$out"
"$python" -m alignbench.report plots "$out"
wait "$!" || status=$?
exit "$status"
