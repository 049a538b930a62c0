"""log pi of the sampled tokens and the entropy of pi, in float32 whatever the logits' dtype.

Rows are widened a chunk at a time, forward and backward: no float32 copy of all logits exists. Saved for the backward
pass are the logits themselves and three numbers a row.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of the logits that are widened at a time: 32 MiB of float32, 55 rows of Qwen3's vocabulary.
CHUNK = 2**23


def token_log_probs(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor | None = None,
    with_entropy: bool = False,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Natural-log probability of each row's label under softmax(logits / temperature), and the entropy in nats.

    Args:
        logits: ``[N, V]``, any floating dtype; the gradient has the same.
        labels: int64 ``[N]``.
        temperature: ``[N]``, above 0; None for 1.
        inplace_backward: the backward pass overwrites ``logits`` with their gradient; nothing else may need them then.

    Returns:
        float32 ``[N]`` each; the second is None unless ``with_entropy``.
    """
    if temperature is not None:
        temperature = temperature.float()
    log_prob, entropy = _TokenLogProbs.apply(logits, labels, temperature, with_entropy, inplace_backward)
    return log_prob, entropy if with_entropy else None


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, temperature: Tensor | None, with_entropy: bool, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        log_prob, entropy, largest, log_sum = (
            torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(4)
        )
        for rows, wide in _widened(logits, temperature):
            largest[rows] = wide.amax(-1)
            wide.sub_(largest[rows, None])
            sampled = wide.gather(-1, labels[rows, None])[:, 0]
            total = wide.exp_().sum(-1)
            log_sum[rows] = total.log()
            log_prob[rows] = sampled - log_sum[rows]
            if with_entropy:  # entr(x) = -x ln x: a probability of 0 adds 0
                entropy[rows] = log_sum[rows] + torch.special.entr(wide).sum(-1) / total
        ctx.save_for_backward(logits, labels, temperature, largest, log_sum, entropy)
        ctx.inplace = inplace
        ctx.set_materialize_grads(False)
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return log_prob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor | None, entropy_slope: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, labels, temperature, largest, log_sum, entropy = ctx.saved_tensors
        gradient = logits if ctx.inplace else torch.empty_like(logits)
        slope = torch.zeros_like(log_sum) if slope is None else slope
        for rows, wide in _widened(logits, temperature):
            wide.sub_(largest[rows, None]).sub_(log_sum[rows, None])
            if entropy_slope is None:
                wide.exp_().mul_(-slope[rows, None])
            else:  # d H / d logit = -p (log p + H); p is 0 in float32 from -104 on
                probability = wide.exp()
                factor = wide.clamp_min_(-200.0).add_(entropy[rows, None]).mul_(entropy_slope[rows, None])
                factor.add_(slope[rows, None])
                torch.mul(probability, factor, out=wide).neg_()
            wide.scatter_add_(-1, labels[rows, None], slope[rows, None])
            if temperature is not None:
                wide.div_(temperature[rows, None])
            gradient[rows] = wide
        return gradient, None, None, None, None


def _widened(logits: Tensor, temperature: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits / temperature in float32) by chunks, in one buffer that is overwritten each time."""
    size = max(min(CHUNK // logits.shape[-1], len(logits)), 1)
    buffer = torch.empty(size, logits.shape[-1], dtype=torch.float32, device=logits.device)
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        wide = buffer[: len(logits[rows])].copy_(logits[rows])
        if temperature is not None:
            wide.div_(temperature[rows, None])
        yield rows, wide
