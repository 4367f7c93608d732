"""Ground costs between the channels of two networks, by weights or by activations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flwr_fusion.errors import FusionError
from flwr_fusion.maps import Correspondence, Maps, Segment, map_tensor
from flwr_fusion.observe import batches_of, record
from flwr_fusion.precision import widened

Norms = Mapping[str, tuple[float, float]]
"""Of tensors: their norms in the reference and in the client."""


def weight_cost(
    group: str,
    reference: Mapping[str, Tensor],
    client: Mapping[str, Tensor],
    correspondence: Correspondence,
    maps: Maps,
    norms: Norms,
) -> Tensor:
    """Return the squared Euclidean distances between channels, over all their weights.

    ``C[i, j] = sum over tensors of |A[i] / |A| - B[j] / |B||^2``, where A is the reference's
    tensor and B the client's, its other axes brought into the reference's channels. Every tensor
    counts alike, whatever its scale. (The ground cost of Singh & Jaggi 2020, section 4.1, squared;
    up to the norms the inner products of Ainsworth et al. 2023, section 3.2.)

    Parameters
    ----------
    group : str
        Name of the channel group.
    reference : mapping of str to Tensor
        State dict in the fused network's channels.
    client : mapping of str to Tensor
        State dict of the client.
    correspondence : Correspondence
        Positions in both networks.
    maps : mapping of str to ChannelMap
        The client's current maps of the other groups.
    norms : mapping of str to (float, float)
        The tensors that count, with their norms in the reference and in the client.

    Returns
    -------
    Tensor
        Shape (fused channels, client channels), on the reference's device.
    """
    total: Tensor | None = None
    for name, (norm, client_norm) in norms.items():
        for axis, segment in segments_of(group, name, correspondence):
            mapped = map_tensor(client[name], name, correspondence, maps, keep_axis=axis)
            ours = channel_rows(reference[name], axis, segment.fused_positions)
            theirs = channel_rows(mapped, axis, segment.client_positions).to(ours)
            # |a - b|^2 = |a|^2 - 2 <a, b> + |b|^2, with a = A[i] / |A| and b = B[j] / |B|: one
            # matrix product, where differences would need channels^2 x weights numbers.
            # Norms of rows make no copy, as squares of all values do.
            norms_of_ours, norms_of_theirs = (
                torch.linalg.vector_norm(rows, dim=1) for rows in (ours, theirs)
            )
            distance = torch.addmm(
                (norms_of_ours / norm).square().unsqueeze(1),
                ours,
                theirs.T,
                alpha=-2 / (norm * client_norm),
            )
            distance += (norms_of_theirs / client_norm).square()
            total = distance if total is None else total.add_(distance)
    if total is None:
        raise FusionError(f"no weights tell the channels of group '{group}' apart")
    return total.clamp_(min=0)


def segments_of(
    group: str, tensor: str, correspondence: Correspondence
) -> Iterator[tuple[int, Segment]]:
    """Yield the axes of a tensor that carry a group, with the group's positions."""
    for axis, segments in correspondence.segments[tensor].items():
        for segment in segments:
            if segment.group == group:
                yield axis, segment


def channel_norms(
    group: str, state: Mapping[str, Tensor], correspondence: Correspondence, fused: bool
) -> Tensor:
    """Return the L2 norm of the weights that write each channel of a group.

    Parameters
    ----------
    group : str
        Name of the channel group.
    state : mapping of str to Tensor
        State dict of the fused network or of the client.
    correspondence : Correspondence
        Positions in both networks.
    fused : bool
        Whether `state` is in the fused network's channels.

    Returns
    -------
    Tensor
        Shape (channels,).
    """
    squares: Tensor | None = None
    for name in matched_tensors(correspondence, state):
        for axis, segment in segments_of(group, name, correspondence):
            if not segment.writes:
                continue
            positions = segment.fused_positions if fused else segment.client_positions
            rows = channel_rows(state[name], axis, positions).square().sum(1)
            squares = rows if squares is None else squares + rows
    if squares is None:
        raise FusionError(f"no weights write the channels of group '{group}'")
    return squares.sqrt()


def matched_tensors(correspondence: Correspondence, state: Mapping[str, Tensor]) -> list[str]:
    """Return the tensors by which channels are compared.

    Those with at least two axes: a bias or a norm scale says little about what a channel detects,
    and its noise misleads the matching. Nor the factors of products, whose other axis has channels
    of its own in every client.
    """
    factors = correspondence.factors
    return [
        name
        for name in correspondence.segments
        if name not in factors and state[name].is_floating_point() and state[name].dim() > 1
    ]


def channel_rows(tensor: Tensor, axis: int, positions: Tensor) -> Tensor:
    """Return a tensor as (channels, everything else), in at least single precision.

    Parameters
    ----------
    tensor : Tensor
        Any tensor of a state dict.
    axis : int
        The axis that carries the channels.
    positions : Tensor
        Shape (channels, block): where they stand along the axis.

    Returns
    -------
    Tensor
        Shape (channels, block * everything else).
    """
    moved = tensor.detach().movedim(axis, 0)
    flat = positions.flatten()
    if not torch.equal(flat, torch.arange(len(moved))):
        moved = moved.index_select(0, flat.to(tensor.device))
    rows = moved.reshape(len(positions), -1)
    return rows if rows.dtype == torch.float64 else rows.float()


