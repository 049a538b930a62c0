"""The training process: ``python -m cppo_verl.adapters.main RUN_FOLDER`` (``cppo train`` starts it).

Reads RUN_FOLDER/config.yaml, which the command line has composed and checked, starts Ray and runs the trainer.
"""

import sys
from pathlib import Path
from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config

from cppo_verl import lifeline
from cppo_verl.adapters import compat, cpu_platform
from cppo_verl.run_log import RunLog


@ray.remote
class TaskRunner(TaskRunnerV1.__ray_metadata__.modified_class):
    """verl's V1 task runner with our trainer; the trainer mode stays "sync", which verl compares by name."""

    trainer_class: type | None = None  # TrustRegionTrainer; imported in the runner's own process

    def run(self, config: DictConfig) -> None:
        import transfer_queue as tq
        from verl.utils.logging_utils import configure_verl_logging

        from cppo_verl.adapters import rollout_server
        from cppo_verl.adapters.trainer import TrustRegionTrainer

        rollout_server.register()
        configure_verl_logging()
        config.transfer_queue.enable = True
        OmegaConf.resolve(config)
        self.config = config
        RunLog(f"{config.run.dir}/{config.run.name}").event("starting workers")
        tq.init(config.transfer_queue)
        succeeded = False
        try:
            self.trainer = (self.trainer_class or TrustRegionTrainer)(config=config)
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

    def fit(self, config: DictConfig) -> None:
        self.trainer.fit(self.agent_loop_manager)


def train(config: DictConfig, runner: Any = TaskRunner) -> None:
    """Run one training to its end. Errors of workers arrive here as Ray's task errors."""
    compat.check()
    if config.trainer.device == "cpu" and not cpu_platform.active():
        raise RuntimeError("trainer.device=cpu needs VERL_PLATFORM=cpu in the environment; cppo train sets it")
    validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    run_ppo(config, task_runner_class=runner)


def run(folder: str, runner: Any = TaskRunner) -> None:
    """Train what RUN_FOLDER/config.yaml says; the outcome is the last event of the folder."""
    lifeline.heed()
    log = RunLog(folder)
    log.event("starting Ray")
    try:
        train(OmegaConf.load(Path(folder) / "config.yaml"), runner)
    except BaseException as error:
        cause: Any = getattr(error, "cause", None) or error
        log.event("failed", error=type(cause).__name__, message=str(cause))
        raise
    log.event("finished")


if __name__ == "__main__":
    run(sys.argv[1])
