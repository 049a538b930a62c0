"""The training process: Ray, verl's task runner and trainer."""
