"""Divergences (Section 2.3, Appendix D) against explicit partitions of a full vocabulary."""

import itertools
import math

import core_reference as slow
import pytest
import torch
from core_cases import FLOAT_DTYPES, generator, vocabulary

from cppo_verl.core.divergence import binary_kl, binary_tv, k3, topk_kl, topk_tv

TOPK = [topk_tv, topk_kl]
TOLERANCE = {"atol": 2e-6, "rtol": 2e-5}


def flat(tensor):
    return tensor.reshape(-1, *tensor.shape[2:]).tolist()


def over_cells(formula, cells, shape):
    return torch.tensor([formula(c) for c in cells], dtype=torch.float64).reshape(shape).float()


def partitions(full):
    """The K + 1 or K + 2 cells of every position, out of the full distributions."""
    parts = zip(flat(full["mu"]), flat(full["pi"]), flat(full["ids"]), flat(full["sampled"]), strict=True)
    return [slow.vocabulary_cells(mu, pi, set(ids), sampled) for mu, pi, ids, sampled in parts]


def whole(full):
    return [slow.full_cells(mu, pi) for mu, pi in zip(flat(full["mu"]), flat(full["pi"]), strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("top", [1, 2, 4, 10])
@pytest.mark.parametrize("seed", range(6))
def test_topk_matches_the_explicit_partition(seed, top, dtype):
    inputs, full = vocabulary(seed, top=top, dtype=dtype)
    shape = inputs["log_prob"].shape
    for function, formula in [(topk_tv, slow.tv_of_cells), (topk_kl, slow.kl_of_cells)]:
        value = function(**inputs)
        assert value.dtype == torch.float32
        assert value.shape == shape
        torch.testing.assert_close(value, over_cells(formula, partitions(full), shape), **TOLERANCE)


def test_the_random_partitions_hold_both_kinds_of_positions():
    inside = torch.cat([vocabulary(seed)[0]["sampled_in_topk"].flatten() for seed in range(6)])
    assert 0.1 < inside.float().mean() < 0.9


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (4, 33)])
def test_binary_matches_the_slow_loop(shape, dtype):
    for seed in range(5):
        g = generator(seed)
        mu = (-5 * torch.rand(shape, generator=g) - 1e-2).to(dtype)
        pi = (-5 * torch.rand(shape, generator=g) - 1e-2).to(dtype)
        cells = [
            slow.binary_cells(p, m)
            for p, m in zip(pi.double().flatten().tolist(), mu.double().flatten().tolist(), strict=True)
        ]
        for function, formula in [(binary_tv, slow.tv_of_cells), (binary_kl, slow.kl_of_cells)]:
            value = function(pi, mu)
            assert value.dtype == torch.float32
            assert value.shape == shape
            torch.testing.assert_close(value, over_cells(formula, cells, shape), **TOLERANCE)


def log_of(*probabilities):
    return torch.tensor([[probabilities]]).log()


# mu = (.5, .25, .125, .125), pi = (.25, .25, .375, .125), K = 2
BY_HAND = {
    "sampled among the K: K cells and other": (0.5, 0.25, True, 0.5 * (0.25 + 0 + 0.25)),
    "sampled outside: a cell of its own": (0.125, 0.375, False, 0.5 * (0.25 + 0 + 0.25 + 0)),
    "sampled outside and unchanged: other holds the move": (0.125, 0.125, False, 0.5 * (0.25 + 0 + 0 + 0.25)),
}


@pytest.mark.parametrize(("mu", "pi", "inside", "expected"), BY_HAND.values(), ids=BY_HAND.keys())
def test_topk_tv_by_hand(mu, pi, inside, expected):
    value = topk_tv(log_of(pi)[0], log_of(mu)[0], log_of(0.25, 0.25), log_of(0.5, 0.25), torch.tensor([[inside]]))
    assert value.item() == pytest.approx(expected, abs=1e-6)


