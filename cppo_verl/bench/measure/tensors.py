"""Mask, calibrated budget, Top-K gather and log-probabilities: tensors of a made-up batch in, nothing else around."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils.torch_functional import logprobs_from_logits

from cppo_verl import core
from cppo_verl.adapters.actor.log_prob import token_log_probs
from cppo_verl.adapters.actor.topk import TopKLogits, gather_logits, response_markers
from cppo_verl.adapters.cpu.verl_platform import PlatformCPU
from cppo_verl.bench.cells import Cell

Functions = dict[str, Callable[[], object]]

# Where the tensors are, and what counts the bytes there.
_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_MEMORY: Any = torch.cuda if _DEVICE.type == "cuda" else PlatformCPU.device_module

# The paper's for Qwen3-30B-A3B-Base: thresholds and quantile.
DELTA, DELTA_B, W_MIN, QUANTILE = 0.20, 0.020, 0.8, 0.9


def _on_the_device(build: Callable[[Cell], tuple[Functions, dict[str, Any]]]) -> Callable[..., Any]:
    """``build``, with every tensor that it makes on the device."""

    @functools.wraps(build)
    def built(cell: Cell) -> tuple[Functions, dict[str, Any]]:
        with _DEVICE:
            return build(cell)

    return built


@_on_the_device
def mask(cell: Cell) -> tuple[Functions, dict[str, Any]]:
    """Position weights and mask with both causes, as the loss calls them, and reading their inputs once."""
    divergence, valid = _batch(cell)
    log_ratio = torch.randn_like(divergence).mul_(0.1)
    advantages = torch.randn(len(divergence), 1).expand_as(divergence).contiguous()
    budget = core.prefix_budget(divergence, valid, delta_b=DELTA_B, validate=False)

    def ours() -> core.TrustRegion:
        weights = core.position_weights(valid, W_MIN, validate=False)
        return core.cppo_mask(
            log_ratio, advantages, divergence, valid, delta=DELTA, weights=weights, delta_b=budget, validate=False
        )

    return {"mask": ours, "read": lambda: _read(log_ratio, advantages, divergence, valid)}, {}


@_on_the_device
def quantile(cell: Cell) -> tuple[Functions, dict[str, Any]]:
    """The calibrated budget (Eq. 22), sorting the divergences, and reading them once."""
    divergence, valid = _batch(cell)

    def ours() -> Tensor:
        return core.prefix_budget(divergence, valid, delta_b=DELTA_B, quantile=QUANTILE, validate=False)

    return {"quantile": ours, "sort": lambda: divergence.sort(-1), "read": lambda: _read(divergence, valid)}, {}


@_on_the_device
def gather(cell: Cell) -> tuple[Functions, dict[str, Any]]:
    """The logits hook and what the loss makes of it, against verl's log-probability of the sampled token.

    "hook" is all of ours, with its checks; "copy" the copying of the K + 1 logits alone.
    """
    dtype, tokens, k = getattr(torch, cell["dtype"]), cell["tokens"], cell["k"]
    logits = torch.randn(tokens, cell["vocabulary"]).mul_(3.0).to(dtype)
    data, log_prob, sampled = _topk_batch(logits, k)
    valid = torch.ones_like(log_prob, dtype=torch.bool)
    markers = response_markers(data).unsqueeze(0)
    ids = torch.cat([data["topk_ids"].values().long(), sampled[:-1].unsqueeze(-1)], dim=-1)
    topk, leaf = TopKLogits(), logits.clone().requires_grad_()

    def hook() -> object:
        topk.collect(logits.unsqueeze(0), data)
        return topk.finish(log_prob, log_prob, valid, data)

    def forward() -> Tensor:
        with torch.no_grad():
            return logprobs_from_logits(logits, sampled)

    def both() -> None:
        leaf.grad = None
        logprobs_from_logits(leaf, sampled).sum().backward()

    copy = torch.no_grad()(lambda: gather_logits(logits.unsqueeze(0), markers, ids, 0, []))
    return {"hook": hook, "copy": copy, "log_softmax": forward, "log_softmax and backward": both}, {}


@_on_the_device
def log_prob(cell: Cell) -> tuple[Functions, dict[str, Any]]:
    """log pi of the sampled tokens in float32, and verl's, which without flash-attn's kernel has the logits' dtype.

    "bytes" is what a forward and a backward pass take beyond the logits at their peak.
    """
    torch.manual_seed(0)
    logits = torch.randn(cell["tokens"], cell["vocabulary"]).mul_(3.0).to(getattr(torch, cell["dtype"]))
    sampled = torch.randint(cell["vocabulary"], (cell["tokens"],))

    def ours(logits: Tensor, with_entropy: bool = False) -> Tensor:
        log_pi, entropy = token_log_probs(logits, sampled, None, with_entropy, inplace_backward=True)
        return log_pi if entropy is None else log_pi + entropy

    def both(function: Callable[[Tensor], Tensor]) -> None:
        leaf = torch.empty(0, dtype=logits.dtype, requires_grad=True)
        function(_FromHead.apply(leaf, logits.clone())).sum().backward()

    def verls(logits: Tensor) -> Tensor:
        return logprobs_from_logits(logits, sampled)

    functions: Functions = {
        "verl's": torch.no_grad()(lambda: verls(logits)),
        "ours": torch.no_grad()(lambda: ours(logits)),
        "verl's and backward": lambda: both(verls),
        "ours and backward": lambda: both(ours),
        "ours with entropy and backward": lambda: both(lambda logits: ours(logits, with_entropy=True)),
    }
    size = logits.numel() * logits.element_size()
    return functions, {"bytes": {name: peak(functions[name]) - size for name in functions if "backward" in name}}


class _FromHead(torch.autograd.Function):
    """The model's part of the graph: logits that come out of it and a gradient that goes back into it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, logits: Tensor) -> Tensor:
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_empty(0), None


