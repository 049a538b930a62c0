"""The checkpoint that a person means: a hub id, a run folder, verl's ``global_step_N`` or a Hugging Face folder."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cppo_verl.checkpoint import retention
from cppo_verl.problems import ConfigError
from cppo_verl.run.files import DamagedFile, read_json
from cppo_verl.run.folder import run_of

_WEIGHTS = ("*.safetensors", "*.bin")
_STEP = re.compile(r"global_step_(\d+)")
_LATEST = "latest_checkpointed_iteration.txt"


class CheckpointError(ConfigError):
    """A checkpoint that cannot be found, is incomplete or cannot be merged; the message says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """One set of weights."""

    source: str
    """What was asked for, made exact: a hub id with its revision, or an absolute path."""
    folder: Path
    """A Hugging Face folder, or verl's folder of shards (``global_step_N/actor``)."""
    folder_name: str
    """The model's own name: the last part of its hub id or path."""
    step: int | None = None
    """Training step, where verl saved it."""
    run: Path | None = None
    """The run folder it belongs to, whose config.yaml says how it was trained and validated."""

    @property
    def backend(self) -> str | None:
        """ "fsdp" or "megatron" where the weights are verl's shards, None for a Hugging Face folder."""
        if has_weights(self.folder):
            return None
        if (self.folder / "fsdp_config.json").is_file():
            return "fsdp"
        return "megatron" if (self.folder / "model" / "dist_ckpt").is_dir() else None

    @property
    def name(self) -> str:
        """A short name for folders and tables."""
        return self.folder_name if self.step is None else f"step_{self.step}"


def find(text: str, revision: str | None = None, on_hub: bool = True) -> Checkpoint:
    """The checkpoint that ``text`` names.

    Args:
        text: a Hugging Face folder or hub id; a run folder or verl's checkpoint folder (its latest checkpoint);
            ``global_step_N`` or its ``actor``.
        revision: commit, tag or branch of a hub id.
        on_hub: what is no path here may be a hub id.

    Raises:
        CheckpointError: nothing usable is there.
        DamagedFile: what says whether it is complete cannot be read.
    """
    path = Path(os.path.expanduser(text))
    if not path.exists() and not on_hub:
        raise CheckpointError(f"{text} does not exist: give a run folder or one of its checkpoints/global_step_N")
    if not path.exists():
        return _from_hub(text, revision)
    path = path.absolute()
    run = run_of(path)
    if (path / "checkpoints").is_dir() and not has_weights(path):
        path = path / "checkpoints"
    steps = retention.complete_steps(path)
    for later, error in retention.damaged(path):
        if not steps or later > steps[-1]:
            raise error
    if steps:
        path = retention.step_folder(path, steps[-1])
    elif (path / _LATEST).is_file():
        path = path / f"global_step_{(path / _LATEST).read_text(errors='replace').strip()[:20]}"
    of_step = next((folder for folder in (path, *path.parents) if _STEP.fullmatch(folder.name)), None)
    step = int(of_step.name.removeprefix("global_step_")) if of_step else None
    if of_step:
        retention.metrics_of(of_step)  # raises where complete.json is damaged
    if (path / "actor").is_dir():
        path = path / "actor"
    # With actor.checkpoint.save_contents=[...,hf_model] verl has written a whole Hugging Face folder itself.
    for whole in (path, path / "huggingface", path / "model" / "huggingface"):
        if has_weights(whole):
            return Checkpoint(str(whole), whole, whole.name, step, run)
    checkpoint = Checkpoint(str(path), path, path.name, step, run)
    if checkpoint.backend is None:
        raise CheckpointError(
            f"{text} holds no model: give a Hugging Face folder (config.json and weights) or hub id, a run folder with "
            "checkpoints/, or one of verl's global_step_N folders"
        )
    return checkpoint


def checkpoints_of(run: Path, say: Callable[[str], None]) -> list[Checkpoint]:
    """Every checkpoint of a run folder, by step; told and left out: those whose weights verl has removed or not saved.

    Raises:
        CheckpointError: it has none.
    """
    checkpoints = run / "checkpoints"
    damaged = dict(retention.damaged(checkpoints))
    found = []
    marked = retention.complete_steps(checkpoints) or damaged
    for step, folder in retention.step_folders(checkpoints).items():
        if step in damaged:
            say(f"left out: {damaged[step]}")
            continue
        if marked and not retention.is_complete(folder):
            say(f"left out: {folder} was not written to its end")
            continue
        try:
            checkpoint = find(str(folder))
            check_shards(checkpoint)
            found.append(checkpoint)
        except ConfigError as error:
            say(f"left out: {error}")
    if not found or found[0].run is None:
        raise CheckpointError(f"{run} is not a run folder with checkpoints/global_step_N: give one that saved some")
    return found


def has_weights(folder: Path) -> bool:
    """Whether it is a Hugging Face folder with weights."""
    return (folder / "config.json").is_file() and any(next(folder.glob(name), None) for name in _WEIGHTS)


def check_shards(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless every rank's file of an FSDP checkpoint is there."""
    if checkpoint.backend != "fsdp":
        return
    file, remedy = checkpoint.folder / "fsdp_config.json", "use another checkpoint"
    ranks = read_json(file, remedy, "world_size")["world_size"]
    if not isinstance(ranks, int) or ranks < 1:
        raise DamagedFile(file, 1, "is damaged (world_size is no number of ranks)", remedy)
    names = [f"model_world_size_{ranks}_rank_{rank}.pt" for rank in range(ranks)]
    missing = [name for name in names if not (checkpoint.folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder} is incomplete: {', '.join(missing)} missing; use another checkpoint"
        )


def _from_hub(text: str, revision: str | None) -> Checkpoint:
    if text.startswith(("/", ".", "~")) or text.count("/") != 1:
        raise CheckpointError(f"{text} does not exist: give a folder, or a hub id like Qwen/Qwen3-1.7B")
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(text, revision=revision))
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{text} is neither a folder here nor to be had from the hub ({type(error).__name__}: {reason})"
        ) from None
    return Checkpoint(
        f"{text}@{folder.name}", folder, text.split("/")[1]
    )  # the cache names the snapshot's folder by its commit
