"""Generation: verl's agent loop and vLLM server with seeds and Top-K log-probabilities."""
