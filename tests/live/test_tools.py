"""A run with a tool: the model calls a calculator, and the trust region is over its own tokens only."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from leftovers import leftovers
from mask_oracle import divergences_of_response, mask_of_response
from small_run import base_overrides

from cppo_verl.run.log import read_metrics

pytestmark = [pytest.mark.live, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
DELTA, DELTA_B, W_MIN = 0.02, 0.01, 0.8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of a model that has been warmed up on calls for a moment, validated at the end."""
    folder = tmp_path_factory.mktemp("tools")
    warm = [
        "--calculator",
        "--terms",
        "2",
        "--operand-max",
        "60",
        "--warmup-worked-share",
        "0.7",
        "--warmup-problems",
        "800",
    ]
    more = ["--warmup-steps", "160", "--heldout-problems", "8", "--measure-samples", "2"]
    command = [sys.executable, "-m", "cppo_verl.quickstart", "--out", str(folder / "assets"), *warm, *more]
    subprocess.run(command, check=True, timeout=900)
    settings = [
        "recipe=tools",
        f"actor_rollout_ref.rollout.multi_turn.function_tool_path={ROOT / 'recipes/calculator.py'}",
        "reward.custom_reward_function.path=pkg://cppo_verl.grading",
        *(f"run.dir={folder}", "run.name=r", "run.mask_std_0=false", "run.dump_steps=[1,2]"),
        *("trainer.total_training_steps=2", "trainer.test_freq=2"),
        *(f"method.delta={DELTA}", f"method.delta_b={DELTA_B}", f"method.w_min={W_MIN}"),
    ]
    command = [str(Path(sys.executable).parent / "cppo"), "train", *base_overrides(folder / "assets"), *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "r"


@pytest.fixture(scope="module")
def rows(run):
    """(step, minibatch, batch, row) of every dumped response."""
    found = []
    for file in sorted((run / "dumps").glob("step_*/*.pt")):
        minibatch = int(file.name.removeprefix("minibatch").partition("_")[0])
        batch = torch.load(file)
        step = int(file.parent.name.removeprefix("step_"))
        found += [(step, minibatch, batch, row) for row in range(len(batch["response_mask"]))]
    return found


def holes(valid):
    """How many tokens lie between the first and the last own one and are not own."""
    own = valid.nonzero()[:, 0]
    return int(own[-1] - own[0] + 1 - len(own)) if len(own) else 0


def test_the_model_calls_and_calls_are_counted(run, rows):
    lines = read_metrics(run)
    torn = sum(holes(batch["response_mask"][row].bool()) > 0 for _, _, batch, row in rows)
    print(f"{torn} of {len(rows)} responses go on after a result")
    assert torn > len(rows) / 4
    for step in (1, 2):
        assert lines[step]["rollout/tool_calls"] > 0
        assert lines[step]["rollout/tool_errors"] >= 0
        assert lines[step]["rollout/missing_responses"] == 0
        assert lines[step]["num_turns/max"] >= 4


def test_rows_lie_at_the_models_own_tokens(rows, run):
    """Under the weights that sampled, log pi is log mu at every own token and its K ids, after a result as well."""
    compared = 0
    for step, minibatch, batch, row in rows:
        if (step, minibatch) != (1, 0):
            continue
        valid = batch["response_mask"][row].bool()
        after = valid & (torch.cumsum(~valid, 0) > 0)  # behind the first result
        for name in ("", "topk_"):
            pi, mu = batch[f"{name}log_prob"][row][valid], batch[f"rollout_{name}log_prob"][row][valid]
            assert torch.allclose(pi, mu, rtol=0, atol=1e-4)
        compared += int(after.sum())
    assert compared > 50
    assert read_metrics(run)[1]["divergence/at_rollout_weights"] < 1e-4


def test_divergence_weights_and_mask_count_own_tokens_only(rows, run):
    """The float64 loop over a response without its holes, and what is logged of a step is over that alone."""
    masked = compared = 0
    own = {1: [], 2: []}
    for step, _, batch, row in rows:
        valid = batch["response_mask"][row].bool()
        expected = torch.tensor(divergences_of_response(batch, row), dtype=torch.float64)
        assert torch.allclose(batch["divergence"][row][valid].double(), expected, rtol=0, atol=1e-6)
        own[step] += expected.tolist()
        wanted, margin, _ = mask_of_response(batch, row, delta=DELTA, delta_b=DELTA_B, w_min=W_MIN)
        for got, want, distance in zip((batch["gate"][row][valid] == 1).tolist(), wanted, margin, strict=True):
            assert got == want or distance < 1e-6
            compared += 1
            masked += not want
    print(f"{masked} of {compared} tokens masked")
    assert masked > 10
    for step, divergence in own.items():
        line = read_metrics(run)[step]
        assert line["trust_region/tokens"] == len(divergence)
        assert line["divergence/mean"] == pytest.approx(sum(divergence) / len(divergence), rel=1e-5)


def test_it_leaves_nothing_running(run):
    assert leftovers(run) == []
