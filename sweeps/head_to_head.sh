#!/usr/bin/env bash
# All methods on the embedded benchmark over five thresholds and three seeds, from an empty store to the report: tables,
# pictures and one page to filter and search. Two sweeps side by side, of one thread each, on one store; they begin with
# different seeds, so that neither waits for what the other makes. 61 to 66 minutes on 2 cores; kept: sweeps/results/head_to_head/.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/head_to_head}
grid='[-0.2],[0.0],[0.1],[0.2],[0.4]'
sweep() { "$python" main.py -m output_dir="$out" hardware.threads=1 "$@"; }

set -m # in a process group of its own, so that all of it can be stopped: the background does not hear Ctrl-C
sweep seed=2,1,0 method=mocaid,pecaid constraint.thresholds="$grid" "$@" &
set +m
iterated=$! status=0
trap 'kill -- "-$iterated" 2>/dev/null || true' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
sweep seed=0,1,2 method=sacpo,mocan,pecan,pd_dpo constraint.thresholds="$grid" "$@" || status=$?
sweep seed=0,1,2 method=sft,dpo_helpful,dpo_safe,naive_merge,p_sacpo "$@" || status=$?
wait "$iterated" || status=$?

# a plan makes no records
case " $* " in *" plan=true "*) exit "$status" ;; esac
"$python" -m alignbench.report compare "$out"
"$python" -m alignbench.report plots "$out"
"$python" -m alignbench.report dashboard "$out"
exit "$status"
