"""A checkpoint as a Hugging Face folder: verl's shards merged, a model card beside them, a digest of the whole."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from cppo_verl.checkpoint.card import model_card
from cppo_verl.checkpoint.find import Checkpoint, CheckpointError, check_shards, has_weights
from cppo_verl.run.files import read_json, sync_tree, write_atomically
from cppo_verl.run.machine import has_gpu

# In every folder that a merge makes and may replace.
_MARK = ".merged"


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
        for folder in (temporary, merged):
            _require_own(folder)
        shutil.rmtree(temporary, ignore_errors=True)  # of a merger that was killed
        temporary.mkdir()
        (temporary / _MARK).touch()
        _merge(checkpoint, temporary, trust_remote_code)
        _readable(temporary)
        shutil.rmtree(merged, ignore_errors=True)
        temporary.rename(merged)
    return merged


def _require_own(folder: Path) -> None:
    """Raise CheckpointError where something is there that no merge has made."""
    if os.path.lexists(folder) and (folder.is_symlink() or not (folder / _MARK).is_file()):
        raise CheckpointError(f"{folder} is in the way, and no merge of these shards has made it: move it away")


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
        return _copy(folder, card, out)
    write_atomically(folder / "README.md", card)
    return folder


def _copy(folder: Path, card: str, out: Path) -> Path:
    """``out``: the folder's files and the card, all or nothing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        shutil.copytree(folder, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns(_MARK))
        (temporary / "README.md").write_text(card)
        _readable(temporary)
        sync_tree(temporary)
        return temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _readable(folder: Path) -> None:
    """The files' modes as this process makes files; safetensors makes its own for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
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
        if config.is_file() and read_json(config, "use another checkpoint").get("tie_word_embeddings"):
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
