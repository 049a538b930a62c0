"""The training process: ``python -m cppo_verl.adapters.driver.main RUN_FOLDER`` (``cppo train`` starts it).

Reads RUN_FOLDER/config.yaml, which the command line has composed and checked, starts Ray and runs the trainer.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config

from cppo_verl.adapters import compat
from cppo_verl.adapters.cpu import verl_platform
from cppo_verl.adapters.driver import deaths
from cppo_verl.run import confidential, lifeline, progress
from cppo_verl.run.folder import read_config
from cppo_verl.run.log import RunLog
from cppo_verl.run.machine import OWN_RAY, joined_cluster

# Variables of this process that the workers of a running cluster are to have as well, by how their names begin.
_FORWARDED = (
    *("CPPO_", "VERL_", "VLLM_", "TQ_", "OMP_", "KMP_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "NCCL_", "GLOO_"),
    *("CUDA_DEVICE_MAX", "RAY_ACCEL", "RAY_DEDUP", "RAY_USAGE", "PYTHONUNBUFFERED", "HYDRA_", "WANDB_", "TENSORBOARD_"),
)
# Of one node only.
_LOCAL = ("VLLM_HOST_IP",)


@ray.remote
class TaskRunner(TaskRunnerV1.__ray_metadata__.modified_class):
    """verl's V1 task runner with our trainer of the mode."""

    trainer_class: type | None = None  # of the mode; imported in the runner's own process

    def run(self, config: DictConfig) -> None:
        import transfer_queue as tq
        from verl.utils.logging_utils import configure_verl_logging

        from cppo_verl.adapters.driver import resampling
        from cppo_verl.adapters.driver.modes import trainer_of
        from cppo_verl.adapters.rollout import registration

        progress.report("driver")  # in a process of its own on GPUs
        registration.register()
        resampling.install()
        configure_verl_logging()
        config.transfer_queue.enable = True
        OmegaConf.resolve(config)
        self.config = config
        RunLog(f"{config.run.dir}/{config.run.name}").event("starting workers")
        succeeded = False
        try:
            self.trainer = (self.trainer_class or trainer_of(config))(config=config)
            self.trainer.init()
            self.init_agent_loop_manager()
            self.fit(config)
            succeeded = True
        finally:
            try:
                tracking = getattr(self.trainer, "logger", None)
                if tracking is not None:
                    tracking.finish(exit_code=0 if succeeded else 1)
            finally:
                tq.close()

    def init_agent_loop_manager(self) -> None:
        if self.trainer.agent_loops is None:
            super().init_agent_loop_manager()
        else:
            self.agent_loop_manager = self.trainer.agent_loops
            self.agent_loop_manager.connect(self.trainer.get_llm_client())

    def fit(self, config: DictConfig) -> None:
        workers = enumerate(self.agent_loop_manager.agent_loop_workers)
        loops = {f"agent loop worker {number}": worker for number, worker in workers}
        with deaths.ending_the_run({**deaths.queue_actors(config), **loops}):
            self.trainer.fit(self.agent_loop_manager)


class InThisProcess:
    """Stands for an actor class in verl's ``run_ppo``: its one method, ``run``, is called right here.

    An actor's own process would import all of verl and vLLM once more before anything starts. On an accelerator it is
    worth that: Ray hides the devices from an actor that asks for none.
    """

    def __init__(self, actor_class: Any) -> None:
        self._class = actor_class.__ray_metadata__.modified_class
        self.run = self

    def remote(self, *arguments: Any) -> Any:
        """First verl makes the actor, then it calls its method, whose result it waits for."""
        return ray.put(self._class().run(*arguments)) if arguments else self


def train(config: DictConfig, runner: Any = TaskRunner) -> None:
    """Run one training to its end. Errors of workers arrive here as Ray's task errors."""
    compat.check()
    if config.trainer.device == "cpu" and not verl_platform.active():
        raise RuntimeError("trainer.device=cpu needs VERL_PLATFORM=cpu in the environment; cppo train sets it")
    private = [str(name) for name in config.run.private_variables or ()]
    config.ray_kwargs.ray_init = ray_settings(config.ray_kwargs.ray_init, os.environ, private)
    validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    joins = config.ray_kwargs.ray_init.address != OWN_RAY
    handed = {name: os.environ[name] for name in private if joins and name in os.environ}
    with confidential.shared(Path(config.run.dir) / str(config.run.name), handed):
        run_ppo(config, task_runner_class=InThisProcess(runner) if config.trainer.device == "cpu" else runner)


def ray_settings(settings: DictConfig, environment: Mapping[str, str], private: Sequence[str] = ()) -> DictConfig:
    """Arguments of ``ray.init``: for a Ray of this run's own, or for a cluster that is running already.

    Processes of an own Ray inherit this one's environment. Those of a running cluster have its nodes': what the run
    needs is sent along, but for secrets, and what would size a new Ray is left out, which ``ray.init`` refuses there.

    Args:
        private: variables that workers read from a file of the run, whatever their names.
    """
    address = joined_cluster(settings.get("address"), environment)
    if address is None:
        # Without "local" Ray joins any cluster that it finds on this machine.
        return _merged(settings, {"address": OWN_RAY})
    forwarded = {
        name: value
        for name, value in environment.items()
        if name.startswith(_FORWARDED) and name not in (*_LOCAL, *private) and not confidential.is_secret(name, value)
    }
    sizes = ("num_cpus", "num_gpus", "resources", "object_store_memory", "include_dashboard")
    kept = {name: value for name, value in settings.items() if name not in sizes}
    hook = {"worker_process_setup_hook": confidential.RECEIVE} if any(name in environment for name in private) else {}
    return _merged({"runtime_env": {"env_vars": forwarded, **hook}}, kept, {"address": address})


def _merged(*settings: Any) -> DictConfig:
    merged = OmegaConf.merge(*settings)
    assert isinstance(merged, DictConfig)
    return merged


def run(folder: str, runner: Any = TaskRunner) -> None:
    """Train what RUN_FOLDER/config.yaml says; the outcome is the last event of the folder."""
    lifeline.heed()
    progress.report("driver")
    log = RunLog(folder)
    log.event("starting Ray")
    with log.outcome():
        train(read_config(folder), runner)


if __name__ == "__main__":
    run(sys.argv[1])
    lifeline.leave()
