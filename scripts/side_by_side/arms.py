"""The four arms of the comparison: the command of each, all from one composed configuration of the quickstart."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cppo_verl.config.compose import compose, config_dir

ROOT = Path(__file__).parents[2]
OURS = ("cppo", "grpo")
ARMS = (*OURS, "stock", "trl")

# What stock verl is told beside what it needs on a machine without an accelerator (configs/platform/cpu.yaml): the
# task, the model and what the arms are to have in common. Everything else stays verl's default.
_TOLD = (
    *(f"data.{key}" for key in ("train_files", "val_files", "train_batch_size", "seed")),
    *(f"data.{key}" for key in ("max_prompt_length", "max_response_length", "filter_overlong_prompts")),
    "algorithm.adv_estimator",
    "actor_rollout_ref.model.path",
    *(f"actor_rollout_ref.actor.{key}" for key in ("ppo_mini_batch_size", "ppo_micro_batch_size_per_gpu", "optim.lr")),
    *(f"actor_rollout_ref.rollout.{key}" for key in ("name", "n", "temperature", "top_p", "top_k", "seed")),
    *(f"actor_rollout_ref.rollout.{key}" for key in ("log_prob_micro_batch_size_per_gpu", "max_model_len")),
    *(f"actor_rollout_ref.rollout.{key}" for key in ("max_num_seqs", "val_kwargs.do_sample", "val_kwargs.n")),
    *(f"actor_rollout_ref.rollout.val_kwargs.{key}" for key in ("temperature", "top_p")),
    *(f"reward.custom_reward_function.{key}" for key in ("path", "name")),
    *(f"trainer.{key}" for key in ("total_training_steps", "total_epochs", "val_before_train", "test_freq")),
    *(f"trainer.{key}" for key in ("save_freq", "resume_mode")),
)


def our_settings(assets: Path, folder: Path, seed: int, steps: int, evaluate_every: int) -> list[str]:
    """Overrides of ``cppo train`` for both of our arms; the others are derived from what they compose to."""
    return [
        "recipe=quickstart",
        "platform=cpu",
        f"quickstart.assets='{assets}'",
        f"run.dir='{folder}'",
        f"run.seed={seed}",
        "run.dump_steps=[]",
        f"trainer.total_training_steps={steps}",
        f"trainer.test_freq={evaluate_every}",
        "trainer.save_freq=-1",
    ]


def command(arm: str, settings: list[str], folder: Path, trl_python: str) -> list[str]:
    """What is run for ``arm``, which writes to ``folder``/``arm``."""
    if arm in OURS:
        method = [] if arm == "cppo" else ["method=grpo"]
        return [str(Path(sys.executable).parent / "cppo"), "train", *settings, *method, f"run.name={arm}"]
    config = compose(settings)
    if arm == "stock":
        return [sys.executable, "-m", "verl.trainer.main_ppo", *stock_overrides(config)]
    given = json.dumps(trl_settings(config, folder / arm))
    return [trl_python, str(ROOT / "scripts/side_by_side/trl_grpo.py"), given]


def stock_overrides(config: DictConfig) -> list[str]:
    """Overrides of ``python -m verl.trainer.main_ppo``."""
    composed = dict(_leaves(OmegaConf.to_container(config, resolve=True)))
    told = {key: value for key, value in composed.items() if key in _TOLD}
    without_accelerator = OmegaConf.to_container(OmegaConf.load(config_dir() / "platform" / "cpu.yaml"))
    needed = {key: composed[key] for key, _ in _leaves(without_accelerator)}
    own = {
        "ray_kwargs.ray_init.address": "local",
        "trainer.logger": ["console", "file"],
        "trainer.project_name": "side_by_side",
        "trainer.experiment_name": "stock",
    }
    return [f"++{key}={_as_override(value)}" for key, value in {**needed, **told, **own}.items()]


def trl_settings(config: DictConfig, folder: Path) -> dict[str, Any]:
    """What ``trl_grpo.py`` reads: where model and data are, and the arguments of TRL's GRPOConfig."""
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    updates = config.data.train_batch_size // actor.ppo_mini_batch_size
    return {
        "model": config.actor_rollout_ref.model.path,
        "train": config.data.train_files,
        "heldout": config.data.val_files,
        "samples": rollout.val_kwargs.n,
        "evaluate_every": config.trainer.test_freq,
        "updates": updates,
        "config": {
            "output_dir": str(folder),
            # One generation batch, cut into minibatches of as many prompts as ours, one optimizer update each.
            "per_device_train_batch_size": actor.ppo_mini_batch_size * rollout.n,
            "gradient_accumulation_steps": 1,
            "steps_per_generation": updates,
            "num_generations": rollout.n,
            "max_completion_length": config.data.max_response_length,
            "max_steps": config.trainer.total_training_steps * updates,
            "learning_rate": actor.optim.lr,
            "lr_scheduler_type": actor.optim.lr_scheduler_type,
            "adam_beta1": actor.optim.betas[0],
            "adam_beta2": actor.optim.betas[1],
            "weight_decay": actor.optim.weight_decay,
            "max_grad_norm": actor.optim.clip_grad,
            "temperature": rollout.temperature,
            "top_p": rollout.top_p,
            "top_k": 0,  # verl's -1: no truncation
            "epsilon": actor.clip_ratio_low,
            "beta": 0.0,
            # The mean over the tokens of a minibatch, as verl's token-mean; TRL's default, dapo, divides by the mean
            # number of tokens of the generation batch's minibatches instead.
            "loss_type": "bnpo",
            "seed": config.run.seed,
            # As configs/platform/cpu.yaml has it for verl: float32, no recomputed activations.
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "model_init_kwargs": {"dtype": "float32"},
            # A line of metrics for each generation batch.
            "logging_steps": updates,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        },
    }


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _as_override(value: Any) -> str:
    """In Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_as_override, value))}]"
    return f"'{value}'" if isinstance(value, str) else str(value)
