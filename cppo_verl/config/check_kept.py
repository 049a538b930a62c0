"""What other runs and earlier attempts have written: nobody's is overwritten, and what is gone on from is whole."""

from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from cppo_verl.checkpoint import retention
from cppo_verl.checkpoint.owner import other_owner
from cppo_verl.config.compose import run_folder
from cppo_verl.problems import Problem, about
from cppo_verl.run.files import DamagedFile
from cppo_verl.run.folder import CONFIG, read_attempts, read_config
from cppo_verl.run.log import read_metrics

_OWN = "leave it out, or give a folder of its own"


def check_owner(config: DictConfig) -> Iterator[Problem]:
    """A run removes checkpoints of its own only, and writes no samples over another one's."""
    run, trainer = run_folder(config), config.trainer
    for key in ("default_local_dir", "validation_data_dir", "rollout_data_dir"):
        folder = trainer.get(key)
        if folder is None or "://" in str(folder):
            continue
        try:
            owner = other_owner(Path(folder), run)
        except DamagedFile as error:
            yield about(f"trainer.{key}", f"={folder}: whose it is cannot be told: {error}")
            continue
        if owner:
            yield about(f"trainer.{key}", f"={folder}: {owner}, whose files this run would replace; {_OWN}")
        elif key == "default_local_dir":
            yield from _check_nobodys(config, run, Path(folder))


def _check_nobodys(config: DictConfig, run: Path, folder: Path) -> Iterator[Problem]:
    """Checkpoints that no run's name is on are this run's if it has been writing there."""
    if folder.resolve().is_relative_to(run.resolve()) or not (steps := retention.step_folders(folder)):
        return
    if config.run.resume and (run / CONFIG).exists():
        try:
            before = OmegaConf.select(read_config(run), "trainer.default_local_dir")
        except DamagedFile:  # check_earlier_attempts says so
            return
        if before is not None and Path(before).resolve() == folder.resolve():
            return
    yield about(
        "trainer.default_local_dir",
        f"={folder}: it holds {next(reversed(steps.values())).name}, which this run has not written and would replace; "
        f"{_OWN}",
    )


def check_earlier_attempts(config: DictConfig) -> Iterator[Problem]:
    """What a resumed run reads and goes on writing."""
    folder, checkpoints = run_folder(config), config.trainer.default_local_dir
    if config.run.resume is True and (folder / CONFIG).exists():
        for read in (read_config, read_attempts, read_metrics):
            try:
                read(folder)
            except DamagedFile as error:
                yield about("run.resume", f"=true: {error}")
        for _, damage in retention.damaged(checkpoints):
            yield about("run.resume", f"=true: {damage}")
    resumed = 0
    if config.trainer.resume_mode == "resume_path":
        source = Path(str(config.trainer.resume_from_path))
        resumed = next((step for step, path in retention.step_folders(source.parent).items() if path == source), 0)
        for step, damage in retention.damaged(source.parent):
            if step == resumed and source.parent != Path(checkpoints):
                yield about("trainer.resume_from_path", f"={source}: {damage}")
    for step, link in retention.step_folders(checkpoints).items():
        if link.is_symlink() and step > resumed:
            yield about(
                "trainer.default_local_dir",
                f"={checkpoints}: {link.name} is a symbolic link, and the run would save its step {step} there; "
                "move the link away",
            )
