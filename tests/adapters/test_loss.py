"""The loss function by itself: its value, its slope and its statistics on one micro-batch, without an engine."""

from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from topk_cases import micro_batch, nested

from cppo_verl.adapters.actor.loss import TrustRegionLoss
from cppo_verl.config.compose import compose

LENGTHS = [5, 2, 9, 3]


def called(overrides=(), dtype=torch.float32, columns=(), dump_dir="", **terms):
    """(loss, slope of each sequence position, statistics, inputs by hand) of one call over binary TV.

    columns: more of the batch, by name; dump_dir: where it is dumped to.
    """
    config = compose(["platform=cpu", "recipe=quickstart", "run.name=x", "divergence=binary_tv", *overrides])
    settings = {"entropy_coeff": 0.0, "use_kl_loss": False, "kl_loss_type": "kl", "kl_loss_coef": 0.5, **terms}
    actor = SimpleNamespace(
        policy_loss=SimpleNamespace(method=instantiate(config.method), divergence={"name": "binary_tv"}),
        loss_agg_mode="seq-mean-token-sum-norm",
        loss_scale_factor=40,
        **settings,
    )
    data, _, log_pi, log_mu, valid = micro_batch(LENGTHS)
    advantages = [torch.full((n,), sign) for n, sign in zip(LENGTHS, (1.0, -1.0, 0.5, -2.0), strict=True)]
    data["advantages"] = nested(advantages)
    data["rollout_log_probs"] = nested([log_mu[row, :n] for row, n in enumerate(LENGTHS)])
    data["response_mask"] = nested([torch.ones(n) for n in LENGTHS])
    data["loss_mask"] = nested([torch.full((n,), float(row != 1)) for row, n in enumerate(LENGTHS)])
    data["ref_log_prob"] = nested([log_pi[row, :n] - 0.1 for row, n in enumerate(LENGTHS)])
    for name, value in dict(columns).items():
        data[name] = value
    sizes = {"dp_size": 1, "batch_num_tokens": 17, "global_batch_size": 8, "dump_dir": str(dump_dir)}
    for name, value in sizes.items():
        from verl.utils import tensordict_utils as tu

        tu.assign_non_tensor(data, **{name: value})
    ends = (data["prompts"].offsets().diff() + data["responses"].offsets().diff()).cumsum(0).tolist()
    flat = torch.zeros(ends[-1])
    for row, (end, n) in enumerate(zip(ends, LENGTHS, strict=True)):
        flat[end - n - 1 : end - 1] = log_pi[row, :n]
    flat = flat.to(dtype).requires_grad_()
    loss_function = TrustRegionLoss(actor)
    output = {"log_probs": flat, "entropy": torch.full_like(flat, 2.0)}
    loss, _ = loss_function(output, data)
    (slope,) = torch.autograd.grad(loss, flat)
    places = torch.cat([torch.arange(end - n - 1, end - 1) for end, n in zip(ends, LENGTHS, strict=True)])
    return loss.item(), slope[places], loss_function.statistics.metrics(), (log_pi, log_mu, valid, advantages)


