"""Least squares: layers as close as possible to every client's on that client's own inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import median
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flwr_fusion.errors import FusionError, check_number, check_option
from flwr_fusion.fusion import Client, Fusion
from flwr_fusion.maps import Maps, along, coverage_along, map_channels, map_tensor
from flwr_fusion.networks import all_finite, key_of
from flwr_fusion.precision import widened
from flwr_fusion.rules.mean import Mean
from flwr_fusion.rules.ridge import ridge_solution
from flwr_fusion.rules.rule import Combined
from flwr_fusion.rules.update_moments import by_update_moments
from flwr_fusion.statistics.comparison import mean_square_of_inputs
from flwr_fusion.statistics.moments import (
    DETAILS,
    LayerStatistics,
    diagonal_blocks,
    independent_blocks,
)

Moments = Literal["clients", "updates", "auto"]
MOMENTS = ("clients", "updates", "auto")
BOUNDS = ("auto", "norm", "change")
# How many times as large as the median client's a client's moments can count.
_LARGEST_MOMENTS = 3.0


@dataclass(frozen=True)
class LeastSquares:
    """How layers are combined by least squares.

    The combined layer is what is closest to every client's layer on that client's own inputs, near
    the mean: ``W = argmin sum_k w_k E_k |W x - W_k x|^2 + r |W - mean|^2``.

    Parameters
    ----------
    moments : {"clients", "updates", "auto"}
        Where the moments come from: what clients measured and sent (`Client.statistics`), or the
        clients' updates, ``G_k = D_k^T D_k / |D_k|^2`` with ``D_k`` the change of a weight from the
        model that was sent out. The latter asks nothing of the clients, and combines convolutions,
        embeddings and projections too; biases and norms are the mean, running means of BatchNorm
        those that go with the weights (`flwr_fusion.rules.running_means`). "auto": the clients'
        where clients of most of the weight sent them and the network has no convolutions; otherwise
        the updates', where clients come from what was sent out; then the clients' again; else the
        mean.
    shrinkage : float
        Factor of the moments' off-diagonals, in [0, 1]; 0: every input on its own.
    ridge : float
        ``r`` relative to the mean of the moments' diagonal; 0: inputs that never occur keep the
        mean's weights, all others are free.
    strength : float or "auto"
        Share of the way from the mean to the least-squares solution, in [0, 1]. "auto": all of it;
        with moments of the updates the less, the more the clients' changes of the last layer's
        bias agree (`flwr_fusion.rules.update_moments.Agreement`), down to none at 0.2: then the
        clients' data are alike, and what else their updates differ in is noise.
    weight_exponent : float, optional
        Clients' moments count by this power of their weights. A client's moments already say which
        inputs are its own; below 1, few samples of a rare kind are heard. Default: 1/4, with
        moments of the updates 1.
    convolutions : bool
        Whether the clients' moments of convolutions are used, or convolutions are the mean.
    bound : {"auto", "norm", "change"} or None
        What keeps weights from growing over rounds. "norm": a layer's norm is at most the clients'
        mean norm. "change": the distance of each row from the mean layer is at most the clients'
        mean distance. "auto": "change" for networks with convolutions, else "norm"; with moments
        of the updates both. None: nothing, as in the paper; over rounds training diverges.

    References
    ----------
    Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023,
    equation 2 (RegMean); Nasery et al., "PLeaS", 2024, section 3.2. Pulling towards the mean
    instead of zero, and the bounds, are not in these papers: RegMean as published, for layers
    without biases (which it averages), is
    ``LeastSquares(shrinkage=0.9, ridge=0, weight_exponent=1, bound=None)``.
    """

    least_clients: ClassVar[int] = 1
    few_cannot_decide: ClassVar[bool] = False

    shrinkage: float = 0.5
    ridge: float = 0.1
    strength: float | Literal["auto"] = "auto"
    weight_exponent: float | None = None
    convolutions: bool = False
    bound: Literal["auto", "norm", "change"] | None = "auto"
    moments: Moments = "clients"

    def __post_init__(self) -> None:
        check_option("moments", self.moments, MOMENTS)
        check_number("shrinkage", self.shrinkage, 0, 1)
        if self.strength != "auto":
            check_number("strength", self.strength, 0, 1)
        if self.weight_exponent is not None:
            check_number("weight_exponent", self.weight_exponent, 0, 1)
        check_number("ridge", self.ridge, 0)
        if self.bound is not None and self.bound not in BOUNDS:
            raise FusionError(f"bound must be one of {BOUNDS} or None, not {self.bound!r}")

    @property
    def needs_statistics(self) -> bool:
        """Whether it needs what clients measured."""
        return self.moments == "clients"

    @property
    def needs_sent(self) -> bool:
        """Whether it needs the model that was sent out."""
        return self.moments == "updates"

    @property
    def exponent(self) -> float:
        """The power of the clients' weights that their moments count by."""
        default = 1.0 if self.moments == "updates" else 0.25
        return default if self.weight_exponent is None else self.weight_exponent

    def combine(self, fusion: Fusion, maps: Sequence[Maps]) -> Combined:
        """Return the fused state, and for each layer combined so the detail of its moments."""
        mean = Mean().combine(fusion, maps)
        moments = self._moments_of(fusion, mean)
        if moments is None:
            return Combined(mean)
        options = self._with_defaults(moments, mean)
        if moments == "updates":
            weights, running_means = by_update_moments(fusion, maps, mean, options)
            details = dict.fromkeys(weights, "moments of the update")
            return Combined(mean | weights | running_means, details)
        sums = options._layer_sums(fusion, mean)
        for client, chosen in zip(fusion.clients, maps, strict=True):
            state = client.state()
            for name, layer in sums.items():
                if key_of(name, "weight") not in client.absent:
                    layer.add(client, state, chosen)
        solved = {name: layer.solve() for name, layer in sums.items()}
        state, details = dict(mean), {}
        for name, tensors in solved.items():
            if tensors is not None:
                state |= tensors
                details[name] = sums[name].detail
        return Combined(state, details)

    def _moments_of(self, fusion: Fusion, mean: Mapping[str, Tensor]) -> Moments | None:
        """Return which moments a fusion has; None for neither."""
        if self.moments != "auto":
            return self.moments
        measured = sum(c.weight for c in fusion.clients if _usual_details([c])) > 0.5
        if fusion.sent is not None and (not measured or _is_convolutional(mean)):
            return "updates"
        return "clients" if measured else None

    def _with_defaults(self, moments: Moments, mean: Mapping[str, Tensor]) -> LeastSquares:
        """Return the options with the moments that there are, and what goes with the network."""
        bound = self.bound
        if bound == "auto" and moments == "clients":
            bound = "change" if _is_convolutional(mean) else "norm"
        return replace(self, moments=moments, bound=bound)

    def _layer_sums(self, fusion: Fusion, mean: Mapping[str, Tensor]) -> dict[str, _LayerSums]:
        """Return empty sums for every layer that can be combined so; tied ones stay the mean."""
        details = _usual_details(fusion.clients)
        limits = _limits(fusion.clients)
        return {
            name: _LayerSums(name, mean, detail, self, limits.get(name, math.inf))
            for name, detail in details.items()
            if (mean[key_of(name, "weight")].dim() == 2 or self.convolutions)
            and key_of(name, "weight") not in fusion.tied
        }


