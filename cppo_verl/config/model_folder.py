"""What a local model folder's ``config.json`` tells before anything is loaded."""

import json
import os
from pathlib import Path
from typing import Any


def shape(path: str | None) -> dict[str, Any]:
    """The folder's config.json; empty where there is none that can be read (a hub id, for one)."""
    if not isinstance(path, str):
        return {}
    try:
        found = json.loads(Path(os.path.expanduser(path), "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def largest_tensor(path: str | None) -> int:
    """Bytes in float32 of the embedding, or of one layer's experts where they are larger; 0 where that is unknown."""
    found = shape(path)
    sizes = {name: found.get(name) for name in ("hidden_size", "vocab_size", "moe_intermediate_size", "num_experts")}
    hidden, vocabulary, width, experts = (size if isinstance(size, int) else 0 for size in sizes.values())
    return 4 * hidden * max(vocabulary, 2 * width * experts)
