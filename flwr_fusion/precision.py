"""Computing on any device: its most precise numbers, its linear algebra, and one wait for many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache

import torch
from torch import Tensor


@cache
def widest_of(device: torch.device) -> torch.dtype:
    """Return double precision, or single where a device has no other (Apple's MPS)."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


def widest_for(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the most precise type that the devices of all tensors have."""
    types = {widest_of(tensor.device) for tensor in tensors}
    return torch.float32 if torch.float32 in types else torch.float64


def widened(tensor: Tensor) -> Tensor:
    """Return real numbers in the most precise type that their device has."""
    return tensor.to(widest_of(tensor.device))


def numbers(values: Iterable[Tensor]) -> list[float]:
    """Return tensors of one value each as numbers, waiting for their device once."""
    listed = [value.detach() for value in values]
    return torch.stack([v.to(listed[0]) for v in listed]).cpu().tolist() if listed else []


def decomposable(tensor: Tensor) -> Tensor:
    """Return a tensor where it can be decomposed: on the CPU, if its device has no doubles.

    Apple's MPS lacks both.
    """
    return tensor if widest_of(tensor.device) is torch.float64 else tensor.cpu()


def decomposed(function: Callable[[Tensor], Sequence[Tensor]], tensor: Tensor) -> list[Tensor]:
    """Return the parts of a tensor's decomposition, on its device."""
    return [part.to(tensor.device) for part in function(decomposable(tensor))]


def thin_svd(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return left vectors, singular values and transposed right vectors, on a tensor's device."""
    u, values, vh = decomposed(lambda t: torch.linalg.svd(t, full_matrices=False), tensor)
    return u, values, vh
