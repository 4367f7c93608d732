"""Refining the alignment of many clients to one reference as a barycentre."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from flwr_fusion.combine import RunningMean
from flwr_fusion.maps import Correspondence
from flwr_fusion.matching.align import Alignment, Matching, align_by_weights

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
    """

    state: Callable[[], Mapping[str, Tensor]]
    weight: float
    correspondence: Correspondence


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
        mean.add(client.state(), client.weight, client.correspondence, alignment.maps)
    for _ in range(_MAX_PASSES):
        moved = False
        for k, client in enumerate(clients):
            state, maps = client.state(), refined[k].maps
            mean.add(state, -client.weight, client.correspondence, maps)
            others = mean.mean(uncovered=reference)
            refined[k] = align_by_weights(others, state, client.correspondence, matching, maps)
            mean.add(state, client.weight, client.correspondence, refined[k].maps)
            moved = moved or any(refined[k].maps[name] is not maps[name] for name in maps)
        if not moved:
            break
    return refined
