"""The quickstart on a GPU: verl, Ray and vLLM as ``cppo train platform=gpu`` starts them.

CPPO_QUICKSTART_ASSETS names a folder that ``python -m cppo_verl.quickstart`` filled (else it is made here),
CPPO_GPU_RUNS where the run folder is to stay.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mask_oracle import divergences_of_response, mask_of_response

from cppo_verl.training.summary import RunSummary

pytestmark = [pytest.mark.live, pytest.mark.slow]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The finished run."""
    assets = os.environ.get("CPPO_QUICKSTART_ASSETS")
    if not assets:
        assets = str(tmp_path_factory.mktemp("quickstart"))
        subprocess.run([sys.executable, "-m", "cppo_verl.quickstart", "--out", assets], check=True, timeout=600)
    folder = Path(os.environ.get("CPPO_GPU_RUNS") or tmp_path_factory.mktemp("runs"))
    command = [sys.executable, "-m", "cppo_verl.cli", "train", "platform=gpu", "recipe=quickstart"]
    command += [f"quickstart.assets={assets}", f"run.dir={folder}", "run.name=quickstart", "run.seed=11"]
    # Works without flash-attn; the model is too small for graphs to pay.
    command += ["+actor_rollout_ref.model.override_config.attn_implementation=sdpa"]
    command += ["actor_rollout_ref.rollout.enforce_eager=true", "actor_rollout_ref.rollout.gpu_memory_utilization=0.3"]
    # verl's eight of each are for a node of eight cards.
    command += ["actor_rollout_ref.rollout.agent.num_workers=2", "reward.num_workers=4"]
    command += ["transfer_queue.backend.SimpleStorage.num_data_storage_units=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=420)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "quickstart"


def test_it_learns(run):
    (change,) = RunSummary.read(run).changes
    print(f"{change.before:.1%} -> {change.after:.1%}, {change.low:+.3f} to {change.high:+.3f}")
    assert change.low > 0.2


def test_before_the_first_update_rollout_and_training_are_near(run):
    """bfloat16 rollout, bfloat16 forward pass: what the mismatch is before anything moved."""
    lines = RunSummary.read(run).trained()
    floors = [line["divergence/at_rollout_weights"] for line in lines]
    errors = [line["rollout/log_prob_relative_error"] for line in lines]
    print(f"divergence at the rollout's weights: {min(floors):.2g} to {max(floors):.2g}")
    print(f"relative error of log pi, at most: {max(errors):.2g}")
    assert 0 < max(floors) < 0.02


def test_divergence_and_mask_are_the_float64_loops(run):
    masked, compared = 0, 0
    for path in sorted(run.glob("dumps/step_*/minibatch*.pt")):
        batch = {name: value.cpu() for name, value in torch.load(path).items()}
        for row in range(len(batch["response_mask"])):
            valid = batch["response_mask"][row]
            expected = torch.tensor(divergences_of_response(batch, row), dtype=torch.float64)
            torch.testing.assert_close(batch["divergence"][row][valid].double(), expected, rtol=0, atol=1e-6)
            keep, margin, _ = mask_of_response(batch, row, delta=0.15, delta_b=0.015, w_min=0.8)
            for got, want, distance in zip((batch["gate"][row][valid] == 1).tolist(), keep, margin, strict=True):
                if distance > 1e-6:
                    assert got == want
                    compared, masked = compared + 1, masked + (not want)
    print(f"{compared} tokens compared, {masked} masked")
    assert compared > 5000
    assert masked > 0
