"""Channel maps: how one model's channels go into the fused model's.

A map is a choice of two matrices per client and group, ``merge`` (fused channels x client
channels) and ``unmerge`` (client channels x fused channels). With them a weight of client k
becomes ``merge_out @ W_k @ unmerge_in`` in the fused model's channels. Permutations and selections
are kept as indices; only transport plans are dense. Channels of linear groups have no map.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from flwr_fusion.errors import FusionError
from flwr_fusion.graph.groups import ChannelGraph, ChannelGroup

# Numbers of a tensor that are mapped at a time.
_BLOCK = 250_000


@dataclass(frozen=True, eq=False)
class Selection:
    """Every fused channel takes one client channel, or none.

    A permutation, a network placed in a wider one, or the channels kept of a larger one.

    Parameters
    ----------
    index : Tensor
        Shape (fused channels,), integers: the client channel at each fused channel, -1 for none.
    client_size : int
        Number of client channels.
    """

    index: Tensor
    client_size: int

    @classmethod
    def identity(cls, fused_size: int, client_size: int) -> Selection:
        """Return the map that keeps every channel where it is, as far as both sizes reach."""
        index = torch.arange(fused_size)
        return cls(torch.where(index < client_size, index, -1), client_size)

    @cached_property
    def is_identity(self) -> bool:
        """Whether nothing moves."""
        size = len(self.index)
        return size == self.client_size and bool((self.index == torch.arange(size)).all())

    @cached_property
    def is_injection(self) -> bool:
        """Whether every client channel stands at exactly one place."""
        places = torch.bincount(self.index[self.index >= 0], minlength=self.client_size)
        return bool((places == 1).all())

    @property
    def share_moved(self) -> float:
        """Share of the client's channels that do not stand at their own index."""
        kept = int((self.index == torch.arange(len(self.index))).sum())
        return 1.0 - kept / self.client_size

    def coverage(self) -> Tensor:
        """Return for each fused channel 1 if the client has a channel there, else 0."""
        return (self.index >= 0).to(torch.float32)

    def read_scale(self) -> Tensor:
        """Return for each fused channel 1 / copies of its client channel, so that sums agree."""
        copies = torch.bincount(self.index.clamp(min=0), self.coverage(), self.client_size)
        return self.coverage() / copies[self.index.clamp(min=0)].clamp(min=1)

    def merge(self) -> Tensor:
        """Return the merge matrix, shape (fused channels, client channels)."""
        matrix = torch.zeros(len(self.index), self.client_size)
        rows = torch.nonzero(self.index >= 0).flatten()
        matrix[rows, self.index[rows]] = 1.0
        return matrix

    def unmerge(self) -> Tensor:
        """Return the unmerge matrix, shape (client channels, fused channels)."""
        return self.merge().T * self.read_scale()


@dataclass(frozen=True, eq=False)
class Plan:
    """A transport plan between fused and client channels.

    Parameters
    ----------
    mass : Tensor
        Shape (fused channels, client channels), non-negative: how much of each client channel
        goes to each fused channel.
    """

    mass: Tensor

    is_identity = False

    @property
    def client_size(self) -> int:
        """Number of client channels."""
        return self.mass.shape[1]

    @property
    def share_moved(self) -> float:
        """Share of the mass that leaves its own index."""
        return float(1.0 - self.mass.diagonal().sum() / self.mass.sum())

    def coverage(self) -> Tensor:
        """Return for each fused channel its mass over the mean mass, at most 1."""
        rows = self.mass.sum(1)
        return (rows / rows.mean()).clamp(max=1.0).to(torch.float32)

    def merge(self) -> Tensor:
        """Return the row-normalised plan, shape (fused channels, client channels).

        The barycentric projection of the plan (Singh & Jaggi 2020, section 4.2).
        """
        # diag(1 / row sums) T: each fused channel is a mean of the client's.
        return self.mass / self.mass.sum(1, keepdim=True).clamp(min=1e-30)

    def unmerge(self) -> Tensor:
        """Return the column-normalised plan, shape (client channels, fused channels)."""
        return (self.mass / self.mass.sum(0, keepdim=True).clamp(min=1e-30)).T


