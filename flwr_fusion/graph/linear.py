"""Linear groups: which may bear any invertible matrix, as what two factors share does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flwr_fusion.networks import owner_of, tied_tensors

if TYPE_CHECKING:
    from flwr_fusion.graph.groups import ChannelGraph, ChannelGroup

# Products of so many channels are no low-rank ones.
_LARGEST_RANK = 512


def invertible(size: int, generator: torch.Generator) -> Tensor:
    """Return a random matrix with singular values from 1/2 to 2, which no scale or sign is."""
    left, right = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    values = torch.exp2(2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1)
    matrix: Tensor = -(left * values) @ right
    return matrix


def linear_candidates(graph: ChannelGraph) -> list[ChannelGroup]:
    """Return the groups that may be linear, no two with a common tensor, the first ones first.

    One layer writes them or one reads them, so that every product of a reader and a writer is in
    the network. Every other free group keeps a weight that writes it and is no factor: by these its
    channels are matched. And they are fewer than the rows and the columns of the product, or, at
    any number, beside a weight that reads what they read and writes what they write, as adapters
    are: elsewhere the mean of the factors, which is FedAvg's, is all that a product could keep.
    """
    tied = tied_tensors(graph.model)
    weights = {
        g.name: {p.tensor for p in g.places if p.writes and len(graph.shapes[p.tensor]) > 1}
        for g in graph.groups
    }
    fixed = {group.name for group in graph.groups if group.fixed}
    ends = _ends(graph)
    taken: set[str] = set()
    chosen = []
    for group in graph.groups:
        tensors = {place.tensor for place in group.places}
        apart = len(tensors) == len(group.places) and not tensors & (taken | tied)
        possible = group.linear and not group.fixed and group.size <= _LARGEST_RANK
        if not possible or not apart or not _is_one_product(group, graph.shapes):
            continue
        alone = {
            name
            for name, own in weights.items()
            if name != group.name and own & tensors and not own - taken - tensors
        }
        if alone <= fixed and (_is_adapter(group, ends) or _is_bottleneck(group, graph.shapes)):
            chosen.append(group)
            taken |= tensors
            del weights[group.name]
    return chosen


def _ends(graph: ChannelGraph) -> dict[str, tuple[set[str], set[str]]]:
    """Return for every tensor the groups that it reads and those that it writes.

    The network's inputs are one, however many layers read them.
    """
    ends: dict[str, tuple[set[str], set[str]]] = {}
    for group in graph.groups:
        name = group.fixed_because if group.name.startswith("input of ") else group.name
        for place in group.places:
            ends.setdefault(place.tensor, (set(), set()))[place.writes].add(name)
    return ends


def _is_adapter(group: ChannelGroup, ends: Mapping[str, tuple[set[str], set[str]]]) -> bool:
    """Whether a weight leads from what the group is written from to what it is read into."""
    own = {place.tensor for place in group.places}
    inputs = set().union(*(ends[p.tensor][False] for p in group.places if p.writes))
    outputs = set().union(*(ends[p.tensor][True] for p in group.places if not p.writes))
    return any(
        reads & inputs and writes & outputs
        for tensor, (reads, writes) in ends.items()
        if tensor not in own
    )


def _is_one_product(group: ChannelGroup, shapes: Mapping[str, torch.Size]) -> bool:
    """Whether the group fills its axes, and every reader reads every writer."""
    if any(p.positions.numel() != shapes[p.tensor][p.axis] for p in group.places):
        return False
    owners = {(p.writes, owner_of(p.tensor)) for p in group.places}
    counts = [sum(writes is kind for writes, _ in owners) for kind in (True, False)]
    return min(counts) == 1


def _is_bottleneck(group: ChannelGroup, shapes: Mapping[str, torch.Size]) -> bool:
    sizes = {True: 0, False: 0}
    for place in group.places:
        sizes[place.writes] += shapes[place.tensor].numel() // group.size
    return group.size < min(sizes.values())
