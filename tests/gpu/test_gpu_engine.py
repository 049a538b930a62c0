"""verl's FSDP engines on a GPU with our loss, without Ray and vLLM: log pi, D_t, the mask and the gradient."""

import json
import math

import pytest
import torch
from engine import DELTA, DELTA_B, W_MIN, run_engine
from mask_oracle import divergences_of_response, mask_of_response

from cppo_verl.config.compose import compose

_PRECISION = "++actor_rollout_ref.actor.fsdp_config.mixed_precision"
FLOAT32 = f"{_PRECISION}={{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}}"


@pytest.fixture(scope="module")
def runs(live_assets, tmp_path_factory):
    """By name: the rows with their full distributions, the dump, the updates by size of micro-batch."""

    def composed(*overrides):
        base = ["platform=gpu", "recipe=quickstart", f"quickstart.assets={live_assets}", "run.name=engine"]
        base += [f"method.delta={DELTA}", f"method.delta_b={DELTA_B}", f"method.w_min={W_MIN}"]
        base += ["actor_rollout_ref.actor.optim.lr=0.0"]
        base += ["+actor_rollout_ref.model.override_config.attn_implementation=sdpa"]
        return compose([*base, *overrides])

    padded = "actor_rollout_ref.model.use_remove_padding=false"
    configs = {
        "float32": composed(FLOAT32),
        "float32 padded": composed(FLOAT32, padded),
        "float32 fsdp": composed(FLOAT32, "actor_rollout_ref.actor.strategy=fsdp"),
        "bfloat16": composed("+temperatures=[1.0,0.7]"),
    }
    found = {}
    for name, (folder, ranks) in run_engine(configs, tmp_path_factory.mktemp("engine"), 1, "gpu").items():
        dump = {key: value.cpu() for key, value in torch.load(next(folder.glob("dump/*.pt"))).items()}
        found[name] = (folder, torch.load(folder / "truth", weights_only=False), dump, ranks[0])
    return found


NAMES = ("float32", "float32 padded", "float32 fsdp", "bfloat16")


@pytest.mark.parametrize("name", NAMES)
def test_log_pi_is_the_models(runs, name):
    """Against the CPU's float32 forward pass: what is left is the GPU's rounding, bfloat16's where it is the dtype."""
    _, rows, dump, _ = runs[name]
    errors = []
    for number, row in enumerate(rows):
        valid = dump["response_mask"][number]
        exact = row["truth"]["log_pi"].gather(-1, row["responses"][:, None])[:, 0]
        if len(exact) == valid.sum():
            errors.append((dump["log_prob"][number][valid].double() - exact).abs().max().item())
    print(f"{name}: largest error of log pi {max(errors):.2g}, {len(errors)} responses")
    assert len(errors) >= 12
    assert max(errors) < (0.1 if name == "bfloat16" else 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_is_the_float64_loops(runs, name):
    _, rows, dump, _ = runs[name]
    masked, compared = 0, 0
    for row in range(len(rows)):
        valid = dump["response_mask"][row]
        expected = torch.tensor(divergences_of_response(dump, row), dtype=torch.float64)
        torch.testing.assert_close(dump["divergence"][row][valid].double(), expected, rtol=0, atol=1e-6)
        keep, margin, _ = mask_of_response(dump, row, delta=DELTA, delta_b=DELTA_B, w_min=W_MIN)
        for got, want, distance in zip((dump["gate"][row][valid] == 1).tolist(), keep, margin, strict=True):
            if distance > 1e-6:
                assert got == want
                compared, masked = compared + 1, masked + (not want)
    assert compared > 200
    assert 20 < masked < compared


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_change_nothing(runs, name):
    _, _, _, updates = runs[name]
    assert [update["micro_batch_size"] for update in updates] == [1, 4, 16, "dynamic"]
    tolerance = 0.05 if name == "bfloat16" else 1e-3
    for update in updates:
        assert math.isfinite(update["grad_norm"])
        assert update["grad_norm"] == pytest.approx(updates[2]["grad_norm"], rel=tolerance)
        assert update["trust_region/tokens"] == updates[2]["trust_region/tokens"] > 200


def test_ours_is_float32_where_verls_rounds(runs):
    """On the very logits of the engine, bfloat16: the largest errors against float64."""
    folder = runs["bfloat16"][0]
    lines = [json.loads(line) for line in (folder / "exactness.0").read_text().splitlines()]
    assert {line["dtype"] for line in lines} == {"torch.bfloat16"}
    ours, verls = (max(line[f"{name} log_probs"] for line in lines) for name in ("ours", "verls"))
    print(f"largest error of log pi on bfloat16 logits: ours {ours:.2g}, verl's {verls:.2g}")
    assert ours < 1e-5
