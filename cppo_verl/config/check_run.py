"""Whether the run can start or go on: its folder, its checkpoints, its loggers."""

import importlib.util
import netrc
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf

from cppo_verl.checkpoint import retention
from cppo_verl.config.compose import run_folder
from cppo_verl.config.schema import shown
from cppo_verl.problems import Problem, about
from cppo_verl.run.files import DamagedFile
from cppo_verl.run.folder import CONFIG, read_config

# What verl imports for a logger, after Ray has started.
_PACKAGES = {
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "vemlp_wandb": "volcengine_ml_platform",
    "clearml": "clearml",
    "trackio": "trackio",
    "rl_insight": "rl_insight",
}
# File systems take 255 bytes; names of files are made of it.
_LONGEST_NAME = 200


def check_run(config: DictConfig) -> Iterator[Problem]:
    """A new name, or a run that goes on as the experiment it was."""
    name, folder = str(config.run.name), run_folder(config)
    taken = next((path for path in (Path(config.run.dir), *Path(config.run.dir).parents) if path.is_file()), None)
    if taken is not None:
        yield about("run.dir", f"={taken} is a file: give a folder")
        return
    if "/" in name or name.strip() in ("", ".", "..") or not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
        yield about("run.name", f"={shown(name)}: a plain folder name is needed, of {_LONGEST_NAME} bytes at most")
    elif config.run.resume not in (True, False):
        yield about("run.resume", f"={config.run.resume}: use true, false or auto")
    elif not config.run.resume and _holds_a_run(folder):
        yield about(
            "run.name", f"={name} is in use ({folder}): choose another name, or continue it with run.resume=true"
        )
    elif config.run.resume and not (folder / CONFIG).exists():
        yield about(
            "run.resume", f"=true, but there is no run {folder}: give the run.name (and run.dir) of the run to continue"
        )
    elif config.run.resume:
        yield from _changed_since(folder / CONFIG, config)


def _holds_a_run(folder: Path) -> bool:
    """Not where its very first file could not be written."""
    if not folder.exists():
        return False
    return any(path.name not in (".lock", "logs") and path.suffix != ".tmp" for path in folder.iterdir())


def _changed_since(stored_file: Path, config: DictConfig) -> Iterator[Problem]:
    """What makes a run another experiment must be the same when it goes on."""
    try:
        stored = read_config(stored_file.parent)
    except DamagedFile:  # check_kept says so
        return
    for key in ("method", "divergence", "run.seed", "actor_rollout_ref.model.path", "data.train_batch_size"):
        before, now = OmegaConf.select(stored, key), OmegaConf.select(config, key)
        if isinstance(now, DictConfig):
            now = OmegaConf.create(OmegaConf.to_container(now, resolve=True))
        if before != now:
            yield about(
                "run.resume", f"=true: {key} was {before} in this run and is {now} now; repeat the run's own settings"
            )


def check_checkpoints(config: DictConfig) -> Iterator[Problem]:
    """That a run can be resumed from what it will write, and from what it is given."""
    trainer = config.trainer
    if trainer.get("remove_previous_ckpt_in_save", False):
        yield about("trainer.remove_previous_ckpt_in_save", "=true: use trainer.max_actor_ckpt_to_keep=1 instead")
    parts = ("model", "optimizer", "extra")
    for key in ("save_contents", "load_contents"):
        contents = config.actor_rollout_ref.actor.checkpoint[key]
        if lacking := [part for part in parts if part not in (contents or ())]:
            yield about(
                "actor_rollout_ref.actor.checkpoint",
                f".{key} lacks {', '.join(lacking)}: a resumed run would go on "
                "with a fresh one, without a word; keep model, optimizer and extra",
            )
    if trainer.resume_mode == "resume_path":
        yield from _check_resume_path(config)
    if config.actor_rollout_ref.actor.checkpoint.get("async_save", False):
        yield about(
            "actor_rollout_ref.actor.checkpoint.async_save",
            "=true: when such a checkpoint is complete cannot be told, "
            "and a run resumes from complete ones only; set false",
        )


def _check_resume_path(config: DictConfig) -> Iterator[Problem]:
    path, own = config.trainer.resume_from_path, config.trainer.default_local_dir
    if path is None:
        yield about(
            "trainer.resume_from_path", " is not set: give a global_step_N folder, or leave trainer.resume_mode alone"
        )
    elif "://" not in path and not Path(path).is_dir():
        yield about("trainer.resume_from_path", f"={path} does not exist", only_here=True)
    elif not (found := re.fullmatch(r"global_step_(\d+)", Path(path).name)):
        yield about("trainer.resume_from_path", f"={path}: give one of verl's global_step_N folders")
    elif Path(path).parent == Path(own) and (
        later := [step for step in retention.complete_steps(own) if step > int(found[1])]
    ):  # the next resume would take the newest, of what was given up
        yield about(
            "trainer.resume_from_path",
            f"={path}: this run has later checkpoints ({', '.join(map(str, later))}); "
            "move them away, or go on from this one in a run of another run.name",
        )


def check_logger(config: DictConfig) -> Iterator[Problem]:
    """Loggers that cannot start, or that lose lines."""
    loggers = config.trainer.logger
    loggers = [loggers] if isinstance(loggers, str) else list(loggers or ())
    if "file" in loggers:
        yield about(
            "trainer.logger",
            "=file: every resume empties verl's file; the run folder's metrics.jsonl has the same names",
        )
    for name, package in _PACKAGES.items():
        if name in loggers and importlib.util.find_spec(package) is None:
            yield about(
                "trainer.logger", f" has {name}, but the package {package} is not installed; install or drop it"
            )
    if "wandb" in loggers and not wandb_can_start():
        yield Problem(
            "wandb login",
            "trainer.logger has wandb, but there is no login: run wandb login, or set WANDB_API_KEY, or set "
            "WANDB_MODE=offline (wandb sync uploads the run folder's wandb/ later)",
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