ChannelMap = Selection | Plan
Maps = Mapping[str, ChannelMap]


@dataclass(frozen=True, eq=False)
class Segment:
    """The part of a tensor axis that carries one group, in the client and the fused model."""

    group: str
    client_positions: Tensor
    fused_positions: Tensor
    writes: bool

    @cached_property
    def is_in_order(self) -> bool:
        """Whether its channels stand in the fused network one after the other, from the first."""
        flat = self.fused_positions.flatten()
        return torch.equal(flat, torch.arange(len(flat)))


@dataclass(frozen=True, eq=False)
class GroupPair:
    """The same channel group in the fused model and in a client's."""

    name: str
    fused_size: int
    client_size: int
    fixed: bool


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear group in the fused model and in a client's: no channel of one is one of the other.

    Only the product of what reads and what writes its channels counts, so that no map brings
    channels into the fused model's: `flwr_fusion.products` fuses the products.

    Parameters
    ----------
    name : str
        The group.
    fused_size, client_size : int
        Numbers of channels.
    places : mapping of (str, int) to Segment
        By tensor and axis, where the channels stand.
    scale : float
        What the client's network multiplies the product by, over what the fused one does (LoRA's
        ``alpha / rank``).
    """

    name: str
    fused_size: int
    client_size: int
    places: Mapping[tuple[str, int], Segment]
    scale: float = 1.0

    @property
    def tensors(self) -> frozenset[str]:
        """The tensors of the product's factors."""
        return frozenset(tensor for tensor, _ in self.places)


class Correspondence:
    """Which tensor positions of a client's network correspond to which of the fused network.

    Parameters
    ----------
    fused : ChannelGraph
        Groups of the fused network.
    client : ChannelGraph
        Groups of the client's network: the same layers, of any width.
    linear : collection of str, optional
        The groups that are taken for linear in all networks of a fusion. Default: those that are
        in both.

    Raises
    ------
    FusionError
        If the networks differ in more than the widths of free groups.
    """

    def __init__(
        self, fused: ChannelGraph, client: ChannelGraph, *, linear: Collection[str] | None = None
    ) -> None:
        self.fused = fused
        self.client = client
        pairs = _matching_groups(fused, client)
        self.groups: list[GroupPair] = []
        self.linear: list[Linear] = []
        self.segments: dict[str, dict[int, list[Segment]]] = defaultdict(lambda: defaultdict(list))
        for fused_group, client_group in pairs:
            places = _paired_places(fused_group, client_group)
            name, sizes = fused_group.name, (fused_group.size, client_group.size)
            both = fused_group.linear and client_group.linear
            if both and (linear is None or name in linear):
                self.linear.append(Linear(name, *sizes, places))
                continue
            self.groups.append(GroupPair(name, *sizes, fused_group.fixed))
            if not fused_group.fixed:
                _check_resized(self.groups[-1], places)
                for (tensor, axis), segment in places.items():
                    self.segments[tensor][axis].append(segment)
        self._check_shapes()

    @property
    def free_groups(self) -> list[GroupPair]:
        """The groups whose channels may move, in forward order; linear ones are none of them."""
        return [group for group in self.groups if not group.fixed]

    @property
    def factors(self) -> frozenset[str]:
        """The tensors of linear groups."""
        return frozenset().union(*(group.tensors for group in self.linear))

    def identity(self) -> dict[str, ChannelMap]:
        """Return maps that keep every channel where it is, as far as both sizes reach."""
        return {g.name: Selection.identity(g.fused_size, g.client_size) for g in self.free_groups}

    def with_scales(self, scales: Mapping[str, float]) -> Correspondence:
        """Return the correspondence with other scales of its linear groups, by name."""
        scaled = copy(self)
        scaled.linear = [replace(g, scale=scales.get(g.name, g.scale)) for g in self.linear]
        return scaled

    def _check_shapes(self) -> None:
        if set(self.fused.shapes) != set(self.client.shapes):
            different = sorted(set(self.fused.shapes) ^ set(self.client.shapes))
            raise FusionError(f"the networks do not have the same tensors: {different[:5]}")
        for name, shape in self.fused.shapes.items():
            other = self.client.shapes[name]
            for axis in range(max(len(shape), len(other))):
                segments = list(self.segments.get(name, {}).get(axis, []))
                segments += [g.places[name, axis] for g in self.linear if (name, axis) in g.places]
                rest = _length(shape, axis) - sum(s.fused_positions.numel() for s in segments)
                theirs = _length(other, axis) - sum(s.client_positions.numel() for s in segments)
                if len(shape) != len(other) or rest != theirs:
                    raise FusionError(
                        f"tensor '{name}' has shape {tuple(other)}, the target's is "
                        f"{tuple(shape)}, and axis {axis} carries channels that cannot change in "
                        "number (inputs, outputs, the inside of attention heads, kernel sizes)"
                    )