def test_the_loss_is_equation_11():
    """With nothing masked: minus the mean over 8 responses of the sum of rho A over 40; a skipped response is 0."""
    loss, slope, _, (log_pi, log_mu, _, advantages) = called(["method.delta=1e9", "method.delta_b=null"])
    rho = [(log_pi[row, :n] - log_mu[row, :n]).exp() for row, n in enumerate(LENGTHS)]
    terms = [-(r * a) / (8 * 40) * (row != 1) for row, (r, a) in enumerate(zip(rho, advantages, strict=True))]
    assert loss == pytest.approx(torch.cat(terms).sum().item(), rel=1e-5)
    torch.testing.assert_close(slope, torch.cat(terms), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_log_probs_are_refused(dtype):
    with pytest.raises(TypeError, match=f"log pi arrived in {dtype}"):
        called(dtype=dtype)


def test_verls_terms_have_their_signs():
    plain = called()[0]
    used = sum(LENGTHS) - LENGTHS[1]
    assert called(entropy_coeff=0.1)[0] - plain == pytest.approx(-0.1 * 2.0 * used / 320, rel=1e-4)
    assert called(use_kl_loss=True)[0] - plain == pytest.approx(0.5 * 0.1 * used / 320, rel=1e-4)


def test_statistics_by_hand():
    from cppo_verl.adapters.actor.token_statistics import TokenStatistics
    from cppo_verl.methods import Outcome, Tokens

    divergence = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 9.0, 9.0, 9.0]])
    valid = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    log_mu = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-5.0, 7.0, 7.0, 7.0]])
    advantages = torch.tensor([[1.0, 1.0, 1.0, -1.0], [0.0, 1.0, 1.0, 1.0]])
    tokens = Tokens(log_mu + 0.5, log_mu, advantages, valid, divergence)
    gate = torch.tensor([[1.0, 0.0, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]])
    cause = torch.tensor([[0, 1, 0, 0], [0, 1, 1, 1]]).bool()
    outcome = Outcome(torch.full((2, 4), -2.0), gate, cause, torch.tensor([0.02, 0.04]))
    statistics = TokenStatistics()
    statistics.add(tokens, outcome, torch.full((2, 4), 1.5), first_minibatch=True)
    statistics.add(tokens._replace(divergence=divergence * 3), outcome, None, first_minibatch=False)
    found = statistics.metrics()
    assert found.pop("divergence/p99") == pytest.approx(1.5, rel=0.05)
    assert found == pytest.approx(
        {
            "trust_region/masked": 3 / 5,
            "trust_region/masked_by_token": 1 / 5,
            "trust_region/masked_by_prefix": 2 / 5,
            "trust_region/masked_positive": 2 / 3,
            "trust_region/masked_negative": 1.0,
            "trust_region/prefix_share": 2 / 3,
            # log pi is above log mu everywhere: the one negative advantage lowers it.
            "trust_region/towards_rollout": 1 / 5,
            "trust_region/gate": 2.5 / 5,
            "trust_region/delta_b": 0.03,
            "trust_region/loss": -2.0,
            "trust_region/absolute_loss": 2.0,
            "divergence/mean": 0.6,
            "divergence/at_rollout_weights": 0.3,
            "rollout/log_prob_relative_error": 2.5 / 15,
            "policy/log_prob_relative_change": 2.5 / 15,
            "policy/entropy_sampled": 3.0,
            "policy/entropy": 1.5,
            "divergence/quarter_1": 2 * (0.1 + 0.5) / 2,
            "divergence/quarter_2": 0.4,
            "divergence/quarter_3": 0.6,
            "divergence/quarter_4": 0.8,
            "trust_region/tokens": 10,
            "trust_region/masked_tokens": 6,
            # Only the first response has more than one token: 2 T (T - 1) = 24, max D = 0.4, mean of the first three
            # 0.2; three times that in the second call. Each call has two responses.
            "bound/uniform": 24 * 0.16 * (1 + 9) / 4,
            "bound/cppo": 24 * 0.4 * 0.2 * (1 + 9) / 4,
        },
        rel=1e-6,
    )


def test_the_bound_uses_the_methods_weights_and_is_left_out_of_other_divergences():
    from cppo_verl.adapters.actor.token_statistics import TokenStatistics
    from cppo_verl.methods import Outcome, Tokens

    divergence = torch.tensor([[0.1, 0.3, 0.2], [0.4, 9.0, 9.0]])
    valid = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    tokens = Tokens(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3), valid, divergence)
    weights = torch.tensor([[1.0, 0.5, 0.25], [1.0, 0.0, 0.0]])
    exceeded = torch.tensor([[0, 0, 1], [0, 0, 0]]).bool()
    cut = torch.tensor([[0, 1, 0], [1, 1, 1]]).bool()  # two of the four are padding
    outcome = Outcome(torch.zeros(2, 3), torch.ones(2, 3), exceeded, torch.ones(2), weights, exceeded, cut)

    def found(**settings):
        statistics = TokenStatistics(**settings)
        statistics.add(tokens, outcome, None, first_minibatch=True)
        return statistics.metrics()

    assert found()["trust_region/inside_prefix"] == 0.5
    assert found()["trust_region/clipped"] == 0.5
    assert found()["bound/uniform"] == pytest.approx(12 * 0.09 / 2)
    assert found()["bound/cppo"] == pytest.approx(12 * 0.3 * (0.25 / 1.5) / 2)  # (0.1 + 0.15) of 1.5
    assert not any(name.startswith("bound/") for name in found(total_variation=False))


