"""The page's mask code against torch's, for every method: the same gate, cause and budget, token for token."""

import json
from importlib.resources import files

import chromium
import pytest
import torch
from hydra.utils import instantiate
from inspected_run import CPPO, THRESHOLDS
from omegaconf import OmegaConf

from cppo_verl import core
from cppo_verl.config.compose import choices, compose
from cppo_verl.inspection.presets import COMPUTED, presets
from cppo_verl.inspection.rows import _shuffled
from cppo_verl.methods import Drpo, Tokens

MASK = (files("cppo_verl.inspection") / "web/mask.js").read_text()
DIVERGENCE = {"name": "binary_tv", "kind": "tv", "thresholds": THRESHOLDS["tv"]}
RUN = OmegaConf.create({"method": CPPO, "divergence": DIVERGENCE, "thresholds": THRESHOLDS, "data": {}})
DEFAULTS = {preset["name"]: preset["settings"] for preset in presets(RUN)}
CASES = {
    **DEFAULTS,
    "uniform": CPPO | {"weights": "uniform"},
    "shuffled": CPPO | {"weights": "shuffled", "w_min": 0.3},
    "horizon": CPPO | {"horizon": 7, "w_min": 0.2},
    "horizon of one token": CPPO | {"horizon": 1},
    "no prefix budget": CPPO | {"delta_b": None},
    "no budget at all": CPPO | {"delta_b": 0.0},
    "infinite budget": CPPO | {"delta_b": float("inf")},
    "calibrated": CPPO | {"delta_b": 0.02, "delta_b_quantile": 0.9},
    "calibrated, wide": CPPO | {"delta_b": 0.001, "delta_b_quantile": 0.37, "delta_b_max_factor": 500.0},
    "calibrated, scaled": CPPO | {"delta_b": 0.001, "delta_b_quantile": 0.9, "delta_b_scale": 0.37},
    "soft gate": CPPO | {"soft_gate": True, "delta": 0.05},
    "trm by the mean": DEFAULTS["trm_avg"] | {"delta_avg": 0.1},
    "trm by the largest": DEFAULTS["trm_max"] | {"delta_max": 0.3},
    "trm by both": DEFAULTS["trm_max_avg"] | {"delta_max": 0.3, "delta_avg": 0.1},
    "thresholds that are hit": CPPO | {"delta": 0.125, "delta_b": 0.0625, "w_min": 0.5, "weights": "uniform"},
}
# Divergences on this grid sum without rounding, so that thresholds are hit exactly.
GRID = {"thresholds that are hit"}


def batch(seed, rows=48, length=60, grid=False):
    """Responses of 1 to ``length`` tokens, from unmoved to far away, a third with holes as tools leave them."""
    draw = torch.Generator().manual_seed(seed)
    shape = (rows, length)
    rollout = -0.05 - 2 * torch.rand(shape, generator=draw)
    moved = torch.logspace(-4, 0, rows).unsqueeze(-1) * torch.randn(shape, generator=draw)
    log_prob = (rollout + moved * (torch.rand(shape, generator=draw) < 0.8)).clamp_max(-1e-4)
    valid = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=draw)
    holes = (torch.rand(shape, generator=draw) < 0.3) & (torch.arange(rows)[:, None] % 3 == 0)
    valid &= ~holes
    advantages = torch.randn((rows, 1), generator=draw).expand(shape).contiguous()
    advantages[torch.arange(rows) % 11 == 10] = 0
    divergence = core.binary_tv(log_prob, rollout)
    if grid:
        divergence = torch.randint(0, 6, shape, generator=draw) / 32
    return Tokens(log_prob, rollout, advantages, valid, divergence, torch.arange(rows) + seed)


def row(tokens, index):
    """As data.js makes it of the page's columns; a float32 survives a JSON number."""
    valid = tokens.valid[index]
    return {
        "n": len(valid), "valid": valid.int().tolist(), "divergence": tokens.divergence[index].tolist(),
        "advantages": tokens.advantages[index].tolist(), "logRatio": tokens.log_ratio[index].tolist(),
        "positions": _shuffled(valid, int(tokens.response_seeds[index])).tolist(),
    }  # fmt: skip


COMPUTE = """
const rebuild = (row) => ({ ...row, valid: Uint8Array.from(row.valid), divergence: Float32Array.from(row.divergence),
  advantages: Float32Array.from(row.advantages), logRatio: Float32Array.from(row.logRatio) });
const answer = CASES.map(({ kind, settings, rows }) => rows.map((row) => {
  const { gate, cause, deltaB, threshold } = maskOf(rebuild(row), { kind, settings });
  return { gate: [...gate], cause: [...cause], deltaB: String(deltaB),
    threshold: [...threshold].map((c) => Number.isNaN(c) ? null : c) };
}));
"""


def computed(browser, script, cases):
    """The masks of all cases by this mask code, in Chromium."""
    return browser.run(f"{{ {script} const CASES = {json.dumps(cases)}; {COMPUTE} answer; }}")


def case(settings, batches):
    rows = [row(tokens, index) for tokens in batches for index in range(len(tokens.valid))]
    return {"kind": settings["_target_"].rpartition(".")[2], "settings": settings, "rows": rows}


