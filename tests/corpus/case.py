"""What a network of the corpus is, and what must become of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """A network of given layers, whose forward pass is a function of itself and its inputs.

    Tensors that are no parameters become buffers.
    """

    def __init__(self, forward: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self._forward(self, *args, **kwargs)


def parameter(*shape: int) -> nn.Parameter:
    """Return a random parameter."""
    return nn.Parameter(torch.randn(*shape) * 0.5)


def rows(*shape: int) -> Callable[[], Tensor]:
    """Return a maker of two samples."""
    return lambda: torch.randn(2, *shape)


def tokens(length: int = 5, vocabulary: int = 11) -> Callable[[], Tensor]:
    """Return a maker of two sequences of tokens."""
    return lambda: torch.randint(vocabulary, (2, length))


@dataclass(frozen=True)
class Case:
    """One situation.

    Parameters
    ----------
    name : str
        What it is.
    build : callable
        Returns the network.
    inputs : callable
        Returns example inputs.
    free : int
        How many channels at least must be free, in all groups together.
    fixed : str
        A pattern that the reason of a fixed group must match, beside inputs and outputs; empty
        where there is none.
    tolerance : float
        Up to which relative error functions are the same; larger for networks of few digits.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    free: int
    fixed: str = ""
    tolerance: float = 1e-4
