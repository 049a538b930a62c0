"""Checkpoints: which are complete and kept, which one is meant, how one becomes a Hugging Face folder."""
