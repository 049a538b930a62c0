"""Seeds that belong to one response, whatever worker, micro-batch or order it is handled in."""

import hashlib


def response_seed(run_seed: int, step: int, problem: object, sample: int) -> int:
    """A 63-bit seed from (run seed, training step, problem index, sample number within the group)."""
    text = f"{run_seed}/{step}/{problem}/{sample}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
