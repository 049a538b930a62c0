"""One live stack (verl + Ray + vLLM) on which methods are swapped in place, started as ``cppo train`` starts its own.

``python stack.py KEY=VALUE...`` launches a run whose training process is this module: it trains, one after the other,
the stages that the file in STAGES lists (name, number of steps, the nodes of the configuration that change). One JSON
line per stage goes to stages.jsonl in the run folder.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import OmegaConf

from cppo_verl.config import compose as configuration
from cppo_verl.config.validate import validate
from cppo_verl.run.folder import read_config
from cppo_verl.run.log import RunLog, read_lines, read_metrics
from cppo_verl.training.launcher import launch

# Names the file with the stages, in the environment of every process of the stack.
STAGES = "CPPO_TEST_STAGES"
# What a stage may change on a running stack.
SWAPPED = ("method", "divergence", "run", "actor_rollout_ref.actor")


def run_stages(
    base: list[str],
    stages: list[tuple[str, list[str], int]],
    timeout: float,
    prefix: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> tuple[str, dict[str, list[dict]]]:
    """Compose ``base``, start one stack, train each (name, overrides, steps).

    Args:
        prefix: words before the command that launches it.
        variables: more of its environment.

    Returns:
        What the terminal showed, and each stage's metrics by step. Validation, checkpoints, trackers: of the first.
    """
    base = [*base, f"trainer.total_training_steps={sum(steps for *_, steps in stages)}"]
    folder = configuration.run_folder(configuration.compose(base))
    plan = []
    for name, overrides, steps in stages:
        changed = configuration.compose([*base, *overrides])
        nodes = {key: OmegaConf.to_container(OmegaConf.select(changed, key), resolve=True) for key in SWAPPED}
        plan.append({"name": name, "steps": steps, "nodes": nodes})
    file = folder.parent / f"{folder.name}-stages.yaml"
    OmegaConf.save(OmegaConf.create({"stages": plan}), file)
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*prefix, sys.executable, __file__, *base],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, STAGES: str(file), "PYTHONPATH": path, **(variables or {})},
    )
    assert done.returncode == 0, f"the live stack ended with status {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout, {line["name"]: line["metrics"] for line in read_lines(folder / "stages.jsonl")}


def train_stages(folder: Path) -> None:
    """The training process."""
    import ray
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.utils.losses import ppo_loss

    from cppo_verl.adapters.actor.loss import TrustRegionLoss
    from cppo_verl.adapters.driver.main import TaskRunner, train

    stages = OmegaConf.load(os.environ[STAGES]).stages

    class VerlsLoss(TrustRegionLoss):
        """verl's own loss function, with what our worker asks of a loss besides; it collects no statistics."""

        needs_logits = False

        def __call__(self, model_output=None, data=None, dp_group=None, **_):
            return ppo_loss(self.config, model_output, data, dp_group)

    class StagedRunner(TaskRunner.__ray_metadata__.modified_class):
        """Runs every stage with the trainer's own fit(), between which the loss function is replaced."""

        def fit(self, config):
            for stage in stages:
                self.train(stage)

        def train(self, stage):
            trainer = self.trainer
            for key, node in stage.nodes.items():
                OmegaConf.update(trainer.config, key, node, merge=False, force_add=True)
            trainer.run = trainer.config.run
            actor = omega_conf_to_dataclass(trainer.config.actor_rollout_ref.actor)
            # A stage that names a registered loss trains with verl's own loss function.
            registered = actor.policy_loss.loss_mode != "vanilla"
            trainer.actor_rollout_wg.set_loss_fn((VerlsLoss if registered else TrustRegionLoss)(actor))
            trainer._init_dump_executor()
            first = trainer.global_steps + 1
            trainer.total_training_steps = trainer.global_steps + stage.steps
            trainer.fit(self.agent_loop_manager)
            trainer.global_steps -= 1  # fit() counts on after its last step
            # Each fit() makes a tracker; that of the one before ends wandb's run when it goes.
            once = {"val_before_train": False, "test_freq": -1, "save_freq": -1, "logger": ["console"]}
            trainer.config.trainer.update(once)
            lines = [line for step, line in read_metrics(folder).items() if step >= first]
            with open(folder / "stages.jsonl", "a") as file:
                file.write(json.dumps({"name": stage.name, "metrics": lines}) + "\n")

    log = RunLog(folder)
    log.event("starting Ray")
    with log.outcome():
        train(read_config(folder), ray.remote(StagedRunner))


def main(arguments: list[str]) -> int:
    """A run folder: train in it. Overrides: launch a run."""
    if len(arguments) == 1 and (Path(arguments[0]) / "config.yaml").exists():
        train_stages(Path(arguments[0]))
        return 0
    config = configuration.compose(arguments)
    validate(config)
    return launch(config, ["tests/live/stack.py", *arguments], module="stack")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
