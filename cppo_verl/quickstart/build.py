"""Builds the toy task and its warm-started model."""

import json
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from cppo_verl.quickstart.calculator import WORDS
from cppo_verl.quickstart.model import build_model, build_tokenizer
from cppo_verl.quickstart.specs import MANIFEST, ModelShape, WarmupSpec
from cppo_verl.quickstart.task import TaskSpec, make_splits, write_parquet
from cppo_verl.quickstart.warmup import (
    ACCURACY_RANGE,
    MIN_BOXED_SHARE,
    answering,
    measure,
    run_warmup,
    warn_off_target,
)
from cppo_verl.run.files import write_atomically


def build(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write model and data to ``directory``, the manifest last, and return the manifest."""
    started = time.monotonic()
    seed: int = settings["seed"]
    task, shape = TaskSpec(**settings["task"]), ModelShape(**settings["model"])
    splits = make_splits(task, seed)
    write_parquet(splits.train, "train", directory / "train.parquet")
    write_parquet(splits.heldout, "heldout", directory / "heldout.parquet")
    tokenizer = build_tokenizer(shape, WORDS if task.calculator else ())
    model = build_model(shape, tokenizer, seed)
    warmup = WarmupSpec(**settings["warmup"])
    run_warmup(model, tokenizer, splits.warmup, answering(task, warmup.worked_share), warmup, seed)
    sampled = measure(
        model, tokenizer, splits.heldout, settings["measure_samples"], settings["measure_max_tokens"], seed
    )
    warn_off_target(sampled, ACCURACY_RANGE, MIN_BOXED_SHARE)
    disable_progress_bar()  # one file, written at once
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    manifest = {
        "settings": settings,
        "problems": {"warmup": len(splits.warmup), "train": len(splits.train), "heldout": len(splits.heldout)},
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "heldout_sampled": asdict(sampled),
        "seconds": round(time.monotonic() - started, 1),
    }
    write_atomically(directory / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return manifest


def build_atomically(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Build in a sibling directory and rename it to ``out``, replacing an earlier build of other settings."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    temporary.chmod(0o755)
    try:
        manifest = build(temporary, settings)
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest
