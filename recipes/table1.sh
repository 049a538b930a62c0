#!/usr/bin/env bash
# Every cell of the paper's Table 1: seven methods on four models.
#   recipes/table1.sh                               list the 28 commands
#   recipes/table1.sh run [MODEL [METHOD]]          run them one after another, each in a run folder of its own
#   EXTRA="trainer.nnodes=2" recipes/table1.sh run qwen3_8b_base cppo
# EXTRA: overrides for every cell (split at spaces). A cell whose run folder is there is continued.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

models=(qwen3_1.7b qwen3_1.7b_base qwen3_8b_base qwen3_30b_a3b_base)
methods=(grpo minpro cispo dppo trm_max trm_avg cppo)
read -ra extra <<<"${EXTRA:-}"
one_of() { # one_of WORD CHOICE...
  local choice
  for choice in "${@:2}"; do if [[ $1 == "$choice" ]]; then return; fi; done
  echo "usage: recipes/table1.sh [list | run [MODEL [METHOD]]]; $1 is none of: ${*:2}" >&2
  exit 2
}
one_of "${1:-list}" list run
one_of "${2:-${models[0]}}" "${models[@]}"
one_of "${3:-${methods[0]}}" "${methods[@]}"

for model in "${models[@]}"; do
  for method in "${methods[@]}"; do
    name=table1-$model-$method
    command=(bash "recipes/$model.sh" "method=$method" "run.name=$name" ${extra[@]+"${extra[@]}"})
    if [[ ${1:-list} == list ]]; then
      echo "${command[*]}"
    elif [[ (-z ${2:-} || $2 == "$model") && (-z ${3:-} || $3 == "$method") ]]; then
      "${command[@]}" run.resume=auto
    fi
  done
done
