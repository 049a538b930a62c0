"""Metrics of a step, exact over its tokens: sums and histogram counts per rank, added up once over data parallelism.

Everything stays in one float64 vector on the training device, so that collecting it costs no synchronisation per
micro-batch and no rounding by averages of averages.
"""

import math

import torch
from torch import Tensor

from cppo_verl import core
from cppo_verl.methods import Outcome, Tokens

# Histogram of D_t: 50 logarithmic bins a decade from 1e-8 to 1e2; a percentile is exact to within one bin (4.7%).
_BINS_PER_DECADE, _LOW, _HIGH = 50, -8, 2
_N_BINS = (_HIGH - _LOW) * _BINS_PER_DECADE

# Ages that have metrics of their own; the last one stands for all above it as well.
_AGES = ("age_0", "age_1", "age_2", "age_3", "age_4_or_more")


class TokenStatistics:
    """Accumulates over the micro-batches of a step; ``metrics`` divides sums by counts once at the end."""

    def __init__(self, total_variation: bool = True) -> None:
        """
        Args:
            total_variation: whether D_t is one; the bounds are left out of the metrics otherwise.
        """
        self._total_variation = total_variation
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._histogram: Tensor | None = None

    @torch.no_grad()
    def add(
        self,
        tokens: Tokens,
        outcome: Outcome,
        entropy: Tensor | None,
        first_minibatch: bool,
        age: Tensor | None = None,
    ) -> None:
        """Add one micro-batch.

        Args:
            entropy: exact per-token entropy of pi ``[B, T]``, where the engine computed it.
            age: weight updates between those that sampled a token and those the step began with, int ``[B, T]``; None
                in lockstep, where it is 0.
        """
        sums = _token_sums(tokens, outcome)
        if age is not None:
            sums |= _age_sums(tokens, outcome, age)
        sums |= _response_sums(tokens, outcome)
        if self._total_variation:
            sums |= _bound_sums(tokens, outcome)
        mismatch = _mismatch_sums(tokens)
        of_first = mismatch if first_minibatch else {name: torch.zeros_like(sum_) for name, sum_ in mismatch.items()}
        sums |= mismatch | {f"first_{name}": value for name, value in of_first.items()}
        zero = torch.zeros((), dtype=torch.float64, device=tokens.divergence.device)
        sums["entropy"] = zero if entropy is None else _total(entropy, tokens.valid)
        sums["entropy_tokens"] = zero if entropy is None else tokens.valid.sum().double()
        vector = torch.stack(list(sums.values()))
        histogram = _histogram(tokens.divergence, tokens.valid)
        if self._sums is None or self._histogram is None:
            self._names, self._sums, self._histogram = list(sums), vector, histogram
        else:
            self._sums += vector
            self._histogram += histogram

    def reduced(self, group: torch.distributed.ProcessGroup | None) -> "TokenStatistics":
        """The sum over the data-parallel ranks (a collective: every rank of ``group`` must call it)."""
        total = TokenStatistics(self._total_variation)
        if self._sums is None or self._histogram is None:
            return total
        total._names, total._sums, total._histogram = self._names, self._sums.clone(), self._histogram.clone()
        if group is not None:
            for tensor in (total._sums, total._histogram):
                torch.distributed.all_reduce(tensor, group=group)
        return total

    def metrics(self) -> dict[str, float]:
        """The finished metrics (docs/metrics.md has each formula); a ratio without a denominator is left out."""
        if self._sums is None or self._histogram is None:
            return {}
        s = dict(zip(self._names, self._sums.tolist(), strict=True))
        masked = s["masked"]
        ratios = {
            "trust_region/masked": (masked, s["tokens"]),
            "trust_region/masked_by_token": (s["masked_by_token"], s["tokens"]),
            "trust_region/masked_by_prefix": (masked - s["masked_by_token"], s["tokens"]),
            "trust_region/masked_positive": (s["masked_positive"], s["positive"]),
            "trust_region/masked_negative": (s["masked_negative"], s["negative"]),
            "trust_region/prefix_share": (masked - s["masked_by_token"], masked),
            "trust_region/towards_rollout": (s["towards_rollout"], s["tokens"]),
            "trust_region/gate": (s["gate"], s["tokens"]),
            "trust_region/delta_b": (s["delta_b"], s["delta_b_responses"]),
            "trust_region/clipped": (s["clipped"], s["clipped_of"]),
            "trust_region/inside_prefix": (s["inside_prefix"], s["inside_prefix_responses"]),
            "trust_region/loss": (s["loss"], s["tokens"]),
            "trust_region/absolute_loss": (s["absolute_loss"], s["tokens"]),
            "divergence/mean": (s["divergence"], s["tokens"]),
            "divergence/at_rollout_weights": (s["first_divergence"], s["first_tokens"]),
            "rollout/log_prob_relative_error": (s["first_log_ratio"], s["first_log_mu"]),
            "policy/log_prob_relative_change": (s["log_ratio"], s["log_mu"]),
            "policy/entropy_sampled": (s["log_mu"], s["tokens"]),
            "policy/entropy": (s["entropy"], s["entropy_tokens"]),
        }
        for quarter in range(1, 5):
            ratios[f"divergence/quarter_{quarter}"] = (s[f"divergence_{quarter}"], s[f"tokens_{quarter}"])
        if self._total_variation:
            ratios["bound/uniform"] = (s["bound_uniform"], s["responses"])
            ratios["bound/cppo"] = (s["bound_cppo"], s["responses"])
        if "age" in s:
            ratios["staleness/mean"] = (s["age"], s["tokens"])
            for name in _AGES:
                ratios[f"staleness/tokens_{name}"] = (s[f"tokens_{name}"], s["tokens"])
                ratios[f"staleness/divergence_{name}"] = (s[f"divergence_{name}"], s[f"tokens_{name}"])
                ratios[f"staleness/masked_{name}"] = (s[f"masked_{name}"], s[f"tokens_{name}"])
        result = {name: top / bottom for name, (top, bottom) in ratios.items() if bottom > 0}
        result |= {"trust_region/tokens": s["tokens"], "trust_region/masked_tokens": masked}
        if s["tokens"] > 0:
            result["divergence/p99"] = _percentile(self._histogram, 0.99)
        return result


