"""CPPO on verl: reinforcement learning from verifiable rewards with a prefix-aware trust region (arXiv 2606.10968)."""

__version__ = "0.1.0"
