"""Our loss inside verl's real FSDP2 engine: micro-batching and data parallelism change neither gradient nor metrics."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine import DELTA, DELTA_B, W_MIN
from mask_oracle import mask_of_response
from omegaconf import OmegaConf

ENGINE = Path(__file__).with_name("engine.py")


def run_engine(config, folder, world):
    """Each rank's updates, one dict per micro-batch size."""
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = folder / f"updates-{world}"
    command = [sys.executable, str(ENGINE), str(folder / "config.yaml"), str(out)]
    environment = {**os.environ, "VERL_PLATFORM": "cpu", "HF_HUB_OFFLINE": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(port)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    return [[json.loads(line) for line in Path(f"{out}.{rank}").read_text().splitlines()] for rank in range(world)]


@pytest.fixture(scope="module")
def engine_config(live_assets):
    from cppo_verl.config import compose

    return compose(
        [
            "platform=cpu",
            "recipe=quickstart",
            f"quickstart.assets={live_assets}",
            "run.name=engine",
            f"method.delta={DELTA}",
            f"method.delta_b={DELTA_B}",
            f"method.w_min={W_MIN}",
            "actor_rollout_ref.actor.optim.lr=0.0",
        ]
    )


@pytest.fixture(scope="module")
def linear(engine_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    return folder, run_engine(engine_config, folder, world=1)[0]


def test_the_batch_decides_every_token_clearly(linear):
    """No token within 1e-6 of a threshold, and both causes at work: otherwise the next tests would prove little."""
    folder, _ = linear
    dump = torch.load(next(folder.glob("updates-1.dump/*.pt")))
    rows = [mask_of_response(dump, row, delta=DELTA, delta_b=DELTA_B, w_min=W_MIN) for row in range(16)]
    assert min(distance for _, margin, _ in rows for distance in margin) > 1e-6
    masked = [cause for keep, _, causes in rows for kept, cause in zip(keep, causes, strict=True) if not kept]
    assert min(masked.count("token"), masked.count("prefix")) >= 10
    gate = [(dump["gate"][row][dump["response_mask"][row]] == 1).tolist() for row in range(16)]
    assert gate == [keep for keep, _, _ in rows]


def assert_same_update(reference, other):
    assert other["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)
    scale = abs(reference["trust_region/absolute_loss"]) * reference["trust_region/tokens"] / (16 * 40)
    assert abs(other["loss"] - reference["loss"]) <= 1e-6 * scale
    for name in reference:
        if name.startswith(("trust_region/", "divergence/", "policy/", "rollout/")):
            assert other[name] == pytest.approx(reference[name], rel=1e-5, abs=1e-9), name


def test_micro_batch_size_changes_nothing(linear):
    _, updates = linear
    assert [update["micro_batch_size"] for update in updates] == [1, 4, 16]
    for update in updates[:2]:
        assert_same_update(updates[2], update)


def test_two_ranks_train_like_one(engine_config, linear, tmp_path):
    config = engine_config.copy()
    config.trainer.n_gpus_per_node = 2
    for updates in run_engine(config, tmp_path, world=2):
        for update in updates:
            assert_same_update(linear[1][2], update)


def test_shuffled_weights_do_not_depend_on_micro_batches(engine_config, tmp_path):
    """Seeded per response; with one generator per micro-batch the three would differ."""
    config = engine_config.copy()
    config.method.weights = "shuffled"
    updates = run_engine(config, tmp_path, world=1)[0]
    for update in updates[:2]:
        assert_same_update(updates[2], update)


def test_the_mask_changes_the_gradient(engine_config, linear, tmp_path):
    """The same batch with delta = 1e9 and no budget: nothing masked, another gradient."""
    config = engine_config.copy()
    config.method.delta, config.method.delta_b = 1e9, None
    free = run_engine(config, tmp_path, world=1)[0][2]
    assert free["trust_region/masked"] == 0
    assert abs(free["grad_norm"] / linear[1][2]["grad_norm"] - 1) > 1e-2
