"""The untrained model, the data and the settings of every live stack."""

from pathlib import Path

import torch


def make_assets(folder: Path) -> Path:
    """A random tiny Qwen3 and two small arithmetic files in ``folder``."""
    from cppo_verl.quickstart.model import build_model, build_tokenizer
    from cppo_verl.quickstart.specs import ModelShape
    from cppo_verl.quickstart.task import TaskSpec, make_splits, write_parquet

    shape = ModelShape()
    tokenizer = build_tokenizer(shape)
    tokenizer.save_pretrained(folder / "model")
    build_model(shape, tokenizer, seed=0).save_pretrained(folder / "model")
    splits = make_splits(TaskSpec(), seed=0)
    write_parquet(splits.train[:64], "train", folder / "train.parquet")
    write_parquet(splits.heldout[:8], "heldout", folder / "heldout.parquet")
    return folder


def base_overrides(assets: Path) -> list[str]:
    """A stack small enough for seconds a step: 8 prompts of 4 responses, two minibatches."""
    return [
        "platform=cpu",
        "recipe=quickstart",
        f"quickstart.assets={assets}",
        f"reward.custom_reward_function.path={Path(__file__).parent / 'rewards.py'}",
        "data.train_batch_size=8",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.actor.optim.lr=5e-4",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "run.stall_minutes=8",  # sooner than the tests' own limits, and it tells where a run hangs
    ]


def weights_of(actor: Path) -> torch.Tensor:
    """All weights of a one-rank FSDP checkpoint, flat, float64."""
    state = torch.load(actor / "model_world_size_1_rank_0.pt", weights_only=False, map_location="cpu")
    local = [value.to_local() if hasattr(value, "to_local") else value for value in state.values()]
    return torch.cat([value.double().flatten() for value in local])
