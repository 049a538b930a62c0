"""CPPO's mask as a plain float64 loop over one response, fed with dumped log-probabilities, ids and masks only."""

import math


def divergence_of_token(token, topk=()):
    """TV on the partition {K ids, sampled token, everything else}; without ``topk`` the binary one.

    token: (id, log pi, log mu) of the sampled token; topk: the same for each of the K.
    """
    cells = {number: (math.exp(pi), math.exp(mu)) for number, pi, mu in topk}
    if token[0] not in cells:
        cells[token[0]] = (math.exp(token[1]), math.exp(token[2]))
    other = [max(1 - sum(cell[side] for cell in cells.values()), 0) for side in (0, 1)]
    return 0.5 * (sum(abs(pi - mu) for pi, mu in cells.values()) + abs(other[0] - other[1]))


def divergences_of_response(batch, row):
    """float64 D_t of each valid token of a dumped row."""
    result = []
    for t in batch["response_mask"][row].nonzero()[:, 0].tolist():
        token = [batch[name][row, t].item() for name in ("responses", "log_prob", "rollout_log_prob")]
        names = ("topk_ids", "topk_log_prob", "rollout_topk_log_prob")
        topk = list(zip(*(batch[name][row, t].tolist() for name in names), strict=True)) if names[0] in batch else ()
        result.append(divergence_of_token(token, topk))
    return result


def mask_of_response(batch, row, *, delta, delta_b, w_min):
    """(keep, distance to the nearest threshold, cause if masked) for each valid token of a dumped row."""
    valid = batch["response_mask"][row].tolist()
    columns = ("log_prob", "rollout_log_prob", "advantages")
    log_pi, log_mu, advantages = (
        [value for value, use in zip(batch[name][row].double().tolist(), valid, strict=True) if use] for name in columns
    )
    divergence = divergences_of_response(batch, row)
    length = len(divergence)
    weights = [1 - (1 - w_min) / max(length - 1, 1) * t for t in range(length)]
    keep, margin, causes, spent, weight = [], [], [], 0.0, 0.0
    for t in range(length):
        z = weights[t] * divergence[t]
        slack_token, slack_prefix = delta - z, delta + delta_b * weight - (spent + z)
        corrective = advantages[t] * math.expm1(log_pi[t] - log_mu[t]) <= 0
        keep.append(corrective or min(slack_token, slack_prefix) >= 0)
        margin.append(min(abs(slack_token), abs(slack_prefix)))
        causes.append("token" if slack_token < 0 else "prefix")
        spent, weight = spent + z, weight + weights[t]
    return keep, margin, causes
