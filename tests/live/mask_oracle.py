"""CPPO's mask as a plain float64 loop over one response, fed with dumped log-probabilities and masks only."""

import math


def mask_of_response(batch, row, *, delta, delta_b, w_min):
    """(keep, distance to the nearest threshold, cause if masked) for each valid token of a dumped row, binary TV."""
    valid = batch["response_mask"][row].tolist()
    columns = ("log_prob", "rollout_log_prob", "advantages")
    log_pi, log_mu, advantages = (
        [value for value, use in zip(batch[name][row].double().tolist(), valid, strict=True) if use] for name in columns
    )
    divergence = [abs(math.exp(p) - math.exp(q)) for p, q in zip(log_pi, log_mu, strict=True)]
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
