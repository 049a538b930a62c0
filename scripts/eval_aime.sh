#!/usr/bin/env bash
# AIME24/25/26 Avg@16 of a checkpoint, sampled as in the paper (temperature 0.7, top_p 0.95):
#   scripts/eval_aime.sh CHECKPOINT [cppo eval options]
# CHECKPOINT: a run folder, one of its global_step_N, a Hugging Face folder or hub id. DATA is the folder of the three
# parquet files (default: data); where they are missing they are fetched from the hub.
set -euo pipefail

if (($# == 0)); then
  echo "usage: scripts/eval_aime.sh CHECKPOINT [cppo eval options]" >&2
  exit 2
fi
cppo=(bash "$(dirname "${BASH_SOURCE[0]}")/cppo.sh")
data=${DATA:-data}

files=() missing=()
for name in aime24 aime25 aime26; do
  files+=("$data/$name.parquet")
  if [[ ! -f $data/$name.parquet ]]; then missing+=("$name"); fi
done
if ((${#missing[@]})); then "${cppo[@]}" prepare --train --eval "${missing[@]}" --out "$data"; fi
exec "${cppo[@]}" eval "$1" --data "${files[@]}" -n 16 --temperature 0.7 --top-p 0.95 "${@:2}"
