"""A checkpoint as a Hugging Face folder: verl's shards merged, a model card beside them, a digest of the whole."""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from cppo_verl.checkpoint.card import model_card
from cppo_verl.checkpoint.find import Checkpoint, CheckpointError, check_shards, has_weights
from cppo_verl.run.machine import has_gpu


def hugging_face_folder(checkpoint: Checkpoint, say: Callable[[str], None], trust_remote_code: bool = False) -> Path:
    """The checkpoint as a Hugging Face folder; verl's shards are merged once, into ``global_step_N/merged``.

    verl's merger writes FSDP shards in bfloat16, whatever they were trained in.

    Raises:
        CheckpointError: shards are missing, or the merger fails.
    """
    if checkpoint.backend is None:
        return checkpoint.folder
    check_shards(checkpoint)
    merged = checkpoint.folder.parent / "merged"
    with open(checkpoint.folder.parent / ".merge.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two evaluations of one checkpoint merge it once
        if has_weights(merged) and merged.stat().st_mtime >= _newest(checkpoint.folder):
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
    if out is not None and out.exists():
        raise CheckpointError(f"--out {out} exists: give a new folder")
    if checkpoint.backend is None and out is None:
        raise CheckpointError(f"{checkpoint.folder} is a Hugging Face folder already; give --out to copy it")
    check_shards(checkpoint)
    card = model_card(checkpoint)  # first: what it is made of may be damaged, and merging takes minutes
    folder = hugging_face_folder(checkpoint, say)
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


def _newest(folder: Path) -> float:
    return max(path.stat().st_mtime for path in folder.rglob("*") if path.is_file())


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
    if done.returncode != 0 or not has_weights(target):
        reason = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise CheckpointError(f"verl's merger failed on {checkpoint.folder} (exit status {done.returncode}):\n{reason}")
    if (target / "lora_adapter").is_dir():
        raise CheckpointError(
            f"{checkpoint.folder} holds a LoRA adapter, which verl's merger saves beside the base model, not into it: "
            "merge the two with peft, and give the resulting folder"
        )
