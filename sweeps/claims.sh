#!/usr/bin/env bash
# Every run that the claims page needs (alignbench/report/claims/declared.py), then the page: effect, interval and verdict
# of each paper's claims. Stages that runs share, also with head_to_head.sh and the other sweeps on the same store, are
# computed once. 331 runs, two at a time of one thread each: 3 hours on 2 cores from an empty store, by their plan at 60
# GFLOP/s. debug=tiny seed=0 for a look at the machinery (no claim is judged on it), plan=true for what it takes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/claims}
options=("$@")
. sweeps/lib/side_by_side.sh # a run that fails (a margin out of reach, say) leaves its claim undecided
grid='[-0.2],[0.0],[0.1],[0.2],[0.4]'
exact='[-0.2],[0.0],[0.2]'
pairs='[0.1,0.05],[0.2,0.0],[0.0,0.1]'

# the embedded benchmark, five seeds: with three hardly a difference of a tenth can be excluded
thresholds() {
    sweep method=dpo_helpful,dpo_safe seed=0,1,2,3,4
    sweep method=sacpo,mocan,mocaid,pd_dpo constraint.thresholds="$grid" seed=0,1,2,3,4
    sweep method=mocan,mocaid constraint.utilities=[safety,politeness] constraint.thresholds="$pairs" seed=0,1,2,3,4
    sweep method=pd_dpo method.rounds=6 constraint.thresholds="$grid" seed=0,1,2,3,4
    return "$status"
}

others() {
    # exact sums over listed answers, and the dual alone: seeds that were not looked at before the claims were declared
    sweep experiment=certificate/mocan,certificate/sacpo,certificate/pd_dpo constraint.thresholds="$exact" seed=5,6,7,8,9
    sweep experiment=certificate/mocaid method.step.train.epochs=0.5 constraint.thresholds="$exact" seed=5,6,7,8,9
    sweep experiment=certificate/mocan,certificate/pecan method.multipliers=[0.7] constraint.thresholds=[0.2] seed=5,6,7,8,9
    sweep experiment=certificate/online method.online.bonus=objectives seed=8,9,10,11,12,13,14,15
    sweep experiment=certificate/online method.online.bonus=objectives method.online.alpha_reward=0.0 \
        method.online.alpha_cost=0.0 seed=8,9,10,11,12,13,14,15
    sweep method=dual method.dual.samples=8,64 constraint.thresholds=[0.4] seed=5,6,7,8,9
    # the embedded benchmark at stated settings
    sweep method=sacpo method.beta_over_lambda='[0.1],[0.2],[0.5],[1.0]' seed=0,1,2,3,4
    sweep method=sacpo method.order=safe_first method.beta_over_lambda=[0.2] seed=0,1,2,3,4
    sweep method=sacpo method.safety_step.loss=kto method.safety_step.kto_labels=is_safe method.beta_over_lambda=[0.2] \
        seed=0,1,2,3,4
    sweep method=p_sacpo seed=0,1,2,3,4
    sweep method=naive_merge method.beta_safe=0.1 seed=0,1,2,3,4
    sweep method=mocan,pecan method.multipliers='[0.5],[1.0],[1.5]' seed=0,1,2,3,4
    return "$status"
}

side_by_side thresholds others || status=$?
if planned; then exit "$status"; fi # a plan makes no records
"$python" -m alignbench.report claims "$out"
exit "$status"
