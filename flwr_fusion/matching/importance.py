"""Choosing channel maps by importance, for Neuron Transplantation.

The fused network keeps the most important channels of all clients and drops the others; hidden
channels of different clients are not averaged and do not read each other. The network that would
hold all clients side by side is never built: channels are scored first, then one pass copies the
chosen slices.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from flwr_fusion.errors import FusionError, check_number, check_option
from flwr_fusion.fusion import Client
from flwr_fusion.graph.groups import ChannelGroup
from flwr_fusion.maps import ChannelMap, Segment, Selection
from flwr_fusion.matching.costs import channel_rows, matched_tensors, segments_of
from flwr_fusion.precision import widened

IMPORTANCES = ("l1", "l2")
SCHEMES = ("joint", "iterative", "recursive")
ORDERS = ("merge-then-prune", "prune-then-merge")
# Estimated distances scatter by sqrt(2 / projections) = 13 %: unrelated channels stay unrelated.
_PROJECTIONS = 128
# Larger groups are compared in full only if there are duplicates in samples of this size.
_SAMPLE = 1024
# Nearer than the limit by this factor of it, in case the estimate of the distance is too large.
_SURELY = 1.5
# Distances between so many channels and all others are held at a time.
_POINTS = 512

# The mean over all channels of a group scatters little: unrelated networks stay near 1.
_COMMON_START = 0.8
# Of the mean squared length of a signature: closer ones are equal.
_ROUNDING = 1e-9

Importance = Callable[[nn.Module, ChannelGroup], Tensor]


@dataclass(frozen=True)
class Transplantation:
    """Which channels a transplantation keeps.

    Parameters
    ----------
    importance : {"l1", "l2"} or callable
        Score of a channel: the sum of absolute values or of squares of all its weights, incoming
        and outgoing, biases and norm scales included; or ``importance(model, group)``, which
        returns one score per channel of a `ChannelGroup`.
    weighted : bool
        Multiply a client's scores by its weight.
    scheme : {"joint", "iterative", "recursive"}
        All networks at once, one after the other, or in pairs.
    order : {"merge-then-prune", "prune-then-merge"}
        Clients compete for all places, or each client gets an equal number of them.
    duplicates : float
        Channels of different clients that differ by less than this share of the spread of all
        channels are duplicates: they take one place, and their weights are averaged. 0: never.
    donated : float, optional
        Share of the places for channels of all clients but the heaviest (partial transplantation).
        Default: no limit.
    """

    importance: Literal["l1", "l2"] | Importance = "l2"
    weighted: bool = False
    scheme: Literal["joint", "iterative", "recursive"] = "joint"
    order: Literal["merge-then-prune", "prune-then-merge"] = "merge-then-prune"
    duplicates: float = 0.25
    donated: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.importance) and self.importance not in IMPORTANCES:
            raise FusionError(
                f"importance must be one of {IMPORTANCES} or a function, not {self.importance!r}"
            )
        check_option("scheme", self.scheme, SCHEMES)
        check_option("order", self.order, ORDERS)
        check_number("duplicates", self.duplicates, 0, 1)
        if self.donated is not None:
            check_number("donated", self.donated, 0, 1)


@dataclass(frozen=True)
class Pool:
    """The distinct channels of all clients in one group.

    Parameters
    ----------
    size : int
        Number of distinct channels.
    members : list of Tensor
        For each client, shape (client channels,): which distinct channel each of its channels is.
    """

    size: int
    members: list[Tensor]


def choose_channels(
    clients: Sequence[Client], transplantation: Transplantation
) -> list[dict[str, ChannelMap]]:
    """Choose which channels of which clients the fused network keeps.

    References
    ----------
    Öz et al., "Model Fusion via Neuron Transplantation", 2024, section 3. The guard against
    duplicates is not in the paper, which leaves redundancy as an open question.
    """
    states = [client.state() for client in clients]
    pools = pool_channels(clients, states, transplantation.duplicates)
    maps: list[dict[str, ChannelMap]] = [{} for _ in clients]
    for group in clients[0].correspondence.free_groups:
        pool = pools[group.name]
        scores = [
            _scores(client, state, group.name, transplantation)
            for client, state in zip(clients, states, strict=True)
        ]
        kept = _kept(scores, pool, group.fused_size, transplantation)
        for client_maps, members in zip(maps, pool.members, strict=True):
            client_maps[group.name] = _selection(kept, members, group.fused_size)
    return maps


def _selection(kept: Tensor, members: Tensor, fused_size: int) -> Selection:
    """Return the map that puts a client's kept channels at the places of their pool channels."""
    channel_of = torch.full((int(max(kept.max(), members.max())) + 1,), -1)
    channel_of[members] = torch.arange(len(members))
    index = torch.full((fused_size,), -1)
    index[: len(kept)] = channel_of[kept]
    return Selection(index, len(members))