needs_chromium = pytest.mark.skipif(chromium.NAME is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with chromium.browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def masks(browser):
    """Case -> (its batches, torch's outcomes, the page's masks)."""
    batches = {name: [batch(seed, grid=name in GRID) for seed in (1, 2)] for name in CASES}
    answers = computed(browser, MASK, [case(settings, batches[name]) for name, settings in CASES.items()])
    outcomes = {name: [instantiate(settings)(tokens) for tokens in batches[name]] for name, settings in CASES.items()}
    return {name: (batches[name], outcomes[name], answer) for name, answer in zip(CASES, answers, strict=True)}


def flat(parts, name):
    return torch.cat([getattr(part, name) for part in parts])


def wrong(batches, outcomes, answer):
    """Valid tokens whose gate, or cause where masked, is not torch's."""
    valid, gate, cause = flat(batches, "valid"), flat(outcomes, "gate"), flat(outcomes, "token_cause")
    ours = torch.tensor([one["gate"] for one in answer])
    masked = valid & (gate < 1)
    causes = torch.tensor([one["cause"] for one in answer])
    return int((valid & (ours != gate)).sum() + (masked & ((causes == 1) != cause)).sum())


def test_the_cases_are_all_methods_that_the_page_computes():
    computed_here = {name for name in choices("method") if class_of(name) in COMPUTED}
    assert computed_here == DEFAULTS.keys() >= {"cppo", "dppo", "trm_avg", "cispo"}
    shown = presets(OmegaConf.merge(RUN, {"method": {"length_reference": 40}}))
    assert (shown[0]["name"], shown[0]["kind"]) == ("cppo", "Trained")  # what training did is shown instead


def class_of(name):
    return compose([f"method={name}", "platform=cpu"]).method._target_.rpartition(".")[2]


@needs_chromium
def test_of_another_method_training_s_own_mask_is_shown(browser):
    """A method of one's own, or one that fades: the dumped gate and cause."""
    tokens = batch(3)
    outcome = Drpo("drpo", 0.1)(tokens)
    trained = [{"gate": outcome.gate[index].tolist(), "tokenCause": outcome.token_cause[index].int().tolist()}
               for index in range(len(tokens.valid))]  # fmt: skip
    rows = [row(tokens, index) | trained[index] for index in range(len(tokens.valid))]
    answer = computed(browser, MASK, [{"kind": "Trained", "settings": {}, "rows": rows}])
    assert wrong([tokens], [outcome], answer[0]) == 0
    assert ((outcome.gate < 1) & tokens.valid).any()


@needs_chromium
@pytest.mark.parametrize("name", CASES)
def test_the_page_masks_as_training_does(name, masks):
    batches, outcomes, answer = masks[name]
    assert wrong(batches, outcomes, answer) == 0
    valid, gate = flat(batches, "valid"), flat(outcomes, "gate")
    if name not in ("cispo", "minpro", "trm_max"):  # trm_max: nearly everything is masked, of binary TV
        assert 0.002 < (gate[valid] < 1).float().mean() < 0.998
    if outcomes[0].delta_b is not None:
        assert [float(one["deltaB"]) for one in answer] == flat(outcomes, "delta_b").tolist()


@needs_chromium
def test_the_threshold_is_the_cores(masks):
    batches, _, answer = masks["calibrated"]
    tokens = batches[0]
    settings = CASES["calibrated"]
    region = core.cppo_mask(
        tokens.log_ratio,
        tokens.advantages,
        tokens.divergence,
        tokens.valid,
        delta=settings["delta"],
        weights=core.position_weights(tokens.valid, settings["w_min"]),
        delta_b=core.prefix_budget(tokens.divergence, tokens.valid, delta_b=0.02, quantile=0.9),
    )
    ours = [one["threshold"] for one in answer[: len(tokens.valid)]]
    for index, valid in enumerate(tokens.valid):
        assert [c for c, use in zip(ours[index], valid, strict=True) if use] == region.threshold[index][valid].tolist()


@needs_chromium
def test_thresholds_are_hit_exactly(masks):
    """Otherwise the inclusive comparison is not tested."""
    (tokens, _), _, _ = masks["thresholds that are hit"]
    z = tokens.divergence.double().masked_fill(~tokens.valid, 0)
    weight = tokens.valid.double().cumsum(-1)
    bound = 0.125 + 0.0625 * (weight - tokens.valid.double())
    assert (tokens.valid & (z == 0.125)).sum() > 50
    assert (tokens.valid & (z.cumsum(-1) == bound)).sum() > 5


# Each a mistake that could be made in mask.js, and a case that has to notice it.
MISTAKES = {
    "a smaller threshold": ("f32(z) > f32(delta)", "f32(z) > f32(0.9 * delta)", "dppo"),
    "not inclusive": ("f32(spent) > f32(bound)", "f32(spent) >= f32(bound)", "thresholds that are hit"),
    "float64 comparison": ("f32(z) > f32(delta)", "z > delta - 1e-12", "thresholds that are hit"),
    "own weight in the bound": ("const bound = deltaB", "weight += w[t]; const bound = deltaB", "cppo"),
    "corrective tokens masked": ("if (returns(row, t))", "if (false)", "cppo"),
    "ceiling of the budget": ("settings.delta_b_max_factor * settings.delta_b", "3 * settings.delta_b", "calibrated"),
    "holes counted in the weights": ("if (!valid[t]) continue;\n    const position", "const position", "horizon"),
    "the mean over the padding": ("Math.max(count, 1)", "n", "trm by the mean"),
    "clipped on one side": ("advantage < 0 && rho < low", "false", "grpo"),
}


@needs_chromium
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_can_fail(mistake, browser):
    old, new, name = MISTAKES[mistake]
    tokens = batch(1, grid=name in GRID)
    cases, outcomes = [case(CASES[name], [tokens])], [instantiate(CASES[name])(tokens)]
    assert old in MASK
    assert wrong([tokens], outcomes, computed(browser, MASK, cases)[0]) == 0
    assert wrong([tokens], outcomes, computed(browser, MASK.replace(old, new), cases)[0]) > 0
