"""Calling any network on what it is called with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from flwr_fusion.errors import FusionError


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a tensor, a tuple of arguments or a dict of keyword arguments as both kinds, copied.

    A network whose first operation works in place must not change what belongs to the caller.
    """
    own = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
    if isinstance(own, dict):
        return (), own
    return (tuple(own), {}) if isinstance(own, (tuple, list)) else ((own,), {})


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a network on a tensor, a tuple of arguments or a dict of keyword arguments."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


def first_of(batch: Any) -> Any:
    """Return the inputs of a data loader's batch: itself if it is a tensor, else its first part."""
    if isinstance(batch, Mapping):
        raise FusionError(
            f"a batch is a mapping with {sorted(map(str, batch))}: say by inputs= what the network "
            'is called with, for example inputs=lambda batch: batch["img"]'
        )
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def batch_size(inputs: Any) -> int:
    """Return the number of samples in a batch of inputs."""
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.dim():
            return len(leaf)
    raise FusionError("a batch of inputs holds no tensor")


def evaluation_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Put a network into evaluation mode; every module gets its own mode back afterwards."""
    return _in_mode(model, False)


def training_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Put a network into training mode; every module gets its own mode back afterwards."""
    return _in_mode(model, True)


@contextmanager
def _in_mode(model: nn.Module, training_now: bool) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.train(training_now)
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