def _kept(
    scores: Sequence[Tensor], pool: Pool, places: int, transplantation: Transplantation
) -> Tensor:
    """Return the pool channels that are kept, in the pool's order."""
    total = torch.zeros(pool.size, dtype=torch.float64)
    for score, members in zip(scores, pool.members, strict=True):
        total.index_add_(0, members, score)
    if transplantation.donated is not None:
        donated = round(places * transplantation.donated)
        heaviest = torch.zeros(pool.size, dtype=torch.bool)
        heaviest[pool.members[0]] = True
        chosen = [_best(total, heaviest, places - donated), _best(total, ~heaviest, donated)]
    elif transplantation.order == "prune-then-merge":
        chosen = []
        free = torch.ones(pool.size, dtype=torch.bool)
        for n, members in enumerate(pool.members):
            count = places * (n + 1) // len(scores) - places * n // len(scores)
            candidates = torch.zeros(pool.size, dtype=torch.bool)
            candidates[members] = True
            chosen.append(_best(total, candidates & free, count))
            free[chosen[-1]] = False
    else:
        chosen = [_best(total, torch.ones(pool.size, dtype=torch.bool), places)]
    kept = torch.cat(chosen)
    # Places that a quota left empty go to the most important channels that remain.
    rest = torch.ones(pool.size, dtype=torch.bool)
    rest[kept] = False
    kept = torch.cat([kept, _best(total, rest, places - len(kept))])
    return kept.sort().values


