"""Whether the run can start or go on: its folder, its checkpoints, its loggers."""

import netrc
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf

from cppo_verl import retention
from cppo_verl.config import run_folder
from cppo_verl.validation.files import Absent
from cppo_verl.validation.settings import not_positive


def check_run(config: DictConfig) -> Iterator[str]:
    """A new name, or a run that goes on as the experiment it was."""
    name, folder = str(config.run.name), run_folder(config)
    if "/" in name or name in ("", ".", ".."):
        yield f"run.name={name}: a plain folder name is needed"
    elif config.run.resume not in (True, False):
        yield f"run.resume={config.run.resume}: use true, false or auto"
    elif not config.run.resume and _holds_a_run(folder):
        yield f"run.name={name} is in use ({folder}): choose another name, or continue it with run.resume=true"
    elif config.run.resume and not (folder / "config.yaml").exists():
        yield f"run.resume=true, but there is no run {folder}: give the run.name (and run.dir) of the run to continue"
    elif config.run.resume:
        yield from _changed_since(folder / "config.yaml", config)


def _holds_a_run(folder: Path) -> bool:
    """Not where its very first file could not be written."""
    if not folder.exists():
        return False
    return any(path.name not in (".lock", "logs") and path.suffix != ".tmp" for path in folder.iterdir())


def _changed_since(stored_file: Path, config: DictConfig) -> Iterator[str]:
    """What makes a run another experiment must be the same when it goes on."""
    stored = OmegaConf.load(stored_file)
    for key in ("method", "divergence", "run.seed", "actor_rollout_ref.model.path", "data.train_batch_size"):
        before, now = OmegaConf.select(stored, key), OmegaConf.select(config, key)
        if isinstance(now, DictConfig):
            now = OmegaConf.create(OmegaConf.to_container(now, resolve=True))
        if before != now:
            yield f"run.resume=true: {key} was {before} in this run and is {now} now; repeat the run's own settings"


def check_checkpoints(config: DictConfig) -> Iterator[str]:
    """That a run can be resumed from what it will write, and from what it is given."""
    keep, trainer = config.trainer.max_actor_ckpt_to_keep, config.trainer
    if keep is not None and not_positive(keep):
        yield f"trainer.max_actor_ckpt_to_keep={keep}: give the number of newest checkpoints to keep, or null for all"
    if trainer.get("remove_previous_ckpt_in_save", False):
        yield "trainer.remove_previous_ckpt_in_save=true: use trainer.max_actor_ckpt_to_keep=1 instead"
    steps = trainer.total_training_steps
    if not_positive(steps):
        yield f"trainer.total_training_steps={steps}: give a number of steps, or null for trainer.total_epochs"
    for key in ("save_freq", "test_freq"):
        if not isinstance(trainer[key], int) and (trainer[key] is None or trainer[key] != steps):  # may be set by it
            yield f"trainer.{key}={trainer[key]}: give a number of steps, or -1 for never"
    parts = ("model", "optimizer", "extra")
    for key in ("save_contents", "load_contents"):
        contents = config.actor_rollout_ref.actor.checkpoint[key]
        if lacking := [part for part in parts if part not in (contents or ())]:
            yield (
                f"actor_rollout_ref.actor.checkpoint.{key} lacks {', '.join(lacking)}: a resumed run would go on "
                "with a fresh one, without a word; keep model, optimizer and extra"
            )
    if trainer.resume_mode == "resume_path":
        yield from _check_resume_path(config)
    if config.actor_rollout_ref.actor.checkpoint.get("async_save", False):
        yield (
            "actor_rollout_ref.actor.checkpoint.async_save=true: when such a checkpoint is complete cannot be told, "
            "and a run resumes from complete ones only; set false"
        )


def _check_resume_path(config: DictConfig) -> Iterator[str]:
    path, own = config.trainer.resume_from_path, config.trainer.default_local_dir
    if path is None:
        yield "trainer.resume_from_path is not set: give a global_step_N folder, or leave trainer.resume_mode alone"
    elif "://" not in path and not Path(path).is_dir():
        yield Absent(f"trainer.resume_from_path={path} does not exist")
    elif not (found := re.fullmatch(r"global_step_(\d+)", Path(path).name)):
        yield f"trainer.resume_from_path={path}: give one of verl's global_step_N folders"
    elif Path(path).parent == Path(own) and (
        later := [step for step in retention.complete_steps(own) if step > int(found[1])]
    ):  # the next resume would take the newest, of what was given up
        yield (
            f"trainer.resume_from_path={path}: this run has later checkpoints ({', '.join(map(str, later))}); "
            "move them away, or go on from this one in a run of another run.name"
        )


def check_logger(config: DictConfig) -> Iterator[str]:
    """Loggers that cannot start, or that lose lines."""
    loggers = config.trainer.logger
    loggers = [loggers] if isinstance(loggers, str) else list(loggers or ())
    if "file" in loggers:
        yield "trainer.logger=file: every resume empties verl's file; the run folder's metrics.jsonl has the same names"
    if "wandb" in loggers and not wandb_can_start():
        yield (
            "trainer.logger has wandb, but there is no login: run wandb login, or set WANDB_API_KEY, or set "
            "WANDB_MODE=offline (wandb sync uploads the run folder's wandb/ later)"
        )


def wandb_can_start() -> bool:
    """Offline, or with a login."""
    if os.environ.get("WANDB_MODE", "online") != "online" or os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
