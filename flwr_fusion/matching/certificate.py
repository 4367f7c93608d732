"""Proof that channels stay where they are, without solving a transport problem."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from flwr_fusion.maps import Correspondence, GroupPair
from flwr_fusion.matching.costs import channel_rows, segments_of

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
        self._gaps: dict[tuple[str, tuple[str, ...]], Tensor] = {}

    def cost(
        self,
        group: GroupPair,
        client: Mapping[str, Tensor],
        correspondence: Correspondence,
        norms: Mapping[str, tuple[float, float]],
    ) -> float | None:
        """Return the relative cost of the identity in one group, or None where it is not proved.

        Parameters
        ----------
        group : GroupPair
            A free group.
        client : mapping of str to Tensor
            State dict of the client, all of whose other groups stay in place.
        correspondence : Correspondence
            Positions in both networks.
        norms : mapping of str to (float, float)
            The tensors that count, with their norms in the reference and in the client.

        Returns
        -------
        float or None
            0 for identical channels, 1 for unrelated ones, as in `Alignment`.
        """
        if group.fused_size != group.client_size or not norms:
            return None
        apart: Tensor | float = 0.0
        everywhere = 0.0
        for name, (norm, client_norm) in norms.items():
            if self.reference[name].shape != client[name].shape:
                return None
            for axis, segment in segments_of(group.name, name, correspondence):
                ours = channel_rows(self.reference[name], axis, segment.fused_positions)
                theirs = channel_rows(client[name], axis, segment.client_positions).to(ours)
                apart = apart + _squared_distances(ours, theirs, norm, client_norm)
                everywhere += _mean_distance(ours, theirs, norm, client_norm)
        assert isinstance(apart, Tensor)
        # Weights that are not finite prove nothing.
        if not bool((4 * apart <= self._gap(group.name, correspondence, norms)).all()):
            return None
        return float(apart.double().mean()) / max(everywhere, 1e-30)

    def _gap(
        self,
        group: str,
        correspondence: Correspondence,
        norms: Mapping[str, tuple[float, float]],
    ) -> Tensor:
        """Return ``min_j |a_i - a_j|^2`` of a group's channels; rounding only makes it smaller."""
        key = (group, tuple(norms))
        if key not in self._gaps:
            self._gaps[key] = _nearest(
                channel_rows(self.reference[name], axis, segment.fused_positions) / norm
                for name, (norm, _) in norms.items()
                for axis, segment in segments_of(group, name, correspondence)
            )
        return self._gaps[key]


def _squared_distances(ours: Tensor, theirs: Tensor, norm: float, client_norm: float) -> Tensor:
    """Return ``|a_i - b_i|^2`` of the rows, in blocks."""
    rows = max(1, _BLOCK // max(1, ours.shape[1]))
    return torch.cat(
        [
            (a / norm).sub_(b, alpha=1 / client_norm).square_().sum(1)
            for a, b in zip(torch.split(ours, rows), torch.split(theirs, rows), strict=True)
        ]
    )


def _mean_distance(ours: Tensor, theirs: Tensor, norm: float, client_norm: float) -> float:
    """Return the mean of ``|a_i - b_j|^2`` over all pairs of rows."""
    # mean |a|^2 + mean |b|^2 - 2 <mean a, mean b>.
    squares = float(ours.norm()) ** 2 / norm**2 + float(theirs.norm()) ** 2 / client_norm**2
    product = float(ours.mean(0) @ theirs.mean(0)) / (norm * client_norm)
    return squares / len(ours) - 2 * product


def _nearest(parts: Iterable[Tensor]) -> Tensor:
    """Return for each row the least squared distance to another one, over all parts."""
    squares: Tensor | float = 0.0
    products: Tensor | float = 0.0
    for rows in parts:
        squares = squares + rows.square().sum(1)
        products = products + rows @ rows.T
    assert isinstance(squares, Tensor)
    assert isinstance(products, Tensor)
    scale = squares[:, None] + squares
    # |a_i - a_j|^2 = |a_i|^2 + |a_j|^2 - 2 <a_i, a_j>.
    distances = scale.sub(products, alpha=2).sub_(scale, alpha=_ROUNDING).clamp_(min=0)
    return distances.fill_diagonal_(torch.inf).min(1).values
