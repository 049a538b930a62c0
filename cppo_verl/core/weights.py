"""Position weights w_t (Eq. 9) and the prefix budget delta_b (Section 4.1, Eq. 22)."""

import torch
from torch import Tensor

from cppo_verl.core.checks import require_not_nan, require_positive, require_same_shape

SCHEDULES = ("linear", "uniform", "shuffled")


@torch.no_grad()
def position_weights(
    response_mask: Tensor,
    w_min: float,
    *,
    schedule: str = "linear",
    horizon: int | None = None,
    generator: torch.Generator | None = None,
    validate: bool = True,
) -> Tensor:
    """Eq. 9: ``w_t = 1 - (1 - w_min)/(T - 1) (t - 1)`` with T the response's own number of valid tokens.

    Args:
        response_mask: ``[B, T]``, 1 on valid tokens.
        w_min: weight of the last token, in (0, 1]. A response of one token has weight 1.
        schedule: "linear" | "uniform" (w = 1) | "shuffled" (the linear weights of a row at random positions of it).
        horizon: None, or a T for all responses, at which the weight reaches w_min (and stays there).
        generator: CPU generator for "shuffled"; drawn from once per row, in row order, whatever the padding.
        validate: check ``w_min``, ``schedule`` and ``horizon`` (plain Python values: this never waits for the device).

    Returns:
        float32 ``[B, T]``, 0 on padding.
    """
    require_same_shape("response_mask", response_mask=response_mask)
    if validate and not 0 < w_min <= 1:
        raise ValueError(f"w_min must be in (0, 1], got {w_min}")
    if validate and horizon is not None and horizon < 1:
        raise ValueError(f"horizon must be 1 or more, or None, got {horizon}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    valid = response_mask.bool()
    if schedule == "uniform":
        return valid.float()
    last = (
        valid.sum(-1, keepdim=True) - 1
        if horizon is None
        else torch.full_like(valid[:, :1], horizon - 1, dtype=torch.long)
    )
    position = valid.cumsum(-1) - 1 if schedule == "linear" else _shuffled_positions(valid, generator)
    position = position.minimum(last)
    step = (1.0 - w_min) / last.clamp_min(1).double()
    return torch.where(valid, 1.0 - step * position, 0.0).float()


@torch.no_grad()
def prefix_budget(
    divergence: Tensor,
    response_mask: Tensor,
    *,
    delta_b: float,
    quantile: float | None = None,
    scale: float = 1.0,
    max_factor: float = 2.0,
    validate: bool = True,
) -> Tensor:
    """Prefix budget of each response, float32 ``[B]``: fixed, or calibrated on its own divergences (Eq. 22).

    Args:
        divergence, response_mask: ``[B, T]``. Calibration uses the unweighted D over valid tokens.
        delta_b: the budget (``quantile=None``), or its lower bound delta_b_min.
        quantile: e.g. 0.9 for ``clamp(P90(D_1..D_T), delta_b, max_factor * delta_b)``, linear interpolation.
        scale: factor on that quantile before it is clamped (not in the paper; its authors' code has it, at 1).
        max_factor: upper bound as a multiple of ``delta_b``.

    A response without a valid token gets ``delta_b``.
    """
    require_same_shape("response_mask", response_mask=response_mask, divergence=divergence)
    if validate:
        _check_budget(delta_b, quantile, max_factor)
        require_positive("scale", scale)
        require_not_nan(response_mask.bool(), divergence=divergence)
    fixed = torch.full((divergence.shape[0],), float(delta_b), device=divergence.device)
    if quantile is None or divergence.shape[1] == 0:
        return fixed
    value = _row_quantile(divergence.float(), response_mask.bool(), quantile)
    return torch.where(response_mask.bool().any(-1), (scale * value).clamp(delta_b, max_factor * delta_b), fixed)


def quarters(valid: Tensor) -> Tensor:
    """In which quarter of its response's own length each token lies, int64 ``[B, T]``: 0 to 3 on valid tokens.

    Args:
        valid: bool ``[B, T]``.
    """
    return (valid.cumsum(-1) - 1) * 4 // valid.sum(-1, keepdim=True).clamp_min(1)


def _check_budget(delta_b: float, quantile: float | None, max_factor: float) -> None:
    if not delta_b >= 0:
        raise ValueError(f"delta_b must be >= 0, got {delta_b}")
    if quantile is not None and not 0 <= quantile <= 1:
        raise ValueError(f"quantile must be in [0, 1] or None, got {quantile}")
    if not max_factor >= 1:
        raise ValueError(f"max_factor must be >= 1, got {max_factor}")


def _shuffled_positions(valid: Tensor, generator: torch.Generator | None) -> Tensor:
    """A random permutation of 0..T-1 over each row's valid tokens; the draw depends on T only, not on the padding."""
    positions = torch.zeros(valid.shape, dtype=torch.long, device=valid.device)
    for row, length in enumerate(valid.sum(-1).tolist()):
        positions[row, valid[row]] = torch.randperm(length, generator=generator).to(valid.device)
    return positions


def _row_quantile(values: Tensor, valid: Tensor, quantile: float) -> Tensor:
    """Linear-interpolation quantile of each row's valid values (torch.quantile refuses more than 16M elements)."""
    ordered = values.masked_fill(~valid, torch.inf).sort(-1).values
    place = (valid.sum(-1).clamp_min(1) - 1).double() * quantile
    low = place.floor().long().unsqueeze(-1)
    high = place.ceil().long().unsqueeze(-1)
    below, above = ordered.gather(-1, low).squeeze(-1), ordered.gather(-1, high).squeeze(-1)
    share = place - place.floor()
    # Not lerp: between a number and infinity it gives NaN; between two infinities every formula does.
    between = below.double() + share * (above.double() - below.double())
    return torch.where((below == above) | (share == 0), below, between.float())
