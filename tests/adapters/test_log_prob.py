"""log pi, its temperature and the entropy in float32 whatever the logits' dtype, against float64 at Qwen3's vocabulary.

Beside each, verl's own on the same logits, which is off: what these tests would show if ours were switched off.
"""

import pytest
import torch
from tensordict import TensorDict
from test_topk import LargestTensor
from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits_v2
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, _scale_logits_by_temperature

from cppo_verl.adapters.actor import log_prob
from cppo_verl.adapters.actor.engine import ExactFSDPEngine
from cppo_verl.adapters.actor.log_prob import token_log_probs
from cppo_verl.adapters.actor.worker import ExactTrainingWorker, TrustRegionActorWorker, TrustRegionTrainingWorker

VOCABULARY, TOKENS = 151_936, 32


def case(dtype, vocabulary=VOCABULARY):
    """(logits, labels, temperatures): flat and peaked rows, likely and unlikely labels, a temperature a row."""
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(TOKENS, vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (TOKENS,), generator=generator)
    peaked = torch.arange(0, TOKENS, 2)
    logits[peaked, labels[peaked]] += 20
    temperature = torch.linspace(0.6, 1.4, TOKENS)
    return logits.to(dtype), labels, temperature


def truth(logits, labels, temperature=None):
    """(log pi of the labels, entropy), float64, on the very logits."""
    scaled = logits.double() if temperature is None else logits.double() / temperature.double()[:, None]
    log_pi = scaled.log_softmax(-1)
    return log_pi.gather(-1, labels[:, None])[:, 0], -(log_pi.exp() * log_pi).sum(-1)


def off(value, expected):
    return (value.double() - expected).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_log_pi_is_that_of_the_logits(dtype):
    """And a ratio against the rollout's weights is 1 where the logits are the same."""
    logits, labels, _ = case(dtype)
    exact, _ = truth(logits, labels)
    found, entropy = token_log_probs(logits, labels)
    assert entropy is None
    assert found.dtype == torch.float32
    assert off(found, exact) < 1e-5
    assert off((found - exact.float()).exp(), 1.0) < 1e-5
    verls = logprobs_from_logits_v2(logits, labels)
    assert (off(verls, exact) > 1e-3) == (dtype != torch.float32)


def test_the_temperature_divides_in_float32():
    logits, labels, temperature = case(torch.bfloat16)
    exact, _ = truth(logits, labels, temperature)
    assert off(token_log_probs(logits, labels, temperature)[0], exact) < 1e-5
    scaled = _scale_logits_by_temperature(logits, temperature[:, None], is_unit_temperature=False)
    assert off(logprobs_from_logits_v2(scaled.float(), labels), exact) > 1e-3  # of a float32 log-softmax even


def test_the_entropy_is_exact():
    logits, labels, temperature = case(torch.bfloat16)
    _, exact = truth(logits, labels, temperature)
    found, entropy = token_log_probs(logits, labels, temperature, with_entropy=True)
    assert torch.equal(found, token_log_probs(logits, labels, temperature)[0])
    assert off(entropy, exact) < 1e-5
    _, exact = truth(logits, labels)
    assert off(entropy_from_logits(logits), exact) > 1e-3


def gradient_by_hand(logits, labels, temperature, slope, entropy_slope):
    """float64, row by row: d sum(slope log pi(y) + entropy_slope H) / d logits, and the size of what is added up."""
    rows, sizes = [], []
    for x, label, t, s, e in zip(logits.double(), labels, temperature.double(), slope, entropy_slope, strict=True):
        log_p = (x / t).log_softmax(-1)
        p = log_p.exp()
        entropy_term = p * (log_p - (p * log_p).sum())
        chosen = torch.zeros_like(p)
        chosen[label] = 1
        rows.append((s.double() * (chosen - p) - e.double() * entropy_term) / t)
        sizes.append((s.abs() * (chosen + p) + e.abs() * entropy_term.abs()) / t)
    return torch.stack(rows), torch.stack(sizes)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2.0**-8), (torch.float32, 0.0)])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_the_gradient_is_that_of_a_float64_loop(dtype, rounding, inplace, with_entropy):
    """Within float32's error, and one rounding to the logits' dtype, in which it goes back."""
    logits, labels, temperature = case(dtype, vocabulary=20_000)
    slope = torch.linspace(-2, 2, TOKENS)
    entropy_slope = torch.linspace(1, -0.5, TOKENS) if with_entropy else torch.zeros(TOKENS)
    expected, size = gradient_by_hand(logits, labels, temperature, slope, entropy_slope)
    leaf = logits.clone().requires_grad_()
    made = leaf.clone()  # what may be overwritten
    found, entropy = token_log_probs(made, labels, temperature, with_entropy, inplace_backward=inplace)
    loss = (found * slope).sum() + ((entropy * entropy_slope).sum() if with_entropy else 0.0)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert gradient.dtype == dtype
    assert (gradient.data_ptr() == made.data_ptr()) == inplace
    assert torch.equal(made, logits) != inplace
    error = (gradient.double() - expected).abs() - rounding * expected.abs()
    assert (error / size.clamp_min(1e-30)).max() < 1e-5


