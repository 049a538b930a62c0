"""What only a process of its own can tell: ``python -m cppo_verl.doctor.probe cuda|plugin|ray FOLDER [run]``.

``cppo doctor`` starts it with the environment of a training process, and kills it when a phase takes longer than
announced. Reads FOLDER/config.yaml and appends to FOLDER/events.jsonl; ``run``: the configuration is to be trained.
"""

import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from cppo_verl.run import lifeline
from cppo_verl.run.folder import read_config
from cppo_verl.run.log import RunLog
from cppo_verl.run.machine import joined_cluster

_REINSTALL = "reinstall cppo_verl, whose entry points are missing or switched off: python -m pip install --no-deps -e ."
_SAME_EVERYWHERE = (
    "install the same packages on every node (scripts/setup.sh there, or one image), or send this checkout along: "
    "ray job submit --working-dir . -- cppo train ..."
)
_CLUSTER = "ray start --head on one node, ray start --address=HEAD:6379 on the others, ray_kwargs.ray_init.address=auto"
_NO_IMPORT = "does not import"


class Findings:
    """Writes findings and announcements for the process that waits."""

    def __init__(self, folder: str) -> None:
        self._log = RunLog(folder)

    def waiting(self, what: str, limit: float, remedy: str) -> None:
        """``what`` may take ``limit`` seconds from now; ``remedy``: for when it takes longer or ends the process."""
        self._log.event("waiting", what=what, limit=limit, remedy=remedy)

    def ok(self, found: str) -> None:
        self._finding("ok", found, None)

    def warn(self, found: str, remedy: str) -> None:
        self._finding("warn", found, remedy)

    def fail(self, found: str, remedy: str) -> None:
        self._finding("FAIL", found, remedy)

    def _finding(self, status: str, found: str, remedy: str | None) -> None:
        self._log.event("finding", status=status, found=found, remedy=remedy)


def cuda(config: DictConfig, described: bool, findings: Findings) -> None:
    """torch's CUDA against the driver, one small kernel on every GPU, and the number of GPUs that the run wants."""
    findings.waiting("torch and the CUDA driver", 60, "look for a hanging GPU: nvidia-smi, dmesg | grep -i xid")
    import torch

    if torch.version.cuda is None:
        findings.fail(f"torch {torch.__version__} is built without CUDA", "VENV=.venv-gpu scripts/setup.sh gpu")
        return
    built, driver = torch.version.cuda, _driver_cuda()
    if not torch.cuda.is_available():
        findings.fail(
            f"torch {torch.__version__} for CUDA {built} finds no usable GPU; the driver takes CUDA up to {driver}",
            f"a driver for CUDA {built} or newer; in a container --gpus all; see CUDA_VISIBLE_DEVICES",
        )
        return
    count = torch.cuda.device_count()
    for number in range(count):
        torch.ones(8, device=f"cuda:{number}").sum().item()
        capability = torch.cuda.get_device_capability(number)
        if capability < (8, 0):
            name = torch.cuda.get_device_name(number)
            findings.warn(
                f"cuda:{number} ({name}) has compute capability {capability[0]}.{capability[1]}; bfloat16 needs 8.0",
                "use a GPU of the Ampere generation or newer",
            )
    findings.ok(f"torch {torch.__version__} for CUDA {built} computes on {count} GPUs; the driver takes up to {driver}")
    trainer = config.trainer
    if described and not _address(config) and (trainer.nnodes > 1 or trainer.n_gpus_per_node > count):
        findings.fail(
            f"trainer.nnodes={trainer.nnodes} x trainer.n_gpus_per_node={trainer.n_gpus_per_node} GPUs are wanted, "
            f"{count} are visible here",
            _CLUSTER if trainer.nnodes > 1 else f"trainer.n_gpus_per_node={count} (see also CUDA_VISIBLE_DEVICES)",
        )


