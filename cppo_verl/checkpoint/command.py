"""``cppo merge``."""

from pathlib import Path

from cppo_verl.checkpoint.export import export
from cppo_verl.checkpoint.find import find
from cppo_verl.checkpoint.trust import check_trust


def merge(checkpoint: str, out: Path | None, trust: bool) -> int:
    """Write the checkpoint as a Hugging Face folder with a model card."""
    found = find(checkpoint, on_hub=False)
    check_trust(found, None, trust)
    print(f"written: {export(found, out, say=print)}")
    return 0
