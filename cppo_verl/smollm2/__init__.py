"""A real language model on two CPU cores: SmolLM2-135M-Instruct, warm-started on worded sums (recipes/smollm2.sh)."""