def _driver_cuda() -> str:
    """The newest CUDA version that the driver takes."""
    number = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return "none: there is no libcuda.so.1"
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def plugin(config: DictConfig, described: bool, findings: Findings) -> None:
    """Each place where cppo_verl enters verl and vLLM, seen in a process that has imported both."""
    remedy = f"see what `{sys.executable} -c 'import verl'` says; unset VERL_PLATFORM VERL_USE_EXTERNAL_PLUGINS"
    findings.waiting("verl to be imported", 120, remedy)
    import verl

    findings.ok(f"verl {verl.__version__} is imported from {Path(verl.__file__).parent}")
    findings.waiting("vLLM and the seams", 120, f"see what `{sys.executable} -c 'import vllm.platforms'` says")
    for name, seam, remedy in _SEAMS:
        try:
            findings.ok(f"{name}: {seam(config)}")
        except Exception as error:
            findings.fail(f"{name}: {_short(error)}", remedy)


def _entry_point(config: DictConfig) -> str:
    if "cppo_verl.adapters.cpu.verl_platform" not in sys.modules:
        listed = [point.name for point in entry_points(group="verl.plugins")]
        raise RuntimeError(f"verl did not load cppo_cpu_platform (entry points of verl.plugins: {listed})")
    return "verl loaded cppo_cpu_platform"


def _platform(config: DictConfig) -> str:
    from verl.plugin.platform import get_platform

    found = get_platform()
    if found.device_name != config.trainer.device:
        raise RuntimeError(f"verl chose {type(found).__name__}, but trainer.device={config.trainer.device}")
    return type(found).__name__


def _signatures(config: DictConfig) -> str:
    from cppo_verl.adapters import compat

    compat.check()
    return "as in the versions that cppo_verl was written for"


def _rollout_server(config: DictConfig) -> str:
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    from cppo_verl.adapters.rollout import registration, server

    registration.register()
    found = RolloutReplicaRegistry.get(config.actor_rollout_ref.rollout.name)
    if found is not server.TopKReplica:
        raise RuntimeError(f"rollout.name={config.actor_rollout_ref.rollout.name} means {found.__name__}, not ours")
    return found.__name__


def _agent_loop(config: DictConfig) -> str:
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry

    from cppo_verl.adapters.columns import TOOL_LOOP
    from cppo_verl.adapters.rollout.agent_loop import TrustRegionAgentLoop
    from cppo_verl.adapters.rollout.tool_loop import TrustRegionToolLoop

    name = config.actor_rollout_ref.rollout.agent.default_agent_loop
    ours = TrustRegionToolLoop if name == TOOL_LOOP else TrustRegionAgentLoop
    wanted, found = f"{ours.__module__}.{ours.__name__}", _agent_loop_registry.get(name)
    if found is None or found["_target_"] != wanted:
        raise RuntimeError(f"{name} is {found} in verl's registry, not {wanted}")
    return f"{name} is {ours.__name__}"


def _policy_loss(config: DictConfig) -> str:
    from verl.utils.config import omega_conf_to_dataclass

    from cppo_verl.adapters.actor.loss import TrustRegionConfig

    built = omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)
    if not isinstance(built, TrustRegionConfig):
        raise RuntimeError(f"actor.policy_loss builds a {type(built).__name__}, not TrustRegionConfig")
    return f"TrustRegionConfig with {built.method.name} over {built.divergence['name']}"


def _vllm_platform(config: DictConfig) -> str:
    from vllm.platforms import current_platform

    if current_platform.is_cpu() != (config.trainer.device == "cpu"):
        raise RuntimeError(f"vLLM chose {type(current_platform).__name__}, but trainer.device={config.trainer.device}")
    return type(current_platform).__name__


