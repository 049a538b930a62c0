"""One real stack (verl + Ray + vLLM + FSDP2 on the CPU): CPPO and a baseline train, and the mask is the paper's."""

import math

import pytest
import torch
from mask_oracle import mask_of_response
from stack import run_stages

pytestmark = pytest.mark.live

# Thresholds small enough that an untrained tiny model exceeds both within two minibatches.
DELTA, DELTA_B, W_MIN = 0.004, 0.0008, 0.8
CPPO = ["method=cppo", f"method.delta={DELTA}", f"method.delta_b={DELTA_B}", f"method.w_min={W_MIN}"]


@pytest.fixture(scope="module")
def stages(live_base):
    plan = [
        ("cppo", [*CPPO, "run.dump_steps=[1,3]"], 3),
        ("grpo", ["method=grpo"], 2),
    ]
    return run_stages(live_base, plan, timeout=600)


@pytest.fixture(scope="module")
def dumps(stages, live_folder):
    """(step, minibatch) -> list of dumped micro-batches."""
    found = {}
    for path in sorted((live_folder / "dumps").glob("step_*/minibatch*.pt")):
        minibatch = int(path.name.removeprefix("minibatch").split("_")[0])
        found.setdefault((int(path.parent.name.removeprefix("step_")), minibatch), []).append(torch.load(path))
    return found


def test_cppo_and_a_baseline_train(stages):
    assert [len(stages[name]) for name in ("cppo", "grpo")] == [3, 2]
    for lines in stages.values():
        for line in lines:
            assert math.isfinite(line["actor/grad_norm"])
            assert line["actor/grad_norm"] > 0
            assert line["trust_region/tokens"] > 0
            assert line["rollout/missing_responses"] == 0


def test_identical_weights_have_no_divergence_and_mask_nothing(dumps, stages):
    """Before the first update rollout and training run the same float32 weights."""
    assert stages["cppo"][0]["divergence/at_rollout_weights"] < 1e-4
    divergence = torch.cat([batch["divergence"][batch["response_mask"]] for batch in dumps[1, 0]])
    gate = torch.cat([batch["gate"][batch["response_mask"]] for batch in dumps[1, 0]])
    assert len(divergence) > 50
    assert divergence.mean() < 1e-4
    assert (gate == 1).all()


def test_mask_of_the_training_step_is_the_papers(dumps):
    """Token for token against the float64 loop, in minibatches after the first, but for tokens on a threshold."""
    compared = near = by_token = by_prefix = 0
    for (_, minibatch), batches in dumps.items():
        for batch in batches if minibatch > 0 else []:
            for row in range(len(batch["response_mask"])):
                wanted, margin, causes = mask_of_response(batch, row, delta=DELTA, delta_b=DELTA_B, w_min=W_MIN)
                kept = (batch["gate"][row][batch["response_mask"][row]] == 1).tolist()
                for got, want, distance, cause in zip(kept, wanted, margin, causes, strict=True):
                    if distance < 1e-6:
                        near += 1
                        continue
                    assert got == want
                    compared += 1
                    by_token += not want and cause == "token"
                    by_prefix += not want and cause == "prefix"
    print(
        f"compared {compared} tokens, {near} within 1e-6 of a threshold; masked: token {by_token}, prefix {by_prefix}"
    )
    assert by_token + by_prefix >= 20
    assert min(by_token, by_prefix) > 0


def test_reported_shares_are_those_of_the_dump(dumps, stages):
    """Metrics are exact over the tokens of a step, whatever its micro-batches."""
    batches = [batch for (step, _), found in dumps.items() if step == 3 for batch in found]
    valid = torch.cat([batch["response_mask"].flatten() for batch in batches])
    masked = torch.cat([(batch["gate"] < 1).flatten() for batch in batches]) & valid
    cause = torch.cat([batch["token_cause"].flatten() for batch in batches])
    divergence = torch.cat([batch["divergence"].flatten() for batch in batches]).double()
    line = stages["cppo"][2]
    assert line["trust_region/tokens"] == valid.sum()
    assert line["trust_region/masked"] == pytest.approx((masked.sum() / valid.sum()).item(), rel=1e-6)
    assert line["trust_region/masked_by_token"] == pytest.approx(
        ((masked & cause).sum() / valid.sum()).item(), rel=1e-6
    )
    assert line["divergence/mean"] == pytest.approx(divergence[valid].mean().item(), rel=1e-6)
    assert line["divergence/p99"] == pytest.approx(divergence[valid].quantile(0.99).item(), rel=0.08)


def test_skipped_groups_train_nothing(dumps, stages):
    """Responses of a group with equal rewards have advantage 0 and are out of the mask."""
    for line in stages["cppo"] + stages["grpo"]:
        assert 0 <= line["groups/zero_variance"] < line["groups/total"] == 8
    for batches in dumps.values():
        for batch in batches:
            unused = ~batch["response_mask"].any(-1)
            assert (batch["loss"][unused] == 0).all()
