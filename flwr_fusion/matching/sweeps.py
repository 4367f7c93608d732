"""Sweeps over the channel groups: from ground costs to the maps of a whole network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flwr_fusion.errors import FusionError
from flwr_fusion.maps import ChannelMap, Correspondence, GroupPair, Plan, Selection, map_tensor
from flwr_fusion.matching.assignment import Exact
from flwr_fusion.matching.certificate import IdentityCertificate
from flwr_fusion.matching.costs import channel_norms, matched_tensors, segments_of
from flwr_fusion.matching.kept_costs import KeptCosts
from flwr_fusion.matching.matching import Matching
from flwr_fusion.matching.solver import Solver, solve, solver_of
from flwr_fusion.precision import numbers

_MAX_SWEEPS = 100
# A move must pay by more than the rounding of the cost, so that ties keep channels in place.
_LEAST_GAIN = 1e-6
TOLERANCE = 3e-4
"""Sweeps end when one saves less than this share of the matched channels' cost.

Networks end about a thousandth farther apart at most than by sweeps until nothing moves.
"""


@dataclass(frozen=True)
class Alignment:
    """The maps of one client, and what they cost.

    Parameters
    ----------
    maps : dict of str to ChannelMap
        A map for every free group.
    costs : dict of str to float
        Per group the cost of its matched channels relative to that of all pairs: 0 for identical
        channels, 1 for unrelated ones.
    gain : float
        What a joint sweep has saved, relative to the cost that is left.
    """

    maps: dict[str, ChannelMap]
    costs: dict[str, float]
    gain: float = 0.0

    @property
    def is_identity(self) -> bool:
        """Whether no channel moves."""
        return all(channel_map.is_identity for channel_map in self.maps.values())


def align_by_weights(
    reference: Mapping[str, Tensor],
    client: Mapping[str, Tensor],
    correspondence: Correspondence,
    matching: Matching,
    start: Mapping[str, ChannelMap] | None = None,
    activations: Mapping[str, Tensor] | None = None,
    certificate: IdentityCertificate | None = None,
) -> Alignment:
    """Choose the maps that bring a client's weights (and activations) closest to a reference's.

    Parameters
    ----------
    reference : mapping of str to Tensor
        State dict in the fused network's channels.
    client : mapping of str to Tensor
        State dict of the client.
    correspondence : Correspondence
        Positions in both networks.
    matching : Matching
        Sweep, solver and masses.
    start : mapping of str to ChannelMap, optional
        Maps to start the joint sweep from. Default: the identity, or a forward pass if it comes
        closer to the reference.
    activations : mapping of str to Tensor, optional
        From `flwr_fusion.matching.costs.activation_costs`: added to the cost by weights, on
        average over all pairs equally large.
    certificate : IdentityCertificate, optional
        Of the reference, where several clients are aligned to it: what it has found out for one
        serves all. Default: a new one.

    Returns
    -------
    Alignment
        A map for every free group and what it costs.
    """
    aligner = _WeightAligner(reference, client, correspondence, matching, activations or {})
    if start is not None:
        return aligner.joint(start, waiting=set(start))
    if matching.sweep == "greedy":
        return aligner.forward_pass(incoming_only=True)[0]
    settled = aligner.identity(certificate or IdentityCertificate(reference))
    if settled is not None:
        return settled
    first, unsettled = aligner.forward_pass(incoming_only=False)
    if not unsettled:
        return first
    # Starting from the closest, the descent ends no farther than the identity.
    closest = min(correspondence.identity(), first.maps, key=aligner.distance)
    return aligner.joint(closest, waiting=set(closest))


def align_by_activations(
    reference: Mapping[str, Tensor],
    client: Mapping[str, Tensor],
    correspondence: Correspondence,
    matching: Matching,
    activations: Mapping[str, Tensor],
) -> Alignment:
    """Choose the map of every group from its own ground cost.

    Groups without activations of their own, the inside of recurrent layers and of attention, are
    then matched by their weights.

    Parameters
    ----------
    reference, client, correspondence, matching
        As for `align_by_weights`.
    activations : mapping of str to Tensor
        From `flwr_fusion.matching.costs.activation_costs`.

    Returns
    -------
    Alignment
        A map for every free group and what it costs.
    """
    solver = solver_of(matching.solver)
    known = {name: _solved(name, cost, solver) for name, cost in activations.items()}
    costs = {name: _relative_cost(cost, known[name]) for name, cost in activations.items()}
    aligner = _WeightAligner(reference, client, correspondence, matching, {})
    rest, _ = aligner.forward_pass(incoming_only=False, known=known)
    return Alignment(rest.maps, rest.costs | costs)


class _WeightAligner:
    """Alignment of one client to one reference."""

    def __init__(
        self,
        reference: Mapping[str, Tensor],
        client: Mapping[str, Tensor],
        correspondence: Correspondence,
        matching: Matching,
        activations: Mapping[str, Tensor],
    ) -> None:
        self.reference = reference
        self.client = client
        self.correspondence = correspondence
        self.matching = matching
        self.solver = solver_of(matching.solver)
        names = matched_tensors(correspondence, reference)
        ours, theirs = (_norms([state[name] for name in names]) for state in (reference, client))
        self.norms = dict(zip(names, zip(ours, theirs, strict=True), strict=True))
        self.reads: dict[str, dict[str, set[str]]] = {
            group.name: _groups_needed(group.name, reference, correspondence)
            for group in correspondence.free_groups
        }
        self.costs = KeptCosts(reference, client, correspondence, self.norms, self.reads)
        # On average over all pairs as much as the weights: each normalised tensor differs by 2.
        self.activations = {
            name: cost * 2 * len(self.reads[name]) / max(float(cost.mean()), 1e-30) / len(cost)
            for name, cost in activations.items()
        }

    def identity(self, certificate: IdentityCertificate) -> Alignment | None:
        """Return the identity where it is proved that no group does better, else None."""
        exact = isinstance(self.solver, Exact) and self.matching.masses == "uniform"
        if self.activations or not exact:
            return None
        costs = certificate.costs(self.client, self.correspondence, self.norms, self.reads)
        return None if costs is None else Alignment(self.correspondence.identity(), costs)

    def forward_pass(
        self, incoming_only: bool, known: Mapping[str, ChannelMap] | None = None
    ) -> tuple[Alignment, set[str]]:
        """Match the groups in forward order by the weights whose other axes are matched already.

        Parameters
        ----------
        incoming_only : bool
            Whether to leave out weights that read the group.
        known : mapping of str to ChannelMap, optional
            Groups that are matched already.

        Returns
        -------
        tuple of (Alignment, set of str)
            The maps, and the groups that were matched without all of their weights.
        """
        maps: dict[str, ChannelMap] = dict(known or {})
        costs: dict[str, float] = {}
        unsettled: set[str] = set()
        for group in self.correspondence.free_groups:
            if known and group.name in known:
                continue
            reads = self.reads[group.name]
            comparable = [
                tensor
                for tensor, needed in reads.items()
                if needed <= maps.keys() and (self._writes(tensor, group.name) or not incoming_only)
            ]
            maps[group.name] = Selection.identity(group.fused_size, group.client_size)
            if comparable:
                cost = self._cost(group, maps, comparable)
                maps[group.name] = self._solve(cost, group)
                costs[group.name] = _relative_cost(cost, maps[group.name])
            if len(comparable) < len(reads):
                unsettled.add(group.name)
        return Alignment(maps, costs), unsettled

    def joint(
        self,
        start: Mapping[str, ChannelMap],
        waiting: set[str],
    ) -> Alignment:
        """Re-match every waiting group given the others until a sweep gains next to nothing."""
        maps = dict(start)
        costs: dict[str, float] = {}
        remaining: dict[str, float] = {}
        left = total = 0.0
        for _ in range(_MAX_SWEEPS):
            gained = 0.0
            for group in self.correspondence.free_groups:
                if group.name not in waiting:
                    continue
                waiting.discard(group.name)
                cost = self._cost(group, maps, self.reads[group.name])
                chosen, gain = self._improved(cost, group, maps)
                costs[group.name] = _relative_cost(cost, chosen)
                remaining[group.name] = _mean_cost(cost, chosen) * group.client_size
                if chosen is not maps[group.name]:
                    maps[group.name] = chosen
                    waiting |= set().union(*self.reads[group.name].values()) - {group.name}
                    gained += gain * group.client_size
            total += gained
            left = sum(remaining.values())
            if not waiting or gained < TOLERANCE * left:
                break
        return Alignment(maps, costs, total / max(left, 1e-30))

    def distance(self, maps: Mapping[str, ChannelMap]) -> float:
        """Return the squared distance of reference and mapped client, all tensors normalised.

        With activations, plus the relative costs of the matched channels: what the sweep lowers.
        """
        squares = []
        for name, (norm, client_norm) in self.norms.items():
            # sum over tensors of |A / |A| - merge B unmerge / |B||^2.
            mapped = map_tensor(self.client[name], name, self.correspondence, maps)
            ours = self.reference[name].detach().float() / norm
            difference = ours.sub_(mapped.detach().float(), alpha=1 / client_norm)
            squares.append(torch.linalg.vector_norm(difference).square())
        return sum(numbers(squares)) + sum(
            _mean_cost(cost, maps[name]) * len(cost) for name, cost in self.activations.items()
        )

    def _improved(
        self, cost: Tensor, group: GroupPair, maps: Mapping[str, ChannelMap]
    ) -> tuple[ChannelMap, float]:
        """Return a cheaper map of one group, or its present one if that is as good, and the gain.

        The gain is the mean cost that each matched channel saves.
        """
        candidate, present = self._solve(cost, group), maps[group.name]
        # Coordinate descent (Ainsworth et al. 2023, algorithm 1): given the other groups, the cost
        # is linear in this group's map, so the optimum of its transport problem is the best step.
        gain = _mean_cost(cost, present) - _mean_cost(cost, candidate)
        if isinstance(candidate, Plan) and not isinstance(present, Plan):
            # A plan spreads channels, so it may cost more than the selection that it follows.
            return candidate, abs(gain)
        if gain <= _LEAST_GAIN * float(cost.mean()):
            return present, 0.0
        # Where a tensor is written and read by the group itself, the cost is only linearised.
        coupled = any(group.name in needed for needed in self.reads[group.name].values())
        if coupled and self.distance({**maps, group.name: candidate}) >= self.distance(maps):
            return present, 0.0
        return candidate, gain

    def _solve(self, cost: Tensor, group: GroupPair) -> ChannelMap:
        if self.matching.masses == "uniform":
            return _solved(group.name, cost, self.solver)
        norms = (
            channel_norms(group.name, self.reference, self.correspondence, fused=True),
            channel_norms(group.name, self.client, self.correspondence, fused=False),
        )
        # Channels that nothing writes are equally important.
        masses = (n if bool(n.any()) else torch.ones_like(n) for n in norms)
        return _solved(group.name, cost, self.solver, *masses)

    def _cost(
        self, group: GroupPair, maps: Mapping[str, ChannelMap], tensors: Iterable[str]
    ) -> Tensor:
        """Return a group's ground cost, on the CPU: where it is solved, and compared with maps."""
        cost = self.costs.cost(group.name, maps, tensors).cpu()
        if group.name in self.activations:
            cost += self.activations[group.name].to(cost)
        return cost

    def _writes(self, tensor: str, group: str) -> bool:
        return any(s.writes for _, s in segments_of(group, tensor, self.correspondence))


