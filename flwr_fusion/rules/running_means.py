"""Running means of BatchNorm layers that fit combined weights.

The mean over the clients belongs to the mean of their weights: other weights give other means.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flwr_fusion.fusion import Client, Fusion
from flwr_fusion.maps import Maps, map_tensor
from flwr_fusion.networks import key_of
from flwr_fusion.rules.weight_view import WeightView

# Relative to the mean of the diagonal.
_RIDGE = 0.01


class RunningMeanSums:
    """What the clients' running means tell of one layer's inputs, a client at a time.

    A client's running mean is ``mu_k = W_k m + b_k``, with ``m`` the mean of the layer's inputs in
    each channel and ``W_k`` its weight, summed over the kernel. Least squares over all clients,
    ``m = argmin sum_k w_k |W_k m + b_k - mu_k|^2``, gives ``m``, and that of a combined weight
    ``W`` beside the mean ``A`` is ``sum_k w_k mu_k + (W - A) m``.

    Parameters
    ----------
    norm, layer : str
        The BatchNorm layer, and the one whose outputs it normalises.
    mean : mapping of str to Tensor
        The mean of the clients, in the fused channels.
    modules : mapping of str to nn.Module
        The layers of a client's network.
    """

    def __init__(
        self,
        norm: str,
        layer: str,
        mean: Mapping[str, Tensor],
        modules: Mapping[str, nn.Module],
    ) -> None:
        self.name, self.weight = key_of(norm, "running_mean"), key_of(layer, "weight")
        self._bias = key_of(layer, "bias")
        self._mean, self._mean_weight = mean[self.name], mean[self.weight]
        self._view = WeightView.of(self.weight, self._mean_weight.shape, modules)
        blocks, _, inputs = self._view.kernel_sums(self._mean_weight).shape
        self._products = self._mean.new_zeros((blocks, inputs, inputs), dtype=torch.float64)
        self._sums = self._products.new_zeros(blocks, inputs, 1)

    def add(self, client: Client, state: Mapping[str, Tensor], maps: Maps) -> None:
        """Add a client; of channels that it has not, nothing is added."""
        if {self.name, self.weight} & client.absent:
            return

        def mapped(name: str) -> Tensor:
            return map_tensor(state[name].double(), name, client.correspondence, maps)

        weight = self._view.kernel_sums(mapped(self.weight))
        means = mapped(self.name) - (mapped(self._bias) if self._bias in state else 0)
        self._products.baddbmm_(weight.mT, weight, alpha=client.weight)
        means = means.reshape(*weight.shape[:2], 1)
        self._sums.baddbmm_(weight.mT, means, alpha=client.weight)

    def moved(self, weight: Tensor) -> Tensor:
        """Return the running mean with a combined weight."""
        products = self._products.clone()
        diagonal = products.diagonal(dim1=1, dim2=2)
        diagonal += _RIDGE * diagonal.mean()
        diagonal[diagonal == 0] = 1.0
        factor, failed = torch.linalg.cholesky_ex(products)
        if bool(failed.any()):
            return self._mean
        inputs = torch.cholesky_solve(self._sums, factor)
        change = self._view.kernel_sums(weight.double() - self._mean_weight.double()) @ inputs
        return (self._mean.double() + change.flatten()).to(self._mean.dtype)


def running_mean_sums(
    fusion: Fusion, mean: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
) -> list[RunningMeanSums]:
    """Return empty sums for every BatchNorm layer that has running means, of a known layer."""
    return [
        RunningMeanSums(norm, layer, mean, modules)
        for norm, layer in fusion.batch_normalised.items()
        if {key_of(norm, "running_mean"), key_of(layer, "weight")} <= mean.keys()
    ]
