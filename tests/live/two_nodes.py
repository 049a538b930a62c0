"""Two hosts against one: the quickstart on a Ray cluster of two network namespaces, one FSDP rank on each.

    python tests/live/two_nodes.py FOLDER --assets runs/quickstart-assets-0 [--steps 10]

Needs root (ip netns). Each host has an address, a raylet and a vLLM server of its own; they meet over a virtual cable
and share the disk, as cluster nodes do. FOLDER/result.json gets the mean paired difference of the reward to one host
with two ranks, and its 95% interval. Given again, finished runs are kept.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from kill_sweep import processes
from scipy.stats import t as student

from cppo_verl.run.log import read_metrics

BIN = Path(sys.executable).parent
HOSTS = ("cppo-host-a", "cppo-host-b")
ADDRESSES = ("10.231.7.1", "10.231.7.2")
PORT = 6379

# Of raylets and of what joins them. Ray 2.60 asks for a token on nodes where another Ray has left one.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "GLOO_SOCKET_IFNAME": "eth0",
}


def refusal() -> str | None:
    """Why this machine cannot have two network namespaces, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        made = subprocess.run(["ip", "netns", "add", "cppo-try"], capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no ip command"
    subprocess.run(["ip", "netns", "del", "cppo-try"], capture_output=True)
    return None if made.returncode == 0 else f"ip netns add: {made.stderr.strip()}"


@contextmanager
def two_hosts() -> Iterator[None]:
    """Two namespaces whose eth0 are the ends of one cable."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    def leave() -> None:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)

    leave()
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", "eth0", "netns", HOSTS[0], "type", "veth", "peer", "name", "eth0", "netns", HOSTS[1])
        for host, address in zip(HOSTS, ADDRESSES, strict=True):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "eth0", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield
    finally:
        leave()


def on_host(number: int, *command: str | Path) -> list[str]:
    return ["ip", "netns", "exec", HOSTS[number], *map(str, command)]


@contextmanager
def ray_cluster(log: Path, wait: float = 120) -> Iterator[tuple[str, Path]]:
    """A raylet on each host; yields the cluster's address, when both have joined, and the folder of Ray's own files."""
    address = f"{ADDRESSES[0]}:{PORT}"
    environment = {**os.environ, **ENVIRONMENT}
    sizes = ("--num-cpus=32", "--num-gpus=1", "--object-store-memory=300000000", "--disable-usage-stats", "--block")
    places = (("--head", f"--port={PORT}", "--include-dashboard=false"), (f"--address={address}",))
    nodes = []
    # The default folder would keep this cluster's address, and every later Ray of the machine would look for it there.
    scratch = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: it holds sockets
    try:
        with open(log, "a") as output:
            for number, place in enumerate(places):
                own = (f"--node-ip-address={ADDRESSES[number]}", f"--temp-dir={scratch}")
                command = on_host(number, BIN / "ray", "start", *place, *own, *sizes)
                nodes.append(
                    subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
                )
                _until_joined(address, number + 1, time.time() + wait)
        yield address, Path(scratch)
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            node.wait(timeout=60)
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def namespaces_of(run: Path, title: str) -> Iterator[set[str]]:
    """The network namespaces in which processes of the run with this title are seen meanwhile."""
    found: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(2):
            for process in processes(run, title):
                with suppress(OSError):
                    found.add(os.readlink(f"/proc/{process.pid}/ns/net"))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def _until_joined(address: str, count: int, deadline: float) -> None:
    script = f"import ray; ray.init('{address}', log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
    while True:
        command = on_host(0, sys.executable, "-c", script)
        seen = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
        if seen.stdout.strip().endswith(str(count)):
            return
        if time.time() > deadline:
            raise TimeoutError(f"{count} Ray nodes did not come up:\n{seen.stdout}{seen.stderr}")
        time.sleep(1)


def train(overrides: list[str], log: Path, prefix: list[str], environment: dict[str, str]) -> None:
    with open(log, "a") as output:
        done = subprocess.run(
            [*prefix, str(BIN / "cppo"), "train", *overrides, "run.resume=auto"],
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
        )
    if done.returncode != 0:
        raise RuntimeError(f"training failed with {done.returncode}: {log}")


def compare(one: Path, two: Path, steps: int) -> dict:
    """Paired by step: the same problems, the same seeds."""
    rewards = [[read_metrics(run)[step]["critic/score/mean"] for step in range(1, steps + 1)] for run in (one, two)]
    difference = np.array(rewards[1]) - np.array(rewards[0])
    half = student.ppf(0.975, steps - 1) * difference.std(ddof=1) / steps**0.5
    low, high = difference.mean() - half, difference.mean() + half
    return {
        "rewards_one_node": rewards[0],
        "rewards_two_nodes": rewards[1],
        "difference": float(difference.mean()),
        "interval_95": [float(low), float(high)],
        "contains_0": bool(low <= 0 <= high),
        "width": float(high - low),
    }


def overrides_of(folder: Path, assets: Path, name: str, steps: int) -> list[str]:
    return [
        *("platform=cpu", "recipe=quickstart", f"quickstart.assets={assets}", f"run.dir={folder}", f"run.name={name}"),
        *(f"trainer.total_training_steps={steps}", "trainer.test_freq=-1", "trainer.val_before_train=false"),
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=32",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--assets", type=Path, required=True, help="made by python -m cppo_verl.quickstart")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    if reason := refusal():
        parser.error(reason)
    folder, assets = options.folder.absolute(), options.assets.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    one, two = folder / "one-node", folder / "two-nodes"
    if len(read_metrics(two)) < options.steps:
        with two_hosts(), ray_cluster(folder / "ray.log") as (address, _):
            split = [f"ray_kwargs.ray_init.address={address}", "trainer.nnodes=2", "trainer.n_gpus_per_node=1"]
            settings = [*overrides_of(folder, assets, two.name, options.steps), *split]
            train(settings, folder / "two-nodes.log", on_host(0), ENVIRONMENT)
    if len(read_metrics(one)) < options.steps:
        settings = [*overrides_of(folder, assets, one.name, options.steps), "trainer.n_gpus_per_node=2"]
        train(settings, folder / "one-node.log", [], {})
    result = {"date": time.strftime("%Y-%m-%d"), "steps": options.steps, **compare(one, two, options.steps)}
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0 if result["contains_0"] and result["width"] < 0.1 else 1


if __name__ == "__main__":
    sys.exit(main())
