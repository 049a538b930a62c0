"""``cppo merge``."""

from pathlib import Path

from cppo_verl.checkpoint.export import export
from cppo_verl.checkpoint.find import find
from cppo_verl.checkpoint.trust import check_trust
from cppo_verl.run.terminal import say


def merge(checkpoint: str, out: Path | None, trust: bool) -> int:
    """Write the checkpoint as a Hugging Face folder with a model card."""
    found = find(checkpoint, on_hub=False)
    check_trust(found, None, trust)
    say(f"written: {export(found, out, say=say)}")
    return 0
