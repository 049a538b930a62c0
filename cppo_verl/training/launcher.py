"""``cppo train`` from a checked configuration to the end of the run: its folder, its process, its display."""

import json
import time
import uuid
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cppo_verl.config.compose import run_folder
from cppo_verl.problems import ConfigError
from cppo_verl.run.folder import CONFIG, MANIFEST
from cppo_verl.run.log import EVENTS, METRICS, json_object, write_atomically
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
    try:
        log_file = prepare_folder(config, folder, command)
    except OSError as error:
        warn(f"cppo: the run folder {folder} cannot be written: {error}; make room, or change run.dir")
        return 2
    display = RunDisplay(folder, log_file)
    status = supervise(module, folder, log_file, environment(config), folder / METRICS, display)
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
    attempt = 1 + len(list((folder / "logs").glob("train-*.log")))
    text = OmegaConf.to_yaml(config, resolve=True)
    for path in (folder / CONFIG, folder / "logs" / f"config-{attempt}.yaml"):
        write_atomically(path, text)
    attempts = _attempts(folder)
    tracking_id = attempts[0]["tracking_id"] if attempts else uuid.uuid4().hex[:12]
    record = {"attempt": attempt, "tracking_id": tracking_id, **manifest(command)}
    write_atomically(folder / MANIFEST, json.dumps({"attempts": [*attempts, record]}, indent=2) + "\n")
    (folder / EVENTS).unlink(missing_ok=True)
    return folder / "logs" / f"train-{attempt}.log"


def _attempts(folder: Path) -> list[dict[str, Any]]:
    path = folder / MANIFEST
    if not path.exists():
        return []
    attempts = json_object(path.read_bytes(), str(path)).get("attempts")
    if not isinstance(attempts, list) or not all(isinstance(one, dict) and "tracking_id" in one for one in attempts):
        raise ConfigError(f"{path}: damaged, it names no attempts; move it away to go on without them")
    return attempts


def environment(config: DictConfig, tag: str | None = None) -> dict[str, str]:
    """The environment of a run's processes: our defaults under what the user has set, and the run's tag.

    Every attempt of a run goes on with the same wandb run and the same TensorBoard folder.
    """
    folder = run_folder(config)
    tracking = {"TENSORBOARD_DIR": str(folder / "tensorboard"), "WANDB_DIR": str(folder), "WANDB_RESUME": "allow"}
    if attempts := _attempts(folder):
        tracking["WANDB_RUN_ID"] = attempts[0]["tracking_id"]
    variables = process_environment(config.trainer.device == "cpu", str(config.actor_rollout_ref.model.path))
    return {**tracking, **variables, RUN_FOLDER: str(folder), **({RUN_TAG: tag} if tag else {})}
