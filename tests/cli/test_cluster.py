"""Launchers and Dockerfiles. No cluster, no Docker: Slurm's commands and Ray are fakes that record their calls."""

import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "recipes" / "cluster"
RECIPE = "recipes/qwen3_8b_base.sh"

# Every fake notes how it was called in $FAKE/calls; $FAKE/joined counts the nodes that are in Ray.
FAKES = {
    "note": 'printf "%s\\n" "$*" >>"$FAKE/calls"',
    "sleep": "exec /bin/sleep 0.05",
    "hostname": "echo 10.0.0.1 172.17.0.1",
    "srun": """note "srun $*"
        tasks=1
        while [[ $1 == --* ]]; do
          if [[ $1 == --ntasks=* ]]; then tasks=${1#*=}; fi
          shift
        done
        FAKE_TASKS=$tasks exec "$@" """,
    "scontrol": """note "scontrol $*"
        case "$1 $2" in
          "show hostnames") printf "node%s\\n" 1 2 3 4 ;;
          "show job") echo "JobId=$3 JobState=${FAKE_STATE:-RUNNING} Reason=None" ;;
        esac""",
    "rm": 'note "rm $*"',
    "python": 'cat "$FAKE/joined"',
    "ray": """if [[ $1 == status ]]; then [[ -s $FAKE/joined ]]; exit; fi
        if [[ $* == *--head* ]]; then role=head; else role=worker; fi
        trap 'note "$role ended"; exit 1' TERM
        joining=${FAKE_TASKS:-1}
        if [[ $role == "${FAKE_RAY_ENDS:-}" ]]; then
          note "ray $* RAY_ADDRESS=${RAY_ADDRESS:-none} ROCR=${ROCR_VISIBLE_DEVICES:-none} token=${#RAY_AUTH_TOKEN}"
          echo "no memory" >&2
          exit 1
        fi
        if [[ $role == worker ]]; then joining=${FAKE_WORKERS_JOIN:-$joining}; fi
        echo $(($(cat "$FAKE/joined" 2>/dev/null || echo 0) + joining)) >"$FAKE/joined"
        note "ray $* RAY_ADDRESS=${RAY_ADDRESS:-none} ROCR=${ROCR_VISIBLE_DEVICES:-none} token=${#RAY_AUTH_TOKEN}"
        while :; do sleep 1; done""",
    "cppo": """trap 'note "run ended in order"; exit 130' TERM
        note "cppo $* RAY_ADDRESS=$RAY_ADDRESS mode=$RAY_AUTH_MODE in=$PWD"
        case ${FAKE_RUN:-} in
          "") ;;
          fails) exit 3 ;;
          goes_on) while :; do sleep 1; done ;;
        esac""",
}


