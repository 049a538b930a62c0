"""Random batches for the tests of `cppo_verl.core`: ragged, with holes, and with garbage wherever the mask is 0."""

import torch

GARBAGE = (float("nan"), float("inf"), float("-inf"), 1e30, -7.0)
MASK_DTYPES = (torch.bool, torch.int64, torch.float32)
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def ragged_mask(g, rows, length, holes=True):
    """Right-padded rows of random length, some empty, some full, with holes in the even ones."""
    lengths = torch.randint(0, length + 1, (rows,), generator=g)
    if rows > 1:
        lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    if holes:
        drop = torch.rand(rows, length, generator=g) < 0.25
        drop[1::2] = False
        mask = mask & ~drop
    return mask


def spoil(tensor, mask, seed=0):
    """Garbage on padding: the same values where mask is 1, NaN / inf / huge values elsewhere."""
    pick = torch.randint(0, len(GARBAGE), mask.shape, generator=generator(seed))
    junk = torch.tensor(GARBAGE)[pick].to(tensor.dtype)
    return torch.where(mask.bool(), tensor, junk)


def mask_inputs(seed, rows=5, length=23, *, holes=True, dtype=torch.float32, mask_dtype=torch.bool):
    """Inputs of cppo_mask and soft_gate. Divergences straddle delta = 0.15 and budgets run from tight to loose."""
    g = generator(seed)
    mask = ragged_mask(g, rows, length, holes)
    shape = (rows, length)
    heavy = torch.rand(shape, generator=g) < 0.2
    divergence = torch.rand(shape, generator=g) * torch.where(heavy, 0.4, 0.08)
    advantages = torch.randn(rows, 1, generator=g).sign().expand(shape) * torch.rand(shape, generator=g)
    advantages = torch.where(torch.rand(shape, generator=g) < 0.1, 0.0, advantages)
    log_ratio = torch.randn(shape, generator=g) * 0.2
    weights = 0.5 + 0.5 * torch.rand(shape, generator=g)
    named = {"log_ratio": log_ratio, "advantages": advantages, "divergence": divergence}
    named = {name: spoil(value.to(dtype), mask, seed) for name, value in named.items()}
    named["response_mask"] = mask.to(mask_dtype)
    options = {"delta": 0.15, "weights": spoil(weights, mask, seed), "delta_b": 0.15 * torch.rand(rows, generator=g)}
    return named, options


def lattice_inputs(seed, rows=6, length=24):
    """The same on a dyadic lattice, where float32 is exact and thresholds are often hit exactly."""
    g = generator(seed)
    mask = ragged_mask(g, rows, length)
    shape = (rows, length)
    named = {
        "log_ratio": torch.randint(-1, 2, shape, generator=g) / 4,
        "advantages": torch.randint(-1, 2, shape, generator=g).float(),
        "divergence": torch.randint(0, 9, shape, generator=g) / 64,
    }
    named["log_ratio"][torch.rand(shape, generator=g) < 0.4] = 0.25
    named["advantages"][torch.rand(shape, generator=g) < 0.4] = 1.0
    named = {name: spoil(value, mask, seed) for name, value in named.items()}
    named["response_mask"] = mask
    weights = torch.randint(1, 5, shape, generator=g) / 4
    options = {
        "delta": 6 / 64,
        "weights": spoil(weights, mask, seed),
        "delta_b": torch.randint(0, 12, (rows,), generator=g) / 64,
    }
    return named, options


def surrogate_inputs(seed, rows=5, length=19, *, dtype=torch.float32, spread=0.4, holes=True):
    g = generator(seed)
    shape = (rows, length)
    mask = ragged_mask(g, rows, length, holes)
    rollout = -6 * torch.rand(shape, generator=g)
    log_prob = rollout + spread * torch.randn(shape, generator=g)
    advantages = torch.randn(shape, generator=g)
    advantages[torch.rand(shape, generator=g) < 0.1] = 0.0
    return {
        "log_prob": log_prob.to(dtype),
        "rollout_log_prob": rollout.to(dtype),
        "advantages": advantages.to(dtype),
    }, mask


def vocabulary(seed, vocab=11, rows=3, length=7, top=4, noise=0.7, dtype=torch.float64):
    """Two full distributions per position, the K ids most likely under mu, and a token sampled from mu."""
    g = generator(seed)
    logits = 1.5 * torch.randn(rows, length, vocab, generator=g, dtype=torch.float64)
    log_mu = torch.log_softmax(logits, -1)
    log_pi = torch.log_softmax(logits + noise * torch.randn(logits.shape, generator=g, dtype=torch.float64), -1)
    ids = log_mu.topk(top, -1).indices
    sampled = torch.multinomial(log_mu.exp().reshape(-1, vocab), 1, generator=g).reshape(rows, length, 1)
    inputs = {
        "log_prob": log_pi.gather(-1, sampled)[..., 0].to(dtype),
        "rollout_log_prob": log_mu.gather(-1, sampled)[..., 0].to(dtype),
        "topk_log_prob": log_pi.gather(-1, ids).to(dtype),
        "rollout_topk_log_prob": log_mu.gather(-1, ids).to(dtype),
        "sampled_in_topk": (ids == sampled).any(-1),
    }
    return inputs, {"mu": log_mu.exp(), "pi": log_pi.exp(), "ids": ids, "sampled": sampled[..., 0]}


def rows_of(*tensors):
    """Row by row as Python lists, exact values."""
    return zip(*[tensor.double().tolist() for tensor in tensors], strict=True)


def compact(tensor, mask):
    """The valid tokens of each row pushed to the left, garbage behind: holes removed."""
    out = torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 0)
    for row in range(mask.shape[0]):
        own = tensor[row][mask[row].bool()]
        out[row, : own.numel()] = own
    return out
