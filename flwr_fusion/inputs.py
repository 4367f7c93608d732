"""Calling any network on what it is called with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from flwr_fusion.errors import FusionError


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a tensor, a tuple of arguments or a dict of keyword arguments as both kinds."""
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a network on a tensor, a tuple of arguments or a dict of keyword arguments."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode; every module gets its own mode back afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def moved_to(model: nn.Module, inputs: Any) -> Any:
    """Bring inputs to the device and the floating-point type of a network.

    Parameters
    ----------
    inputs : Tensor, tuple or dict
        What the network is called with.
    model : nn.Module
        The network.

    Returns
    -------
    Tensor, tuple or dict
        The same structure.
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise FusionError(f"{type(model).__name__} has no parameters: there is nothing to fuse")

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach().to(parameter.device)
        return x.to(parameter.dtype) if x.is_floating_point() else x

    return tree_map(move, inputs)
