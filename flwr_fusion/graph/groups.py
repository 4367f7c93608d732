"""Channel groups: which axes of which tensors carry the same channels.

A network is a set of channel groups. A group is one set of neurons together with every place
that indexes them: rows of the layers that write them, columns of the layers that read them, norm
scales, running statistics, all branches of a residual sum. Groups are found by torch-pruning's
``DependencyGraph`` and then checked: permuting a group must not change the network.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flwr_fusion.errors import FusionError
from flwr_fusion.graph.checking import (
    idle_layers,
    is_close,
    output_vector,
    prepared_copy,
    random_state,
)
from flwr_fusion.graph.tracing import ChannelGroup, Place, owner_of, trace_groups
from flwr_fusion.observe import moved_to

# Of long lists in messages.
_LISTED = 4

__all__ = ["ChannelGraph", "ChannelGroup", "Place", "verified_graph"]


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
    _model: nn.Module = field(repr=False)
    _example_inputs: Any = field(repr=False)

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
        traced = prepared_copy(model)
        inputs = moved_to(traced, example_inputs)
        groups, called_layers = trace_groups(traced, inputs)
        shapes = {name: tensor.shape for name, tensor in traced.state_dict().items()}
        return cls(tuple(groups), shapes, called_layers, traced, inputs)

    def verify(self, seed: int = 0) -> None:
        """Check that permuting the free groups does not change the network.

        All parameters are drawn at random first (a head that starts at zero would make the
        check meaningless), then every free group is permuted at random.

        Raises
        ------
        FusionError
            Naming each group whose permutation changes the output, and its layers.
        """
        generator = torch.Generator().manual_seed(seed)
        model, inputs = self._model, self._example_inputs
        state = random_state(model, generator)
        free = [group for group in self.groups if not group.fixed]
        permutations = {g.name: torch.randperm(g.size, generator=generator) for g in free}
        expected = output_vector(model, state, inputs)

        def changes(chosen: dict[str, Tensor]) -> bool:
            permuted = self.permute(state, chosen)
            output = output_vector(model, permuted, inputs)
            return not float((output - expected).norm()) <= 1e-3 * float(expected.norm())

        if not changes(permutations):
            self._check_idle_layers(state, permutations)
            return
        wrong = [g for g in free if changes({g.name: permutations[g.name]})]
        listed = "; ".join(
            f"group '{g.name}' ({_shortened(sorted({p.tensor for p in g.places}))})"
            for g in (wrong or free)[:_LISTED]
        )
        more = f" and {len(wrong) - _LISTED} more groups" if len(wrong) > _LISTED else ""
        raise FusionError(
            f"the traced channel groups of {type(self._model).__name__} are wrong: permuting "
            f"{listed}{more} changes its output. The network uses these channels in a way that "
            "cannot be traced (for example a channel shuffle, a flatten after a transpose, or a "
            "concatenation with the network's own inputs before them)."
        )

    def _check_idle_layers(self, state: Mapping[str, Tensor], chosen: dict[str, Tensor]) -> None:
        """Refuse layers that run in training only and read channels; warn of those that never run.

        The trace sees what runs in evaluation mode.
        """
        model, inputs = self._model, self._example_inputs
        never = idle = idle_layers(model, inputs)
        if not idle:
            return
        with _written_for_training(model):
            try:
                never = idle_layers(model, inputs)
                same = never == idle or is_close(
                    output_vector(model, self.permute(state, chosen), inputs),
                    output_vector(model, state, inputs),
                )
            except FusionError:  # It needs more than the inputs, such as labels.
                never, same = idle, True
        if not same:
            trained = sorted(set(idle) - set(never))
            raise FusionError(
                f"layers of {type(model).__name__} run in training only ({_shortened(trained)}) "
                "and read channels of the others: what they read cannot be traced. Take them out "
                "of the networks that are fused, or let them run in evaluation as well"
            )
        if never:
            warnings.warn(
                f"layers of {type(model).__name__} do not run on the example inputs "
                f"({_shortened(never)}): they are averaged by index, which is wrong if they read "
                "channels of the others",
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
            Name of a layer that is called in the forward pass, and the positions (channels,) of
            the group's channels along the channel axis of its output.
        """
        return [
            (owner_of(place.tensor), place.positions[:, 0])
            for place in group.places
            if place.writes
            and place.tensor.endswith("weight")
            and owner_of(place.tensor) in self.called_layers
        ]

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
        permuted = dict(state)
        for group in self.groups:
            if group.name not in permutations:
                continue
            order = permutations[group.name]
            for place in group.places:
                tensor = permuted[place.tensor]
                index = torch.arange(tensor.shape[place.axis])
                index[place.positions.flatten()] = place.positions[order].flatten()
                permuted[place.tensor] = tensor.index_select(place.axis, index.to(tensor.device))
        return permuted


@contextmanager
def _written_for_training(model: nn.Module) -> Iterator[None]:
    """Let a network in evaluation mode take its own branches for training.

    PyTorch's modules stay in evaluation: dropout draws other masks for permuted channels.
    """
    own = [m for m in model.modules() if not type(m).__module__.startswith("torch.nn.")]
    for module in own:
        module.training = True
    try:
        yield
    finally:
        for module in own:
            module.training = False


def _shortened(names: list[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def verified_graph(model: nn.Module, example_inputs: Any) -> ChannelGraph:
    """Trace and verify a network, remembering the result while the module object lives.

    Parameters
    ----------
    model : nn.Module
        The network.
    example_inputs : Tensor, tuple or dict
        As for `ChannelGraph.trace`.

    Returns
    -------
    ChannelGraph
        The verified graph; traced again if the shapes of the parameters or inputs have changed.
    """
    shapes = tuple((n, t.shape) for n, t in model.state_dict().items())
    key = (shapes, tuple(getattr(x, "shape", x) for x in tree_leaves(example_inputs)))
    remembered = _VERIFIED.get(model)
    if remembered is None or remembered[0] != key:
        graph = ChannelGraph.trace(model, example_inputs)
        graph.verify()
        remembered = (key, graph)
        _VERIFIED[model] = remembered
    return remembered[1]


_VERIFIED: WeakKeyDictionary[nn.Module, tuple[Any, ChannelGraph]] = WeakKeyDictionary()
