"""What ``cppo doctor`` looks at in its own process: settings, data, model and disk of a run.

Standard library at import: what a check needs is imported inside it, so that a broken installation is a finding.
"""

import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cppo_verl.doctor.findings import GIB, Finding, Subject, fail, ok, readable, skip, warn
from cppo_verl.run.files import DamagedFile, read_json

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Problems that checks of their own look into: check_data, check_model, check_wandb, check_shared_memory, check_disk.
_OTHER_CHECKS = ("data file", "actor_rollout_ref.model.path", "wandb login", "/dev/shm", "TMPDIR", "RAY_TMPDIR")
# The smallest runs need less.
_LEAST_DISK = 2 * GIB
# Ray stores nothing more on a disk that is fuller.
_RAY_FULL = 0.95
# float32 weights and Adam's two moments.
_BYTES_PER_PARAMETER = 12


def check_settings(subject: Subject) -> Iterator[Finding]:
    """What ``cppo train`` would refuse; files are other checks' business."""
    from cppo_verl.config.validate import validate
    from cppo_verl.problems import ConfigError

    if subject.model is None and subject.config.data.train_files is None:
        yield skip("neither data nor model are given: the machine is examined, not a run")
        return
    problems = []
    try:
        validate(subject.config)
    except ConfigError as error:
        problems = [problem for problem in error.problems if problem.key not in _OTHER_CHECKS]
    for problem in problems:
        yield fail(problem.text, "cppo train --dry-run OVERRIDES shows the whole configuration")
    if not problems:
        yield ok(f"{subject.config.method.name} over {subject.config.divergence.name}")


def check_disk(subject: Subject) -> Iterator[Finding]:
    """Room for the run's checkpoints, for what Ray spills, and for what the hub sends."""
    from cppo_verl.config.check_machine import check_temporary

    folder = _model_folder(subject.model) if subject.model else None
    yield _checkpoint_room(subject, Path(subject.config.run.dir), _checkpoint_size(subject, folder))
    for problem in check_temporary():
        yield fail(problem.text, "TMPDIR=/a/short/path/elsewhere")
    temporary = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    usage = shutil.disk_usage(_existing(temporary))
    found = f"Ray's files ({temporary}): {readable(usage.free)} free"
    if usage.free < (1 - _RAY_FULL) * usage.total:
        yield warn(
            f"{found}, and Ray stores nothing on a disk that is over {_RAY_FULL:.0%} full",
            "make room, or RAY_TMPDIR=/a/short/path/elsewhere",
        )
    else:
        yield ok(found)
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    usage = shutil.disk_usage(_existing(cache))
    found = f"hub's cache ({cache}): {readable(usage.free)} free"
    if subject.model and folder is None and usage.free < _LEAST_DISK:
        yield warn(f"{found}, and {subject.model} is not in it yet", "make room, or HF_HOME=/path/elsewhere")
    else:
        yield ok(found)


def _checkpoint_size(subject: Subject, folder: Path | None) -> float:
    """Bytes, as the dry run says; of another kind of model by its files; 0 where neither tells."""
    from cppo_verl.dry_run.memory import checkpoint_bytes
    from cppo_verl.dry_run.model import find_model

    if subject.model is None:
        return 0
    shape = find_model(subject.config.actor_rollout_ref.model)[0]
    if shape is not None:
        return checkpoint_bytes(subject.config, shape)
    return inspect_model(folder)[1] * _BYTES_PER_PARAMETER if folder else 0


def _checkpoint_room(subject: Subject, folder: Path, size: float) -> Finding:
    """``size``: bytes of one checkpoint, 0 where it is not known."""
    trainer, free = subject.config.trainer, shutil.disk_usage(_existing(folder)).free
    found = f"runs ({folder}): {readable(free)} free"
    change = "make room, or choose another run.dir, trainer.save_freq or trainer.max_actor_ckpt_to_keep"
    if size and trainer.save_freq > 0:
        found += f", a checkpoint takes about {readable(size)}"
        if free < size:
            return fail(found, change)
        kept = _kept(trainer)
        if kept and free < kept * size:
            return warn(f"{found}, and up to {kept} lie there at a time", change)
    return warn(found, change) if free < _LEAST_DISK else ok(found)


def _kept(trainer: "DictConfig") -> int | None:
    """How many checkpoints lie there at most; None where the run's length is not known before the data is read."""
    steps, newest = trainer.total_training_steps, trainer.get("max_actor_ckpt_to_keep")
    saved = math.ceil(steps / trainer.save_freq) if steps else None
    # The best validated one stays besides the newest, and the oldest goes when the next one is complete.
    return saved if newest is None else min(newest + 2, saved or newest + 2)


def check_model(subject: Subject) -> Iterator[Finding]:
    path = subject.model
    if path is None:
        yield skip("actor_rollout_ref.model.path is not given")
        return
    folder = _model_folder(path)
    download = f"hf download {path}"
    if folder is None and (path.startswith(("/", ".", "~")) or path.count("/") != 1):
        yield fail(f"{path} does not exist", "actor_rollout_ref.model.path=FOLDER, or a hub id like Qwen/Qwen3-1.7B")
    elif folder is None:
        yield _on_the_hub(path, download)
    else:
        problems, parameters = inspect_model(folder)
        copied = folder == Path(path).expanduser()
        again = f"copy the model again; from the hub: hf download REPOSITORY --local-dir {path}"
        for problem in problems:
            if copied or _offline():
                yield fail(f"{folder}: {problem}", again if copied else f"HF_HUB_OFFLINE=0 {download}")
            else:
                yield warn(f"{folder}: {problem}; training downloads what the cache lacks", download)
        if not problems:
            size = f", {parameters / 1e6:,.1f} million parameters" if parameters else ""
            yield ok(f"{folder}: complete{size}")


