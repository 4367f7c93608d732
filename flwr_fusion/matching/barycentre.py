"""Refining the alignment of many clients to one reference as a barycentre."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from flwr_fusion.fusion import Client
from flwr_fusion.matching.matching import Matching
from flwr_fusion.matching.sweeps import TOLERANCE, Alignment, align_by_weights
from flwr_fusion.progress import tracked
from flwr_fusion.rules.mean import RunningMean


def refine_as_barycentre(
    clients: Sequence[Client],
    alignments: Sequence[Alignment],
    reference: Mapping[str, Tensor],
    matching: Matching,
) -> list[Alignment]:
    """Re-align every client to the mean of the others, until a pass gains next to nothing.

    No client is the reference of all others any more.
    """
    refined = list(alignments)
    factors = clients[0].correspondence.factors
    mean = RunningMean({n: t for n, t in reference.items() if n not in factors})
    for client, alignment in zip(clients, refined, strict=True):
        mean.add(client, alignment.maps)
    for n in range(matching.passes):
        gain = 0.0
        what = f"matching clients to each other, pass {n + 1}"
        for k, client in enumerate(tracked(clients, what)):
            state, maps = client.state(), refined[k].maps
            # The mean of the others: sum_l w_l M_l(W_l) - w_k M_k(W_k), over their weight.
            mean.add(client, maps, sign=-1, state=state)
            others = mean.mean(uncovered=reference)
            refined[k] = align_by_weights(others, state, client.correspondence, matching, maps)
            mean.add(client, refined[k].maps, state=state)
            gain += refined[k].gain
        if gain <= TOLERANCE * len(clients):
            break
    return refined