def _is_convolutional(state: Mapping[str, Tensor]) -> bool:
    return any(tensor.dim() > 2 for tensor in state.values())


def _usual_details(clients: Sequence[Client]) -> dict[str, str]:
    """Return for every layer with moments the detail that clients of half of their weight have.

    Those with less count as if what is not known were independent: one client that sends little
    does not decide for all.
    """
    weights: dict[str, dict[str, float]] = {}
    for client in clients:
        for name, layer in (client.statistics or {}).items():
            if layer.second is not None:
                by_detail = weights.setdefault(name, dict.fromkeys(DETAILS, 0.0))
                by_detail[layer.detail] += client.weight
    return {name: _heaviest_half(by_detail) for name, by_detail in weights.items()}


def _heaviest_half(by_detail: Mapping[str, float]) -> str:
    """Return the greatest detail that half of the weight has at least."""
    reached = accumulate(by_detail[detail] for detail in DETAILS)
    half = sum(by_detail.values()) / 2
    return next(d for d, weight in zip(DETAILS, reached, strict=True) if weight >= half)


def _limits(clients: Sequence[Client]) -> dict[str, float]:
    """Return for every layer the largest mean square of its inputs that a client counts with.

    Moments weigh by their size, which nobody can check; among fewer than three clients none is
    usual.
    """
    sizes: dict[str, list[float]] = {}
    for client in clients:
        for name, layer in (client.statistics or {}).items():
            if layer.second is not None:
                sizes.setdefault(name, []).append(mean_square_of_inputs(layer))
    return {
        name: _LARGEST_MOMENTS * median(found) for name, found in sizes.items() if len(found) > 2
    }


