"""Methods that verl has as well: the same gradient from verl's own function on the same tensors.

What differs by verl's defaults and is set here: ``clip_ratio_c`` 3.0 (a dual clip in ``vanilla``, the cap of
``dppo_*``); ``clip_ratio_low/high`` 0.2 for every loss, GSPO's and GMPO's too; ``sapo`` reduces by sequence means
whatever is configured, ``geo_mean`` by its own.
"""

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

from cppo_verl import core
from cppo_verl.config.compose import compose
from cppo_verl.methods import MEASURES, Tokens

ROWS, COLUMNS = 24, 30
# method, its settings -> verl's function, verl's settings, reduction.
SAME = {
    "grpo": (
        {},
        "vanilla",
        {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 1e9},
        "token-mean",
    ),
    "cispo": ({}, "cispo", {"clip_ratio_low": 1.0, "clip_ratio_high": 4.0}, "token-mean"),
    "dppo": (
        {"delta": 0.1, "ratio_cap": 3.0},
        "dppo_tv",
        {"clip_ratio_low": 0.1, "clip_ratio_high": 0.1},
        "token-mean",
    ),
    "gspo": (
        {"eps_low": 0.01, "eps_high": 0.02},
        "gspo",
        {"clip_ratio_low": 0.01, "clip_ratio_high": 0.02},
        "seq-mean-token-mean",
    ),
    "sapo": ({}, "sapo", {}, "seq-mean-token-mean"),
    "gmpo": ({}, "geo_mean", {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}, "seq-mean-token-mean"),
}


def batch():
    """log pi, log mu, one advantage a response (none of them 0), a mask with holes and no empty row; float64."""
    draw = torch.Generator().manual_seed(3)
    log_mu = -0.05 - 2 * torch.rand(ROWS, COLUMNS, generator=draw, dtype=torch.float64)
    spread = torch.logspace(-3, 0, ROWS, dtype=torch.float64)[:, None]
    log_pi = (log_mu + spread * torch.randn(ROWS, COLUMNS, generator=draw, dtype=torch.float64)).clamp_max(-1e-3)
    advantages = torch.randn(ROWS, 1, generator=draw, dtype=torch.float64).expand(ROWS, COLUMNS).contiguous()
    mask = torch.rand(ROWS, COLUMNS, generator=draw) < 0.8
    mask[:, 0] = True
    return log_pi, log_mu, advantages, mask


def ours(name, settings, reduction):
    log_pi, log_mu, advantages, mask = batch()
    config = compose([f"method={name}", "divergence=binary_tv", "platform=cpu"])
    method = instantiate({**OmegaConf.to_container(config.method, resolve=True), **settings})
    leaf = log_pi.clone().requires_grad_()
    divergence = MEASURES["binary_tv"].function(leaf.detach().float(), log_mu.float())
    outcome = method(Tokens(leaf, log_mu, advantages, mask, divergence))
    core_algos.agg_loss(outcome.loss, mask, reduction).backward()
    return leaf.grad, outcome


def verls(name, settings, reduction):
    log_pi, log_mu, advantages, mask = batch()
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **settings)
    leaf = log_pi.clone().requires_grad_()
    loss, _ = core_algos.get_policy_loss_fn(name)(
        old_log_prob=log_mu, log_prob=leaf, advantages=advantages, response_mask=mask.double(),
        loss_agg_mode=reduction, config=config,
    )  # fmt: skip
    loss.backward()
    return leaf.grad


@pytest.mark.parametrize("name", SAME)
def test_the_gradient_is_verls(name):
    settings, function, theirs, reduction = SAME[name]
    slope, outcome = ours(name, settings, reduction)
    torch.testing.assert_close(slope, verls(function, theirs, reduction), rtol=2e-5, atol=1e-9)
    assert slope.abs().max() > 1e-4
    if name not in ("cispo", "sapo"):
        mask = batch()[3]
        assert 0.01 < (outcome.gate[mask] == 0).double().mean() < 0.9


def test_a_setting_that_differs_is_seen():
    """verl's default dual clip, and its cap of 3 instead of 20."""
    settings, function, theirs, reduction = SAME["grpo"]
    slope = ours("grpo", settings, reduction)[0]
    assert not torch.allclose(slope, verls(function, theirs | {"clip_ratio_c": 3.0}, reduction), rtol=1e-3, atol=1e-9)
    slope = ours("dppo", {"delta": 0.1, "ratio_cap": 20.0}, "token-mean")[0]
    assert not torch.allclose(slope, verls("dppo_tv", SAME["dppo"][2], "token-mean"), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("threshold", [1.3, "0.8_1.3"])
def test_importance_weights_are_those_of_verls_rollout_correction(level, threshold):
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    log_pi, log_mu, _, mask = batch()
    found = compute_rollout_correction_weights(
        log_ratio=log_pi - log_mu, response_mask=mask.double(), rollout_is=level, rollout_is_threshold=threshold
    )
    theirs = found[0] if isinstance(found, tuple) else found
    if isinstance(threshold, float):
        factor = core.truncated(log_pi - log_mu, mask, level=level, cap=threshold)
        assert factor.clipped.any()
    else:
        low, high = map(float, threshold.split("_"))
        factor = core.banded(log_pi - log_mu, mask, level=level, low=low, high=high)
        assert 0 < (factor.gate[mask] == 0).sum() < mask.sum()
    torch.testing.assert_close(factor.weight.double(), theirs.double() * mask, rtol=1e-5, atol=1e-7)


def test_verls_bounds_of_token_k1_are_of_the_inverse_ratio():
    """What the page on IcePop says of verl's rollout_rs."""
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_rejection_mask

    ratios = torch.tensor([[0.15, 0.3, 1.0, 1.9, 2.1, 4.0]], dtype=torch.float64)
    keep, _ = compute_rollout_rejection_mask(
        log_ratio=ratios.log(), response_mask=torch.ones_like(ratios), rollout_rs="token_k1",
        rollout_rs_threshold="0.5_5.0",
    )  # fmt: skip
    assert keep.bool().tolist() == [[False, True, True, True, False, False]]