class Cluster:
    def __init__(self, folder):
        self.folder = folder
        self.bin = folder / "venv" / "bin"
        self.bin.mkdir(parents=True)
        for name, body in FAKES.items():
            (self.bin / name).write_text(f"#!/bin/bash\n{body}\n")
            (self.bin / name).chmod(0o755)
        (folder / "calls").touch()

    def start(self, command, **variables):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RAY", "VENV"))}
        environment = {"FAKE": str(self.folder), "VENV": str(self.bin.parent), **variables}
        self.process = subprocess.Popen(
            command,
            cwd=self.folder,
            env={**inherited, **environment, "PATH": f"{self.bin}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        return self

    def slurm(self, *overrides, nodes=4, **variables):
        job = {
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "1234567",
            "SLURM_JOB_NAME": "cppo",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
            "SLURM_GPUS_ON_NODE": "8",
            "ROCR_VISIBLE_DEVICES": "0,1",
        }
        return self.start(["bash", CLUSTER / "slurm.sh", RECIPE, *overrides], **{**job, **variables})

    def end(self):
        """(exit status, output) once it ends by itself."""
        try:
            output, _ = self.process.communicate(timeout=30)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.returncode, output

    @property
    def calls(self):
        return (self.folder / "calls").read_text().splitlines()

    def called(self, start):
        return [call for call in self.calls if call.startswith(start)]

    def wait_for(self, start):
        deadline = time.monotonic() + 20
        while not self.called(start):
            assert time.monotonic() < deadline, self.calls
            time.sleep(0.05)

    def terminate(self):
        """As ``--signal=B:TERM`` does: only the batch script gets it."""
        self.process.send_signal(signal.SIGTERM)


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def position(calls, start):
    return next(index for index, call in enumerate(calls) if call.startswith(start))


def test_launchers_are_short():
    for path in (*CLUSTER.iterdir(), ROOT / "docker" / "Dockerfile", ROOT / "docker" / "Dockerfile.cpu"):
        assert len(path.read_text().splitlines()) <= 60, path


@pytest.mark.parametrize("script", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK)


# Slurm


def test_slurm_starts_ray_and_runs_the_recipe_on_all_nodes(cluster):
    status, output = cluster.slurm("method=dppo", "trainer.save_freq=5").end()
    assert status == 0, output
    head, worker, clean_up = cluster.called("srun")
    assert "--nodes=1 --ntasks=1 --nodelist=node1 " in head
    assert "--nodes=3 --ntasks=3 --exclude=node1 " in worker
    port = 20000 + 1234567 % 10000
    common = "--block --disable-usage-stats --num-gpus=8 --temp-dir=/tmp/ray-1234567"
    seen = "RAY_ADDRESS=none ROCR=none token=64"
    assert cluster.called("ray start") == [
        f"ray start {common} --head --node-ip-address=10.0.0.1 --port={port} {seen}",
        f"ray start {common} --address=10.0.0.1:{port} {seen}",
    ]
    settings = "trainer.nnodes=4 trainer.n_gpus_per_node=8 run.name=qwen3_8b_base-1234567 run.resume=auto"
    (run,) = cluster.called("cppo")
    assert f"recipe=qwen3_8b_base {settings} method=dppo trainer.save_freq=5 RAY_ADDRESS=10.0.0.1:{port}" in run
    assert f"mode=token in={ROOT}" in run
    # The run comes after all nodes and before Ray ends.
    calls = cluster.calls
    assert position(calls, "ray start") < position(calls, "cppo") < position(calls, "head ended")
    assert cluster.called("worker ended")
    assert clean_up.endswith("rm -rf /tmp/ray-1234567")
    assert not cluster.called("scontrol requeue")


def test_slurm_on_one_node_starts_no_workers(cluster):
    status, output = cluster.slurm(nodes=1, GPUS="2").end()
    assert status == 0, output
    assert len(cluster.called("ray start")) == 1
    assert "trainer.nnodes=1 trainer.n_gpus_per_node=2 " in cluster.called("cppo")[0]


def test_slurm_names_the_run_like_the_job(cluster):
    status, output = cluster.slurm("run.resume=false", SLURM_JOB_NAME="mine").end()
    assert status == 0, output
    assert "run.name=mine run.resume=auto run.resume=false" in cluster.called("cppo")[0]


def test_slurm_gives_up_on_nodes_that_do_not_join(cluster):
    status, output = cluster.slurm(FAKE_WORKERS_JOIN="2", JOIN_LIMIT="4").end()
    assert status == 1
    assert "waiting: 3 of 4 nodes have joined Ray at 10.0.0.1:24567" in output
    assert "gave up: 3 of 4 nodes have joined Ray at 10.0.0.1:24567" in output
    assert "Ray's logs: /tmp/ray-1234567 on each node" in output
    assert not cluster.called("cppo")
    assert cluster.called("head ended")
    assert cluster.called("worker ended")
    assert not cluster.called("rm")


def test_slurm_does_not_wait_for_a_ray_that_ended(cluster):
    started = time.monotonic()
    status, output = cluster.slurm(FAKE_RAY_ENDS="worker").end()
    assert status == 1
    assert "no memory" in output
    assert "Ray ended on a node" in output
    assert not cluster.called("cppo")
    assert cluster.called("head ended")
    assert time.monotonic() - started < 20


def test_slurm_passes_a_failure_on_and_ends_ray(cluster):
    status, output = cluster.slurm(FAKE_RUN="fails").end()
    assert status == 3, output
    assert cluster.called("head ended")
    assert cluster.called("worker ended")
    assert not cluster.called("scontrol requeue")


def test_slurm_ends_the_run_in_order_and_queues_the_job_again(cluster):
    cluster.slurm(FAKE_RUN="goes_on").wait_for("cppo")
    cluster.terminate()
    status, output = cluster.end()
    assert status == 130, output
    calls = cluster.calls
    assert position(calls, "run ended in order") < position(calls, "head ended")
    assert calls[-1] == "scontrol requeue 1234567"
    assert "queueing the job again, to continue qwen3_8b_base-1234567" in output


def test_slurm_leaves_a_cancelled_job_alone(cluster):
    cluster.slurm(FAKE_RUN="goes_on", FAKE_STATE="CANCELLED").wait_for("cppo")
    cluster.terminate()
    status, output = cluster.end()
    assert status == 130, output
    assert cluster.called("run ended in order")
    assert not cluster.called("scontrol requeue")


def test_slurm_preempted_while_nodes_join(cluster):
    cluster.slurm(FAKE_WORKERS_JOIN="0").wait_for("ray start --block --disable-usage-stats --num-gpus=8")
    cluster.terminate()
    status, output = cluster.end()
    assert status == 143, output
    assert not cluster.called("cppo")
    assert cluster.called("head ended")
    assert cluster.called("scontrol requeue 1234567")


def test_slurm_needs_gpus(cluster):
    status, output = cluster.slurm(SLURM_GPUS_ON_NODE="").end()
    assert status != 0
    assert "no GPUs in this job" in output
    assert not cluster.called("srun")


def test_slurm_options():
    text = (CLUSTER / "slurm.sh").read_text()
    options = set(" ".join(re.findall(r"^#SBATCH (.*)$", text, re.M)).split())
    assert {"--requeue", "--open-mode=append", "--signal=B:TERM@120", "--exclusive", "--ntasks-per-node=1"} <= options
    first_command = next(line for line in text.splitlines() if line and not line.startswith("#"))
    assert text.rindex("#SBATCH") < text.index(first_command)  # sbatch ignores those after it


# Ray jobs


def test_ray_submit(cluster):
    """The fake runs the entrypoint as Ray does: in its copy of the checkout, with the cppo of the PATH."""
    shared = cluster.folder / "shared"
    shared.mkdir()
    copy = cluster.folder / "copy"
    (copy / "recipes").mkdir(parents=True)
    (copy / RECIPE).write_text((ROOT / RECIPE).read_text())
    (copy / "scripts").mkdir()
    (copy / "scripts/cppo.sh").write_text((ROOT / "scripts/cppo.sh").read_text())  # without its mode
    (cluster.bin / "ray").write_text(
        """#!/bin/bash
        note "$(printf '%q ' "$@")"
        while [[ $1 != -- ]]; do shift; done
        shift
        cd "$FAKE/copy" && unset VENV && RAY_ADDRESS=10.0.0.1:6379 RAY_AUTH_MODE=token exec "$@" """
    )
    command = [CLUSTER / "ray_submit.sh", shared, RECIPE, "trainer.nnodes=2", "data.val_files=[a b.parquet]"]
    status, output = cluster.start(command).end()
    assert status == 0, output
    submitted = shlex.split(cluster.calls[0])
    assert submitted[:4] == ["job", "submit", "--working-dir", str(ROOT)]
    environment = json.loads(submitted[submitted.index("--runtime-env-json") + 1])
    assert "/tests" in environment["excludes"]
    assert int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
    assert "--no-wait" not in submitted
    assert cluster.calls[1] == (
        "cppo train platform=gpu recipe=qwen3_8b_base run.resume=auto trainer.nnodes=2 data.val_files=[a b.parquet] "
        f"RAY_ADDRESS=10.0.0.1:6379 mode=token in={shared}"
    )


def test_ray_submit_says_how(cluster):
    status, output = cluster.start([CLUSTER / "ray_submit.sh", "folder"]).end()
    assert status == 2
    assert "recipes/cluster/ray_submit.sh FOLDER recipes/" in output


# SkyPilot


def sky():
    return yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())


def test_skypilot_task():
    task = sky()
    assert task["num_nodes"] >= 2
    assert task["resources"]["accelerators"][0] == "H100:8"
    assert len(task["resources"]["accelerators"]) > 1
    assert task["resources"]["job_recovery"]["max_restarts_on_errors"] > 0
    assert (ROOT / "recipes" / f"{task['envs']['RECIPE']}.sh").is_file()
    assert {"RECIPE", "RUN_NAME", "OVERRIDES"} == task["envs"].keys()
    assert {"HF_TOKEN", "WANDB_API_KEY"} < task["secrets"].keys()
    assert set(task["secrets"].values()) == {None}
    assert task["setup"].strip() == "scripts/setup.sh gpu"
    assert "/cppo" in task["volumes"]
    # Its own Ray must be left alone: ports 6380 and 8266, and `ray stop` ends every Ray of the user.
    commands = "\n".join(line for line in task["run"].splitlines() if not line.lstrip().startswith("#"))
    assert not re.search(r"6379|6380|8266|52365|address=auto|ray stop", commands)


def run_skypilot(cluster, rank, **variables):
    """The task's commands on one node, with /cppo elsewhere."""
    work, shared = cluster.folder / "sky_workdir", cluster.folder / "shared"
    work.mkdir()
    shared.mkdir()
    (work / "recipes").symlink_to(ROOT / "recipes")
    (work / ".venv").symlink_to(cluster.bin.parent)
    script = f"cd {work}\n" + sky()["run"].replace("cd /cppo", f"cd {shared}")
    node = {"SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
    task = {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "RAY_AUTH_TOKEN": "x" * 64, **sky()["envs"], **variables}
    return cluster.start(["bash", "-c", script], **node, **task)


def test_skypilot_head(cluster):
    run_skypilot(cluster, 0, OVERRIDES="method=dppo run.seed=7").wait_for("ray start")
    assert not cluster.called("cppo")  # the other node has not joined
    (cluster.folder / "joined").write_text("2\n")
    status, output = cluster.end()
    assert status == 0, output
    (head,) = cluster.called("ray start")
    assert "--block" in head
    assert "--head --port=6479 --dashboard-port=8365 RAY_ADDRESS=none" in head
    (run,) = cluster.called("cppo")
    settings = "trainer.nnodes=2 trainer.n_gpus_per_node=8 run.name=qwen3_8b_base run.resume=auto"
    assert f"{settings} method=dppo run.seed=7" in run
    assert f"RAY_ADDRESS=10.0.0.1:6479 mode=token in={cluster.folder / 'shared'}" in run
    cluster.wait_for("head ended")


def test_skypilot_head_passes_a_failure_on(cluster):
    run_skypilot(cluster, 0, FAKE_RUN="fails").wait_for("ray start")
    (cluster.folder / "joined").write_text("2\n")
    status, output = cluster.end()
    assert status == 3, output
    cluster.wait_for("head ended")


def test_skypilot_worker_waits_for_the_head_and_blocks(cluster):
    run_skypilot(cluster, 1)
    time.sleep(0.5)
    assert not cluster.called("ray start")
    (cluster.folder / "joined").write_text("1\n")
    cluster.wait_for("ray start")
    assert "--address=10.0.0.1:6479" in cluster.called("ray start")[0]
    assert cluster.process.poll() is None
    os.killpg(cluster.process.pid, signal.SIGTERM)
    cluster.end()
    assert not cluster.called("cppo")


# KubeRay


def test_kuberay_job():
    job = yaml.safe_load((CLUSTER / "kuberay.yaml").read_text())
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    cluster = spec["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"]
    locked = (ROOT / "scripts" / "requirements" / "gpu.lock").read_text()
    assert f"\nray=={cluster['rayVersion']} ;" in locked
    assert cluster["authOptions"] == {"mode": "token"}
    assert "RAY_JOB_STOP_WAIT_TIME_S" in yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]

    bash, recipe, *overrides = spec["entrypoint"].split()
    assert bash == "bash"
    checkout = dockerfile("Dockerfile")["WORKDIR"][0]
    assert (ROOT / Path(recipe).relative_to(checkout)).is_file()
    settings = dict(override.split("=") for override in overrides)
    assert settings["trainer.nnodes"] == str(1 + workers["replicas"])
    assert settings["run.resume"] == "auto"
    assert settings["run.name"]
    assert re.fullmatch(r"[\w/. =]+", spec["entrypoint"])  # two shells read it

    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert settings["trainer.n_gpus_per_node"] == container["resources"]["limits"]["nvidia.com/gpu"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume.pop("name"): volume for volume in map(dict, pod["volumes"])}
        assert mounts.keys() == volumes.keys()
        assert mounts["shared"] == container["workingDir"]
        assert "persistentVolumeClaim" in volumes["shared"]
        assert mounts["shm"] == "/dev/shm"
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert "secretRef" in container["envFrom"][0]


# Docker


def dockerfile(name):
    """Instructions of a Dockerfile: {instruction: [arguments, ...]}."""
    lines = (ROOT / "docker" / name).read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#")).replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, arguments = line.split(maxsplit=1)
        found.setdefault(instruction, []).append(arguments)
    return found


@pytest.mark.parametrize(("name", "stack"), [("Dockerfile", "gpu"), ("Dockerfile.cpu", "cpu")])
def test_dockerfiles_install_through_setup(name, stack):
    instructions = dockerfile(name)
    runs = instructions["RUN"]
    (setup,) = [run for run in runs if "setup.sh" in run]
    assert setup.endswith(f"scripts/setup.sh {stack}")
    assert not [run for run in runs if re.search(r"\bpip3? install|\buv |conda|==|whl", run)]
    assert any(f"CPPO_STACK={stack}" in line for line in instructions["ENV"])
    assert instructions["WORKDIR"][0] == "/opt/cppo_verl"
    assert "Not built here" in (ROOT / "docker" / name).read_text().splitlines()[0]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_docker_bases_are_pinned(name):
    instructions = dockerfile(name)
    (base,) = instructions["FROM"]
    defaults = dict(argument.split("=", 1) for argument in instructions.get("ARG", []))
    base = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], base)
    assert re.fullmatch(r"(nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu24\.04|python:3\.11\.\d+-slim-bookworm)", base)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_docker_copies_what_is_there(name):
    ignored = set((ROOT / ".dockerignore").read_text().split())
    copies = dockerfile(name)["COPY"]
    assert copies[-1] == ". ."
    for *sources, _ in map(str.split, copies):
        for source in sources:
            assert (ROOT / source).exists(), source
            assert not {source, f"/{source}"} & ignored
    # setup.sh builds the package from what was copied before it.
    before = {source for copy in copies[:-1] for source in copy.split()[:-1]}
    assert {"pyproject.toml", "README.md", "LICENSE", "scripts", "configs", "cppo_verl"} == before