def activation_costs(
    reference: nn.Module,
    client: nn.Module,
    correspondence: Correspondence,
    calibration: Any,
    kind: str = "correlation",
    who: str = "the client",
) -> dict[str, Tensor]:
    """Return ground costs between channels by their pre-activations on calibration inputs.

    Correlation: ``C[i, j] = 1 - corr(z_i, z_j)``. Euclidean (Singh & Jaggi 2020, section 4.1):
    ``C[i, j] = mean (z_i - z_j)^2``. Averaged over the layers that write the group; one pass over
    the inputs, in evaluation mode.

    Parameters
    ----------
    reference, client : nn.Module
        The two networks, on one device.
    correspondence : Correspondence
        Positions in both networks; the reference is its fused side.
    calibration : Tensor or iterable of inputs
        A batch of inputs, or batches of what the network is called with.
    kind : {"correlation", "euclidean"}
        The cost.
    who : str
        What to call the client where it cannot be run.

    Returns
    -------
    dict of str to Tensor
        For each free group a matrix of shape (fused channels, client channels), on the CPU, where
        transport is solved.
    """
    moments: dict[tuple[str, str], _CrossMoments] = defaultdict(_CrossMoments)
    layers = _layer_pairs(correspondence)
    names = {layer for _, layer, _, _ in layers}
    for batch in batches_of(calibration):
        ours, theirs = (
            record(network, names, batch, _channel_samples, title)
            for network, title in ((reference, "the reference"), (client, who))
        )
        for group, layer, fused_positions, client_positions in layers:
            x, y = torch.cat(ours[layer], 1), torch.cat(theirs[layer], 1)
            # All positions of a channel are samples of it.
            x = x[fused_positions.to(x.device)].flatten(1)
            y = y[client_positions.to(y.device)].flatten(1)
            moments[group, layer].add(x, y.to(x.device))
    costs: dict[str, list[Tensor]] = defaultdict(list)
    for (group, _), moment in moments.items():
        costs[group].append(moment.cost(kind))
    return {group: torch.stack(of_layers).mean(0).cpu() for group, of_layers in costs.items()}


def _layer_pairs(correspondence: Correspondence) -> list[tuple[str, str, Tensor, Tensor]]:
    """Return (group, layer, fused positions, client positions) of all recorded layers."""
    pairs = []
    free = {group.name for group in correspondence.free_groups}
    for fused, client in zip(
        correspondence.fused.groups, correspondence.client.groups, strict=True
    ):
        if fused.name not in free:
            continue
        theirs = dict(correspondence.client.activation_places(client))
        ours = correspondence.fused.activation_places(fused)
        pairs += [(fused.name, layer, places, theirs[layer]) for layer, places in ours]
    return pairs


def _channel_samples(layer: nn.Module, _inputs: Tensor, output: Tensor) -> Tensor:
    """Return a layer's output as (channels, samples), copied."""
    axis = 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1
    return output.movedim(axis, 0).clone(memory_format=torch.contiguous_format).flatten(1)


class _CrossMoments:
    """Running first and second moments between the channels of two networks."""

    def __init__(self) -> None:
        self.samples = 0
        self.shifts: tuple[Tensor, Tensor] | None = None
        self.sums: list[Tensor] = []

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Add pre-activations, each of shape (channels, samples)."""
        x, y = widened(ours), widened(theirs)
        if self.shifts is None:
            # Moments about the first batch's means, or variances drown in large means.
            self.shifts = (x.mean(1), y.mean(1))
        x, y = x - self.shifts[0][:, None], y - self.shifts[1][:, None]
        new = [x.sum(1), y.sum(1), x.square().sum(1), y.square().sum(1), x @ y.T]
        self.samples += x.shape[1]
        self.sums = [a + b for a, b in zip(self.sums, new, strict=True)] if self.sums else new

    def cost(self, kind: str) -> Tensor:
        """Return 1 - correlation, or the mean squared distance."""
        assert self.shifts is not None
        x, y, xx, yy, xy = (total / self.samples for total in self.sums)
        # Cov(x, y) = E[x y] - E[x] E[y], about the shifts; Var(x) = E[x^2] - E[x]^2.
        covariance = xy - x[:, None] * y[None, :]
        variances = (xx - x.square()).clamp(min=0), (yy - y.square()).clamp(min=0)
        means = x + self.shifts[0], y + self.shifts[1]
        if kind == "euclidean":
            # E (x - y)^2 = (E x - E y)^2 + Var(x) + Var(y) - 2 Cov(x, y).
            difference = (means[0][:, None] - means[1][None, :]).square()
            return difference + variances[0][:, None] + variances[1][None, :] - 2 * covariance
        ours, theirs = (
            torch.where(v > 1e-10 * m.square(), v, torch.inf)
            for v, m in zip(variances, means, strict=True)
        )
        # A channel that is constant on all inputs correlates with nothing.
        return 1 - covariance / ours.sqrt()[:, None] / theirs.sqrt()[None, :]