def _limited(layer: LayerStatistics | None, limit: float) -> LayerStatistics | None:
    """Return moments as of smaller inputs where their mean square exceeds a limit."""
    if layer is None or layer.second is None or layer.mean is None:
        return layer
    share = min(1.0, limit / max(mean_square_of_inputs(layer), 1e-30))
    return replace(layer, second=share * layer.second, mean=share**0.5 * layer.mean)


@dataclass(frozen=True)
class _Blocks:
    """How a layer is seen as blocks over its inputs, and joined again.

    Parameters
    ----------
    shape : torch.Size
        Shape of the weight.
    groups : int
        Groups of a grouped convolution.
    detail : {"full", "block", "diagonal"}
        One block, a block for each input channel, or one for each column.
    constant : bool
        Whether the bias is the column of one more, constant input; only if full.
    """

    shape: torch.Size
    groups: int
    detail: str
    constant: bool

    @property
    def size(self) -> int:
        """Number of columns of a block, the constant input aside."""
        return {"full": self.shape[1:].numel(), "block": self.shape[2:].numel(), "diagonal": 1}[
            self.detail
        ]

    @property
    def channels(self) -> int:
        """Number of input channels."""
        return self.groups * self.shape[1]

    def split(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return a layer as (blocks, rows, columns)."""
        rows = self.shape[0] // self.groups
        if self.detail == "full":
            block = weight.reshape(1, rows, -1)
            return torch.cat([block, bias.reshape(1, -1, 1)], 2) if bias is not None else block
        blocks = weight.reshape(self.groups, rows, self.shape[1], -1).transpose(1, 2)
        if self.detail == "diagonal":
            blocks = blocks.transpose(2, 3)
        return blocks.reshape(-1, rows, self.size)

    def join(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the weight, and the bias where there is a constant input."""
        rows = self.shape[0] // self.groups
        if self.detail == "full":
            weight = blocks[0, :, : self.size].reshape(self.shape)
            return weight, blocks[0, :, -1] if self.constant else None
        if self.detail == "diagonal":
            blocks = blocks.reshape(self.channels, -1, rows).transpose(1, 2)
        blocks = blocks.reshape(self.groups, self.shape[1], rows, -1).transpose(1, 2)
        return blocks.reshape(self.shape), None

    def moments(self, statistics: LayerStatistics, shrinkage: float) -> Tensor:
        """Return a client's moments as blocks, with smaller off-diagonals."""
        assert statistics.second is not None
        assert statistics.mean is not None
        second, mean = widened(statistics.second), widened(statistics.mean)
        known = second.shape[1]
        blocks = (
            diagonal_blocks(second, self.size)
            if known >= self.size
            else independent_blocks(second, mean, self.size)
        )
        if self.constant:
            blocks = torch.cat([blocks, mean.reshape(1, 1, -1)], 1)
            column = torch.cat([mean, mean.new_ones(1)]).reshape(1, -1, 1)
            blocks = torch.cat([blocks, column], 2)
        # s G + (1 - s) diag(G): RegMean's scaling of off-diagonals (Jin et al. 2023, section 3.3).
        diagonal = torch.diag_embed(blocks.diagonal(dim1=1, dim2=2))
        return shrinkage * blocks + (1 - shrinkage) * diagonal


class _LayerSums:
    """The running sums of one layer, a client at a time.

    With the mean layer ``A``, moments ``G_k`` and maps ``M_k`` of the inputs, and ``w_k`` to the
    power of `LeastSquares.weight_exponent`, held are
    ``D = sum_k w_k M_k G_k M_k^T`` and ``R = sum_k w_k (W_k G_k M_k^T - A M_k G_k M_k^T)``, rows
    brought into the fused channels; the layer is ``A + strength * R (D + r)^-1``. The bias belongs
    to one more, constant input where the moments are full; otherwise it is the mean. A fused
    channel that a client does not have gets the client's vote for the mean, as do clients without
    statistics for their average input. The result is kept within a bound: rare directions of the
    inputs are amplified otherwise, and weights grow from round to round until training diverges.
    """

    def __init__(
        self,
        name: str,
        mean: Mapping[str, Tensor],
        detail: str,
        options: LeastSquares,
        limit: float,
    ) -> None:
        self.detail = detail
        self._limit = limit
        self._name = name
        self._options = options
        self._keys = key_of(name, "weight"), key_of(name, "bias")
        self._mean = [mean[key] for key in self._keys if key in mean]
        self._moments: Tensor | None = None
        # Of clients with and without moments, in the shapes of weight and bias.
        self._residuals = [torch.zeros_like(widened(t)) for t in self._mean]
        self._silent: list[Tensor] = []
        self._measured_weight = self._silent_weight = 0.0
        # Of the clients' rows: norm, distance from the mean layer, weight.
        self._rows = self._residuals[0].new_zeros(3, len(self._mean[0]))
        self._blocks: _Blocks | None = None

    def add(self, client: Client, state: Mapping[str, Tensor], maps: Maps) -> None:
        """Add one client's layer, with or without moments."""
        layer = [state[key] for key in self._keys if key in state]
        weight = client.weight**self._options.exponent
        covered = coverage_along(self._keys[0], client.correspondence, maps)
        coverage = torch.ones_like(self._rows[0])
        if covered is not None:
            coverage = covered[1].to(coverage)
        mapped = [
            widened(map_tensor(tensor, key, client.correspondence, maps))
            for key, tensor in zip(self._keys, layer, strict=False)
        ]
        difference = [m - mean for m, mean in zip(mapped, self._mean, strict=True)]
        norms = [tensor.flatten(1).norm(dim=1) for tensor in (mapped[0], difference[0])]
        self._rows += weight * coverage * torch.stack([*norms, torch.ones_like(coverage)])
        measured = _limited((client.statistics or {}).get(self._name), self._limit)
        if measured is None or measured.second is None:
            self._silent = self._silent or [torch.zeros_like(t) for t in self._residuals]
            sums, residual = self._silent, difference
            self._silent_weight += weight
        else:
            sums = self._residuals
            residual = self._residual(layer, measured, weight, client, maps)
            self._measured_weight += weight
        for total, part in zip(sums, residual, strict=True):
            total += weight * along(coverage, 0, part.dim()) * part

    def _residual(
        self,
        layer: Sequence[Tensor],
        measured: LayerStatistics,
        weight: float,
        client: Client,
        maps: Maps,
    ) -> list[Tensor]:
        """Return ``W_k G_k M_k^T - A M_k G_k M_k^T``; add the moments to their sum."""
        assert measured.mean is not None
        groups = measured.mean.numel() // layer[0][0].numel()
        constant = len(layer) > 1 and self.detail == "full"
        theirs = _Blocks(layer[0].shape, groups, self.detail, constant)
        # Of a depthwise convolution, every channel is a group.
        fused_groups = 1 if groups == 1 else groups * len(self._mean[0]) // len(layer[0])
        fused = replace(theirs, shape=self._mean[0].shape, groups=fused_groups)
        moments = theirs.moments(measured, self._options.shrinkage).to(self._residuals[0])

        def to_fused(values: Tensor, axis: int) -> Tensor:
            return _map_inputs(values, axis, theirs, self._keys[0], client, maps)

        # W_k G_k in the client's inputs, then its columns and rows in the fused channels.
        products = theirs.split(*_both(layer)) @ moments
        axis = 2 if self.detail == "full" else 0
        if groups == 1:
            products = to_fused(products, axis)
        columns = self._mean[0].shape[1:] if groups == 1 else layer[0].shape[1:]
        fused_inputs = replace(theirs, shape=layer[0].shape[:1] + columns)
        joined = [t for t in fused_inputs.join(products) if t is not None]
        kept = 1 if groups == 1 else None
        outputs = [
            map_tensor(tensor, key, client.correspondence, maps, keep_axis=kept)
            for key, tensor in zip(self._keys, joined, strict=False)
        ]
        moments = to_fused(moments, axis)
        if self.detail == "full":
            moments = to_fused(moments, 1)
        self._blocks = fused
        self._moments = moments * weight + (0 if self._moments is None else self._moments)
        of_mean = fused.join(fused.split(*_both(self._mean)) @ moments)
        residual = [o - m for o, m in zip(outputs, of_mean, strict=False) if m is not None]
        # Without a constant input the bias is the mean.
        return residual + [torch.zeros_like(t) for t in self._residuals[len(residual) :]]

    def solve(self) -> dict[str, Tensor] | None:
        """Return the combined weight and bias; None where there are no useful moments."""
        if self._moments is None or self._blocks is None:
            return None
        blocks = self._blocks
        average = self._moments / self._measured_weight
        # D = sum_k w_k G_k, R = sum_k w_k (W_k - A) G_k; a client without moments has the average.
        residual = blocks.split(*_both(self._residuals))
        if self._silent:
            residual += blocks.split(*_both(self._silent)) @ average
        moments = average * (self._measured_weight + self._silent_weight)
        # W = A + R (D + r I)^-1.
        solved = ridge_solution(moments, residual, self._options.ridge)
        change = blocks.join(solved.to(residual))
        strength = 1.0 if self._options.strength == "auto" else self._options.strength
        layer = self._bounded([c * strength for c in change if c is not None])
        layer = [t.to(mean.dtype) for t, mean in zip(layer, self._mean, strict=False)]
        if not all(map(all_finite, layer)):
            return None
        return dict(zip(self._keys, layer, strict=False))

    def _bounded(self, change: Sequence[Tensor]) -> list[Tensor]:
        """Return the mean layer plus its change, kept within the bound."""
        norms, distances = self._rows[:2] / self._rows[2].clamp(min=1e-12)
        mean = [widened(tensor) for tensor in self._mean[: len(change)]]
        if self._options.bound is None:
            return [m + c for m, c in zip(mean, change, strict=True)]
        if self._options.bound == "change":
            # |row of the change| <= sum_k w_k |row of W_k - A| / sum_k w_k.
            rows = change[0].flatten(1).norm(dim=1)
            scale = (distances / rows.clamp(min=1e-30)).clamp(max=1)
            return [m + along(scale, 0, c.dim()) * c for m, c in zip(mean, change, strict=True)]
        # |W| <= sum_k w_k |W_k| / sum_k w_k, or |A| if the mean itself is longer.
        layer = [m + c for m, c in zip(mean, change, strict=True)]
        bound = torch.maximum(norms.norm(), mean[0].norm())
        scale = (bound / layer[0].norm().clamp(min=1e-30)).clamp(max=1)
        return [t * scale for t in layer]


def _both(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias, or weight and None, as precise as their device has them."""
    return widened(tensors[0]), widened(tensors[1]) if len(tensors) > 1 else None


def _map_inputs(
    values: Tensor, axis: int, layer: _Blocks, weight_key: str, client: Client, maps: Maps
) -> Tensor:
    """Bring an axis over a layer's input columns or blocks into the fused network's channels."""
    if layer.groups > 1 and layer.shape[1] > 1:
        return values  # The channels of grouped convolutions do not move.
    per_channel = layer.shape[2:].numel() if layer.detail != "block" else 1
    moved = values.movedim(axis, 0)
    length = layer.channels * per_channel
    inputs, constant = moved[:length], moved[length:]
    by_channel = inputs.reshape(layer.channels, per_channel, *moved.shape[1:])
    # A depthwise convolution's input channels are its output channels.
    layer_axis = (weight_key, 1 if layer.groups == 1 else 0)
    mapped = map_channels(by_channel, 0, layer_axis, client.correspondence, maps)
    return torch.cat([mapped.flatten(0, 1), constant]).movedim(0, axis)