def test_the_sampled_token_is_added_and_replaces_no_entry():
    """mu = (.5, .25, s = .125, .125), pi = (.5, .3125, .125, .0625): without the K-th cell both would be 0."""
    inputs = log_of(0.125)[0], log_of(0.125)[0], log_of(0.5, 0.3125), log_of(0.5, 0.25), torch.tensor([[False]])
    assert topk_tv(*inputs).item() == pytest.approx(0.0625, abs=1e-6)
    assert topk_kl(*inputs).item() == pytest.approx(0.25 * math.log(0.8) + 0.125 * math.log(2), abs=1e-6)


def test_a_sampled_token_among_the_k_is_counted_once():
    """sampled_in_topk decides; the sampled log-probs then carry nothing the K entries do not."""
    value = topk_tv(log_of(0.5)[0], log_of(0.25)[0], log_of(0.5, 0.25), log_of(0.25, 0.25), torch.tensor([[True]]))
    assert value.item() == pytest.approx(0.25, abs=1e-6)


def test_kl_is_from_mu_to_pi_by_hand():
    mu, pi = 0.75, 0.25
    expected = 0.75 * math.log(3) + 0.25 * math.log(1 / 3)
    assert binary_kl(log_of(pi)[0], log_of(mu)[0]).item() == pytest.approx(expected, rel=1e-5)
    mu, pi = 0.5, 0.25  # asymmetric: KL(pi || mu) would be 0.1308
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert binary_kl(log_of(pi)[0], log_of(mu)[0]).item() == pytest.approx(expected, rel=1e-5)
    value = topk_kl(log_of(pi)[0], log_of(mu)[0], log_of(pi), log_of(mu), torch.tensor([[True]]))
    assert value.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_a_finer_partition_never_lowers_a_divergence(seed):
    """binary <= Top-K <= Top-(K+3) <= full, for TV and KL; and Pinsker KL >= 2 TV^2 on each partition."""
    for function, binary, formula in [(topk_tv, binary_tv, slow.tv_of_cells), (topk_kl, binary_kl, slow.kl_of_cells)]:
        coarse, full = vocabulary(seed, top=4)
        fine, _ = vocabulary(seed, top=7)
        fine = {**fine, "log_prob": coarse["log_prob"], "rollout_log_prob": coarse["rollout_log_prob"]}
        fine["sampled_in_topk"] = (full["mu"].topk(7, -1).indices == full["sampled"][..., None]).any(-1)
        chain = [
            binary(coarse["log_prob"], coarse["rollout_log_prob"]),
            function(**coarse),
            function(**fine),
            over_cells(formula, whole(full), coarse["log_prob"].shape),
        ]
        for low, high in itertools.pairwise(chain):
            assert (low <= high + 3e-6).all()
    tv, kl = topk_tv(**coarse), topk_kl(**coarse)
    assert (kl >= 2 * tv**2 - 3e-6).all()
    pair = coarse["log_prob"], coarse["rollout_log_prob"]
    assert (binary_kl(*pair) >= 2 * binary_tv(*pair) ** 2 - 3e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_k_equal_to_the_vocabulary_is_the_full_divergence(seed, dtype):
    """The "other" bucket is empty there: rounding in it must neither raise a value nor make it infinite."""
    inputs, full = vocabulary(seed, top=11, dtype=dtype)
    assert inputs["sampled_in_topk"].all()
    for function, formula in [(topk_tv, slow.tv_of_cells), (topk_kl, slow.kl_of_cells)]:
        expected = over_cells(formula, whole(full), inputs["log_prob"].shape)
        torch.testing.assert_close(function(**inputs), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("top", [1, 4, 11])
def test_equal_log_probs_have_divergence_exactly_zero(top, dtype):
    for seed in range(6):
        inputs, _ = vocabulary(seed, top=top, dtype=dtype)
        inputs["log_prob"], inputs["topk_log_prob"] = inputs["rollout_log_prob"], inputs["rollout_topk_log_prob"]
        pair = inputs["log_prob"], inputs["rollout_log_prob"]
        for value in (binary_tv(*pair), binary_kl(*pair), topk_tv(**inputs), topk_kl(**inputs), k3(pair[0] - pair[1])):
            assert value.dtype == torch.float32
            assert value.eq(0).all()


@pytest.mark.parametrize("noise", [1e-7, 1e-5, 1e-3, 0.3, 5.0])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_divergences_are_never_negative_and_tv_never_above_one(dtype, noise):
    for seed in range(4):
        for top in (1, 4, 11):
            inputs, _ = vocabulary(seed, top=top, noise=noise, dtype=dtype)
            pair = inputs["log_prob"], inputs["rollout_log_prob"]
            tvs = [binary_tv(*pair), topk_tv(**inputs)]
            for value in [*tvs, binary_kl(*pair), topk_kl(**inputs), k3(pair[0] - pair[1])]:
                assert value.isfinite().all()
                assert (value >= 0).all()
            for value in tvs:
                # bfloat16 probabilities need not sum to one
                assert (value <= (1.0 + 1e-6 if dtype != torch.bfloat16 else 1.05)).all()


def test_disjoint_distributions_have_tv_one():
    value = topk_tv(log_of(1e-30)[0], log_of(1.0)[0], log_of(1e-30, 1.0), log_of(1.0, 1e-30), torch.tensor([[True]]))
    assert value.item() == pytest.approx(1.0, abs=1e-6)
    assert binary_tv(log_of(1e-30)[0], log_of(1.0)[0]).item() == pytest.approx(1.0, abs=1e-6)


CERTAIN = {
    "both certain": (0.0, 0.0),
    "pi certain": (0.0, -0.5),
    "mu certain": (-0.5, 0.0),
    "rounded above one": (1e-7, -1e-7),
    "mu rounded above one": (-1e-7, 1e-7),
    "very unlikely under both": (-80.0, -90.0),
    "impossible under pi": (-200.0, -0.1),
    "impossible under mu": (-0.1, -200.0),
}


@pytest.mark.parametrize(("pi", "mu"), CERTAIN.values(), ids=CERTAIN.keys())
def test_extreme_log_probs_give_no_nan_and_nothing_negative(pi, mu):
    pair = torch.tensor([[pi]]), torch.tensor([[mu]])
    top = [x[..., None] for x in pair]
    for inside in (True, False):
        flag = torch.tensor([[inside]])
        other = top if inside else [torch.full((1, 1, 1), -30.0)] * 2
        for value in (binary_tv(*pair), binary_kl(*pair), topk_tv(*pair, *other, flag), topk_kl(*pair, *other, flag)):
            assert not value.isnan().any()
            assert (value >= 0).all()
    assert binary_tv(*pair).item() == pytest.approx(abs(math.exp(pi) - math.exp(mu)), abs=1e-6)


def test_mu_certain_has_a_finite_binary_kl():
    """mu = 1 leaves nothing in the rest: KL = log(1 / pi)."""
    value = binary_kl(torch.tensor([[-0.5]]), torch.tensor([[0.0]]))
    assert value.item() == pytest.approx(0.5, rel=1e-5)


def test_an_id_impossible_under_both_adds_nothing():
    top = torch.tensor([[[math.log(0.5), float("-inf")]]])
    pair = torch.tensor([[math.log(0.5)]])
    flag = torch.tensor([[True]])
    assert topk_tv(pair, pair, top, top, flag).item() == 0
    assert topk_kl(pair, pair, top, top, flag).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_k3_matches_the_slow_loop(dtype):
    log_ratio = torch.cat([torch.linspace(-6, 6, 121), torch.tensor([-100.0, 10.0, 1e-6, -1e-6])])[None].to(dtype)
    expected = torch.tensor([[slow.k3(r) for r in log_ratio[0].double().tolist()]])
    value = k3(log_ratio)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, atol=5e-7, rtol=2e-6)


@pytest.mark.parametrize("scale", [1e-8, 1e-6, 1e-4, 1e-3])
def test_k3_is_never_negative_near_zero(scale):
    log_ratio = scale * torch.randn(1, 4000, generator=generator(0))
    assert (k3(log_ratio) >= 0).all()


def test_divergences_carry_no_gradient():
    inputs, _ = vocabulary(0)
    grads = {k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
    pair = grads["log_prob"], grads["rollout_log_prob"]
    for value in (binary_tv(*pair), binary_kl(*pair), topk_tv(**grads), topk_kl(**grads), k3(pair[0] - pair[1])):
        assert not value.requires_grad
