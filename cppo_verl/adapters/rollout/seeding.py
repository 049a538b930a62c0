"""Seeds that belong to one response, whatever worker, micro-batch or order it is handled in."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any


def problem_key(raw_prompt: Iterable[Any]) -> str:
    """A digest of a problem's chat messages: rows of a data file need no index, and two files may share theirs."""
    return hashlib.blake2b(json.dumps(list(raw_prompt), default=str).encode(), digest_size=8).hexdigest()


def response_seed(run_seed: int, step: int, problem: str, sample: int) -> int:
    """A 63-bit seed from (run seed, training step, problem key, sample number within the group)."""
    text = f"{run_seed}/{step}/{problem}/{sample}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def piece_seed(seed: int, piece: int) -> int:
    """The seed of what a response goes on with after its ``piece``-th interruption."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{piece}".encode(), digest_size=8).digest(), "big") >> 1
