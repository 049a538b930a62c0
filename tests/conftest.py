"""The untrained model, its data and the settings of every live stack."""

from pathlib import Path

import pytest

LIVE = Path(__file__).parent / "live"


@pytest.fixture(scope="session")
def live_assets(tmp_path_factory):
    """A random tiny Qwen3 and two small arithmetic files."""
    from cppo_verl.quickstart.model import ModelShape, build_model, build_tokenizer
    from cppo_verl.quickstart.task import TaskSpec, make_splits, write_parquet

    folder = tmp_path_factory.mktemp("assets")
    shape = ModelShape()
    tokenizer = build_tokenizer(shape)
    tokenizer.save_pretrained(folder / "model")
    build_model(shape, tokenizer, seed=0).save_pretrained(folder / "model")
    splits = make_splits(TaskSpec(), seed=0)
    write_parquet(splits.train[:64], "train", folder / "train.parquet")
    write_parquet(splits.heldout[:8], "heldout", folder / "heldout.parquet")
    return folder


@pytest.fixture(scope="module")
def live_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "live"


@pytest.fixture(scope="module")
def live_base(live_assets, live_folder):
    """Overrides of a stack small enough for seconds a step: 8 prompts of 4 responses, two minibatches."""
    return [
        "platform=cpu",
        "recipe=quickstart",
        f"quickstart.assets={live_assets}",
        f"run.dir={live_folder.parent}",
        f"run.name={live_folder.name}",
        f"reward.custom_reward_function.path={LIVE / 'rewards.py'}",
        "data.train_batch_size=8",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.actor.optim.lr=5e-4",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
    ]
