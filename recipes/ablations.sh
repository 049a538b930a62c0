#!/usr/bin/env bash
# The ablations of Section 4.3 (Figs. 5 and 6): CPPO with one thing changed, on one model.
#   recipes/ablations.sh                    list the commands
#   recipes/ablations.sh run [NAME]         run them one after another, each in a run folder of its own
# MODEL: the recipe (default qwen3_8b_base). EXTRA: overrides for every run (split at spaces).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

model=${MODEL:-qwen3_8b_base}
read -ra extra <<<"${EXTRA:-}"
declare -A changes=(
  [cppo]=""
  [no-position-weight]="method.weights=uniform"
  [no-prefix-budget]="method.delta_b=null"
  [shuffled-weights]="method.weights=shuffled"
  [soft-gate]="method.soft_gate=true"
  [w-min-0.6]="method.w_min=0.6"
  [w-min-0.8]="method.w_min=0.8"
  [delta-b-0.02]="method.delta_b=0.02"
  [delta-b-0.03]="method.delta_b=0.03 method.delta_b_quantile=null"
  [kl]="divergence=topk_kl method.delta_b_quantile=null"
  [binary]="divergence=binary_tv"
  [trm-max-avg]="method=trm_max_avg"
)
if [[ ${1:-list} != list && $1 != run ]] || [[ -n ${2:-} && -z ${changes[$2]+there} ]]; then
  echo "usage: recipes/ablations.sh [list | run [NAME]]; NAME: $(printf '%s\n' "${!changes[@]}" | sort | paste -sd ' ')" >&2
  exit 2
fi
for name in $(printf '%s\n' "${!changes[@]}" | sort); do
  read -ra change <<<"${changes[$name]}"
  run=ablation-$model-$name
  command=(bash "recipes/$model.sh" ${change[@]+"${change[@]}"} "run.name=$run" ${extra[@]+"${extra[@]}"})
  if [[ ${1:-list} == list ]]; then
    echo "${command[*]}"
  elif [[ -z ${2:-} || $2 == "$name" ]]; then
    "${command[@]}" run.resume=auto
  fi
done
