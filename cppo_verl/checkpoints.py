"""From what a person calls a checkpoint to a Hugging Face folder: hub ids, run folders, verl's sharded checkpoints."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cppo_verl import retention
from cppo_verl.config import ConfigError, has_gpu

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
        if _has_weights(self.folder):
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
    """
    path = Path(text).expanduser()
    if not path.exists() and not on_hub:
        raise CheckpointError(f"{text} does not exist: give a run folder or one of its checkpoints/global_step_N")
    if not path.exists():
        return _from_hub(text, revision)
    path = path.absolute()
    run = _run_of(path)
    if (path / "checkpoints").is_dir() and not _has_weights(path):
        path = path / "checkpoints"
    if steps := retention.complete_steps(path):
        path = retention.step_folder(path, steps[-1])
    elif (path / _LATEST).is_file():
        path = path / f"global_step_{(path / _LATEST).read_text().strip()}"
    step = next((int(found[1]) for part in reversed(path.parts) if (found := _STEP.fullmatch(part))), None)
    if (path / "actor").is_dir():
        path = path / "actor"
    # With actor.checkpoint.save_contents=[...,hf_model] verl has written a whole Hugging Face folder itself.
    for whole in (path, path / "huggingface", path / "model" / "huggingface"):
        if _has_weights(whole):
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
    folders = sorted(
        (folder for folder in (run / "checkpoints").glob("global_step_*") if _STEP.fullmatch(folder.name)),
        key=lambda folder: int(folder.name.removeprefix("global_step_")),
    )
    found = []
    marked = any(retention.is_complete(folder) for folder in folders)
    for folder in folders:
        if marked and not retention.is_complete(folder):
            say(f"left out: {folder} was not written to its end")
            continue
        try:
            checkpoint = find(str(folder))
            _check_shards(checkpoint)
            found.append(checkpoint)
        except CheckpointError as error:
            say(f"left out: {error}")
    if not found or found[0].run is None:
        raise CheckpointError(f"{run} is not a run folder with checkpoints/global_step_N: give one that saved some")
    return found


def hugging_face_folder(checkpoint: Checkpoint, say: Callable[[str], None], trust_remote_code: bool = False) -> Path:
    """The checkpoint as a Hugging Face folder; verl's shards are merged once, into ``global_step_N/merged``.

    verl's merger writes FSDP shards in bfloat16, whatever they were trained in.

    Raises:
        CheckpointError: shards are missing, or the merger fails.
    """
    if checkpoint.backend is None:
        return checkpoint.folder
    _check_shards(checkpoint)
    merged = checkpoint.folder.parent / "merged"
    with open(checkpoint.folder.parent / ".merge.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two evaluations of one checkpoint merge it once
        if _has_weights(merged) and merged.stat().st_mtime >= _newest(checkpoint.folder):
            return merged
        say(f"merging {checkpoint.folder} into {merged}")
        temporary = checkpoint.folder.parent / ".merging"
        shutil.rmtree(temporary, ignore_errors=True)  # of a merger that was killed
        temporary.mkdir()
        _merge(checkpoint, temporary, trust_remote_code)
        _readable(temporary)
        shutil.rmtree(merged, ignore_errors=True)
        temporary.rename(merged)
    return merged


def export(checkpoint: Checkpoint, out: Path | None, say: Callable[[str], None]) -> Path:
    """The checkpoint as a Hugging Face folder with a model card; returns the folder.

    Args:
        out: a new folder to copy it to; None leaves verl's shards merged in ``global_step_N/merged``.

    Raises:
        CheckpointError: the checkpoint cannot be merged, or ``out`` is in use, or there is nothing to do.
    """
    from cppo_verl.model_card import model_card

    if out is not None and out.exists():
        raise CheckpointError(f"--out {out} exists: give a new folder")
    if checkpoint.backend is None and out is None:
        raise CheckpointError(f"{checkpoint.folder} is a Hugging Face folder already; give --out to copy it")
    folder = hugging_face_folder(checkpoint, say)
    card = model_card(checkpoint)
    if out is not None:
        temporary = out.with_name(out.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(folder, temporary)
        _readable(temporary)
        folder = temporary.rename(out)
    (folder / "README.md").write_text(card)
    return folder


def _readable(folder: Path) -> None:
    """The files' modes as this process makes files; safetensors makes its own for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def fingerprint(folder: Path) -> str:
    """SHA-256 over names and contents of a model folder's weights, configuration and tokenizer files."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".safetensors", ".bin", ".json", ".jinja", ".txt", ".model"):
            digest.update(path.name.encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()


def _has_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(next(folder.glob(name), None) for name in _WEIGHTS)


def _run_of(path: Path) -> Path | None:
    """The run folder that ``path`` is or lies in."""
    files = ("config.yaml", "manifest.json")
    return next((folder for folder in (path, *path.parents) if all((folder / name).is_file() for name in files)), None)


def _newest(folder: Path) -> float:
    return max(path.stat().st_mtime for path in folder.rglob("*") if path.is_file())


def _check_shards(checkpoint: Checkpoint) -> None:
    if checkpoint.backend != "fsdp":
        return
    ranks = json.loads((checkpoint.folder / "fsdp_config.json").read_text())["world_size"]
    names = [f"model_world_size_{ranks}_rank_{rank}.pt" for rank in range(ranks)]
    missing = [name for name in names if not (checkpoint.folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder} is incomplete: {', '.join(missing)} missing; use another checkpoint"
        )


def _merge(checkpoint: Checkpoint, target: Path, trust_remote_code: bool) -> None:
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", str(checkpoint.backend)]
    command += ["--local_dir", str(checkpoint.folder), "--target_dir", str(target)]
    if checkpoint.backend == "megatron":
        config = checkpoint.folder / "model" / "huggingface" / "config.json"
        if config.is_file() and json.loads(config.read_text()).get("tie_word_embeddings"):
            command.append("--tie-word-embedding")
    if trust_remote_code:
        command.append("--trust-remote-code")
    platform = {} if has_gpu() else {"VERL_PLATFORM": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env={**platform, **os.environ})
    if done.returncode != 0 or not _has_weights(target):
        reason = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise CheckpointError(f"verl's merger failed on {checkpoint.folder} (exit status {done.returncode}):\n{reason}")
    if (target / "lora_adapter").is_dir():
        raise CheckpointError(
            f"{checkpoint.folder} holds a LoRA adapter, which verl's merger saves beside the base model, not into it: "
            "merge the two with peft, and give the resulting folder"
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
