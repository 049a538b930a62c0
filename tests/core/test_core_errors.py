"""Every bad argument is refused by a ValueError that names it; values on padding and validate=False are not checked."""

import pytest
import torch
from core_cases import mask_inputs, surrogate_inputs, vocabulary

from cppo_verl.core.divergence import binary_kl, binary_tv, topk_kl, topk_tv
from cppo_verl.core.masks import cppo_mask, dppo_mask, soft_gate, trm_mask
from cppo_verl.core.surrogate import cispo_loss, clip_loss, minpro_loss, ratio_loss
from cppo_verl.core.weights import position_weights, prefix_budget

NAN = float("nan")
EPS = {"eps_low": 0.2, "eps_high": 0.28}


def good():
    """For every function the arguments, by name, of a call that is accepted. B = 3, T = 6, K = 4, all tokens valid."""
    _named, options = mask_inputs(0, 3, 6, holes=False)
    valid = torch.ones(3, 6, dtype=torch.bool)
    fresh = {name: torch.rand(3, 6) for name in ("log_ratio", "advantages", "divergence")}
    fresh |= {"response_mask": valid}
    options = {"delta": 0.15, "weights": torch.ones(3, 6), "delta_b": torch.full((3,), 0.02)}
    measured = {name: fresh[name] for name in ("divergence", "response_mask")}
    loss, _ = surrogate_inputs(0, 3, 6)
    top, _ = vocabulary(0, rows=3, length=6)
    pair = {name: top[name] for name in ("log_prob", "rollout_log_prob")}
    return {
        position_weights: {"response_mask": valid, "w_min": 0.8},
        prefix_budget: dict(**measured, delta_b=0.02, quantile=0.9),
        cppo_mask: {**fresh, **options},
        soft_gate: {**fresh, **options},
        dppo_mask: {**fresh, "delta": 0.15},
        trm_mask: {**measured, "delta_max": 0.1, "delta_avg": 0.01},
        binary_tv: pair,
        binary_kl: pair,
        topk_tv: top,
        topk_kl: top,
        ratio_loss: {**loss, "gate": valid},
        clip_loss: {**loss, **EPS},
        cispo_loss: {**loss, **EPS},
        minpro_loss: {**loss, "response_mask": valid, **EPS},
    }


GOOD = good()
CHECKED = (position_weights, prefix_budget, cppo_mask, soft_gate, dppo_mask, trm_mask)


def cases(rows):
    return [pytest.param(f, name, bad, id=f"{f.__name__}-{name}-{label}") for f, name, label, bad in rows]


def wrong_shapes():
    for function, arguments in GOOD.items():
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        for name, value in tensors.items():
            yield function, name, "one more dimension", value[..., None]
            if len(tensors) > 1:
                yield function, name, "longer", torch.cat([value, value[..., :1]], -1)
                yield function, name, "fewer rows", value[:-1]
                yield function, name, "broadcastable row", value[:1]
            if len(tensors) > 1 and value.dim() > 1:
                yield function, name, "broadcastable column", value[:, :1]
                yield function, name, "first row only", value[0]


@pytest.mark.parametrize(("function", "name", "bad"), cases(wrong_shapes()))
def test_a_wrong_shape_is_refused_by_name(function, name, bad):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        function(**{**GOOD[function], name: bad})


@pytest.mark.parametrize("function", GOOD, ids=lambda f: f.__name__)
def test_the_good_calls_are_accepted(function):
    function(**GOOD[function])


@pytest.mark.parametrize("function", [topk_tv, topk_kl], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["topk_log_prob", "rollout_topk_log_prob"])
def test_a_k_mismatch_is_refused_by_name(function, name):
    with pytest.raises(ValueError, match="topk_log_prob"):
        function(**{**GOOD[function], name: GOOD[function][name][..., :-1]})


def scalars():
    for function in (cppo_mask, soft_gate, dppo_mask):
        for bad in (0.0, -0.1, NAN):
            yield function, "delta", bad, bad
    for name in ("delta_max", "delta_avg"):
        for bad in (0.0, -0.1, NAN):
            yield trm_mask, name, bad, bad
    for bad in (0.0, -0.5, 1.5, NAN):
        yield position_weights, "w_min", bad, bad
    for name, bad in (("delta_b", -0.01), ("delta_b", NAN), ("quantile", -0.1), ("quantile", 1.1), ("max_factor", 0.5)):
        yield prefix_budget, name, bad, bad
    for function in (cppo_mask, soft_gate):
        yield function, "delta_b", "one negative", torch.tensor([0.1, -0.01, 0.1])
        yield function, "delta_b", "one NaN", torch.tensor([0.1, NAN, 0.1])
    yield position_weights, "schedule", "unknown", "exponential"


@pytest.mark.parametrize(("function", "name", "bad"), cases(scalars()))
def test_a_bad_number_is_refused_by_name(function, name, bad):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        function(**{**GOOD[function], name: bad})


def test_trm_without_any_limit_is_refused():
    with pytest.raises(ValueError, match=r"delta_max.*delta_avg|delta_avg.*delta_max"):
        trm_mask(GOOD[trm_mask]["divergence"], GOOD[trm_mask]["response_mask"])


def nans():
    for function in CHECKED[1:]:
        for name, value in GOOD[function].items():
            if isinstance(value, torch.Tensor) and value.dim() == 2 and name != "response_mask":
                bad = value.clone()
                bad[1, 2] = NAN
                yield function, name, "NaN", bad


@pytest.mark.parametrize(("function", "name", "bad"), cases(nans()))
def test_a_nan_in_a_valid_token_is_refused_by_name(function, name, bad):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        function(**{**GOOD[function], name: bad})


@pytest.mark.parametrize(("function", "name", "bad"), cases(nans()))
def test_a_nan_on_padding_is_accepted(function, name, bad):
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 2] = False
    function(**{**GOOD[function], name: bad, "response_mask": mask})


@pytest.mark.parametrize(("function", "name", "bad"), cases(nans()))
def test_validate_false_skips_the_value_checks(function, name, bad):
    function(**{**GOOD[function], name: bad}, validate=False)


@pytest.mark.parametrize("function", [cppo_mask, soft_gate], ids=lambda f: f.__name__)
def test_validate_false_skips_the_value_check_of_the_budget(function):
    function(**{**GOOD[function], "delta_b": torch.tensor([0.1, -0.01, 0.1])}, validate=False)


@pytest.mark.parametrize("function", CHECKED, ids=lambda f: f.__name__)
def test_validate_changes_no_result(function):
    left, right = (function(**GOOD[function], validate=flag) for flag in (True, False))
    pairs = zip(left, right, strict=True) if isinstance(left, tuple) else [(left, right)]
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("function", CHECKED[1:], ids=lambda f: f.__name__)
def test_validate_false_still_checks_shapes(function):
    """Shapes cost no wait for the device."""
    with pytest.raises(ValueError, match="divergence"):
        function(**{**GOOD[function], "divergence": torch.rand(3, 1)}, validate=False)
