"""``cppo merge``."""

from pathlib import Path

from cppo_verl.checkpoint.export import export
from cppo_verl.checkpoint.find import find


def merge(checkpoint: str, out: Path | None) -> int:
    """Write the checkpoint as a Hugging Face folder with a model card."""
    print(f"written: {export(find(checkpoint, on_hub=False), out, say=print)}")
    return 0
