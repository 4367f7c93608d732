"""A weight as matrices of outputs and inputs, whatever layer it is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from flwr_fusion.networks import module_of

# Convolutions with more inputs have moments of the channels at each kernel position apart: a ninth
# of the work for 3 x 3, and about as good (docs/results.md). Weights with more than the second have
# moments of each channel's kernel, or of each input, alone.
_MOST_JOINT, MOST_INPUTS = 1024, 4608


@dataclass(frozen=True)
class WeightView:
    """A weight as blocks of (outputs, inputs), one for each set of inputs that meet.

    Parameters
    ----------
    shape : torch.Size
        Of the weight.
    groups : int
        Of a grouped convolution; 1 otherwise.
    outputs_second : bool
        Whether its second axis carries the outputs: transposed convolutions and embeddings.
    """

    shape: torch.Size
    groups: int = 1
    outputs_second: bool = False

    @classmethod
    def of(cls, name: str, shape: torch.Size, modules: Mapping[str, nn.Module]) -> WeightView:
        """Return the view of a network's tensor."""
        module = modules.get(module_of(name))
        if isinstance(module, nn.modules.conv._ConvNd):
            # A depthwise convolution of another width has as many groups as channels, too.
            depthwise = module.groups == module.in_channels == module.out_channels > 1
            return cls(shape, shape[0] if depthwise else module.groups, module.transposed)
        return cls(shape, 1, isinstance(module, nn.Embedding))

    def blocks(self, weight: Tensor) -> Tensor:
        """Return a weight as (blocks, outputs, inputs of a block)."""
        grouped = self._grouped(weight)
        apart = self._apart(grouped.shape[2])
        if apart == "nothing":
            return grouped
        pieces = grouped.reshape(*grouped.shape[:2], -1, self._kernel)
        order = (0, 3, 1, 2) if apart == "positions" else (0, 2, 1, 3)
        # As it lies: products of blocks that are spread over the memory take twice as long.
        return pieces.permute(order).flatten(0, 1).contiguous()

    def weight(self, blocks: Tensor) -> Tensor:
        """Return blocks as the weight that they are of."""
        pieces = blocks.reshape(self.groups, -1, *blocks.shape[1:])
        apart = self._apart(blocks[0, 0].numel() * pieces.shape[1])
        order = (0, 2, 3, 1) if apart == "positions" else (0, 2, 1, 3)
        return self._ungrouped(pieces.permute(order).flatten(2))

    @property
    def inputs(self) -> int:
        """The number of inputs of a group, whatever the kernel."""
        return self.shape[0] // self.groups if self.outputs_second else self.shape[1]

    @property
    def _kernel(self) -> int:
        return self.shape[2:].numel()

    def _apart(self, inputs: int) -> Literal["nothing", "positions", "channels"]:
        """Return what of so many inputs is taken apart into blocks."""
        if inputs <= _MOST_JOINT or (self._kernel == 1 and inputs <= MOST_INPUTS):
            return "nothing"
        return (
            "positions"
            if self._kernel > 1 and inputs // self._kernel <= MOST_INPUTS
            else "channels"
        )

    def row_norms(self, weight: Tensor) -> Tensor:
        """Return the norm of every output's weights, as (groups, outputs)."""
        norms: Tensor = self._grouped(weight).norm(dim=2)
        return norms

    def scaled_rows(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Return a weight with every output's weights multiplied."""
        return self._ungrouped(self._grouped(weight) * scale.unsqueeze(2))

    def kernel_sums(self, weight: Tensor) -> Tensor:
        """Return a weight summed over the positions of its kernel: (groups, outputs, inputs)."""
        grouped = self._grouped(weight)
        pieces = grouped.reshape(*grouped.shape[:2], -1, self._kernel)
        # A product with ones is several times as fast as a sum over the last axis.
        return pieces.squeeze(3) if self._kernel == 1 else pieces @ pieces.new_ones(self._kernel)

    def _grouped(self, weight: Tensor) -> Tensor:
        """Return a weight as (groups, outputs, inputs with their kernel positions)."""
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:])
        return (grouped.transpose(1, 2) if self.outputs_second else grouped).flatten(2)

    def _ungrouped(self, grouped: Tensor) -> Tensor:
        if not self.outputs_second:
            return grouped.reshape(self.shape)
        split = grouped.reshape(self.groups, self.shape[1], self.inputs, -1)
        return split.transpose(1, 2).reshape(self.shape)
