"""``cppo train`` from a checked configuration to the end of the run: its folder, its process, its display."""

import json
import time
import uuid
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from cppo_verl.checkpoint.owner import claim
from cppo_verl.config.compose import run_folder
from cppo_verl.run.files import write_atomically
from cppo_verl.run.folder import CONFIG, MANIFEST, read_attempts
from cppo_verl.run.log import EVENTS, METRICS, read_metrics
from cppo_verl.run.manifest import manifest
from cppo_verl.run.supervisor import (
    INTERRUPTED,
    RUN_FOLDER,
    RUN_TAG,
    locked,
    process_environment,
    stale_processes,
    supervise,
)
from cppo_verl.run.terminal import warn
from cppo_verl.training.display import RunDisplay


def launch(config: DictConfig, command: list[str], module: str = "cppo_verl.adapters.driver.main") -> int:
    """Run one training (or what ``module`` does) to its end; returns the exit status.

    The run folder is made here, after all checks.
    """
    folder = run_folder(config)
    with locked(folder) as free:
        return _launch(config, command, module, folder) if free else 2


def _launch(config: DictConfig, command: list[str], module: str, folder: Path) -> int:
    if not _end_of_earlier_attempt(folder):
        return 2
    for stale in stale_processes():
        warn(_left_behind(*stale))
    read_metrics(folder, say=lambda text: warn(f"cppo: {text}"))
    try:
        log_file = prepare_folder(config, folder, command)
    except OSError as error:
        warn(f"cppo: the run folder {folder} cannot be written: {error}; make room, or change run.dir")
        return 2
    display = RunDisplay(folder, log_file)
    minutes = config.run.stall_minutes
    stall = None if minutes is None else 60 * minutes
    status = supervise(module, folder, log_file, environment(config), folder / METRICS, display, stall)
    if status == 0:
        display.summary()
    elif status != INTERRUPTED:
        display.failure(status)
    return status


def _left_behind(folder: Path, pids: list[int], size: int) -> str:
    return (
        f"cppo: {len(pids)} processes of the earlier run {folder} are still there, with {size / 2**30:.1f} GiB of "
        f"memory; to end them: kill {' '.join(map(str, pids))}"
    )


def _end_of_earlier_attempt(folder: Path, limit: float = 60) -> bool:
    """Wait for what an attempt whose launcher was killed has left of this very run: two at once must not write it."""
    deadline = time.monotonic() + limit
    while own := [stale for stale in stale_processes(held=folder) if stale[0] == folder]:
        if time.monotonic() > deadline:
            warn(f"{_left_behind(*own[0])}; then give the same command again")
            return False
        warn(f"cppo: waiting for {len(own[0][1])} processes of an earlier attempt to end")
        time.sleep(5)
    return True


def prepare_folder(config: DictConfig, folder: Path, command: list[str]) -> Path:
    """Make or reopen the run folder: resolved config, manifest of this attempt. Returns the attempt's log file."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    earlier = (path.stem.removeprefix("train-") for path in (folder / "logs").glob("train-*.log"))
    attempt = 1 + max((int(number) for number in earlier if number.isdecimal()), default=0)
    text = OmegaConf.to_yaml(config, resolve=True)
    for path in (folder / CONFIG, folder / "logs" / f"config-{attempt}.yaml"):
        write_atomically(path, text)
    attempts = read_attempts(folder)
    tracking_id = attempts[0]["tracking_id"] if attempts else uuid.uuid4().hex[:12]
    record = {"attempt": attempt, "tracking_id": tracking_id, **manifest(command)}
    write_atomically(folder / MANIFEST, json.dumps({"attempts": [*attempts, record]}, indent=2) + "\n")
    claim(Path(config.trainer.default_local_dir), folder)
    (folder / EVENTS).unlink(missing_ok=True)
    return folder / "logs" / f"train-{attempt}.log"


def environment(config: DictConfig, tag: str | None = None) -> dict[str, str]:
    """The environment of a run's processes: our defaults under what the user has set, and the run's tag.

    Every attempt of a run goes on with the same wandb run and the same TensorBoard folder.
    """
    folder = run_folder(config)
    tracking = {"TENSORBOARD_DIR": str(folder / "tensorboard"), "WANDB_DIR": str(folder), "WANDB_RESUME": "allow"}
    if attempts := read_attempts(folder):
        tracking["WANDB_RUN_ID"] = attempts[0]["tracking_id"]
    model, address = str(config.actor_rollout_ref.model.path), config.ray_kwargs.ray_init.get("address")
    variables = process_environment(config.trainer.device == "cpu", model, address)
    return {**tracking, **variables, RUN_FOLDER: str(folder), **({RUN_TAG: tag} if tag else {})}
