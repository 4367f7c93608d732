"""Putting mapped models together: by their mean, or by least squares on the clients' inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flwr_fusion.errors import FusionError
from flwr_fusion.maps import (
    Correspondence,
    Maps,
    Plan,
    coverage_along,
    map_channels,
    map_tensor,
    row_mapping,
)
from flwr_fusion.statistics.moments import DETAILS, LayerStatistics, Statistics, key_of, reduced

BOUNDS = ("auto", "norm", "change")
# Numbers of a tensor that are mapped at a time.
_BLOCK = 250_000


class RunningMean:
    """Weighted mean of clients in the fused network's channels, one client at a time.

    ``fused = sum_k merge_k W_k unmerge_k`` with ``merge_k = diag(c_k w_k / sum_l c_l w_l) M_k``:
    a fused channel is the mean over the clients that have a channel there (coverage ``c_k``).
    Only the running sums are held.

    Parameters
    ----------
    template : mapping of str to Tensor
        State dict of the fused architecture: shapes, dtypes and device.
    """

    def __init__(self, template: Mapping[str, Tensor]) -> None:
        self._template = template
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def add(
        self,
        state: Mapping[str, Tensor],
        weight: float,
        correspondence: Correspondence | None = None,
        maps: Maps | None = None,
        absent: Collection[str] = (),
    ) -> None:
        """Add one client; a negative weight takes it out again.

        Parameters
        ----------
        state : mapping of str to Tensor
            The client's state dict.
        weight : float
            Its weight relative to the other clients'.
        correspondence, maps : optional
            How its channels go into the fused network's; default: as they stand.
        absent : collection of str
            Tensors in whose mean it takes no part.
        """
        for name, like in self._template.items():
            if name in absent:
                continue
            value = state[name].detach().to(like.device)
            share = _share(name, like, weight, correspondence, maps)
            if name not in self._sums:
                self._sums[name] = torch.zeros(like.shape, dtype=share.dtype, device=like.device)
                self._weights[name] = torch.zeros_like(share)
            elif not value.is_floating_point() and value.dim():
                self._check_equal(name, value)
            take = as_it_stands(value)
            if correspondence is not None and maps is not None:
                take = row_mapping(value, name, correspondence, maps)
            for rows in row_blocks(name, like, correspondence, maps):
                self._accumulate(name, take(rows).to(share.dtype), share, rows)
            self._weights[name] = self._weights[name] + share

    def _accumulate(self, name: str, part: Tensor, share: Tensor, rows: slice | None) -> None:
        total = self._sums[name]
        if rows is not None:
            total = total[rows]
            share = share[rows] if share.dim() and len(share) > 1 else share
        total.addcmul_(part, share)

    def _check_equal(self, name: str, value: Tensor) -> None:
        """Refuse to average integer tables (indices, masks) that differ between clients."""
        mean = self._sums[name] / self._weights[name]
        if not torch.equal(mean.round().to(value.dtype), value):
            raise FusionError(
                f"tensor '{name}' holds {value.dtype} values that differ between the clients: "
                "they cannot be averaged"
            )

    def mean(self, uncovered: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean in the template's dtypes.

        Parameters
        ----------
        uncovered : mapping of str to Tensor
            State dict whose values fill channels and tensors that no client has.

        Returns
        -------
        dict of str to Tensor
            A state dict of the fused architecture.
        """
        return self._divided(lambda name: self._sums[name].clone(), uncovered)

    def finish(self, uncovered: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean as `mean` does, in the memory of the sums, which are given up."""
        return self._divided(lambda name: self._sums.pop(name), uncovered)

    def _divided(
        self, take: Callable[[str], Tensor], uncovered: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {
            name: self._quotient(name, take(name), uncovered)
            if name in self._sums
            else uncovered[name].to(like.device, like.dtype, copy=True)
            for name, like in self._template.items()
        }

    def _quotient(self, name: str, total: Tensor, uncovered: Mapping[str, Tensor]) -> Tensor:
        weight, like = self._weights[name], self._template[name]
        total.div_(weight)
        empty = weight.abs() < 1e-12
        if bool(empty.any()):
            total = torch.where(empty, uncovered[name].to(total), total)
        return (total if like.is_floating_point() else total.round()).to(like.dtype)


def _share(
    name: str,
    like: Tensor,
    weight: float,
    correspondence: Correspondence | None,
    maps: Maps | None,
) -> Tensor:
    """Return a client's weight in a tensor's sums: of every written position, or one for all."""
    coverage = torch.ones(())
    if correspondence is not None and maps is not None:
        covered = coverage_along(name, correspondence, maps)
        if covered is not None:
            coverage = along(covered[1], covered[0], like.dim())
    return (weight * coverage).to(like.device, _accumulator(like))


def as_it_stands(tensor: Tensor) -> Callable[[slice | None], Tensor]:
    """Return a function that takes some rows of a tensor, or all, as `maps.row_mapping` does."""
    return lambda rows: tensor if rows is None else tensor[rows]


def row_blocks(
    name: str, like: Tensor, correspondence: Correspondence | None, maps: Maps | None
) -> Iterator[slice | None]:
    """Yield slices of a large tensor's first axis, so that little memory is needed beside it.

    None stands for the whole tensor: small ones, and those whose rows a transport plan mixes.
    """
    segments = correspondence.segments.get(name, {}).get(0, []) if correspondence else []
    mixed = maps is not None and any(isinstance(maps[s.group], Plan) for s in segments)
    if like.numel() <= _BLOCK or mixed or not like.is_floating_point():
        yield None
        return
    size = max(1, _BLOCK * len(like) // like.numel())
    yield from (slice(start, start + size) for start in range(0, len(like), size))


@dataclass(frozen=True)
class LeastSquares:
    """How layers are combined by least squares.

    The combined layer is what is closest to every client's layer on that client's own inputs, near
    the mean: ``W = argmin sum_k w_k E_k |W x - W_k x|^2 + r |W - mean|^2``.

    Parameters
    ----------
    shrinkage : float
        Factor of the moments' off-diagonals, in [0, 1]; 0: every input on its own.
    ridge : float
        ``r`` relative to the mean of the moments' diagonal, positive.
    strength : float
        Share of the way from the mean to the least-squares solution, in [0, 1].
    weight_exponent : float
        Clients' moments count by this power of their weights. A client's moments already say which
        inputs are its own; below 1, few samples of a rare kind are heard.
    convolutions : bool
        Whether convolutions are combined so too, or by their mean.
    bound : {"auto", "norm", "change"}
        What keeps weights from growing over rounds. "norm": a layer's norm is at most the clients'
        mean norm. "change": the distance of each row from the mean layer is at most the clients'
        mean distance. "auto": "change" for networks with convolutions, else "norm".

    References
    ----------
    Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023,
    equation 2 (RegMean); Nasery et al., "PLeaS", 2024, section 3.2. Pulling towards the mean
    instead of zero, and the bound on the norm, are not in these papers.
    """

    shrinkage: float = 0.5
    ridge: float = 0.1
    strength: float = 1.0
    weight_exponent: float = 0.25
    convolutions: bool = False
    bound: Literal["auto", "norm", "change"] = "auto"

    def __post_init__(self) -> None:
        for name in ("shrinkage", "strength", "weight_exponent"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise FusionError(f"{name} must lie in [0, 1], not {value!r}")
        if not 0 < self.ridge < math.inf:
            raise FusionError(f"ridge must be positive, not {self.ridge!r}")
        if self.bound not in BOUNDS:
            raise FusionError(f"bound must be one of {BOUNDS}, not {self.bound!r}")


class RunningLeastSquares:
    """Least-squares combination of layers in the fused network's channels, a client at a time.

    With the mean layer ``A``, moments ``G_k`` and maps ``M_k`` of the inputs, and ``w_k`` to the
    power of `LeastSquares.weight_exponent`, held are
    ``D = sum_k w_k M_k G_k M_k^T`` and ``R = sum_k w_k (W_k G_k M_k^T - A M_k G_k M_k^T)``, rows
    brought into the fused channels; the layer is ``A + strength * R (D + r)^-1``. The bias belongs
    to one more, constant input where the moments are full; otherwise it is the mean. A fused
    channel that a client does not have gets the client's vote for the mean, as do clients without
    statistics for their average input. The result is kept within a bound: rare directions of the
    inputs are amplified otherwise, and weights grow from round to round until training diverges.

    Parameters
    ----------
    mean : mapping of str to Tensor
        State dict of the fused network: the mean of the clients that will be added.
    statistics : sequence of (mapping or None)
        The clients' statistics; they fix in which detail a layer can be combined.
    options : LeastSquares
        How.
    tied : collection of str
        Tensors that several layers share; they stay the mean.
    """

    def __init__(
        self,
        mean: Mapping[str, Tensor],
        statistics: Sequence[Statistics | None],
        options: LeastSquares,
        tied: Collection[str] = (),
    ) -> None:
        self._mean = mean
        self._exponent = options.weight_exponent
        if options.bound == "auto":
            convolutional = any(tensor.dim() > 2 for tensor in mean.values())
            options = replace(options, bound="change" if convolutional else "norm")
        self._layers = {
            name: _LayerSums(name, mean, detail, options)
            for name, detail in _least_details(statistics).items()
            if (mean[key_of(name, "weight")].dim() == 2 or options.convolutions)
            and key_of(name, "weight") not in tied
        }

    def add(
        self,
        state: Mapping[str, Tensor],
        statistics: Statistics | None,
        weight: float,
        correspondence: Correspondence,
        maps: Maps,
        absent: Collection[str] = (),
    ) -> None:
        """Add one client.

        Parameters
        ----------
        state : mapping of str to Tensor
            The client's state dict.
        statistics : mapping or None
            Its statistics.
        weight : float
            Its share of the total weight.
        correspondence, maps
            How its channels go into the fused network's.
        absent : collection of str
            Tensors that it has not: it takes no part in their layers.
        """
        for name, sums in self._layers.items():
            if key_of(name, "weight") in absent:
                continue
            own = (statistics or {}).get(name)
            sums.add(state, own, weight**self._exponent, correspondence, maps)

    def finish(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the combined state dict, and for each layer combined so the moments' detail."""
        combined, details = dict(self._mean), {}
        for name, sums in self._layers.items():
            layer = sums.solve()
            if layer is not None:
                combined |= layer
                details[name] = sums.detail
        return combined, details


def _least_details(statistics: Sequence[Statistics | None]) -> dict[str, str]:
    """Return for every layer with moments the least detail that a client has of them."""
    details: dict[str, str] = {}
    for own in statistics:
        for name, layer in (own or {}).items():
            if layer.second is not None:
                details[name] = max(details.get(name, "full"), layer.detail, key=DETAILS.index)
    return details


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
        blocks = reduced(statistics.second, self.size).double()
        if self.constant:
            mean = statistics.mean.double()
            blocks = torch.cat([blocks, mean.reshape(1, 1, -1)], 1)
            column = torch.cat([mean, mean.new_ones(1)]).reshape(1, -1, 1)
            blocks = torch.cat([blocks, column], 2)
        diagonal = torch.diag_embed(blocks.diagonal(dim1=1, dim2=2))
        return shrinkage * blocks + (1 - shrinkage) * diagonal


class _LayerSums:
    """The running sums of one layer."""

    def __init__(
        self, name: str, mean: Mapping[str, Tensor], detail: str, options: LeastSquares
    ) -> None:
        self.detail = detail
        self._options = options
        self._keys = key_of(name, "weight"), key_of(name, "bias")
        self._mean = [mean[key] for key in self._keys if key in mean]
        self._moments: Tensor | None = None
        # Of clients with and without statistics, in the shapes of weight and bias.
        self._residuals = [torch.zeros_like(t, dtype=torch.float64) for t in self._mean]
        self._silent: list[Tensor] = []
        self._known_weight = self._silent_weight = 0.0
        # Of the clients' rows: norm, distance from the mean layer, weight.
        self._rows = self._residuals[0].new_zeros(3, len(self._mean[0]))
        self._blocks: _Blocks | None = None

    def add(
        self,
        state: Mapping[str, Tensor],
        statistics: LayerStatistics | None,
        weight: float,
        correspondence: Correspondence,
        maps: Maps,
    ) -> None:
        """Add one client's layer, with or without statistics."""
        own = [state[key] for key in self._keys if key in state]
        covered = coverage_along(self._keys[0], correspondence, maps)
        coverage = torch.ones_like(self._rows[0])
        if covered is not None:
            coverage = covered[1].to(coverage)
        mapped = [
            map_tensor(tensor, key, correspondence, maps).double()
            for key, tensor in zip(self._keys, own, strict=False)
        ]
        difference = [m - mean for m, mean in zip(mapped, self._mean, strict=True)]
        norms = [tensor.flatten(1).norm(dim=1) for tensor in (mapped[0], difference[0])]
        self._rows += weight * coverage * torch.stack([*norms, torch.ones_like(coverage)])
        if statistics is None or statistics.second is None:
            self._silent = self._silent or [torch.zeros_like(t) for t in self._residuals]
            sums, residual = self._silent, difference
            self._silent_weight += weight
        else:
            sums = self._residuals
            residual = self._residual(own, statistics, weight, correspondence, maps)
            self._known_weight += weight
        for total, part in zip(sums, residual, strict=True):
            total += weight * along(coverage, 0, part.dim()) * part

    def _residual(
        self,
        own: Sequence[Tensor],
        statistics: LayerStatistics,
        weight: float,
        correspondence: Correspondence,
        maps: Maps,
    ) -> list[Tensor]:
        """Return ``W_k G_k M_k^T - A M_k G_k M_k^T``; add the moments to their sum."""
        assert statistics.mean is not None
        groups = statistics.mean.numel() // own[0][0].numel()
        constant = len(own) > 1 and self.detail == "full"
        client = _Blocks(own[0].shape, groups, self.detail, constant)
        # Of a depthwise convolution, every channel is a group.
        fused_groups = 1 if groups == 1 else groups * len(self._mean[0]) // len(own[0])
        fused = replace(client, shape=self._mean[0].shape, groups=fused_groups)
        moments = client.moments(statistics, self._options.shrinkage).to(own[0].device)

        def to_fused(values: Tensor, axis: int) -> Tensor:
            return _map_inputs(values, axis, client, self._keys[0], correspondence, maps)

        products = client.split(*_both(own)) @ moments
        axis = 2 if self.detail == "full" else 0
        if groups == 1:
            products = to_fused(products, axis)
        columns = self._mean[0].shape[1:] if groups == 1 else own[0].shape[1:]
        fused_inputs = replace(client, shape=own[0].shape[:1] + columns)
        joined = [t for t in fused_inputs.join(products) if t is not None]
        kept = 1 if groups == 1 else None
        outputs = [
            map_tensor(tensor, key, correspondence, maps, keep_axis=kept)
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
        average = self._moments / self._known_weight
        residual = blocks.split(*_both(self._residuals))
        if self._silent:
            residual += blocks.split(*_both(self._silent)) @ average
        moments = average * (self._known_weight + self._silent_weight)
        diagonal = moments.diagonal(dim1=1, dim2=2)
        diagonal += self._options.ridge * diagonal.mean()
        factor, failed = torch.linalg.cholesky_ex(moments)
        if bool(failed.any()):
            return None
        change = blocks.join(torch.cholesky_solve(residual.mT, factor).mT)
        layer = self._bounded([c * self._options.strength for c in change if c is not None])
        layer = [t.to(mean.dtype) for t, mean in zip(layer, self._mean, strict=False)]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in layer):
            return None
        return dict(zip(self._keys, layer, strict=False))

    def _bounded(self, change: Sequence[Tensor]) -> list[Tensor]:
        """Return the mean layer plus its change, kept within the bound."""
        norms, distances = self._rows[:2] / self._rows[2].clamp(min=1e-12)
        mean = [tensor.double() for tensor in self._mean[: len(change)]]
        if self._options.bound == "change":
            rows = change[0].flatten(1).norm(dim=1)
            scale = (distances / rows.clamp(min=1e-30)).clamp(max=1)
            return [m + along(scale, 0, c.dim()) * c for m, c in zip(mean, change, strict=True)]
        layer = [m + c for m, c in zip(mean, change, strict=True)]
        bound = max(float(norms.norm()), float(mean[0].norm()))
        return [t * min(1.0, bound / max(float(layer[0].norm()), 1e-30)) for t in layer]


def _both(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias, or weight and None, in double precision."""
    return tensors[0].double(), tensors[1].double() if len(tensors) > 1 else None


def _map_inputs(
    values: Tensor,
    axis: int,
    client: _Blocks,
    weight_key: str,
    correspondence: Correspondence,
    maps: Maps,
) -> Tensor:
    """Bring an axis over a layer's input columns or blocks into the fused network's channels."""
    if client.groups > 1 and client.shape[1] > 1:
        return values  # The channels of grouped convolutions do not move.
    per_channel = client.shape[2:].numel() if client.detail != "block" else 1
    moved = values.movedim(axis, 0)
    length = client.channels * per_channel
    inputs, constant = moved[:length], moved[length:]
    by_channel = inputs.reshape(client.channels, per_channel, *moved.shape[1:])
    # A depthwise convolution's input channels are its output channels.
    layer_axis = (weight_key, 1 if client.groups == 1 else 0)
    mapped = map_channels(by_channel, 0, layer_axis, correspondence, maps)
    return torch.cat([mapped.flatten(0, 1), constant]).movedim(0, axis)


def _accumulator(value: Tensor) -> torch.dtype:
    """Sum half precision in single, integers in double."""
    if value.is_floating_point():
        return torch.promote_types(value.dtype, torch.float32)
    return torch.float64


def along(vector: Tensor, axis: int, dimensions: int) -> Tensor:
    """Return a vector as a tensor of so many dimensions that extends along one axis."""
    shape = [-1 if a == axis else 1 for a in range(dimensions)]
    return vector.view(shape)
