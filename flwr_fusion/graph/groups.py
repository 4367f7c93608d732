"""Channel groups: which axes of which tensors carry the same channels.

A network is a set of channel groups. A group is one set of neurons together with every place
that indexes them: rows of the layers that write them, columns of the layers that read them, norm
scales, running statistics, all branches of a residual sum. Groups are found by torch-pruning's
``DependencyGraph`` and then checked: permuting a group must not change the network.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flwr_fusion.errors import FusionError
from flwr_fusion.graph.checking import check_groups, checked_groups, warn_of_idle_layers
from flwr_fusion.graph.outputs import is_close, outputs_both_ways, random_inputs, random_state
from flwr_fusion.networks import (
    architecture_of,
    check_network,
    copy_sharing_parameters,
    owner_of,
    prepared_copy,
    tied_tensors,
)
from flwr_fusion.observe import Inputs, evaluation_mode, moved_to, named_failure
from flwr_fusion.plots import plot_graph

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Numbers of a tensor that are permuted at a time.
_BLOCK = 1 << 20


@dataclass(frozen=True, eq=False)
class Place:
    """Where the channels of a group stand along one axis of one tensor.

    Parameters
    ----------
    tensor : str
        Key of the tensor in the state dict.
    axis : int
        The axis that the channels index.
    positions : Tensor
        Shape (channels, block), integers: channel c stands at ``positions[c]`` along the axis.
        ``block`` is 1, or the number of columns that one channel becomes after a flatten.
    writes : bool
        True where the tensor produces the channels (rows of a layer, bias, norm scale, running
        statistics), False where it consumes them (columns of the next layer).
    """

    tensor: str
    axis: int
    positions: Tensor
    writes: bool

    @property
    def block(self) -> int:
        """Number of positions along the axis that belong to one channel."""
        return self.positions.shape[1]


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """One set of channels and every place that indexes it.

    Parameters
    ----------
    name : str
        The first layer that writes the channels, or "input of LAYER".
    size : int
        Number of channels.
    places : tuple of Place
        Every tensor axis that carries the channels.
    fixed_because : str
        Why the channels must stay where they are; empty for a free group.
    normalised : bool
        True if a LayerNorm or GroupNorm normalises across the channels, so that their number
        cannot change without changing the function.
    linear : bool
        True if nothing but products stands between what writes the channels and what reads them,
        and they are fewer than the product's rows and columns (LoRA's A and B, bottlenecks without
        activation): then any invertible matrix may mix them, and the product alone counts.
    """

    name: str
    size: int
    places: tuple[Place, ...]
    fixed_because: str = ""
    normalised: bool = False
    linear: bool = False

    @property
    def fixed(self) -> bool:
        """Whether the channels must keep their order (inputs, outputs, the inside of heads)."""
        return bool(self.fixed_because)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must agree with the same group of a network of another width."""
        return (
            self.name,
            self.fixed,
            tuple(sorted((p.tensor, p.axis, p.block, p.writes) for p in self.places)),
        )


