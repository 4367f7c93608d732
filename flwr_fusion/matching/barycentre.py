"""Refining the alignment of many clients to one reference as a barycentre."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from flwr_fusion.maps import Correspondence, Maps
from flwr_fusion.matching.sweeps import Alignment, Matching, align_by_weights
from flwr_fusion.rules.least_squares import RunningMean

_MAX_PASSES = 20


@dataclass(frozen=True)
class Client:
    """One client of a fusion.

    Parameters
    ----------
    state : callable
        Returns the client's state dict; called whenever it is needed, so that not all clients
        must be in memory at once.
    weight : float
        Its share of the total weight.
    correspondence : Correspondence
        Its tensor positions and the fused network's.
    absent : frozenset of str, optional
        For a network brought to another depth: tensors that it has not, in whose mean it takes no
        part. None for a network that came in the fused network's layers.
    """

    state: Callable[[], Mapping[str, Tensor]]
    weight: float
    correspondence: Correspondence
    absent: frozenset[str] | None = None

    def join(
        self,
        mean: RunningMean,
        maps: Maps,
        sign: int = 1,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add the client to a mean, or with sign -1 take it out again."""
        state = self.state() if state is None else state
        absent = self.absent or frozenset()
        mean.add(state, sign * self.weight, self.correspondence, maps, absent)


def most_central(clients: Sequence[Client], matching: Matching) -> int:
    """Return the client to which half of the others can be aligned at the least cost.

    A client that has nothing in common with the others, whatever its weights, is never chosen
    while most of the others have.

    Parameters
    ----------
    clients : sequence of Client
        Of the fused architecture, widths included.
    matching : Matching
        How channels are matched.

    Returns
    -------
    int
        Its number; every client is aligned to every other one.
    """
    costs = torch.full((len(clients), len(clients)), torch.nan)
    for n, reference in enumerate(clients):
        state = reference.state()
        for k, client in enumerate(clients):
            if k != n:
                found = align_by_weights(state, client.state(), client.correspondence, matching)
                costs[n, k] = fmean(found.costs.values()) if found.costs else 0.0
    return int(costs.nanmedian(1).values.argmin()) if len(clients) > 1 else 0


def refine_as_barycentre(
    clients: Sequence[Client],
    alignments: Sequence[Alignment],
    reference: Mapping[str, Tensor],
    matching: Matching,
) -> list[Alignment]:
    """Re-align every client to the mean of the others until no channel moves.

    No client is the reference of all others any more.

    Parameters
    ----------
    clients : sequence of Client
        At least two.
    alignments : sequence of Alignment
        Their alignments to one common reference.
    reference : mapping of str to Tensor
        State dict in the fused network's channels.
    matching : Matching
        How channels are matched.

    Returns
    -------
    list of Alignment
        The refined alignments.
    """
    refined = list(alignments)
    mean = RunningMean(reference)
    for client, alignment in zip(clients, refined, strict=True):
        client.join(mean, alignment.maps)
    for _ in range(_MAX_PASSES):
        moved = False
        for k, client in enumerate(clients):
            state, maps = client.state(), refined[k].maps
            client.join(mean, maps, -1, state)
            others = mean.mean(uncovered=reference)
            refined[k] = align_by_weights(others, state, client.correspondence, matching, maps)
            client.join(mean, refined[k].maps, 1, state)
            moved = moved or any(refined[k].maps[name] is not maps[name] for name in maps)
        if not moved:
            break
    return refined
