"""Each method is its rule of the core and nothing else; what it reports as masked has gradient zero."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from cppo_verl import core
from cppo_verl.config.compose import choices, compose
from cppo_verl.methods import MEASURES, Tokens


@cache
def configured(name):
    """The settings of a method over binary TV, as ``cppo train`` composes them."""
    config = compose([f"method={name}", "divergence=binary_tv", "platform=cpu"])
    return OmegaConf.to_container(config.method, resolve=True)


def build(name, **changes):
    """The method as its configuration file says, with a few settings changed."""
    return instantiate({**configured(name), **changes})


@pytest.fixture
def tokens():
    """16 responses of up to 12 tokens, from nearly unmoved to far away: every threshold is crossed by some only."""
    generator = torch.Generator().manual_seed(5)
    shape = (16, 12)
    rollout = -0.2 - torch.rand(shape, generator=generator)
    distance = torch.logspace(-4, -0.3, 16).unsqueeze(-1)
    log_prob = (rollout + distance * torch.randn(shape, generator=generator)).clamp_max(-1e-3).requires_grad_()
    mask = torch.arange(12) < torch.randint(6, 13, (16, 1), generator=generator)
    advantages = torch.randn((16, 1), generator=generator).expand(shape)
    divergence = core.binary_tv(log_prob, rollout)
    return Tokens(log_prob, rollout, advantages, mask, divergence, torch.arange(16))


def gradient(tokens, outcome):
    loss = torch.where(tokens.valid, outcome.loss, 0.0).sum()
    return torch.autograd.grad(loss, tokens.log_prob)[0]


@pytest.mark.parametrize("name", sorted(choices("method")))
def test_masked_means_no_gradient_and_kept_means_some(name, tokens):
    outcome = build(name)(tokens)
    slope = gradient(tokens, outcome)
    valid = tokens.valid
    assert (slope[valid & (outcome.gate == 0)] == 0).all()
    assert (slope[valid & (outcome.gate == 1)] != 0).all()


@pytest.mark.parametrize(
    "name",
    [
        *("cppo", "dppo", "grpo", "trm_max", "trm_avg", "trm_max_avg"),
        *("gspo", "gmpo", "aspo", "m2po", "mis", "icepop", "fipo"),
    ],
)
def test_the_batch_exercises_the_mask(name, tokens):
    narrow = {"m2po": {"tau": 0.001}, "mis": {"high": 1.05}}.get(name, {})
    gate = build(name, **narrow)(tokens).gate[tokens.valid]
    assert 0 < (gate == 0).sum() < len(gate)


def test_cppo_is_the_cores_mask(tokens):
    outcome = build("cppo")(tokens)
    weights = core.position_weights(tokens.valid, 0.8)
    delta_b = torch.full((16,), 0.015)
    region = core.cppo_mask(
        tokens.log_prob.detach() - tokens.rollout_log_prob,
        tokens.advantages,
        tokens.divergence,
        tokens.valid,
        delta=0.15,
        weights=weights,
        delta_b=delta_b,
    )
    assert torch.equal(outcome.gate, region.keep.float())
    assert torch.equal(outcome.token_cause, region.token_exceeded)
    assert torch.equal(outcome.delta_b, delta_b)


def test_dppo_is_cppo_without_weights_and_budget(tokens):
    plain = build("cppo", weights="uniform", delta_b=None)(tokens)
    assert torch.equal(build("dppo")(tokens).gate, plain.gate)


def test_the_importance_weight_is_any_of_four_over_any_mask(tokens):
    """gate times weight: the loss is -gate k A with k the token's ratio, the response's product or mean, or 1."""
    far = tokens._replace(rollout_log_prob=tokens.rollout_log_prob - torch.linspace(0, 1, 12))
    x = far.log_ratio * far.valid
    kinds = {
        "token": x.exp(),
        "sequence": x.sum(-1, keepdim=True).exp().expand_as(x),
        "geometric": (x.sum(-1, keepdim=True) / far.valid.sum(-1, keepdim=True)).exp().expand_as(x),
        "none": torch.ones_like(x),
    }
    for kind, k in kinds.items():
        outcome = build("dppo", importance=kind, ratio_cap=1.5)(far)
        capped = k if kind == "none" else k.clamp_max(1.5)
        want = (-outcome.gate * capped * far.advantages)[far.valid]
        torch.testing.assert_close(outcome.loss[far.valid].detach(), want, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(gradient(far, outcome)[far.valid], want, rtol=1e-5, atol=1e-7)
        if kind == "none":
            assert outcome.clipped is None
        else:
            assert torch.equal(outcome.clipped, far.valid & (outcome.gate > 0) & (k > 1.5))
            assert outcome.clipped.any()
    with pytest.raises(InstantiationException, match="importance must be one of token, sequence, geometric, none"):
        build("cppo", importance="squared")


def test_a_scaled_quantile_and_a_reference_length(tokens):
    scaled = build("cppo", delta_b=0.001, delta_b_quantile=0.9, delta_b_scale=0.5, delta_b_max_factor=1e9)(tokens)
    plain = build("cppo", delta_b=0.001, delta_b_quantile=0.9, delta_b_max_factor=1e9)(tokens)
    torch.testing.assert_close(scaled.delta_b, (0.5 * plain.delta_b).clamp_min(0.001))
    lengths = tokens.valid.sum(-1)
    outcome = build("cppo", length_reference=8)(tokens)
    room = (8 * 7 / (lengths * (lengths - 1)).float()).sqrt()
    torch.testing.assert_close(outcome.delta_b, 0.015 * room)
    for row in range(16):  # each response as with thresholds of its own
        one = Tokens(*[column[row : row + 1] for column in tokens])
        own = build("cppo", delta=0.15 * room[row].item(), delta_b=0.015 * room[row].item())(one)
        assert torch.equal(own.gate, outcome.gate[row : row + 1])
    assert not torch.equal(outcome.gate, build("cppo")(tokens).gate)


SWITCHES = {
    "no position weights": {"weights": "uniform"},
    "shuffled weights": {"weights": "shuffled"},
    "no prefix budget": {"delta_b": None},
    "calibrated budget": {"delta_b_quantile": 0.9},
    "soft gate": {"soft_gate": True},
    "w_min": {"w_min": 1.0},
    "delta": {"delta": 1e9},
    "horizon": {"horizon": 4},
    "reference length": {"length_reference": 100},
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_every_switch_changes_the_result(switch, tokens):
    base = {"w_min": 0.2, "delta": 0.05, "delta_b": 0.1}
    assert not torch.equal(build("cppo", **(base | switch))(tokens).gate, build("cppo", **base)(tokens).gate)


def test_ratio_cap_changes_the_gradient(tokens):
    far = tokens._replace(rollout_log_prob=tokens.rollout_log_prob - 5)
    capped, free = build("dppo", delta=1e9, ratio_cap=20.0), build("dppo", delta=1e9, ratio_cap=None)
    assert gradient(far, capped(far)).abs().max() < gradient(far, free(far)).abs().max()


def test_shuffled_weights_follow_the_responses_seed(tokens):
    method = build("cppo", weights="shuffled", w_min=0.2, delta=0.05, delta_b=0.1)
    whole = method(tokens).gate
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    reordered = Tokens(*[column[order] for column in tokens])
    assert torch.equal(method(reordered).gate, whole[order])
    others = tokens._replace(response_seeds=tokens.response_seeds + 100)
    assert not torch.equal(method(others).gate, whole)
    with pytest.raises(ValueError, match="needs one seed per response"):
        method(tokens._replace(response_seeds=None))


CLIPPED = {
    "grpo": lambda t: core.clip_loss(t.log_prob, t.rollout_log_prob, t.advantages, eps_low=0.2, eps_high=0.28),
    "cispo": lambda t: core.cispo_loss(t.log_prob, t.rollout_log_prob, t.advantages, eps_low=1.0, eps_high=4.0),
    "minpro": lambda t: core.minpro_loss(
        t.log_prob, t.rollout_log_prob, t.advantages, t.valid, eps_low=0.2, eps_high=0.28
    ),
}


MASKED = [name for name in sorted(choices("method")) if "importance" in configured(name)]


@pytest.mark.parametrize(("name", "changes"), [*((n, {}) for n in (*CLIPPED, *MASKED)), ("cppo", {"soft_gate": True})])
def test_the_loss_is_the_cores(name, changes, tokens):
    """Ratios up to e^4: beyond every clip and the cap of 20."""
    far = tokens._replace(rollout_log_prob=tokens.rollout_log_prob - torch.linspace(0, 4, 12))
    outcome = build(name, **changes)(far)
    if name in CLIPPED:
        want = CLIPPED[name](far)
    else:
        cap = configured(name)["ratio_cap"]
        want = core.ratio_loss(far.log_prob, far.rollout_log_prob, far.advantages, outcome.gate, ratio_cap=cap)
    assert torch.equal(outcome.loss[far.valid], want[far.valid])


def test_the_calibrated_budget_is_the_cores(tokens):
    found = build("cppo", delta_b=0.01, delta_b_quantile=0.9, delta_b_max_factor=3.0)(tokens).delta_b
    want = core.prefix_budget(tokens.divergence, tokens.valid, delta_b=0.01, quantile=0.9, max_factor=3.0)
    assert torch.equal(found, want)
    assert len(want.unique()) > 2


def test_causes_are_the_thresholds(tokens):
    far = (tokens.divergence > 0.1) & tokens.valid
    assert torch.equal(build("dppo", delta=0.1)(tokens).token_cause, far)
    outcome = build("grpo")(tokens)
    assert torch.equal(outcome.token_cause, outcome.gate == 0)
    limits = {"delta_max": 0.1, "delta_avg": 1e-9}
    both = build("trm_max_avg", **limits)(tokens)
    assert not both.gate[tokens.valid].any()
    assert torch.equal(both.token_cause, far.any(-1, keepdim=True).expand(16, 12))


def test_a_response_that_fipo_masks_for_others_tokens_has_no_token_to_blame():
    """Two of four tokens lie beyond the dual clip: all are masked, those two by themselves."""
    log_ratio, ones = torch.tensor([[4.0, 4.0, 0.0, 0.0]]), torch.ones(1, 4)
    tokens = Tokens(log_ratio - 9, -9 * ones, -ones, ones.bool(), 0 * ones)
    outcome = build("fipo")(tokens)
    assert not outcome.gate.any()
    assert outcome.token_cause.tolist() == [[True, True, False, False]]


def test_trm_masks_whole_responses(tokens):
    outcome = build("trm_max", delta_max=0.1)(tokens)
    for gate, cause, valid in zip(outcome.gate, outcome.token_cause, tokens.valid, strict=True):
        assert len(set(gate[valid].tolist())) == 1
        assert (cause[valid] == (gate[valid] == 0)).all()


def test_every_configured_divergence_exists(tokens):
    assert set(MEASURES) == set(choices("divergence"))
    for name in choices("divergence"):
        assert compose([f"divergence={name}", "platform=cpu"]).divergence.name == name
        arguments = [tokens.log_prob.detach(), tokens.rollout_log_prob]
        if MEASURES[name].over_topk:  # K = 1: the sampled token
            arguments += [arguments[0][..., None], arguments[1][..., None], torch.ones(16, 12, dtype=torch.bool)]
        mu, pi = tokens.rollout_log_prob.double().exp(), tokens.log_prob.detach().double().exp()
        want = {
            "tv": (pi - mu).abs(),
            "kl": mu * (mu / pi).log() + (1 - mu) * ((1 - mu) / (1 - pi)).log(),
            "k3": pi / mu - 1 - (pi / mu).log(),
        }[name.rpartition("_")[2]]
        torch.testing.assert_close(MEASURES[name].function(*arguments), want.float(), atol=2e-6, rtol=1e-3)


def test_methods_know_nothing_of_their_caller(tokens):
    """Only what Tokens offers is read: the same numbers from anything that has it."""
    stand_in = SimpleNamespace(**tokens._asdict(), log_ratio=tokens.log_ratio)
    for name in choices("method"):
        assert torch.equal(build(name)(stand_in).loss, build(name)(tokens).loss)
