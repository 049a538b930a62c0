"""verl and vLLM without an accelerator, from outside."""
