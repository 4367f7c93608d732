"""Proof that channels stay where they are, without solving a transport problem."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from flwr_fusion.maps import Correspondence, Segment
from flwr_fusion.matching.costs import Norms, channel_rows, segments_of
from flwr_fusion.precision import numbers, widened

# Distances by inner products round by about this much of the squared norms.
_ROUNDING = 1e-5
# As many numbers at once as stay in the processor's cache rather than fill the memory.
_BLOCK = 1 << 20


class IdentityCertificate:
    """Cheap proofs that a client's channels match a reference's best as they stand.

    With ``a_i, b_i`` the channels of reference and client over all their normalised tensors, the
    identity is an optimal assignment if for every i

    ``|a_i - b_i| <= 1/2 min_j |a_i - a_j|``,

    for then ``|a_j - b_i| >= |a_i - a_j| - |a_i - b_i| >= |a_i - b_i|``: every client channel is
    nearest to its own place. The right side is the reference's alone, found once for all clients.

    Parameters
    ----------
    reference : mapping of str to Tensor
        State dict in the fused network's channels.
    """

    def __init__(self, reference: Mapping[str, Tensor]) -> None:
        self.reference = reference
        self._gaps: dict[str, _Gaps] = {}
        self._means: dict[tuple[str, int, str], Tensor] = {}

    def costs(
        self,
        client: Mapping[str, Tensor],
        correspondence: Correspondence,
        norms: Norms,
        tensors: Mapping[str, Collection[str]],
    ) -> dict[str, float] | None:
        """Return the relative costs of the identity in all groups, or None where it is not proved.

        Parameters
        ----------
        client : mapping of str to Tensor
            State dict of the client.
        correspondence : Correspondence
            Positions in both networks.
        norms : mapping of str to (float, float)
            The tensors that count, with their norms in the reference and in the client.
        tensors : mapping of str to collection of str
            For every free group the tensors that tell its channels apart.

        Returns
        -------
        dict of str to float or None
            0 for identical channels, 1 for unrelated ones, as in `Alignment`.
        """
        apart: dict[str, dict[int, Tensor]] = {}
        costs: dict[str, Tensor] = {}
        # One group after the other: the first tells that networks are unrelated.
        for group in correspondence.free_groups:
            names = tensors.get(group.name, ())
            places = [
                (n, *place) for n in names for place in segments_of(group.name, n, correspondence)
            ]
            if not places or not all(
                self._stands_alike(client, n, segment) for n, _, segment in places
            ):
                return None
            for name in names:
                if name not in apart:
                    axes = correspondence.segments[name]
                    given = self.reference[name], client[name], axes, norms[name]
                    apart[name] = _squared_differences(*given)
            total = torch.stack(
                [apart[n][axis][segment.fused_positions].sum(1) for n, axis, segment in places]
            ).sum(0)
            if not self._gaps_of(group.name, names, correspondence, norms).reach(4 * total):
                return None
            distances = [
                self._mean_distance(client[n], n, axis, segment, norms[n])
                for n, axis, segment in places
            ]
            everywhere = torch.stack(distances).sum().clamp(min=1e-30)
            costs[group.name] = widened(total).mean() / everywhere
        return dict(zip(costs, numbers(costs.values()), strict=True))

    def _stands_alike(self, client: Mapping[str, Tensor], name: str, segment: Segment) -> bool:
        """Whether channels have the same positions in a tensor of the client's."""
        same_shape = self.reference[name].shape == client[name].shape
        return same_shape and torch.equal(segment.fused_positions, segment.client_positions)

    def _gaps_of(
        self, group: str, tensors: Collection[str], correspondence: Correspondence, norms: Norms
    ) -> _Gaps:
        """Return what is known of ``min_j |a_i - a_j|^2`` of a group's channels."""
        if group not in self._gaps:
            # Every tensor counts as much: the small ones take less time.
            by_size = sorted(tensors, key=lambda name: self.reference[name].numel())
            places = [
                (n, *place) for n in by_size for place in segments_of(group, n, correspondence)
            ]
            rows = (
                channel_rows(self.reference[name], axis, segment.fused_positions) / norms[name][0]
                for name, axis, segment in places
            )
            self._gaps[group] = _Gaps(rows, len(places))
        return self._gaps[group]

    def _mean_distance(
        self, theirs: Tensor, name: str, axis: int, segment: Segment, norms: tuple[float, float]
    ) -> Tensor:
        """Return the mean of ``|a_i - b_j|^2`` over all pairs of channels, of one tensor."""
        key = (name, axis, segment.group)
        ours = self.reference[name]
        if key not in self._means:
            self._means[key] = _mean_channel(ours, axis, segment.fused_positions)
        mean = _mean_channel(theirs, axis, segment.fused_positions).to(self._means[key])
        product = self._means[key] @ mean
        squares = sum(
            _share_of_squares(tensor, axis, segment.fused_positions, norm)
            for tensor, norm in zip((ours, theirs), norms, strict=True)
        )
        # mean |a|^2 + mean |b|^2 - 2 <mean a, mean b>.
        return squares / len(segment.fused_positions) - 2 * product / (norms[0] * norms[1])


