"""``loss_mode=cppo`` in verl's own loss: the loss and gradient of our trainer's, over a binary divergence."""

import re
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, compute_policy_loss_cispo, get_policy_loss_fn
from verl.utils import tensordict_utils as tu
from verl.workers.utils.losses import ppo_loss

from cppo_verl import policy_loss
from cppo_verl.adapters.actor.loss import TrustRegionLoss
from cppo_verl.config.compose import choices, compose
from cppo_verl.problems import ConfigError

LENGTHS = [7, 3, 9, 5]


def nested(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def both(name, *overrides, loss_mode=None, mode="seq-mean-token-sum-norm"):
    """(loss, gradient) of our trainer's loss and of verl's ppo_loss with ours registered."""
    config = compose(["platform=cpu", f"method={name}", *overrides])
    divergence = config.divergence.name
    if divergence.startswith("topk"):
        divergence = f"binary_{config.divergence.kind}"
    draw = torch.Generator().manual_seed(0)
    log_mu = [-2 * torch.rand(length, generator=draw) - 0.05 for length in LENGTHS]
    moved = [(row + 0.3 * torch.randn(len(row), generator=draw)).clamp_max(-0.01) for row in log_mu]
    columns = {
        "prompts": nested([torch.ones(2, dtype=torch.long) for _ in LENGTHS]),
        "responses": nested([torch.ones(length, dtype=torch.long) for length in LENGTHS]),
        "input_ids": nested([torch.ones(2 + length, dtype=torch.long) for length in LENGTHS]),
        "response_mask": nested([torch.ones(length, dtype=torch.long) for length in LENGTHS]),
        "loss_mask": nested([torch.ones(length, dtype=torch.long) for length in LENGTHS]),
        "rollout_log_probs": nested(log_mu),
        "old_log_probs": nested(log_mu),
        "advantages": nested([torch.full((length,), 1.0 - row % 2 * 2.5) for row, length in enumerate(LENGTHS)]),
    }
    data = TensorDict(columns, batch_size=len(LENGTHS))
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=sum(LENGTHS), global_batch_size=len(LENGTHS),
                         max_response_len=9)  # fmt: skip
    results = []
    for ours in (True, False):
        leaf = torch.cat([torch.cat([torch.zeros(1), row, torch.zeros(1)]) for row in moved]).requires_grad_()
        offsets = torch.tensor([0, *torch.tensor([2 + length for length in LENGTHS]).cumsum(0).tolist()])
        output = {"log_probs": torch.nested.nested_tensor_from_jagged(leaf, offsets)}
        settings = {
            "policy_loss": SimpleNamespace(
                method=instantiate(config.method), divergence={"name": divergence},
                get=lambda key, default=None: {"loss_mode": loss_mode or name}.get(key, default),
            ),
            **{"loss_agg_mode": mode, "loss_scale_factor": 40, "global_batch_info": {}},
            **{"entropy_coeff": 0.0, "use_kl_loss": False, "kl_loss_coef": 0.0, "kl_loss_type": "kl"},
        }  # fmt: skip
        actor = SimpleNamespace(**settings)
        loss, metrics = TrustRegionLoss(actor)(output, data) if ours else ppo_loss(actor, output, data)
        loss.backward()
        results.append((loss.item(), leaf.grad, metrics))
    return results


METHODS = sorted(choices("method"))


@pytest.mark.parametrize("name", METHODS)
def test_the_registered_loss_is_our_trainers(name):
    loss_mode = name if isinstance(POLICY_LOSS_REGISTRY[name], policy_loss.RegisteredLoss) else f"cppo_verl.{name}"
    (loss, slope, _), (theirs, their_slope, metrics) = both(name, loss_mode=loss_mode)
    assert loss == pytest.approx(theirs, rel=1e-6)
    torch.testing.assert_close(slope, their_slope, rtol=1e-6, atol=1e-9)
    assert slope.abs().max() > 0 or name.startswith("trm")
    assert metrics["trust_region/masked"].aggregate() >= 0


def test_verls_own_losses_stay_verls():
    assert POLICY_LOSS_REGISTRY["cispo"] is compute_policy_loss_cispo
    assert isinstance(get_policy_loss_fn("cppo_verl.cispo"), policy_loss.RegisteredLoss)
    assert isinstance(get_policy_loss_fn("cppo"), policy_loss.RegisteredLoss)


def test_settings_of_ones_own():
    policy_loss.register("mine", "method=cppo", "method.delta=0.02", "method.delta_b=0.001")
    (loss, slope, _), (theirs, their_slope, metrics) = both(
        "cppo", "method.delta=0.02", "method.delta_b=0.001", loss_mode="mine"
    )
    assert loss == pytest.approx(theirs, rel=1e-6)
    torch.testing.assert_close(slope, their_slope, rtol=1e-6, atol=1e-9)
    default = both("cppo", loss_mode="cppo")[1]
    assert metrics["trust_region/masked"].aggregate() > default[2]["trust_region/masked"].aggregate()
    assert loss != default[0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method=trm_max", "divergence=binary_tv"], "divergence=binary_tv: trm_max is defined on a KL divergence"),
        (["method=drpo", "divergence=binary_kl"], "divergence=binary_kl: drpo is defined on a total variation"),
        (["method=cppo", "divergence=topk_tv"], "divergence=topk_tv: a policy loss sees no Top-K"),
        (["method=cppo", "method.delta=-1"], "method.delta must be > 0; got -1"),
        (["method=ppo2"], "method=ppo2: there is no such method"),
    ],
)
def test_what_cppo_train_refuses_is_refused(overrides, expected):
    policy_loss.register("refused", *overrides)
    x = torch.zeros(1, 2)
    with pytest.raises(ConfigError, match=re.escape(expected)):
        get_policy_loss_fn("refused")(x, x, x, torch.ones(1, 2), config=None)


def test_a_reduction_of_verls():
    (loss, slope, _), (theirs, their_slope, _) = both("cppo", mode="token-mean")
    assert loss == pytest.approx(theirs, rel=1e-6)
    torch.testing.assert_close(slope, their_slope, rtol=1e-6, atol=1e-9)


def test_weights_of_verls_are_refused():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="rollout_is: the method weighs by itself"):
        get_policy_loss_fn("cppo")(x, x, x, torch.ones(1, 2), config=None, rollout_is_weights=x)
