"""One live stack (verl + Ray + vLLM) on which methods are swapped in place: ``python stack.py RUN_FOLDER``.

RUN_FOLDER/config.yaml is what ``cppo train`` would have written; stages.yaml lists, for each stage, its name, number of
steps and the nodes of the configuration that change. One JSON line per stage goes to stages.jsonl.
"""

import json
import subprocess
import sys
import uuid
from pathlib import Path

from omegaconf import OmegaConf

from cppo_verl.config import compose as configuration
from cppo_verl.config.validate import validate
from cppo_verl.run.log import read_lines
from cppo_verl.run.supervisor import end_run
from cppo_verl.training.launcher import environment, prepare_folder

# What a stage may change on a running stack.
SWAPPED = ("method", "divergence", "run", "actor_rollout_ref.actor")


def run_stages(base: list[str], stages: list[tuple[str, list[str], int]], timeout: float) -> dict[str, list[dict]]:
    """Compose ``base``, start one stack, train each (name, overrides, steps); returns each stage's metrics by step."""
    config = configuration.compose(base)
    validate(config)
    folder = configuration.run_folder(config)
    log_file = prepare_folder(config, folder, ["tests/live/stack.py"])
    plan = []
    for name, overrides, steps in stages:
        changed = configuration.compose([*base, *overrides])
        nodes = {key: OmegaConf.to_container(OmegaConf.select(changed, key), resolve=True) for key in SWAPPED}
        plan.append({"name": name, "steps": steps, "nodes": nodes})
    OmegaConf.save(OmegaConf.create({"stages": plan}), folder / "stages.yaml")
    tag = uuid.uuid4().hex
    with open(log_file, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdout=log,
            stderr=log,
            env=environment(config, tag),
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=timeout)
        finally:
            end_run(process, tag, patience=5)
    if status != 0:
        tail = "\n".join(log_file.read_text(errors="replace").splitlines()[-40:])
        raise AssertionError(f"the live stack ended with status {status}; the end of {log_file}:\n{tail}")
    return {line["name"]: line["metrics"] for line in read_lines(folder / "stages.jsonl")}


def _main(folder: Path) -> None:
    import ray
    from verl.utils.config import omega_conf_to_dataclass

    from cppo_verl.adapters.actor.loss import TrustRegionLoss
    from cppo_verl.adapters.driver.main import TaskRunner, train
    from cppo_verl.run.log import read_metrics

    stages = OmegaConf.load(folder / "stages.yaml").stages

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
            trainer.actor_rollout_wg.set_loss_fn(TrustRegionLoss(actor))
            trainer._init_dump_executor()
            first = trainer.global_steps + 1
            trainer.total_training_steps = trainer.global_steps + stage.steps
            trainer.fit(self.agent_loop_manager)
            trainer.global_steps -= 1  # fit() counts on after its last step
            lines = [line for step, line in read_metrics(folder).items() if step >= first]
            with open(folder / "stages.jsonl", "a") as file:
                file.write(json.dumps({"name": stage.name, "metrics": lines}) + "\n")

    train(OmegaConf.load(folder / "config.yaml"), ray.remote(StagedRunner))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