@dataclass(eq=False)
class ChannelGraph:
    """The channel groups of a network, in forward order.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from flwr_fusion import ChannelGraph
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> graph = ChannelGraph.trace(model, torch.zeros(1, 4))
    >>> [(group.name, group.size, group.fixed) for group in graph.groups]
    [('input of 0', 4, True), ('0', 8, False), ('2', 2, True)]
    >>> graph.verify()
    """

    groups: tuple[ChannelGroup, ...]
    shapes: dict[str, torch.Size]
    called_layers: frozenset[str]
    model: nn.Module = field(repr=False)
    example_inputs: Any = field(repr=False)
    trained_branches: bool = False
    work: int = 0
    batch_normalised: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def trace(cls, model: nn.Module, example_inputs: Any) -> ChannelGraph:
        """Find the channel groups of any module.

        Parameters
        ----------
        model : nn.Module
            The network. It is copied, not modified.
        example_inputs : Tensor, tuple or dict
            What the network is called with: ``model(x)``, ``model(*x)`` or ``model(**x)``. A
            batch of one or two samples is enough.

        Returns
        -------
        ChannelGraph
            Groups in forward order; `verify` has not been called.

        Raises
        ------
        FusionError
            If the network cannot be run on the example inputs or not be traced.
        """
        # Imported where it is used: tracing makes groups.
        from flwr_fusion.graph.tracing import traced

        check_network("the network", model)
        inputs = moved_to(model, example_inputs)
        with named_failure(type(model).__name__, "the example inputs", example_inputs):
            found = traced(prepared_copy(model), inputs)
        warn_of_idle_layers(model, found.idle_layers)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        graph = cls(
            found.groups,
            shapes,
            found.called_layers,
            copy_sharing_parameters(model),  # The check runs it with values of its own.
            inputs,
            found.trained_branches,
            found.work,
            found.batch_normalised,
        )
        return replace(graph, groups=checked_groups(graph))

    def summary(self) -> str:
        """Return a table of the groups: name, channels, and why those are fixed that are."""
        free_as = {True: "free, linear", False: "free"}
        rows = [(g.name, str(g.size), g.fixed_because or free_as[g.linear]) for g in self.groups]
        rows = [("group", "channels", "free or fixed because"), *rows]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        free = sum(g.size for g in self.groups if not g.fixed)
        total = sum(g.size for g in self.groups)
        lines = [f"{n:{widths[0]}}  {size:>{widths[1]}}  {why}".rstrip() for n, size, why in rows]
        return "\n".join([*lines, f"{free} of {total} channels are free"])

    def __str__(self) -> str:
        return self.summary()

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw which layers write and read which groups; see `flwr_fusion.plots.plot_graph`."""
        return plot_graph(self, axes)

    def verify(self, seed: int = 0) -> None:
        """Check that permuting the free groups does not change the network.

        All parameters are drawn at random first (a head that starts at zero would make the
        check meaningless), then every free group is permuted at random.

        Raises
        ------
        FusionError
            Naming each group whose permutation changes the output, and its layers.
        """
        check_groups(self, seed)

    @property
    def is_fixed(self) -> bool:
        """Whether no channel is free."""
        return all(group.fixed for group in self.groups)

    def warn_if_fixed(self) -> None:
        """Warn where no channel is free: then fusion is averaging by index."""
        if self.is_fixed:
            inner = [
                g.fixed_because for g in self.groups if not g.fixed_because.endswith("network")
            ]
            reason, _ = Counter(inner or ["there is no hidden layer"]).most_common(1)[0]
            warnings.warn(
                f"no channels of {type(self.model).__name__} can be matched, fusion is plain "
                f"averaging: {reason}",
                stacklevel=2,
            )

    def activation_places(self, group: ChannelGroup) -> list[tuple[str, Tensor]]:
        """Return the layers whose outputs are pre-activations of a group, with its positions.

        Parameters
        ----------
        group : ChannelGroup
            A group of this graph.

        Returns
        -------
        list of (str, Tensor)
            Name of a layer that is called in the forward pass, and the positions (channels, block)
            of the group's channels along the channel axis of its output.
        """
        return [
            (owner_of(place.tensor), place.positions)
            for place in group.places
            if place.writes
            and place.tensor.endswith("weight")
            and owner_of(place.tensor) in self.called_layers
        ]

    def holding(self, stays: Callable[[str], bool]) -> ChannelGraph:
        """Return the graph with the groups fixed that index a tensor which stays where it is."""

        def held(group: ChannelGroup) -> ChannelGroup:
            local = next((p.tensor for p in group.places if stays(p.tensor)), None)
            if group.fixed or local is None:
                return group
            return replace(group, fixed_because=f"'{local}' stays at the clients", linear=False)

        return replace(self, groups=tuple(held(group) for group in self.groups))

    def permute(
        self, state: Mapping[str, Tensor], permutations: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Permute groups of a state dict without changing the network's function.

        Parameters
        ----------
        state : mapping of str to Tensor
            State dict of the traced network; not modified.
        permutations : mapping of str to Tensor
            For group names, the index of the old channel that comes to each place.

        Returns
        -------
        dict of str to Tensor
            The permuted state dict.
        """
        orders = self._axis_orders(permutations)
        permuted = {n: tensor.clone() if n in orders else tensor for n, tensor in state.items()}
        for name, own in orders.items():
            _reorder_in_place(permuted[name], own)
        return permuted

    @contextmanager
    def permuted(
        self, states: Sequence[Mapping[str, Tensor]], permutations: Mapping[str, Tensor]
    ) -> Iterator[None]:
        """Permute groups of state dicts as `permute` does, in their own memory and for a while.

        Parameters
        ----------
        states : sequence of mapping of str to Tensor
            State dicts of the traced network; tensors may be of several, or tied.
        permutations : mapping of str to Tensor
            For group names, the index of the old channel that comes to each place.
        """
        orders = self._axis_orders(permutations)
        tensors = {
            id(state[name]): (state[name], own) for state in states for name, own in orders.items()
        }
        try:
            for tensor, own in tensors.values():
                _reorder_in_place(tensor, own)
            yield
        finally:
            for tensor, own in tensors.values():
                _reorder_in_place(tensor, {axis: order.argsort() for axis, order in own.items()})

    def _axis_orders(self, permutations: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
        """Return for every tensor that permuted groups index the order along each axis."""
        orders: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for group in self.groups:
            if group.name not in permutations:
                continue
            order = permutations[group.name]
            for place in group.places:
                axes = orders[place.tensor]
                length = self.shapes[place.tensor][place.axis]
                index = axes.setdefault(place.axis, torch.arange(length))
                index[place.positions.flatten()] = place.positions[order].flatten()
        return orders

    def mix(self, state: Mapping[str, Tensor], matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mix the channels of groups of a state dict by invertible matrices.

        Of linear groups that does not change the network's function.

        Parameters
        ----------
        state : mapping of str to Tensor
            State dict of the traced network; not modified.
        matrices : mapping of str to Tensor
            For group names ``M`` of shape (channels, channels): ``W`` becomes ``M W`` where it
            writes the channels, and ``W M^-1`` where it reads them.

        Returns
        -------
        dict of str to Tensor
            The mixed state dict.
        """
        mixed = dict(state)
        for group in self.groups:
            if group.name not in matrices:
                continue
            matrix = matrices[group.name].double()
            for place in group.places:
                tensor = mixed[place.tensor].clone()
                rows = tensor.movedim(place.axis, 0)
                factor = matrix if place.writes else torch.linalg.inv(matrix).T
                index = place.positions.to(tensor.device)
                rows[index] = torch.tensordot(factor.to(tensor), rows[index], dims=1)
                mixed[place.tensor] = tensor
        return mixed


def _reorder_in_place(tensor: Tensor, orders: Mapping[int, Tensor]) -> None:
    """Bring the axes of a tensor into other orders, a part at a time."""
    for axis, order in orders.items():
        order = order.to(tensor.device)
        # Along another axis, so that a part holds all of this one; the first lies best.
        across = 1 if axis == 0 else 0
        parts = [tensor]
        if tensor.dim() > 1:
            size = max(1, _BLOCK * tensor.shape[across] // max(1, tensor.numel()))
            parts = list(torch.split(tensor, size, across))
        for part in parts:
            part.copy_(part.index_select(axis, order))


def verified_graph(model: nn.Module, example_inputs: Any) -> ChannelGraph:
    """Return a network's verified graph, remembered while the module object lives.

    It is traced again if the shapes of parameters or inputs have changed. Another network of the
    same type and shapes that computes the same at random weights has the same graph.
    """
    leaves = tree_leaves(Inputs.of(example_inputs))
    key = (
        architecture_of(model),
        frozenset(tied_tensors(model)),
        tuple(getattr(x, "shape", repr(x)) for x in leaves),
    )
    remembered = _VERIFIED.get(model)
    if remembered is None or remembered[0] != key:
        known = _BY_ARCHITECTURE.get(key)
        if known is None or not _computes_the_same(model, known, example_inputs):
            known = ChannelGraph.trace(model, example_inputs)
            _BY_ARCHITECTURE[key] = known
        remembered = (key, known)
        _VERIFIED[model] = remembered
    stays = _STAYS.get()
    return remembered[1] if stays is None else remembered[1].holding(stays)


_STAYS: ContextVar[Callable[[str], bool] | None] = ContextVar("stays", default=None)


@contextmanager
def holding(stays: Callable[[str], bool]) -> Iterator[None]:
    """Fix the groups of all networks that index a tensor which stays at the clients.

    A private layer reads, or writes, channels in the order that its client has learnt.
    """
    token = _STAYS.set(stays)
    try:
        yield
    finally:
        _STAYS.reset(token)


_VERIFIED: WeakKeyDictionary[nn.Module, tuple[Any, ChannelGraph]] = WeakKeyDictionary()
_BY_ARCHITECTURE: WeakValueDictionary[Any, ChannelGraph] = WeakValueDictionary()


def _computes_the_same(model: nn.Module, graph: ChannelGraph, example_inputs: Any) -> bool:
    """Whether a network gives what a traced one does, at the same random weights and inputs."""
    generator = torch.Generator().manual_seed(0)
    state = random_state(model, generator)
    try:
        for inputs in (random_inputs(example_inputs, generator), example_inputs):
            with evaluation_mode(model):
                ours, theirs = (
                    outputs_both_ways(network, state, moved_to(network, inputs), graph)
                    for network in (model, graph.model)
                )
            if len(ours) != len(theirs) or not all(map(is_close, ours, theirs)):
                return False
    except FusionError:
        return False
    return True
