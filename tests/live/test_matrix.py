"""Every method of Table 1 and every ablation switch trains for two steps, swapped in place on one live stack."""

import math

import own_method
import pytest
from stack import run_stages

pytestmark = [pytest.mark.live, pytest.mark.slow]

# An update of an untrained model moves a token's own probability by about 4e-4 and the whole distribution by 0.02, the
# first one by 0.08; seventy updates later a tenth of that (mean D 0.001): thresholds well below.
FIRST = ["method.delta=0.075", "method.delta_b=0.065"]
SMALL = ["method.delta=0.005", "method.delta_b=0.0005"]
BINARY = ["method.delta=0.0005", "method.delta_b=0.00005"]
REGISTERED = "verl's own loss, ours registered"
AGENT_LOOPS = "cppo_verl.adapters.rollout.tool_loop"
VARIANTS = {
    "cppo": FIRST,
    "dppo": ["method=dppo", "method.delta=0.005"],
    "grpo": ["method=grpo"],
    "minpro": ["method=minpro"],
    "cispo": ["method=cispo"],
    "trm_max": ["method=trm_max", "method.delta_max=0.00001"],
    "trm_avg": ["method=trm_avg", "method.delta_avg=0.000001"],
    "trm_max_avg": ["method=trm_max_avg", "method.delta_max=0.00001", "method.delta_avg=0.000001"],
    "trm_max over binary KL": ["method=trm_max", "divergence=binary_kl", "method.delta_max=0.00001"],
    "trm_max over the sampled estimate": ["method=trm_max", "divergence=k3", "method.delta_max=0.00001"],
    "dppo over KL": ["method=dppo", "divergence=topk_kl", "method.delta=0.00001"],
    "dppo over binary TV": ["method=dppo", "divergence=binary_tv", "method.delta=0.0005"],
    "dppo over binary KL": ["method=dppo", "divergence=binary_kl", "method.delta=0.000001"],
    "cppo over KL": ["divergence=topk_kl", "method.delta=0.00001", "method.delta_b=0.000001"],
    "cppo over binary TV": ["divergence=binary_tv", *BINARY],
    "cppo over binary KL": ["divergence=binary_kl", "method.delta=0.00001", "method.delta_b=0.000001"],
    "K = 5": ["divergence.k=5", *SMALL],
    "no position weights": [*SMALL, "method.weights=uniform"],
    "shuffled weights": [*SMALL, "method.weights=shuffled"],
    "no prefix budget": ["method.delta=0.005", "method.delta_b=null"],
    "soft gate": [*SMALL, "method.soft_gate=true"],
    "w_min 0.6": [*SMALL, "method.w_min=0.6"],
    "larger fixed delta_b": ["method.delta=0.005", "method.delta_b=0.03"],
    "calibrated delta_b": ["method.delta=0.005", "method.delta_b=0.0003", "method.delta_b_quantile=0.9"],
    "no ratio cap": [*SMALL, "method.ratio_cap=null"],
    "mask_std_0 off": [*SMALL, "run.mask_std_0=false"],
    "drpo": ["method=drpo", "method.delta=0.001"],
    "drpo over Top-K TV": ["method=drpo", "divergence=topk_tv", "method.delta=0.01"],
    "gspo": ["method=gspo", "method.eps_low=0.00001", "method.eps_high=0.00001"],
    "gmpo": ["method=gmpo", "method.eps_low=0.0001", "method.eps_high=0.0001"],
    "sapo": ["method=sapo"],
    "aspo": ["method=aspo", "method.eps_low=0.0001", "method.eps_high=0.0001"],
    "opsm": ["method=opsm", "method.delta=0.0000001"],
    "m2po": ["method=m2po", "method.tau=0.0000001"],
    "m2po by response": ["method=m2po", "method.tau=0.0000001", "method.scope=response"],
    "tis": ["method=tis"],
    "mis": ["method=mis", "method.low=0.999", "method.high=1.001"],
    "icepop": ["method=icepop", "method.low=0.999", "method.high=1.001"],
    "fipo": ["method=fipo", "method.eps_low=0.0001", "method.eps_high=0.0001"],
    "vespo": ["method=vespo"],
    "a sequence's weight under CPPO's mask": [*SMALL, "method.importance=geometric"],
    "a method of another package": ["method=running_max", "method.delta=0.0005"],
    REGISTERED: ["actor_rollout_ref.actor.policy_loss.loss_mode=small_cppo"],
    "token-mean": [*SMALL, "actor_rollout_ref.actor.loss_agg_mode=token-mean"],
}
# A policy loss with settings of its own, as docs/policy_loss.md has a user register one.
LOSSES = f"from cppo_verl.policy_loss import register\n\nregister('small_cppo', *{BINARY})\n"
UNMASKED = ("cispo", "minpro", "tis", "vespo")