def _total(values: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, values, 0.0).sum(dtype=torch.float64)


def _token_sums(tokens: Tokens, outcome: Outcome) -> dict[str, Tensor]:
    valid, gate = tokens.valid, outcome.gate
    masked = valid & (gate < 1)
    up, down = valid & (tokens.advantages > 0), valid & (tokens.advantages < 0)
    counts = {
        "tokens": valid,
        "masked": masked,
        "masked_by_token": masked & outcome.token_cause,
        # A positive advantage raises pi, a negative one lowers it.
        "towards_rollout": valid & (tokens.advantages * (tokens.log_prob.detach() - tokens.rollout_log_prob) < 0),
        "positive": up,
        "negative": down,
        "masked_positive": masked & up,
        "masked_negative": masked & down,
    }
    sums = {name: flags.sum().double() for name, flags in counts.items()}
    clipped = torch.zeros_like(valid) if outcome.clipped is None else outcome.clipped
    sums["clipped"] = (valid & clipped).sum().double()
    sums["clipped_of"] = sums["tokens"] * float(outcome.clipped is not None)
    loss = outcome.loss.detach()
    return sums | {"gate": _total(gate, valid), "loss": _total(loss, valid), "absolute_loss": _total(loss.abs(), valid)}


def _age_sums(tokens: Tokens, outcome: Outcome, age: Tensor) -> dict[str, Tensor]:
    """Tokens, their divergence and how many of them are masked, by age."""
    masked = tokens.valid & (outcome.gate < 1)
    sums = {"age": _total(age.double(), tokens.valid)}
    for number, name in enumerate(_AGES):
        of_age = tokens.valid & ((age >= number) if number == len(_AGES) - 1 else (age == number))
        sums[f"tokens_{name}"] = of_age.sum().double()
        sums[f"masked_{name}"] = (masked & of_age).sum().double()
        sums[f"divergence_{name}"] = _total(tokens.divergence, of_age)
    return sums


def _response_sums(tokens: Tokens, outcome: Outcome) -> dict[str, Tensor]:
    """Mean divergence by quarter of the response's own length, and the effective prefix budget."""
    valid = tokens.valid
    quarter = core.quarters(valid)
    sums = {}
    for number in range(1, 5):
        inside = valid & (quarter == number - 1)
        sums[f"divergence_{number}"] = _total(tokens.divergence, inside)
        sums[f"tokens_{number}"] = inside.sum().double()
    answered = valid.any(-1)
    delta_b = torch.zeros(len(valid), device=valid.device) if outcome.delta_b is None else outcome.delta_b
    sums["delta_b"] = _total(delta_b, answered)
    sums["delta_b_responses"] = answered.sum().double() * float(outcome.delta_b is not None)
    exceeded = torch.zeros_like(valid) if outcome.prefix_exceeded is None else outcome.prefix_exceeded
    sums["inside_prefix"] = (answered & ~exceeded.any(-1)).sum().double()
    sums["inside_prefix_responses"] = answered.sum().double() * float(outcome.prefix_exceeded is not None)
    return sums


def _bound_sums(tokens: Tokens, outcome: Outcome) -> dict[str, Tensor]:
    """Theorem 1's bound with each response's own constants, and that of a uniform threshold."""
    weights = tokens.valid.float() if outcome.weights is None else outcome.weights
    bounds = core.realised_bounds(tokens.divergence, weights, tokens.valid)
    return {
        "bound_uniform": bounds.uniform.sum(),
        "bound_cppo": bounds.cppo.sum(),
        "responses": tokens.valid.any(-1).sum().double(),
    }


def _mismatch_sums(tokens: Tokens) -> dict[str, Tensor]:
    """sum |log pi - log mu| and sum |log mu| = -sum log mu, with the divergence."""
    valid = tokens.valid
    return {
        "log_ratio": _total((tokens.log_prob.detach() - tokens.rollout_log_prob).abs(), valid),
        "log_mu": -_total(tokens.rollout_log_prob, valid),
        "divergence": _total(tokens.divergence, valid),
        "tokens": valid.sum().double(),
    }


def _histogram(divergence: Tensor, valid: Tensor) -> Tensor:
    place = (divergence.clamp_min(1e-30).log10() - _LOW) * _BINS_PER_DECADE
    bins = place.floor().clamp(0, _N_BINS - 1).nan_to_num(0.0).long()
    counts = torch.zeros(_N_BINS, dtype=torch.float64, device=divergence.device)
    return counts.scatter_add_(0, bins.flatten(), valid.flatten().double())


def _percentile(histogram: Tensor, share: float) -> float:
    """Geometric middle of the bin that holds the percentile."""
    cumulative = histogram.cumsum(0).cpu()
    index = int(torch.searchsorted(cumulative, cumulative[-1] * share))
    return math.pow(10.0, _LOW + (min(index, _N_BINS - 1) + 0.5) / _BINS_PER_DECADE)
