"""Argument checks shared by the core: every error names the argument at fault."""

import torch
from torch import Tensor


def require_same_shape(reference: str, **tensors: Tensor) -> None:
    """Raise ValueError unless every tensor has the 2-D shape of the one called ``reference``."""
    shape = tensors[reference].shape
    if len(shape) != 2:
        raise ValueError(f"{reference} must have shape [B, T], got {list(shape)}")
    for name, tensor in tensors.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but {reference} has {list(shape)}")


def require_positive(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` > 0 (NaN is refused too)."""
    if not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}")


def require_not_nan(valid: Tensor, **tensors: Tensor) -> None:
    """Raise ValueError naming the first tensor that is NaN on a valid token. Waits for the device once."""
    bad = {name: (torch.isnan(tensor) & valid).any() for name, tensor in tensors.items()}
    if bool(torch.stack(list(bad.values())).any()):
        culprit = next(name for name, flag in bad.items() if bool(flag))
        row, position = torch.nonzero(torch.isnan(tensors[culprit]) & valid)[0].tolist()
        raise ValueError(f"{culprit} is NaN at valid token {position} of response {row}")