class Unaligned(Correspondence):
    """Networks of one architecture whose channels correspond as they stand; nothing is traced."""

    def __init__(self) -> None:
        self.groups: list[GroupPair] = []
        self.linear: list[Linear] = []
        self.segments: dict[str, dict[int, list[Segment]]] = {}


def _paired_places(fused: ChannelGroup, client: ChannelGroup) -> dict[tuple[str, int], Segment]:
    """Return where the channels of a group stand in two networks, by tensor and axis."""
    theirs = {(p.tensor, p.axis): p.positions for p in client.places}
    return {
        (p.tensor, p.axis): Segment(fused.name, theirs[p.tensor, p.axis], p.positions, p.writes)
        for p in fused.places
    }


def _check_resized(group: GroupPair, places: Mapping[tuple[str, int], Segment]) -> None:
    """Refuse groups of other widths that nothing reads: the target's own channels would count."""
    if group.fused_size != group.client_size and all(s.writes for s in places.values()):
        raise FusionError(
            f"channel group '{group.name}' has {group.client_size} channels, the target's has "
            f"{group.fused_size}, and nothing reads them: they are inside of a product of weights, "
            "such as an adapter that is added to a weight"
        )


def _length(shape: torch.Size, axis: int) -> int:
    return shape[axis] if axis < len(shape) else 0


def _matching_groups(
    fused: ChannelGraph, client: ChannelGraph
) -> list[tuple[ChannelGroup, ChannelGroup]]:
    """Return the groups of two networks in pairs, refusing what does not correspond."""
    if len(fused.groups) != len(client.groups):
        raise FusionError(
            f"the network has {len(client.groups)} channel groups, the target "
            f"{len(fused.groups)}: networks of different depth are fused by cla_fusion"
        )
    pairs = list(zip(fused.groups, client.groups, strict=True))
    for fused_group, client_group in pairs:
        if fused_group.signature != client_group.signature:
            ours, theirs = ({*g.signature[-1]} for g in (fused_group, client_group))
            different = sorted({tensor for tensor, *_ in ours ^ theirs})
            raise FusionError(
                f"channel group '{client_group.name}' does not correspond to the target's group "
                f"'{fused_group.name}': it stands elsewhere, or in blocks of another size, in "
                f"{different[:4]}; layers, attention heads and the like must be of one kind"
            )
    resized = [f.name for f, c in pairs if f.size != c.size and f.normalised]
    if resized:
        warnings.warn(
            f"the number of channels of groups {resized[:5]} changes under a LayerNorm or "
            "GroupNorm, which then normalises across other channels: the fused network computes "
            "the client's function only roughly",
            stacklevel=2,
        )
    return pairs


def map_tensor(
    tensor: Tensor,
    name: str,
    correspondence: Correspondence,
    maps: Maps,
    keep_axis: int | None = None,
) -> Tensor:
    """Bring one tensor of a client into the fused network's channels.

    Parameters
    ----------
    tensor : Tensor
        The client's tensor.
    name : str
        Its key in the state dict.
    correspondence : Correspondence
        Positions in both networks.
    maps : mapping of str to ChannelMap
        A map for every free group.
    keep_axis : int, optional
        An axis that stays in the client's channels.

    Returns
    -------
    Tensor
        ``merge @ W`` along axes that write channels, ``W @ unmerge`` along axes that read them.
    """
    return row_mapping(tensor, name, correspondence, maps, keep_axis)(None)


