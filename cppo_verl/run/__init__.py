"""What every process of a run and the command line share: its files, its life and its end. No verl, Ray or vLLM."""
