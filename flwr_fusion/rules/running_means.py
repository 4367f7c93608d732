"""Running means of BatchNorm layers that fit combined weights.

The mean over the clients belongs to the mean of their weights: other weights give other means.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flwr_fusion.fusion import Client, Fusion
from flwr_fusion.maps import Maps, coverage_along, map_tensor
from flwr_fusion.networks import key_of
from flwr_fusion.precision import widened
from flwr_fusion.rules.ridge import ridge_solution
from flwr_fusion.rules.weight_view import MOST_INPUTS, WeightView

# Relative to the mean of the diagonal.
_RIDGE = 0.01


class RunningMeanSums:
    """What the clients' running means tell of one layer's inputs, a client at a time.

    A client's running mean is ``mu_k = W_k m + b_k``, with ``m`` the mean of the layer's inputs in
    each channel and ``W_k`` its weight, summed over the kernel. Least squares over all clients,
    ``m = argmin sum_k w_k |W_k m + b_k - mu_k|^2``, gives ``m``, and that of a combined weight
    ``W`` beside the mean ``A`` is ``sum_k w_k mu_k + (W - A) m``. Running means that no client has
    moved are constants which the weights were trained with, and stay.

    Parameters
    ----------
    norm, layer : str
        The BatchNorm layer, and the one whose outputs it normalises.
    mean : mapping of str to Tensor
        The mean of the clients, in the fused channels.
    sent : mapping of str to Tensor
        The model that was sent out, in the fused channels.
    view : WeightView
        Of the layer's weight.
    """

    def __init__(
        self,
        norm: str,
        layer: str,
        mean: Mapping[str, Tensor],
        sent: Mapping[str, Tensor],
        view: WeightView,
    ) -> None:
        weight = key_of(layer, "weight")
        self.name, self._bias = key_of(norm, "running_mean"), key_of(layer, "bias")
        self._mean, self._mean_weight, self._sent = mean[self.name], mean[weight], sent[self.name]
        # On the device: whether any client's differ from those that were sent.
        self._measured = torch.zeros((), dtype=torch.bool, device=self._mean.device)
        self._view = view
        groups, inputs = view.groups, view.inputs
        self._products = torch.zeros(groups, inputs, inputs, device=self._mean.device)
        self._sums = self._products.new_zeros(groups, 1, inputs)

    def add(self, weight: Tensor, client: Client, state: Mapping[str, Tensor], maps: Maps) -> None:
        """Add a client with its weight in the fused channels; of what it has not, nothing."""
        if self.name in client.absent:
            return

        def mapped(name: str) -> Tensor:
            return map_tensor(state[name].float(), name, client.correspondence, maps)

        sums, means = self._view.kernel_sums(weight), mapped(self.name)
        differs = means != self._sent.float()
        covered = coverage_along(self.name, client.correspondence, maps)
        if covered is not None:
            differs &= (covered[1] > 0).to(differs.device)
        self._measured |= differs.any()
        if self._bias in state:
            means = means - mapped(self._bias)
        self._products.baddbmm_(sums.mT, sums, alpha=client.weight)
        means = means.reshape(len(sums), 1, -1)
        self._sums.baddbmm_(means, sums, alpha=client.weight)

    def moved(self, weight: Tensor) -> Tensor:
        """Return the running mean with a combined weight."""
        input_means = ridge_solution(widened(self._products), widened(self._sums), _RIDGE)
        moved_weight = self._view.kernel_sums(weight.float() - self._mean_weight.float())
        change = moved_weight @ input_means.to(moved_weight).mT
        moved = self._mean.float() + change.flatten()
        stays = ~(self._measured & moved.isfinite().all())
        return torch.where(stays, self._mean, moved.to(self._mean.dtype))


def running_mean_sums(
    fusion: Fusion, mean: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
) -> dict[str, list[RunningMeanSums]]:
    """Return by weight empty sums for the BatchNorm layers that normalise its layer's outputs."""
    assert fusion.sent is not None
    found: dict[str, list[RunningMeanSums]] = {}
    for norm, layer in fusion.batch_normalised.items():
        weight = key_of(layer, "weight")
        if not {key_of(norm, "running_mean"), weight} <= mean.keys():
            continue
        view = WeightView.of(weight, mean[weight].shape, modules)
        # A matrix of more inputs would be too large.
        if view.inputs <= MOST_INPUTS:
            sums = RunningMeanSums(norm, layer, mean, fusion.sent, view)
            found.setdefault(weight, []).append(sums)
    return found