def _vllm_plugin(config: DictConfig) -> str:
    import vllm.model_executor.layers.utils as layers
    from vllm.plugins import load_general_plugins

    listed = [point.name for point in entry_points(group="vllm.general_plugins")]
    if "cppo_vllm_cpu" not in listed:
        raise RuntimeError(f"cppo_vllm_cpu is not among the entry points of vllm.general_plugins: {listed}")
    load_general_plugins()
    kept = layers.dispatch_cpu_unquantized_gemm.__module__ == "cppo_verl.adapters.cpu.vllm_plugin"
    if config.trainer.device == "cpu" and not kept:
        raise RuntimeError("vLLM did not load cppo_vllm_cpu: the first weight sync would fail")
    return "cppo_vllm_cpu keeps the weights updatable" if kept else "cppo_vllm_cpu is listed, for CPUs only"


_SETUP = "scripts/setup.sh"
_REPORT = "undo local changes to verl, vLLM and cppo_verl: scripts/setup.sh in a fresh checkout"
_SEAMS: tuple[tuple[str, Callable[[DictConfig], str], str], ...] = (
    ("entry point", _entry_point, f"unset VERL_USE_EXTERNAL_PLUGINS; {_REINSTALL}"),
    ("platform", _platform, "see the entry point above; unset VERL_PLATFORM, and choose platform=cpu or platform=gpu"),
    ("signatures", _signatures, _SETUP),
    ("rollout server", _rollout_server, _REPORT),
    ("agent loop", _agent_loop, _REPORT),
    ("policy loss", _policy_loss, "cppo train --dry-run names the setting"),
    ("vLLM platform", _vllm_platform, "a build of vLLM for another platform: see what was said of the stack"),
    ("vLLM plug-in", _vllm_plugin, f"unset VLLM_PLUGINS; {_REINSTALL}"),
)


def ray_cluster(config: DictConfig, described: bool, findings: Findings) -> None:
    """A task on every node of the cluster that a run would join, or of a small Ray that is started for this."""
    findings.waiting("verl and Ray to be imported", 120, f"see what `{sys.executable} -c 'import verl, ray'` says")
    import ray

    from cppo_verl.adapters.driver.main import ray_settings

    settings: dict[str, Any] = OmegaConf.to_container(ray_settings(config.ray_kwargs.ray_init, os.environ))  # type: ignore[assignment]
    address, own = settings["address"], not _address(config)
    if own:
        settings |= {"num_cpus": 2, "object_store_memory": 100 * 2**20, "include_dashboard": False}
        remedy = (
            "end what is left of an earlier Ray (ray stop --force ends every one of yours), then look at free memory"
        )
    else:
        remedy = (
            f"ray status --address={address}; same Python and Ray there? With a token: RAY_AUTH_MODE=token and "
            "the same RAY_AUTH_TOKEN on every node and here (docs/cluster.md)"
        )
    findings.waiting("a small Ray to start" if own else f"the Ray cluster at {address}", 60, remedy)
    started = time.monotonic()
    try:
        ray.init(**{**settings, "log_to_driver": False})
    except Exception as error:
        findings.fail(f"{'Ray does not start' if own else f'no connection to {address}'}: {_short(error)}", remedy)
        return
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        where = f"started here in {time.monotonic() - started:.0f} s" if own else f"the cluster at {address}"
        total, free = ray.cluster_resources(), ray.available_resources()
        findings.ok(f"Ray {ray.__version__}, {where}: {_nodes(len(nodes))}, {total.get('CPU', 0):g} CPU slots, "
                  f"{total.get('GPU', 0):g} GPU slots")  # fmt: skip
        if free.get("GPU", 0) < total.get("GPU", 0):
            findings.warn(
                f"{total['GPU'] - free.get('GPU', 0):g} of its {total['GPU']:g} GPUs are in use",
                "wait for them, or see who has them: ray status, ray list actors",
            )
        trainer = config.trainer
        if described and not own and (short := shortage(nodes, trainer.nnodes, trainer.n_gpus_per_node)):
            findings.fail(short, "start the missing nodes, or set trainer.nnodes and trainer.n_gpus_per_node")
        _compare_nodes(nodes, _local_paths(config), findings)
    finally:
        ray.shutdown()