@pytest.fixture(scope="module")
def matrix(live_base, tmp_path_factory):
    site = own_method.install(tmp_path_factory.mktemp("site"))
    (site / "my_methods" / "losses.py").write_text(LOSSES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("PYTHONPATH", str(site))  # of the stack and its workers, where pip would have installed it
        base = [*live_base, f"actor_rollout_ref.model.external_lib=[{AGENT_LOOPS},my_methods.losses]"]
        return run_stages(base, [(name, overrides, 2) for name, overrides in VARIANTS.items()], timeout=1800)[1]


@pytest.mark.parametrize("name", VARIANTS)
def test_trains_two_steps(matrix, name):
    lines = matrix[name]
    assert len(lines) == 2
    for line in lines:
        assert math.isfinite(line["actor/loss"])
        assert line["actor/grad_norm"] > 0
        assert line["rollout/missing_responses"] == 0


def share(matrix, name, metric):
    return max(line[metric] for line in matrix[name])


@pytest.mark.parametrize(
    "name",
    [
        *("cppo", "dppo", "trm_max", "trm_avg", "soft gate", "shuffled weights", "K = 5"),
        *("drpo", "drpo over Top-K TV", "gspo", "gmpo", "sapo", "aspo", "opsm", "m2po", "m2po by response", "mis"),
        *("icepop", "fipo", "a sequence's weight under CPPO's mask", "a method of another package"),
        *("cppo over KL", "cppo over binary TV", "cppo over binary KL", "dppo over KL", "dppo over binary TV"),
    ],
)
def test_a_mask_really_masks(matrix, name):
    assert share(matrix, name, "trust_region/masked") > 0


@pytest.mark.parametrize("name", UNMASKED)
def test_methods_without_a_mask_mask_nothing(matrix, name):
    assert share(matrix, name, "trust_region/masked") == 0


@pytest.mark.parametrize("name", ["dppo", "no prefix budget"])
def test_without_a_budget_nothing_is_masked_by_the_prefix(matrix, name):
    assert share(matrix, name, "trust_region/masked_by_prefix") == 0
    assert share(matrix, "cppo", "trust_region/masked_by_prefix") > 0


def test_calibrated_budget_varies_between_its_bounds(matrix):
    assert 0.0003 < share(matrix, "calibrated delta_b", "trust_region/delta_b") <= 0.0006 + 1e-9
    assert share(matrix, "cppo", "trust_region/delta_b") == pytest.approx(0.065)


def test_groups_are_skipped_only_where_asked_for(matrix):
    assert "groups/zero_variance" in matrix["cppo"][0]
    assert "groups/zero_variance" not in matrix["mask_std_0 off"][0]


def test_verls_own_loss_with_ours_registered(matrix):
    """Its metrics come from the registered function; those of our own loss, which is not there, are absent."""
    for line in matrix[REGISTERED]:
        assert 0 < line["trust_region/masked"] < 1
        assert line["divergence/mean"] > 0
        assert "actor/pg_loss" in line
        assert "trust_region/tokens" not in line


def test_only_what_cuts_a_weight_reports_how_often(matrix):
    assert "trust_region/clipped" in matrix["cispo"][0]
    assert "trust_region/clipped" in matrix["tis"][0]
    for name in ("grpo", "drpo", "m2po"):
        assert "trust_region/clipped" not in matrix[name][0]
