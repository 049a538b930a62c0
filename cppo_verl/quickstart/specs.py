"""Numbers of the tiny model and of its warm start; without torch, so that finding a finished build takes no time."""

from dataclasses import dataclass

# Of a finished build: what it was made with.
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ModelShape:
    """Width, depth, head counts and vocabulary of the network; embeddings are tied."""

    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    head_dim: int = 32
    max_positions: int = 512
    vocabulary: int = 0


@dataclass(frozen=True)
class Supervised:
    """A supervised phase: optimiser steps, examples a step, peak learning rate."""

    steps: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class WarmupSpec(Supervised):
    """The toy task's: besides these the share of worked answers."""

    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 2e-3
    worked_share: float = 0.30