def _best(total: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Return the highest-scored candidates; the first of equals."""
    indices = torch.nonzero(candidates).flatten()
    order = torch.argsort(total[indices], descending=True, stable=True)
    return indices[order[: max(count, 0)]]


def _scores(
    client: Client,
    state: Mapping[str, Tensor],
    group: str,
    transplantation: Transplantation,
) -> Tensor:
    """Return the importance of each of a client's channels of a group, in double precision."""
    factor = client.weight if transplantation.weighted else 1.0
    if callable(transplantation.importance):
        return _given_scores(transplantation.importance, client, group).cpu().double() * factor
    power = 1 if transplantation.importance == "l1" else 2
    total: Tensor | None = None
    for name, segments_of_axes in client.correspondence.segments.items():
        if not state[name].is_floating_point() or name.endswith(("running_mean", "running_var")):
            continue
        # What writes no free channels, the output layer above all, is averaged.
        averaged = not any(s.writes for segments in segments_of_axes.values() for s in segments)
        share = client.weight**power if averaged else 1.0
        for axis, segment in segments_of(group, name, client.correspondence):
            rows = channel_rows(state[name], axis, segment.client_positions)
            # sum |w|^p over all weights of a channel; what is averaged counts with its share.
            norms = widened(torch.linalg.vector_norm(rows, ord=power, dim=1)) ** power * share
            total = norms if total is None else total + norms
    if total is None:
        raise FusionError(f"no weights tell the channels of group '{group}' apart")
    return total.cpu().double() * factor


def _given_scores(importance: Importance, client: Client, name: str) -> Tensor:
    """Return what a user's importance says of each of a client's channels of a group."""
    group = next(g for g in client.correspondence.client.groups if g.name == name)
    try:
        scores = torch.as_tensor(importance(client.model(), group))
    except Exception as error:
        raise FusionError(f"importance failed: {type(error).__name__}: {error}") from error
    if scores.shape != (group.size,) or not bool(torch.isfinite(scores).all()):
        raise FusionError(f"importance must return {group.size} finite scores for group '{name}'")
    return scores


def pool_channels(
    clients: Sequence[Client], states: Sequence[Mapping[str, Tensor]], duplicates: float
) -> dict[str, Pool]:
    """Find the distinct channels of all clients in every group.

    Two channels are compared by random projections of their incoming weights (Johnson &
    Lindenstrauss), in forward order, so that channels which read duplicates can be duplicates
    themselves. The spread is twice their mean squared distance from the mean channel, what
    unrelated channels differ by. Mutual nearest neighbours that differ by less than ``duplicates``
    times the spread are one channel. If the channels of equal index are closer than unrelated ones
    on average, the networks have a common start and those of equal index are one. Of groups of more
    than 1,024 channels samples of that size are compared first: where these share none, less than
    a few percent of the channels are duplicates, and all count as distinct.

    Parameters
    ----------
    clients : sequence of Client
        The clients.
    states : sequence of mapping of str to Tensor
        Their state dicts.
    duplicates : float
        The limit; at 0 every channel is distinct.

    Returns
    -------
    dict of str to Pool
        For each free group.
    """
    pools: dict[str, Pool] = {}
    for group in clients[0].correspondence.free_groups:
        sizes = [_client_size(client, group.name) for client in clients]

        def signatures(samples: Sequence[Tensor], name: str = group.name) -> list[Tensor]:
            return [
                _signatures(name, n, client, states[n], pools, samples[n])
                for n, client in enumerate(clients)
            ]

        if duplicates and _may_have_duplicates(signatures, sizes, duplicates):
            pool = _pool(signatures([torch.arange(size) for size in sizes]), duplicates)
        else:
            pool = _all_distinct(sizes)
        pools[group.name] = pool
    return pools


def _may_have_duplicates(
    signatures: Callable[[Sequence[Tensor]], list[Tensor]], sizes: Sequence[int], duplicates: float
) -> bool:
    """Whether samples of the clients' channels have duplicates; small groups always may."""
    if max(sizes) <= _SAMPLE:
        return True
    # For equal sizes the same channels: networks with a common start have those in common.
    generators = [torch.Generator().manual_seed(0) for _ in sizes]
    samples = [
        torch.randperm(size, generator=generator)[:_SAMPLE]
        for size, generator in zip(sizes, generators, strict=True)
    ]
    pool = _pool(signatures(samples), _SURELY * duplicates)
    return pool.size < sum(len(sample) for sample in samples)


def _all_distinct(sizes: Sequence[int]) -> Pool:
    offsets = [sum(sizes[:n]) for n in range(len(sizes))]
    members = [torch.arange(s) + o for s, o in zip(sizes, offsets, strict=True)]
    return Pool(sum(sizes), members)


def _client_size(client: Client, group: str) -> int:
    return next(g.client_size for g in client.correspondence.free_groups if g.name == group)


def _pool(signatures: Sequence[Tensor], duplicates: float) -> Pool:
    """Join mutual nearest neighbours of different clients, one client after the other."""
    count = sum(len(rows) for rows in signatures)
    sums = [rows.sum(0, dtype=torch.float64) for rows in signatures]
    mean = torch.stack(sums).sum(0) / count
    squares = sum(float(rows.norm()) ** 2 for rows in signatures) / count
    # Twice the mean squared distance from the mean: E|x - y|^2 of unrelated x and y.
    spread = 2 * (squares - float(mean.square().sum()))
    rounding = _ROUNDING * squares
    distinct = signatures[0]
    members = [torch.arange(len(distinct))]
    for rows in signatures[1:]:
        nearest, back = _nearest(rows, distinct)
        smallest = (rows - distinct[nearest]).square().sum(1)
        index = torch.arange(len(rows))
        if len(rows) == len(signatures[0]):
            # Of equally near ones, such as all-zero channels, that of the same index.
            tied = (rows - signatures[0]).square().sum(1) <= smallest + rounding
            nearest[tied] = back[index[tied]] = index[tied]
        if _common_start(rows, signatures[0], spread, smallest):
            members.append(index)
            continue
        # A layer of one channel, or of equal ones, has no spread.
        same = (back[nearest] == index) & (smallest <= max(duplicates * spread, rounding))
        new = torch.cumsum(~same, 0) - 1 + len(distinct)
        members.append(torch.where(same, nearest, new))
        distinct = torch.cat([distinct, rows[~same]])
    return Pool(len(distinct), members)


def _common_start(rows: Tensor, first: Tensor, spread: float, smallest: Tensor) -> bool:
    """Whether two networks have channels of equal index in common.

    They are closer than unrelated ones on average, and no other channels are much closer still, as
    they are in a permuted copy.
    """
    if len(rows) != len(first):
        return False
    distance = float((rows - first).square().sum(1).mean())
    return distance < _COMMON_START * spread and distance <= 2 * float(smallest.mean()) + 1e-30


def _nearest(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest of the others to each point, and of the points to each other one."""
    norms, point_norms = others.square().sum(1), points.square().sum(1)
    nearest: list[Tensor] = []
    back = torch.zeros(len(others), dtype=torch.long)
    least = torch.full((len(others),), torch.inf).to(points)
    for start in range(0, len(points), _POINTS):
        # Without the points' own norms, which do not matter for what is nearest to them.
        block = torch.addmm(norms, points[start : start + _POINTS], others.T, alpha=-2)
        nearest.append(block.min(1).indices)
        found = block.add_(point_norms[start : start + _POINTS, None]).min(0)
        closer = found.values < least
        back[closer] = found.indices[closer] + start
        least = torch.minimum(least, found.values)
    return torch.cat(nearest), back


def _signatures(
    group: str,
    n: int,
    client: Client,
    state: Mapping[str, Tensor],
    pools: Mapping[str, Pool],
    channels: Tensor,
) -> Tensor:
    """Return random projections of some channels' incoming weights: (channels, projections)."""
    incoming = [
        (name, axis, segment)
        for name in matched_tensors(client.correspondence, state)
        for axis, segment in segments_of(group, name, client.correspondence)
        if segment.writes
    ]
    known = [(n_, a, s) for n_, a, s in incoming if _is_pooled(client, n_, a, pools)]
    total: Tensor | None = None
    for name, axis, segment in known or incoming:
        # What the group itself or a later one writes cannot be compared yet.
        comparable = _without_unknown(state[name], name, axis, client, pools)
        rows = channel_rows(comparable, axis, segment.client_positions[channels])
        projection = _projection(name, axis, segment.client_positions, comparable, n, client, pools)
        projected = rows @ projection.to(rows)
        total = projected if total is None else total + projected
    if total is None:
        raise FusionError(f"no weights write the channels of group '{group}'")
    return total.float().cpu()


def _other_segments(client: Client, name: str, axis: int) -> list[tuple[int, Segment]]:
    """Return the groups along the other axes of a tensor."""
    segments = client.correspondence.segments[name]
    return [(other, s) for other in segments if other != axis for s in segments[other]]


def _is_pooled(client: Client, name: str, axis: int, pools: Mapping[str, Pool]) -> bool:
    return all(s.group in pools for _, s in _other_segments(client, name, axis))


def _without_unknown(
    tensor: Tensor, name: str, axis: int, client: Client, pools: Mapping[str, Pool]
) -> Tensor:
    """Return a tensor with zeros where it reads groups that are not pooled yet."""
    for other, segment in _other_segments(client, name, axis):
        if segment.group not in pools:
            positions = segment.client_positions.flatten().to(tensor.device)
            tensor = tensor.index_fill(other, positions, 0.0)
    return tensor


def _projection(
    name: str,
    axis: int,
    positions: Tensor,
    tensor: Tensor,
    n: int,
    client: Client,
    pools: Mapping[str, Pool],
) -> Tensor:
    """Return the random directions of one tensor for one client, shape (values, projections).

    They are drawn in the pool's channels, so that the same input channel of two clients gets the
    same direction and distinct ones get independent directions.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    indices = [
        _pool_positions(client.correspondence.segments[name].get(other, []), length, n, pools)
        for other, length in enumerate(tensor.shape)
        if other != axis
    ]
    drawn = [positions.shape[1], *(length for _, length in indices), _PROJECTIONS]
    directions = torch.randn(drawn, generator=generator)
    for dimension, (index, _) in enumerate(indices, start=1):
        directions = directions.index_select(dimension, index)
    return directions.reshape(-1, _PROJECTIONS)


def _pool_positions(
    segments: Sequence[Segment], length: int, n: int, pools: Mapping[str, Pool]
) -> tuple[Tensor, int]:
    """Return where each position of a client's axis stands among the pool's, and their number."""
    index = torch.full((length,), -1)
    total = 0
    for segment in segments:
        if segment.group not in pools:
            continue
        pool, block = pools[segment.group], segment.client_positions.shape[1]
        blocks = pool.members[n].unsqueeze(1) * block + torch.arange(block)
        index[segment.client_positions] = total + blocks
        total += pool.size * block
    rest = index < 0
    index[rest] = total + torch.arange(int(rest.sum()))
    return index, total + int(rest.sum())