def shortage(nodes: list[dict[str, Any]], wanted: int, gpus: int) -> str | None:
    """What is missing when ``wanted`` nodes of ``gpus`` GPUs are needed, or None; ``nodes`` as in ``ray.nodes()``."""
    have = [node["Resources"].get("GPU", 0) for node in nodes]
    if sum(count >= gpus for count in have) >= wanted:
        return None
    listed = ", ".join(f"{count:g}" for count in have)
    return f"trainer.nnodes={wanted} nodes with trainer.n_gpus_per_node={gpus} GPUs each are wanted; there are {listed}"


def _compare_nodes(nodes: list[dict[str, Any]], paths: list[str], findings: Findings) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    limit = 180
    slow = "look at that node: memory, ray status, the raylet's log under /tmp/ray/session_latest/logs"
    findings.waiting(f"a task on {_nodes(len(nodes))} that imports verl and cppo_verl", limit + 20, slow)
    started, task = time.monotonic(), ray.remote(num_cpus=0)(node_facts)
    pending = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(paths): node
        for node in nodes
    }
    here = node_facts(paths)
    ray.wait(list(pending), num_returns=len(pending), timeout=limit)
    for reference, node in pending.items():
        name = f"node {node['NodeManagerAddress']}"
        try:
            there = ray.get(reference, timeout=0)
        except Exception as error:
            findings.fail(f"{name}: the task did not end within {limit} s or failed: {_short(error)}", slow)
            continue
        different = list(differences(here, there))
        if different:
            findings.fail(f"{name}: {'; '.join(different)}", _SAME_EVERYWHERE)
        else:
            names = ("Python", "verl", "vllm", "torch", "cppo_verl")
            versions = ", ".join(f"{key} {there[key]}" for key in names)
            findings.ok(f"{name}: a worker has {versions} ({time.monotonic() - started:.0f} s)")


def differences(here: Mapping[str, str], there: Mapping[str, str]) -> Iterator[str]:
    """What a node has otherwise than the machine of ``cppo train``, or cannot import; both as in :func:`node_facts`."""
    for name, value in there.items():
        if value != here[name] or value.startswith(_NO_IMPORT):
            yield f"{name} {value}" + ("" if value == here[name] else f" (here: {here[name]})")


def node_facts(paths: list[str]) -> dict[str, str]:
    """Versions, or why an import fails; a digest of cppo_verl's sources; whether ``paths`` are there.

    Runs as a Ray task, sent by value, where cppo_verl may be missing: it imports all that it needs itself.
    """
    import hashlib
    import importlib
    import os
    import platform
    from importlib.metadata import version
    from pathlib import Path

    found = {"Python": platform.python_version()}
    for name in ("ray", "torch", "vllm", "verl", "cppo_verl"):
        try:
            module = importlib.import_module(name)
            found[name] = getattr(module, "__version__", None) or version(name)
        except Exception as error:
            found[name] = f"{_NO_IMPORT}: {type(error).__name__}: {error}"
    try:
        folder = Path(importlib.import_module("cppo_verl").__file__ or "").parent
        digest = hashlib.sha256()
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
        found["cppo_verl's sources"] = digest.hexdigest()[:12]
    except Exception as error:
        found["cppo_verl's sources"] = f"none ({type(error).__name__})"
    return {**found, **{path: "is there" if os.path.exists(path) else "is missing" for path in paths}}


def _local_paths(config: DictConfig) -> list[str]:
    """Model and data of the run, which every node reads under the same path."""
    values = []
    for value in (config.actor_rollout_ref.model.path, config.data.train_files, config.data.val_files):
        values += list(value) if isinstance(value, ListConfig) else [value]
    return [path for path in values if path and os.path.isabs(path)]


def _address(config: DictConfig) -> str | None:
    """The running cluster that a run would join."""
    return joined_cluster(config.ray_kwargs.ray_init.get("address"))


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def main(what: str, folder: str, *subject: str) -> None:
    lifeline.heed()
    {"cuda": cuda, "plugin": plugin, "ray": ray_cluster}[what](
        read_config(folder), subject == ("run",), Findings(folder)
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
