"""The actor worker: verl's update with the trust-region loss."""
