"""A tiny Qwen3 mixture of experts through the whole stack: its experts route in vLLM and in the actor alike.

verl's FSDP engine has no router replay (its Megatron and VeOmni engines do), so each side routes by its own rounding:
where two experts are nearly equal they may differ. ``divergence/at_rollout_weights`` is what that comes to.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mask_oracle import divergences_of_response
from small_run import base_overrides, make_assets
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from cppo_verl.run.log import read_metrics

pytestmark = [pytest.mark.live, pytest.mark.slow]
CPPO = Path(sys.executable).parent / "cppo"
EXPERTS, CHOSEN, LAYERS = 8, 2, 3


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """The small run's data, and in place of its model one of experts, with random weights."""
    folder = make_assets(tmp_path_factory.mktemp("moe"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    for layer in model.model.layers:  # fresh routers are nearly indifferent, and fresh experts hardly matter
        layer.mlp.gate.weight.data.mul_(20)
        for weight in layer.mlp.experts.parameters():
            weight.data.mul_(4)
    model.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def run(assets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    overrides = [*base_overrides(assets), f"run.dir={folder}", "run.name=moe", "trainer.total_training_steps=2"]
    command = [str(CPPO), "train", *overrides, "run.dump_steps=[1,2]", "method.delta=0.05", "method.delta_b=0.02"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "moe"


@pytest.fixture(scope="module")
def dumps(run):
    """The micro-batches of the first minibatch, before the first update."""
    return [torch.load(path) for path in sorted(run.glob("dumps/step_1/minibatch0_*.pt"))]


def log_probs(model, dump, row):
    """log pi of a response's tokens by transformers, and the router logits at them ``[LAYERS, T, EXPERTS]``."""
    prompt = dump["prompts"][row]
    prompt = prompt[: int(prompt.nonzero()[-1]) + 1]
    response = dump["responses"][row][dump["response_mask"][row]]
    with torch.no_grad():
        output = model(torch.cat([prompt, response])[None], output_router_logits=True)
    logits = output.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    routed = torch.stack([layer.view(-1, EXPERTS)[len(prompt) - 1 : -1] for layer in output.router_logits])
    return logits.gather(-1, response[:, None])[:, 0], routed


def test_experts_route_alike_in_vllm_and_in_the_actor(assets, dumps):
    model = AutoModelForCausalLM.from_pretrained(assets / "model", dtype=torch.float32)
    used, errors = torch.zeros(LAYERS, EXPERTS, dtype=torch.int64), {"actor": [], "vLLM": []}
    for dump in dumps:
        for row in range(len(dump["responses"])):
            valid = dump["response_mask"][row]
            expected, routed = log_probs(model, dump, row)
            for layer in range(LAYERS):
                used[layer] += torch.bincount(routed[layer].topk(CHOSEN).indices.flatten(), minlength=EXPERTS)
            for name, column in (("actor", "log_prob"), ("vLLM", "rollout_log_prob")):
                errors[name].append((dump[column][row][valid] - expected).abs().max().item())
    print(f"tokens by layer and expert: {used.tolist()}; largest errors { ({k: max(v) for k, v in errors.items()}) }")
    assert (used > 0).sum(-1).min() >= EXPERTS // 2
    assert max(errors["actor"]) < 1e-4
    assert max(errors["vLLM"]) < 1e-4


def test_another_routing_would_be_seen(assets, dumps):
    """The comparison above can fail: with the router's experts in another order log pi is elsewhere."""
    model = AutoModelForCausalLM.from_pretrained(assets / "model", dtype=torch.float32)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data = layer.mlp.gate.weight.data.roll(1, 0)
    expected, _ = log_probs(model, dumps[0], 0)
    valid = dumps[0]["response_mask"][0]
    assert (dumps[0]["log_prob"][0][valid] - expected).abs().max() > 1e-2


def test_the_floor_is_reported_and_the_divergence_is_the_loops(run, dumps):
    metrics = read_metrics(run)
    floors = [metrics[step]["divergence/at_rollout_weights"] for step in (1, 2)]
    print(f"divergence at the rollout's weights: {floors}")
    assert 0 < max(floors) < 1e-3
    assert metrics[2]["trust_region/tokens"] > 0
    for dump in dumps:
        for row in range(len(dump["responses"])):
            expected = torch.tensor(divergences_of_response(dump, row), dtype=torch.float64)
            found = dump["divergence"][row][dump["response_mask"][row]].double()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