def _groups_needed(
    group: str, state: Mapping[str, Tensor], correspondence: Correspondence
) -> dict[str, set[str]]:
    """Return for each tensor of a group which groups its other axes carry."""
    needed: dict[str, set[str]] = {}
    for tensor in matched_tensors(correspondence, state):
        for axis, _ in segments_of(group, tensor, correspondence):
            others = (
                segment.group
                for other, segments in correspondence.segments[tensor].items()
                for segment in segments
                if other != axis
            )
            needed.setdefault(tensor, set()).update(others)
    return needed


def _solved(name: str, cost: Tensor, solver: Solver, *masses: Tensor) -> ChannelMap:
    try:
        return solve(cost, solver, *masses)
    except FusionError as error:
        raise FusionError(f"group '{name}': {error}") from error


def _norms(tensors: Iterable[Tensor]) -> list[float]:
    # Not smaller: their squares must not vanish in single precision.
    return [max(norm, 1e-15) for norm in numbers(t.detach().float().norm() for t in tensors)]


def _relative_cost(cost: Tensor, channel_map: ChannelMap) -> float:
    """Return the matched channels' cost over that of all pairs: 0 identical, 1 unrelated."""
    return _mean_cost(cost, channel_map) / max(float(cost.mean()), 1e-30)


def _mean_cost(cost: Tensor, channel_map: ChannelMap) -> float:
    """Return the mean ground cost per matched channel or unit of mass."""
    if isinstance(channel_map, Plan):
        mass = channel_map.mass.to(cost)
        return float((mass * cost).sum() / mass.sum())
    rows = torch.nonzero(channel_map.index >= 0).flatten()
    return float(cost[rows, channel_map.index[rows]].double().mean())