def _share_of_squares(tensor: Tensor, axis: int, positions: Tensor, norm: float) -> Tensor | float:
    """Return ``sum_i |a_i|^2`` of a normalised tensor's channels: 1 if it has no others."""
    if positions.numel() == tensor.shape[axis]:
        return 1.0
    return widened(channel_rows(tensor, axis, positions).norm()).square() / norm**2


def _squared_differences(
    ours: Tensor, theirs: Tensor, axes: Iterable[int], norms: tuple[float, float]
) -> dict[int, Tensor]:
    """Return ``(A / |A| - B / |B|)^2``, summed to each position along some axes."""
    norm, client_norm = norms
    precise = torch.promote_types(ours.dtype, torch.float32)
    sums: dict[int, list[Tensor]] = {axis: [] for axis in axes}
    rows = max(1, _BLOCK * len(ours) // max(1, ours.numel()))
    for a, b in zip(torch.split(ours, rows), torch.split(theirs, rows), strict=True):
        difference = a.detach().to(precise) / norm
        squares = difference.sub_(b.detach().to(difference), alpha=1 / client_norm).square_()
        for axis, found in sums.items():
            found.append(squares.sum([other for other in range(ours.dim()) if other != axis]))
    return {
        axis: torch.cat(found) if axis == 0 else torch.stack(found).sum(0)
        for axis, found in sums.items()
    }


def _mean_channel(tensor: Tensor, axis: int, positions: Tensor) -> Tensor:
    """Return the mean of a tensor's channels, as one row."""
    size, block = positions.shape
    if torch.equal(positions.flatten(), torch.arange(tensor.shape[axis])):
        shape = (*tensor.shape[:axis], size, block, *tensor.shape[axis + 1 :])
        precise = torch.promote_types(tensor.dtype, torch.float32)
        mean = tensor.detach().reshape(shape).mean(axis, dtype=precise)
        return widened(mean.movedim(axis, 0).flatten())
    return widened(channel_rows(tensor, axis, positions).mean(0))


class _Gaps:
    """Least squared distance of each row to another one, from as many tensors as it takes.

    Each tensor makes it larger; rounding only makes it smaller.
    """

    def __init__(self, parts: Iterable[Tensor], count: int) -> None:
        self._parts = iter(parts)
        self._count = count
        self._squares: Tensor | float = 0.0
        self._products: Tensor | float = 0.0
        self._least: Tensor | float = 0.0

    def reach(self, needed: Tensor) -> bool:
        """Whether the distances are at least these; never, of what is not finite."""
        # The least distances are on average no more than the mean of all pairs, which is at most
        # 2 sum_i |a_i|^2 / (n - 1), and the squares of a normalised tensor sum to 1 at most.
        hopeless = needed.mean() * (len(needed) - 1) > 2 * self._count
        while True:
            is_hopeless, is_reached = numbers([hopeless, (needed <= self._least).all()])
            rows = None if is_hopeless or is_reached else next(self._parts, None)
            if rows is None:
                return bool(is_reached)
            self._add(rows)

    def _add(self, rows: Tensor) -> None:
        self._squares = rows.square().sum(1) + self._squares
        self._products = rows @ rows.T + self._products
        scale = self._squares[:, None] + self._squares
        # |a_i - a_j|^2 = |a_i|^2 + |a_j|^2 - 2 <a_i, a_j>.
        distances = scale.sub(self._products, alpha=2).sub_(scale, alpha=_ROUNDING).clamp_(min=0)
        self._least = distances.fill_diagonal_(torch.inf).min(1).values
