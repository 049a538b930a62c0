#!/usr/bin/env bash
# A recipe on several nodes under Slurm; submitted from the checkout, which every node sees (docs/cluster.md):
#   sbatch --nodes=4 recipes/cluster/slurm.sh recipes/qwen3_30b_a3b_base.sh [overrides]
# The run has the job's name (sbatch --job-name=NAME), else RECIPE-JOBID. Before the time limit and on preemption it is ended in order,
# queued again and continued. May be set: VENV, GPUS (a node; default: Slurm's), HEAD_IP, JOIN_LIMIT (seconds; default: 600).
# Run here: no, only with fakes of Slurm's commands (tests/cli/test_cluster.py).
#SBATCH --job-name=cppo --ntasks-per-node=1 --gpus-per-node=8 --exclusive --mem=0
#SBATCH --requeue --open-mode=append --signal=B:TERM@120
set -euo pipefail
recipe=${1:?usage: sbatch --nodes=N recipes/cluster/slurm.sh recipes/RECIPE.sh [overrides]}
cd "${SLURM_SUBMIT_DIR:-.}"
PATH=${VENV:-$PWD/.venv}/bin:$PATH
nodes=$SLURM_JOB_NUM_NODES gpus=${GPUS:-${SLURM_GPUS_ON_NODE:?no GPUs in this job: sbatch --gpus-per-node=N, or set GPUS}}
name=$SLURM_JOB_NAME scratch=/tmp/ray-$SLURM_JOB_ID steps=() run="" cut=0
if [[ $name == cppo ]]; then name=$(basename "$recipe" .sh)-$SLURM_JOB_ID; fi
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
read -r ip _ <<<"${HEAD_IP:-$(hostname -I)}"
export RAY_ADDRESS=$ip:$((20000 + SLURM_JOB_ID % 10000)) # a port of this job: an earlier job's Ray may still be ending
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')} # other users' jobs stay out

say() { echo "slurm.sh: $*" >&2; }
finish() {
  local status=$?
  trap '' TERM
  if ((${#steps[@]})); then kill -TERM "${steps[@]}" 2>/dev/null || true; fi
  wait
  if ((status && !cut)); then say "Ray's logs: $scratch on each node"; else srun --overlap rm -rf "$scratch" || true; fi
  # A cancelled job is not running any more, and stays cancelled.
  if ((status && cut)) && [[ $(scontrol show job "$SLURM_JOB_ID") == *JobState=RUNNING* ]]; then
    say "queueing the job again, to continue $name"
    scontrol requeue "$SLURM_JOB_ID"
  fi
}
trap finish EXIT
trap 'cut=1; say SIGTERM; if [[ $run ]]; then kill -TERM "$run" || true; else exit 143; fi' TERM
joined='import ray; ray.init(logging_level="ERROR", log_to_driver=False); print(sum(node["Alive"] for node in ray.nodes()))'
await() { # await N: until N nodes have joined Ray
  local seen limit=$((SECONDS + ${JOIN_LIMIT:-600}))
  until seen=$(timeout 60 python -c "$joined" 2>/dev/null) && ((seen >= $1)); do
    if (($(jobs -pr | wc -l) < ${#steps[@]})); then say "Ray ended on a node; what it said is above" && exit 1; fi
    if ((SECONDS >= limit)); then say "gave up: ${seen:-0} of $1 nodes have joined Ray at $RAY_ADDRESS" && exit 1; fi
    say "waiting: ${seen:-0} of $1 nodes have joined Ray at $RAY_ADDRESS" && sleep 3
  done
}
# verl refuses ROCR_VISIBLE_DEVICES, which some Slurms set, beside CUDA_VISIBLE_DEVICES.
ray=(--cpu-bind=none env -u RAY_ADDRESS -u ROCR_VISIBLE_DEVICES ray start --block --disable-usage-stats --num-gpus="$gpus" --temp-dir="$scratch")
srun --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" "${ray[@]}" --head --node-ip-address="$ip" --port="${RAY_ADDRESS##*:}" &
steps+=($!)
await 1
if ((nodes > 1)); then
  srun --nodes=$((nodes - 1)) --ntasks=$((nodes - 1)) --exclude="${hosts[0]}" "${ray[@]}" --address="$RAY_ADDRESS" &
  steps+=($!)
  await "$nodes"
fi
bash "$recipe" trainer.nnodes="$nodes" trainer.n_gpus_per_node="$gpus" run.name="$name" run.resume=auto "${@:2}" &
run=$!
wait "$run" && status=0 || status=$?
while ((status > 128)) && kill -0 "$run" 2>/dev/null; do wait "$run" && status=0 || status=$?; done # SIGTERM ended the wait only
exit "$status"
