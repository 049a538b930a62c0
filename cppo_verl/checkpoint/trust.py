"""Code that comes with a checkpoint: who made it is asked before it is run."""

from collections.abc import Iterator

from omegaconf import DictConfig

from cppo_verl.checkpoint.find import Checkpoint, CheckpointError
from cppo_verl.run.folder import foreign, read_config

OWN_REWARD = "pkg://cppo_verl.grading"


def check_trust(checkpoint: Checkpoint, config: DictConfig | None, trusted: bool) -> None:
    """Raise CheckpointError where using the checkpoint would run code that may be somebody else's.

    Args:
        config: the run's, where its model and reward function are to be used, not its weights alone.
        trusted: the user has said that it may run.
    """
    code = list(_code(checkpoint, config))
    if trusted or not code:
        return
    folder, made_as = checkpoint.folder, None
    if checkpoint.run is not None:
        run = read_config(checkpoint.run).run
        folder = checkpoint.run
        made_as = f"{run.dir}/{run.name}" if "dir" in run and "name" in run else None
    if reason := foreign(folder, made_as):
        raise CheckpointError(
            f"CHECKPOINT: {folder} {reason}, and using it runs code that comes with it ({', '.join(code)}); "
            "give --trust if you trust who made it"
        )


def _code(checkpoint: Checkpoint, config: DictConfig | None) -> Iterator[str]:
    if checkpoint.backend is not None:
        yield "verl's shards are pickles"
    if config is not None and checkpoint.run is not None:
        if config.actor_rollout_ref.model.get("trust_remote_code", False):
            yield "actor_rollout_ref.model.trust_remote_code=true"
        if config.reward.custom_reward_function.path != OWN_REWARD:
            yield f"the reward function {config.reward.custom_reward_function.path}"
