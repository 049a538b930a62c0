"""On a GPU every method decides as on the CPU, and the loss makes the host wait for the GPU nowhere."""

from contextlib import contextmanager

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from cppo_verl import core
from cppo_verl.adapters.actor.log_prob import token_log_probs
from cppo_verl.adapters.actor.token_statistics import TokenStatistics
from cppo_verl.adapters.actor.topk import gather_logits
from cppo_verl.config.compose import choices, compose
from cppo_verl.methods import Tokens

METHODS = sorted(choices("method"))
VOCABULARY = 151_936


def method_of(name):
    config = compose([f"method={name}", "divergence=binary_tv", "platform=cpu"])
    return instantiate(OmegaConf.to_container(config.method, resolve=True))


def batch(device, dtype):
    """64 responses of up to 2,048 tokens, from nearly unmoved to far away; the same numbers on every device."""
    generator = torch.Generator().manual_seed(3)
    shape = (64, 2048)
    rollout = -0.2 - 3 * torch.rand(shape, generator=generator)
    distance = torch.logspace(-5, -0.5, shape[0]).unsqueeze(-1)
    log_prob = (rollout + distance * torch.randn(shape, generator=generator)).clamp_max(-1e-3)
    valid = torch.arange(shape[1]) < torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
    valid &= torch.rand(shape, generator=generator) > 0.1  # holes, as tools leave them
    valid[:, 0] = True
    advantages = torch.randn((shape[0], 1), generator=generator).expand(shape).contiguous()
    log_prob, rollout, advantages = (value.to(device, dtype) for value in (log_prob, rollout, advantages))
    log_prob.requires_grad_()
    seeds = torch.arange(shape[0], device=device)
    valid = valid.to(device)
    return Tokens(log_prob, rollout, advantages, valid, core.binary_tv(log_prob.detach(), rollout), seeds)


def slope_of(tokens, outcome):
    return torch.autograd.grad(torch.where(tokens.valid, outcome.loss, 0.0).sum(), tokens.log_prob)[0]


@contextmanager
def no_waiting():
    """Whatever makes the host wait for the GPU raises in here."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", METHODS)
def test_a_gpu_decides_as_the_cpu(name):
    exact, there = batch("cpu", torch.float64), batch("cuda", torch.float32)
    expected, outcome = method_of(name)(exact), method_of(name)(there)
    valid = exact.valid
    differing = (outcome.gate.cpu() != expected.gate)[valid].double().mean().item()
    # Tokens that another rounding of their divergence puts on the other side of a threshold.
    assert differing < 1e-4
    slope, wanted = slope_of(there, outcome).cpu().double(), slope_of(exact, expected)
    alike = valid & (outcome.gate.cpu() == expected.gate)
    torch.testing.assert_close(slope[alike], wanted[alike], rtol=2e-3, atol=1e-4)
    if name in ("cppo", "dppo", "grpo"):
        assert 0 < (expected.gate[valid] == 0).sum() < valid.sum()


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_and_its_statistics_wait_for_nothing(name):
    method, statistics = method_of(name), TokenStatistics()
    tokens = batch("cuda", torch.float32)
    statistics.add(tokens, method(tokens), None, first_minibatch=True)  # whatever is set up once
    torch.cuda.synchronize()
    with no_waiting():
        outcome = method(tokens)
        slope_of(tokens, outcome)
        statistics.add(tokens, outcome, None, first_minibatch=False)
    assert statistics.metrics()["trust_region/tokens"] == 2 * tokens.valid.sum().item()


def test_waiting_is_seen():
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        torch.ones(1, device="cuda").item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_log_pi_and_its_gradient_at_qwen3s_vocabulary(dtype):
    torch.manual_seed(0)
    logits = torch.randn(512, VOCABULARY, device="cuda").mul_(3).to(dtype)
    labels = torch.randint(VOCABULARY, (512,), device="cuda")
    temperature = torch.full((512,), 0.7, device="cuda")
    wide = logits.double().requires_grad_()
    exact = (wide / 0.7).log_softmax(-1)
    entropy = -(exact.exp() * exact).sum(-1)
    leaf = logits.clone().requires_grad_()
    found, found_entropy = token_log_probs(leaf, labels, temperature, with_entropy=True)
    expected = exact.gather(-1, labels[:, None])[:, 0]
    assert (found.double() - expected).abs().max() < 1e-5
    assert (found_entropy.double() - entropy).abs().max() < 1e-5
    weights = torch.randn(512, device="cuda")
    (found * weights + found_entropy).sum().backward()
    (expected * weights.double() + entropy).sum().backward()
    tolerance = {torch.bfloat16: 4e-3, torch.float32: 1e-5}[dtype]  # half a step of the gradient's own dtype
    error = (leaf.grad.double() - wide.grad).norm() / wide.grad.norm()
    assert error < tolerance


def test_gathered_logits_are_those_asked_for():
    torch.manual_seed(0)
    logits = torch.randn(1, 300, VOCABULARY, device="cuda", dtype=torch.bfloat16)
    marked = torch.rand(1, 300, device="cuda") < 0.7
    ids = torch.randint(VOCABULARY, (int(marked.sum()), 21), device="cuda")
    markers = marked * marked.flatten().cumsum(0).view_as(marked)
    picked = gather_logits(logits, markers, ids, 0, [])
    assert picked.dtype == torch.float32
    assert torch.equal(picked, logits[marked].float().gather(-1, ids))