def row_mapping(
    tensor: Tensor,
    name: str,
    correspondence: Correspondence,
    maps: Maps,
    keep_axis: int | None = None,
) -> Callable[[slice | None], Tensor]:
    """Return a function that brings some rows of a tensor, or all, into the fused channels.

    Parameters
    ----------
    tensor, name, correspondence, maps, keep_axis
        As for `map_tensor`.

    Returns
    -------
    callable
        Takes a slice of the fused tensor's first axis (None: all of it), where its maps are
        selections; what all rows have in common is found once.
    """
    mapped = correspondence.segments.get(name, {})
    # The first axis first: with few rows little is left to map.
    axes = [
        _AxisMap.of(
            tensor.shape[axis], axis, mapped[axis], correspondence.fused.shapes[name][axis], maps
        )
        for axis in sorted(mapped)
        if axis != keep_axis
    ]

    def take(rows: slice | None) -> Tensor:
        part = tensor[rows] if rows is not None and 0 not in mapped else tensor
        for axis_map in axes:
            part = axis_map.apply(part, rows if axis_map.axis == 0 else None)
        return part

    return take


def map_channels(
    values: Tensor,
    axis: int,
    layer_axis: tuple[str, int],
    correspondence: Correspondence,
    maps: Maps,
) -> Tensor:
    """Bring an axis of values per channel into the fused network's channels.

    Parameters
    ----------
    values : Tensor
        Values of the client's channels, such as moments of a layer's inputs.
    axis : int
        Their axis that carries the channels.
    layer_axis : tuple of (str, int)
        Tensor of the state dict and its axis that carries the same channels.
    correspondence : Correspondence
        Positions in both networks.
    maps : mapping of str to ChannelMap
        A map for every free group.

    Returns
    -------
    Tensor
        ``merge @ values`` along the axis: what the fused network's channels are, given the
        client's.
    """
    name, tensor_axis = layer_axis
    segments = correspondence.segments.get(name, {}).get(tensor_axis, [])
    if not segments:
        return values
    length = correspondence.fused.shapes[name][tensor_axis]
    written = [replace(segment, writes=True) for segment in segments]
    return _AxisMap.of(values.shape[axis], axis, written, length, maps).apply(values, None)


def axis_sources(
    name: str, axis: int, client_length: int, correspondence: Correspondence, maps: Maps
) -> Tensor:
    """Return for each fused position along an axis the client position it takes, -1 for none.

    Parameters
    ----------
    name : str
        Key of the tensor in the state dict.
    axis : int
        An axis that carries channels.
    client_length : int
        Length of the axis in the client's tensor.
    correspondence : Correspondence
        Positions in both networks.
    maps : mapping of str to Selection
        Maps of the groups that the axis carries.
    """
    used = [(segment, maps[segment.group]) for segment in correspondence.segments[name][axis]]
    length = correspondence.fused.shapes[name][axis]
    index, scale = _axis_index(client_length, length, used)
    return torch.where(scale > 0, index, -1)


def coverage_along(
    name: str, correspondence: Correspondence, maps: Maps
) -> tuple[int, Tensor] | None:
    """Return how much of a client each written position of a fused tensor receives.

    Returns
    -------
    tuple of (int, Tensor) or None
        The axis that writes channels and the coverage of each position along it, in [0, 1];
        None where the client covers everything.
    """
    for axis, segments in correspondence.segments.get(name, {}).items():
        if not segments[0].writes:
            continue
        coverage = torch.ones(correspondence.fused.shapes[name][axis])
        for segment in segments:
            covered = maps[segment.group].coverage().unsqueeze(1)
            coverage[segment.fused_positions] = covered.expand(segment.fused_positions.shape)
        return None if bool((coverage == 1).all()) else (axis, coverage)
    return None


