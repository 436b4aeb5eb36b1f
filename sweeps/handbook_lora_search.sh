#!/usr/bin/env bash
# The search behind the embedded learning rates of adapters, on validation prompts: of the reward step (dpo_helpful) and
# of a Lagrangian step (mocan at lambda 1), for the adapters of handbook_llama_lora (rank 16, every matrix) and CAN's and
# CAID's (rank 8; query, key, value). Writes sweeps/handbook_lora_search.json. About 15 minutes on one core after the models
# that all runs share. The choice, one for both kinds: 1e-3 has the best E r - beta KL in the reward step, and at rank 8 also
# the best E r + lambda E g - beta KL in the Lagrangian one (at rank 16 a third of it is a little better).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/handbook_lora_search}
common=(output_dir="$out" evaluate.split=validation evaluate.samples_per_prompt=8 tracking=disabled tuned_by=null
  model=handbook_llama_lora)
papers=(model.lora.rank=8 model.lora.alpha=16 model.lora.targets=[q_proj,k_proj,v_proj])
rates=method.step.train.learning_rate=3e-4,1e-3,3e-3
for method in method=dpo_helpful "method=mocan method.multipliers=[1.0]"; do
  # shellcheck disable=SC2086 # two words
  "$python" main.py -m "${common[@]}" $method "$rates" "$@"
  # shellcheck disable=SC2086
  "$python" main.py -m "${common[@]}" "${papers[@]}" $method "$rates" "$@"
done
"$python" -m alignbench.report.search "$out" sweeps/handbook_lora_search.json model=handbook_llama_lora