def peak(function: Callable[[], object]) -> int:
    """Bytes that the process, or what it has on the GPU, grows by at most while ``function`` runs."""
    ctypes.CDLL(None).malloc_trim(0)  # or memory kept from before would be used without growing
    _MEMORY.reset_peak_memory_stats()
    before = _MEMORY.memory_allocated()
    function()
    return int(_MEMORY.max_memory_allocated() - before)


def _batch(cell: Cell) -> tuple[Tensor, Tensor]:
    """Divergences, a few of them large, and the valid tokens of responses of half to full length."""
    torch.manual_seed(0)
    rows, length = cell["responses"], cell["tokens"]
    divergence = torch.empty(rows, length).exponential_().square_().mul_(0.006)
    lengths = torch.randint(length // 2, length + 1, (rows, 1))
    return divergence, torch.arange(length) < lengths


def _read(*tensors: Tensor) -> list[Tensor]:
    """One pass over each tensor; booleans four at a time, for torch would widen each."""
    return [(tensor.view(torch.int32) if tensor.dtype == torch.bool else tensor).amax() for tensor in tensors]


def _topk_batch(logits: Tensor, k: int) -> tuple[TensorDict, Tensor, Tensor]:
    """(data, log pi, labels) of a response that was sampled from the policy itself; every fourth token is rare."""
    tokens = len(logits)
    ids, values = torch.empty(tokens, k, dtype=torch.int32), torch.empty(tokens, k)
    sampled, log_prob = torch.empty(tokens, dtype=torch.int64), torch.empty(1, tokens)
    for row in range(tokens):
        log_pi = logits[row].float().log_softmax(-1)
        top = log_pi.topk(k)
        ids[row], values[row] = top.indices.int(), top.values
        sampled[row] = log_pi.argmin() if row % 4 == 0 else top.indices[row % k]
        log_prob[0, row] = log_pi[sampled[row]]
    # The hook sees one row of logits for every token of the sequence: a prompt of one token, the last row unused.
    columns = {
        "prompts": sampled[:1],
        "responses": sampled[:-1],
        "input_ids": sampled,
        "topk_ids": ids[:-1],
        "rollout_topk_log_prob": values[:-1],
    }
    nested = {name: torch.nested.as_nested_tensor([rows], layout=torch.jagged) for name, rows in columns.items()}
    return TensorDict(nested, batch_size=1), log_prob[:, :-1], sampled