def row_blocks(
    name: str, like: Tensor, correspondence: Correspondence, maps: Maps
) -> Iterator[slice | None]:
    """Yield slices of a large tensor's first axis, so that little memory is needed beside it.

    None stands for the whole tensor: small ones, and those whose rows a transport plan mixes.
    """
    segments = correspondence.segments.get(name, {}).get(0, [])
    mixed = any(isinstance(maps[segment.group], Plan) for segment in segments)
    if like.numel() <= _BLOCK or mixed or not like.is_floating_point():
        yield None
        return
    size = max(1, _BLOCK * len(like) // like.numel())
    yield from (slice(start, start + size) for start in range(0, len(like), size))


def along(vector: Tensor, axis: int, dimensions: int) -> Tensor:
    """Return a vector as a tensor of so many dimensions that extends along one axis."""
    shape = [-1 if a == axis else 1 for a in range(dimensions)]
    return vector.view(shape)


@dataclass(frozen=True)
class _AxisMap:
    """What takes the place of what along one axis of a tensor.

    ``index`` is None for the identity, ``scale`` where all factors are 1.
    """

    axis: int
    index: Tensor | None
    scale: Tensor | None
    plans: tuple[tuple[Segment, Plan], ...]

    @classmethod
    def of(
        cls, client_length: int, axis: int, segments: list[Segment], length: int, maps: Maps
    ) -> _AxisMap:
        used = [(segment, maps[segment.group]) for segment in segments]
        if all(channel_map.is_identity for _, channel_map in used):
            return cls(axis, None, None, ())
        index, scale = _axis_index(client_length, length, used)
        plans = tuple((segment, m) for segment, m in used if isinstance(m, Plan))
        factors = None if bool((scale == 1).all()) else scale
        return cls(axis, index.clamp(min=0), factors, plans)

    def apply(self, tensor: Tensor, rows: slice | None) -> Tensor:
        """Return a tensor with its axis mapped, of the first axis only some rows."""
        chosen = slice(None) if rows is None else rows
        if self.index is None:
            return tensor if rows is None else tensor[rows]
        mapped = tensor.index_select(self.axis, self.index[chosen].to(tensor.device))
        if self.scale is not None:
            shape = [-1 if a == self.axis else 1 for a in range(tensor.dim())]
            mapped.mul_(self.scale[chosen].to(tensor).view(shape))
        for segment, plan in self.plans:
            _apply_plan(mapped, tensor, self.axis, segment, plan)
        return mapped


def _axis_index(
    client_length: int, fused_length: int, used: list[tuple[Segment, ChannelMap]]
) -> tuple[Tensor, Tensor]:
    """Return for each fused position the client position it takes (-1: none) and its factor."""
    (segment, channel_map), *others = used
    whole = segment.fused_positions.numel() == fused_length and segment.is_in_order
    if whole and isinstance(channel_map, Selection) and not others:
        # Most axes carry one group, and nothing else.
        chosen, factor = _channel_sources(segment, channel_map)
        return chosen.flatten(), factor.flatten()
    client_rest = torch.ones(client_length, dtype=torch.bool)
    fused_rest = torch.ones(fused_length, dtype=torch.bool)
    for segment, _ in used:
        client_rest[segment.client_positions.flatten()] = False
        fused_rest[segment.fused_positions.flatten()] = False
    index = torch.full((fused_length,), -1)
    index[fused_rest] = torch.nonzero(client_rest).flatten()
    scale = fused_rest.to(torch.float64)
    for segment, channel_map in used:
        if isinstance(channel_map, Selection):
            chosen, factor = _channel_sources(segment, channel_map)
            index[segment.fused_positions] = chosen
            scale[segment.fused_positions] = factor
    return index, scale


def _channel_sources(segment: Segment, selection: Selection) -> tuple[Tensor, Tensor]:
    """Return the client positions that a segment's fused ones take, and their factors."""
    chosen = segment.client_positions[selection.index.clamp(min=0)]
    factor = selection.coverage() if segment.writes else selection.read_scale()
    return chosen, factor.to(torch.float64).unsqueeze(1).expand(chosen.shape)


def _apply_plan(mapped: Tensor, tensor: Tensor, axis: int, segment: Segment, plan: Plan) -> None:
    matrix = plan.merge() if segment.writes else plan.unmerge().T
    source = tensor.movedim(axis, 0)[segment.client_positions.to(tensor.device)]
    moved = torch.tensordot(matrix.to(source), source, dims=1)
    mapped.movedim(axis, 0)[segment.fused_positions.to(tensor.device)] = moved