def _on_the_hub(repository: str, download: str) -> Finding:
    """A model that is not in the cache."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if _offline():
        return fail(f"{repository} is not in the hub's cache, and HF_HUB_OFFLINE=1", f"HF_HUB_OFFLINE=0 {download}")
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, "config.json"), timeout=5)
    except GatedRepoError:
        return fail(f"{repository} is gated on the hub", f"accept its terms at hf.co/{repository}; hf auth login")
    except RepositoryNotFoundError:
        return fail(f"{repository} is not on the hub, or private", "see its name at hf.co; hf auth login")
    except Exception as error:
        remedy = f"{download} where there is a network, and copy the folder; a mirror: HF_ENDPOINT=https://..."
        return fail(f"{repository} is not cached and the hub does not answer ({type(error).__name__})", remedy)
    return ok(f"{repository} is on the hub; training downloads it first")


def _offline() -> bool:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)


def _model_folder(path: str) -> Path | None:
    """The folder that ``path`` is or, for a hub id, has in the cache."""
    if (folder := Path(path).expanduser()).is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def inspect_model(folder: Path) -> tuple[list[str], int]:
    """(what is wrong with a Hugging Face folder, number of parameters or 0 where its files do not tell)."""
    problems, parameters = [], 0
    if not (folder / "config.json").is_file():
        problems.append("has no config.json")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        problems.append("has no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    try:
        names = _weight_files(folder)
    except DamagedFile as error:
        return [*problems, str(error)], 0
    if not names:
        problems.append("has no weights (*.safetensors or *.bin)")
    for name in names:
        problem, count = _inspect_weights(folder / name)
        parameters += count
        if problem:
            problems.append(f"{name} {problem}")
    small = [path for path in folder.glob("*.json") if path.stat().st_size < 1024 and _is_pointer(path)]
    problems += [f"{path.name} {_POINTER}" for path in sorted(small)]
    return problems, parameters


_POINTER = "is a git-LFS pointer, not the file itself (git lfs pull)"


def _is_pointer(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(64).startswith(b"version https://git-lfs")


def _weight_files(folder: Path) -> list[str]:
    """The names in the index of a divided model, else the files that are there."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file() and not _is_pointer(folder / index):
            content = read_json(folder / index, "download it again", "weight_map")
            return sorted(set(content["weight_map"].values()))
    return sorted(path.name for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))


def _inspect_weights(path: Path) -> tuple[str | None, int]:
    """(what is wrong with one file of weights or None, its parameters: 0 where it is not safetensors)."""
    if not path.is_file():
        return "is missing", 0
    if _is_pointer(path):
        return _POINTER, 0
    if path.suffix != ".safetensors":
        return None, 0
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            return "is not a safetensors file, or cut off", 0
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError:
            return "is not a safetensors file, or damaged", 0
    header.pop("__metadata__", None)
    end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if path.stat().st_size < end:
        return f"is cut off ({path.stat().st_size:,} of {end:,} bytes)", 0
    return None, sum(math.prod(tensor["shape"]) for tensor in header.values())


def check_data(subject: Subject) -> Iterator[Finding]:
    from omegaconf import ListConfig

    from cppo_verl.config.check_files import inspect_data_file

    data, files = subject.config.data, []
    for key in ("train_files", "val_files"):
        chosen = data[key] if isinstance(data[key], ListConfig) else [data[key]]
        files += [(f"data.{key}: ", str(file)) for file in chosen if file is not None]
    if not subject.described:
        files += [("", str(path)) for path in sorted(Path("data").glob("*.parquet"))]
    if not files:
        yield skip("no data files are given" + ("" if subject.described else ", and no data/*.parquet is here"))
    for key, file in files:
        if "://" in file:
            yield skip(f"{key}{file} is read by verl itself")
            continue
        problem, rows = inspect_data_file(Path(file), data.prompt_key)
        if problem:
            prepare = "cppo prepare --train NAME=FILE --eval ... --out data (docs/data.md)"
            yield fail(f"{key}{file} {problem}", f"scripts/prepare_data.sh for the paper's data, else {prepare}")
        else:
            yield ok(f"{key}{file}: " + (f"{rows:,} rows" if Path(file).suffix == ".parquet" else "not looked into"))


def check_wandb(subject: Subject) -> Iterator[Finding]:
    """Only whether a login is there; its worth shows when the run starts."""
    from cppo_verl.config.check_run import wandb_can_start

    logger = subject.config.trainer.logger
    if "wandb" not in ([logger] if isinstance(logger, str) else logger or []):
        yield skip("not among trainer.logger")
    elif importlib.util.find_spec("wandb") is None:
        yield fail("not installed", f"{sys.executable} -m pip install wandb, or trainer.logger=[console]")
    elif wandb_can_start():
        yield ok("there is a login, or WANDB_MODE says that none is needed")
    else:
        yield fail("no login", "wandb login, or WANDB_API_KEY=..., or WANDB_MODE=offline (wandb sync later)")


def _existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that is there."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