def test_an_entropy_that_is_only_measured_changes_no_gradient():
    logits, labels, _ = case(torch.float32, vocabulary=500)
    gradients = []
    for with_entropy in (False, True):
        leaf = logits.clone().requires_grad_()
        token_log_probs(leaf, labels, None, with_entropy)[0].sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_ids_that_cannot_be_sampled_are_no_nan():
    """Logits of -inf, as models pad their vocabulary."""
    logits, labels, temperature = case(torch.float32, vocabulary=500)
    logits[:, 490:] = -torch.inf
    labels = labels.clamp_max(489)
    leaf = logits.clone().requires_grad_()
    found, entropy = token_log_probs(leaf, labels, temperature, with_entropy=True)
    (found + entropy).sum().backward()
    exact, _ = truth(logits[:, :490], labels, temperature)
    assert off(found, exact) < 1e-5
    assert entropy.isfinite().all()
    assert (leaf.grad[:, 490:] == 0).all()
    assert leaf.grad.isfinite().all()


def test_chunks_change_nothing_and_bound_the_memory(monkeypatch):
    logits, labels, temperature = case(torch.bfloat16, vocabulary=1000)

    def run():
        leaf = logits.clone().requires_grad_()
        with LargestTensor() as seen:
            found, entropy = token_log_probs(leaf.clone(), labels, temperature, with_entropy=True)
            (found + entropy).sum().backward()
        return found, entropy, leaf.grad, seen.largest

    whole = run()
    monkeypatch.setattr(log_prob, "CHUNK", 3000)
    parts = run()
    assert all(torch.equal(one, other) for one, other in zip(whole[:3], parts[:3], strict=True))
    assert parts[3] == logits.numel()  # the gradient, in the logits' dtype
    monkeypatch.setattr(log_prob, "CHUNK", 1)
    assert torch.equal(run()[2], parts[2])


def test_a_chunk_is_all_that_is_widened():
    logits, labels, _ = case(torch.bfloat16)
    with LargestTensor() as seen, torch.no_grad():
        token_log_probs(logits.repeat(4, 1), labels.repeat(4), with_entropy=True)
    assert seen.largest == 4 * logits.numel()  # the repeated logits
    rows = logits.repeat(4, 1)
    with LargestTensor() as seen, torch.no_grad():
        token_log_probs(rows, labels.repeat(4), with_entropy=True)
    assert seen.largest == log_prob.CHUNK // VOCABULARY * VOCABULARY
    with LargestTensor() as seen, torch.no_grad():
        logprobs_from_logits_v2(rows.unsqueeze(0), labels.repeat(4).unsqueeze(0))
    assert seen.largest == rows.numel()


@pytest.mark.parametrize(
    ("flash", "temperature", "entropy", "fused", "verls"),
    [
        (False, 1.0, False, False, False),
        (True, 1.0, False, False, True),
        (True, 0.7, False, False, False),
        (True, 1.0, True, False, False),
        (False, 0.7, True, True, True),
    ],
)
def test_verls_own_path_is_kept_where_it_is_exact(monkeypatch, flash, temperature, entropy, fused, verls):
    """flash-attn's kernel at temperature 1, and fused kernels, which have no logits to look at."""
    from verl.utils import tensordict_utils as tu
    from verl.utils import torch_functional

    asked = []

    def recorded(self, output, output_args, micro_batch, logits_processor_func):
        asked.append((micro_batch, logits_processor_func))
        return {}

    monkeypatch.setattr(FSDPEngineWithLMHead, "prepare_model_outputs", recorded)
    monkeypatch.setattr(torch_functional, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", flash)
    monkeypatch.delenv("VERL_DISABLE_FLASH_ATTN_CE", raising=False)
    batch = TensorDict({"input_ids": torch.zeros(2, 3)}, batch_size=2)
    tu.assign_non_tensor(batch, calculate_entropy=entropy, use_fused_kernels=fused)
    engine = ExactFSDPEngine.__new__(ExactFSDPEngine)
    arguments = (None, {"temperature_is_one": temperature == 1}, batch)
    engine.prepare_model_outputs(*arguments, "loss")
    assert (asked[0][0] is batch and asked[0][1] == "loss") == verls
    assert tu.get_non_tensor_data(batch, "distillation_only", False) is False  # what the loss sees is not changed
    monkeypatch.setenv("VERL_DISABLE_FLASH_ATTN_CE", "1")
    engine.prepare_model_outputs(*arguments, "loss")
    assert (asked[1][0] is batch) == fused


def test_actor_and_reference_use_the_engine():
    assert issubclass(TrustRegionActorWorker.actor_worker_cls, TrustRegionTrainingWorker)
    assert issubclass(TrustRegionTrainingWorker, ExactTrainingWorker)
    assert TrustRegionActorWorker.ref_worker_cls is ExactTrainingWorker
