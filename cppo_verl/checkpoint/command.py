"""``cppo merge``."""

from pathlib import Path

from cppo_verl.checkpoint.export import export
from cppo_verl.checkpoint.find import find
from cppo_verl.run.terminal import say


def merge(checkpoint: str, out: Path | None) -> int:
    """Write the checkpoint as a Hugging Face folder with a model card."""
    say(f"written: {export(find(checkpoint, on_hub=False), out, say=say)}")
    return 0