def test_statistics_by_age():
    from cppo_verl.adapters.actor.token_statistics import TokenStatistics
    from cppo_verl.methods import Outcome, Tokens

    divergence = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.7, 9.0, 9.0]])
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    log_mu = torch.full((2, 4), -1.0)
    tokens = Tokens(log_mu, log_mu, torch.ones(2, 4), valid, divergence)
    gate = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.5, 1.0, 0.0, 0.0]])
    outcome = Outcome(torch.zeros(2, 4), gate, torch.zeros(2, 4).bool(), None)
    age = torch.tensor([[2, 2, 0, 0], [1, 6, 0, 0]])
    statistics = TokenStatistics()
    statistics.add(tokens, outcome, None, first_minibatch=True, age=age)
    found = {
        name.removeprefix("staleness/"): value
        for name, value in statistics.metrics().items()
        if name.startswith("staleness/")
    }
    assert found == pytest.approx(
        {
            "mean": 11 / 6,
            "tokens_age_0": 2 / 6,
            "tokens_age_1": 1 / 6,
            "tokens_age_2": 2 / 6,
            "tokens_age_3": 0,
            "tokens_age_4_or_more": 1 / 6,
            "divergence_age_0": 0.35,
            "divergence_age_1": 0.5,
            "divergence_age_2": 0.15,
            "divergence_age_4_or_more": 0.7,
            "masked_age_0": 1 / 2,
            "masked_age_1": 1.0,
            "masked_age_2": 1 / 2,
            "masked_age_4_or_more": 0.0,
        }
    )
    in_lockstep = TokenStatistics()
    in_lockstep.add(tokens, outcome, None, first_minibatch=True)
    assert not any("staleness" in name for name in in_lockstep.metrics())


def test_a_small_dump_is_the_chosen_rows_of_a_whole_one(tmp_path):
    verdicts = torch.tensor([[1.0], [0.0], [0.0], [1.0]])
    called(columns={"verdict": verdicts}, dump_dir=tmp_path / "whole")
    chosen = torch.tensor([[1], [0], [0], [1]], dtype=torch.int8)
    called(columns={"verdict": verdicts, "inspected": chosen}, dump_dir=tmp_path / "small")
    none = torch.zeros(4, 1, dtype=torch.int8)
    called(columns={"verdict": verdicts, "inspected": none}, dump_dir=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    whole, small = (torch.load(next((tmp_path / name).glob("*.pt"))) for name in ("whole", "small"))
    assert whole.keys() == small.keys() >= {"gate", "divergence", "token_cause", "log_prob", "prompts", "acc"}
    assert small["acc"].tolist() == [1.0, 1.0]
    assert (
        small["responses"].shape == small["gate"].shape == (2, 5)
    )  # of 5 and 3 tokens, in a batch whose longest has 9
    for name, value in small.items():
        assert value.untyped_storage().nbytes() == value.nbytes, name  # a view would be saved with all that it is of
        expected = whole[name][[0, 3]]
        assert torch.equal(value, expected if value.dim() == 1 else expected[:, : value.shape[1]]), name


def test_a_small_dump_holds_whole_groups_spread_over_the_step():
    from cppo_verl.adapters.driver.trajectories import some_groups

    groups = [[0, 1], [2, 3], [4, 5], [6, 7]]
    lengths = [10] * 8
    assert some_groups(groups, lengths, 1000) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert some_groups(groups, lengths, 40) == [2, 3, 6, 7]
    assert some_groups(groups, lengths, 20) == [6, 7]
    assert some_groups(groups, lengths, 15) == [6]  # a group that is longer: what has room
    assert some_groups(groups, lengths, 1) == [6]  # one at least
    assert some_groups([[0, 1]], [9, 2], 3) == [0]
    assert some_groups([], lengths, 100) == []
