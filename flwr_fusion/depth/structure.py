"""Depth structure: the layers or residual blocks that can be added or removed, in stages."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from flwr_fusion.errors import FusionError
from flwr_fusion.graph.groups import verified_graph
from flwr_fusion.networks import module_of, owner_of, prepared_copy
from flwr_fusion.observe import call, moved_to, named_failure, watch

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Unit:
    """A layer with its norm, or a residual block.

    Parameters
    ----------
    name : str
        The layer or the block.
    modules : tuple of str
        The modules whose tensors belong to it: the layer and its norm, or the block.
    layer : str
        The layer whose output, the pre-activation, represents the unit.
    kind : str
        Type of the layer or block.
    outputs : tuple of int
        Shape of its output for one sample; of a layer without the channels.
    switches : tuple of str
        Parameters that are zero in a residual block that does nothing; empty for a layer, and for
        a block whose input does not reach its output unchanged.
    """

    name: str
    modules: tuple[str, ...]
    layer: str
    kind: str
    outputs: tuple[int, ...]
    switches: tuple[str, ...] = ()

    @property
    def is_block(self) -> bool:
        """Whether the unit is a block, not a single layer."""
        return self.modules[0] != self.layer

    def tensors(self, keys: Iterable[str]) -> dict[str, str]:
        """Return its keys of a state dict by names that agree between units of one kind."""
        return {
            f"{number}.{key[len(module) + 1 :]}": key
            for key in keys
            for number, module in enumerate(self.modules)
            if key.startswith(f"{module}.")
        }


@dataclass(frozen=True)
class Stage:
    """Consecutive units between which units can be added or removed.

    Parameters
    ----------
    units : tuple of Unit
        In forward order.
    """

    units: tuple[Unit, ...]

    @property
    def name(self) -> str:
        """Its first and last unit."""
        first, last = self.units[0].name, self.units[-1].name
        return f"'{first}'" if first == last else f"'{first}' to '{last}'"


@dataclass(frozen=True)
class DepthStructure:
    """The units of a network in stages, and the modules that belong to none.

    Parameters
    ----------
    stages : tuple of Stage
        In forward order.
    rest : tuple of str
        The other modules that own tensors, in forward order: stem, transitions, head.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from flwr_fusion import DepthStructure
    >>> layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)]
    >>> model = nn.Sequential(*layers)
    >>> structure = DepthStructure.trace(model, torch.zeros(1, 4))
    >>> [[unit.name for unit in stage.units] for stage in structure.stages]
    [['0', '2'], ['4']]
    """

    stages: tuple[Stage, ...]
    rest: tuple[str, ...]

    @classmethod
    def trace(cls, model: nn.Module, example_inputs: Any) -> DepthStructure:
        """Find the units and stages of a chain of layers or of a residual network.

        A network with residual blocks (modules that add their input to what they compute): a
        unit is a block, or a block of the same type that changes the shape; a stage is a run of
        blocks with equal outputs. A plain chain: a unit is a layer with its norm; a stage ends
        where the layer's type or the spatial size changes, and before the output layer. (Nguyen
        et al., section 3.1, where the groups are written down for each network.)

        Parameters
        ----------
        model : nn.Module
            The network; not modified.
        example_inputs : Tensor, tuple or dict
            What it is called with.

        Returns
        -------
        DepthStructure
            Its units.

        Raises
        ------
        FusionError
            If the network is neither; `given` takes a structure by hand.
        """
        return trace_family([model], example_inputs)[0]

    @classmethod
    def given(
        cls, model: nn.Module, example_inputs: Any, stages: Sequence[Sequence[str]]
    ) -> DepthStructure:
        """Return a structure whose units are named by hand.

        Parameters
        ----------
        model : nn.Module
            The network.
        example_inputs : Tensor, tuple or dict
            What it is called with.
        stages : sequence of sequences of str
            For each stage the names of its layers or residual blocks, in forward order.

        Returns
        -------
        DepthStructure
            The structure.

        Raises
        ------
        FusionError
            If a name is no module of the network that is called once.
        """
        calls = _Calls(model, example_inputs)
        named = [name for names in stages for name in names]
        if not all(len(names) for names in stages):
            raise FusionError("a stage without units was given")
        units = tuple(
            Stage(tuple(_given_unit(name, model, example_inputs, calls) for name in names))
            for names in stages
        )
        called = [name for name in calls.by_name if name in set(named)]
        if called != named:
            raise FusionError(
                f"the units {named} of {type(model).__name__} must be given once each, in the "
                f"order of their calls: {called}"
            )
        return cls(units, _rest(model, units, calls))


def trace_family(models: Sequence[nn.Module], example_inputs: Any) -> list[DepthStructure]:
    """Return the structures of several networks, which tell each other what a block is."""
    calls = [_Calls(model, example_inputs) for model in models]
    switches = [
        {name: found for name in one.by_name if (found := _switches(name, one))} for one in calls
    ]
    types = {
        type(one.modules[name])
        for one, found in zip(calls, switches, strict=True)
        for name in _innermost(found)
    }
    return [
        _traced(model, example_inputs, one, _residual_blocks(one, found, types))
        for model, one, found in zip(models, calls, switches, strict=True)
    ]


def _traced(
    model: nn.Module, example_inputs: Any, calls: _Calls, blocks: Sequence[Unit]
) -> DepthStructure:
    chain = [] if blocks else _chain(model, example_inputs, calls)

    def stage_of(unit: Unit) -> tuple[Any, ...]:
        return unit.kind, unit.outputs, bool(chain) and unit is chain[-1]

    stages = tuple(Stage(tuple(units)) for _, units in groupby(blocks or chain, key=stage_of))
    return DepthStructure(stages, _rest(model, stages, calls))


@dataclass
class _Call:
    """What is known of a module's call: shapes of one sample, ends in the autograd graph."""

    times: int
    start: Any
    end: Any = None
    outputs: tuple[int, ...] = ()


class _Calls:
    """The modules that a forward pass calls, in order, with the autograd graph it leaves."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.model = prepared_copy(model)
        self.modules = dict(self.model.named_modules())
        self.parameters = {id(p): name for name, p in self.model.named_parameters()}
        self.by_name: dict[str, _Call] = {}
        self._output = self._run(example_inputs)

    def layers_of(self, module: str) -> list[str]:
        """Return the layers that are called inside a module, in order."""
        return [
            name
            for name in self.by_name
            if name.startswith(f"{module}.") and isinstance(self.modules[name], LAYERS)
        ]

    def _run(self, example_inputs: Any) -> Any:
        names = {module: name for name, module in self.modules.items()}

        def enter(module: nn.Module, first: Any, _output: Any) -> None:
            found = self.by_name.setdefault(names[module], _Call(0, None))
            found.times += 1
            found.start = _node(first)

        def leave(module: nn.Module, _first: Any, output: Any) -> None:
            found = self.by_name[names[module]]
            if isinstance(output, Tensor):
                found.end, found.outputs = _node(output), tuple(output.shape[1:])

        inputs = tree_map(_with_gradient, moved_to(self.model, example_inputs))
        with (
            named_failure(type(self.model).__name__, "the example inputs"),
            watch(names, enter, before=True),
            watch(names, leave),
            torch.enable_grad(),
        ):
            # The graph lives as long as its end does.
            return tree_leaves(call(self.model, inputs))


def _with_gradient(x: Any) -> Any:
    return x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x


def _node(x: Any) -> Any:
    """Return a tensor's node in the autograd graph, if it has one."""
    if not isinstance(x, Tensor) or not x.requires_grad:
        return None
    return torch.autograd.graph.get_gradient_edge(x).node


def _innermost(names: Collection[str]) -> set[str]:
    """Return the modules that contain none of the others."""
    return {name for name in names if not any(o.startswith(f"{name}.") for o in names)}


def _residual_blocks(
    calls: _Calls, switches: Mapping[str, tuple[str, ...]], types: set[type]
) -> list[Unit]:
    """Return the residual blocks and the blocks of their types, in forward order."""
    inner = _innermost(switches)
    return [
        _block(name, switches.get(name, ()), calls)
        for name in calls.by_name
        if type(calls.modules[name]) in types and calls.layers_of(name)
        if not any(name != o and f"{name}.".startswith(f"{o}.") for o in inner)
        if not any(o.startswith(f"{name}.") for o in inner)
    ]


def _block(name: str, switches: tuple[str, ...], calls: _Calls) -> Unit:
    layers = calls.layers_of(name)
    _check_called_once(name, calls)
    # The paper compares blocks of two convolutions by the second one's pre-activation.
    layer = layers[min(1, len(layers) - 1)]
    kind = type(calls.modules[name]).__name__
    return Unit(name, (name,), layer, kind, calls.by_name[name].outputs, switches)


def _switches(name: str, calls: _Calls) -> tuple[str, ...]:
    """Return the last parameters of what a module adds to its input; empty if it does not."""
    record = calls.by_name[name]
    if record.start is None or record.end is None or record.times > 1:
        return ()
    last: list[str] = []
    is_residual = False
    # (node, whether a sum was passed, whether only sums and functions of one argument were)
    waiting, seen = [(record.end, False, True)], set()
    while waiting:
        node, summed, straight = waiting.pop()
        if node is record.start:
            is_residual |= summed and straight
            continue
        if (node, summed, straight) in seen:
            continue
        seen.add((node, summed, straight))
        inputs = [function for function, _ in node.next_functions if function is not None]
        owned = [found for function in inputs if (found := _parameter(function, calls))]
        if owned:
            last += owned
            continue
        is_sum = node.name().startswith("AddBackward")
        straight &= is_sum or len(inputs) == 1
        waiting += [(function, summed or is_sum, straight) for function in inputs]
    return tuple(sorted(set(last))) if is_residual else ()


def _parameter(node: Any, calls: _Calls) -> str | None:
    """Return the parameter that a node is, perhaps transposed or reshaped."""
    while True:
        if hasattr(node, "variable"):
            return calls.parameters.get(id(node.variable))
        inputs = [function for function, _ in node.next_functions if function is not None]
        if len(inputs) != 1:
            return None
        node = inputs[0]


def _chain(model: nn.Module, example_inputs: Any, calls: _Calls) -> list[Unit]:
    """Return the layers of a network each of which reads what the one before has written."""
    groups = verified_graph(model, example_inputs).groups
    units: list[Unit] = []
    for number, group in enumerate(groups):
        owners = [owner_of(p.tensor) for p in group.places if p.writes]
        layers = {name for name in owners if isinstance(calls.modules[name], LAYERS)}
        readers = {owner_of(p.tensor) for p in group.places if not p.writes}
        following = groups[number + 1 : number + 2]
        written_next = {owner_of(p.tensor) for g in following for p in g.places if p.writes}
        if len(layers) != min(number, 1) or len(readers) != len(following):
            raise _no_structure(model)
        if not readers <= written_next:
            raise _no_structure(model)
        if layers:
            units.append(_layer_unit(layers.pop(), owners, calls))
    return units


def _layer_unit(layer: str, owners: Iterable[str], calls: _Calls) -> Unit:
    _check_called_once(layer, calls)
    norms = [name for name in dict.fromkeys(owners) if name != layer]
    module, outputs = calls.modules[layer], calls.by_name[layer].outputs
    positions = outputs[:-1] if isinstance(module, nn.Linear) else outputs[1:]
    return Unit(layer, (layer, *norms), layer, type(module).__name__, positions)


def _given_unit(name: str, model: nn.Module, example_inputs: Any, calls: _Calls) -> Unit:
    if name not in calls.by_name:
        raise FusionError(f"{type(model).__name__} calls no module '{name}'")
    if not isinstance(calls.modules[name], LAYERS):
        if not calls.layers_of(name):
            raise FusionError(f"module '{name}' of {type(model).__name__} has no layers")
        return _block(name, _switches(name, calls), calls)
    for group in verified_graph(model, example_inputs).groups:
        owners = [owner_of(p.tensor) for p in group.places if p.writes]
        if name in owners:
            others = [o for o in owners if isinstance(calls.modules[o], LAYERS) and o != name]
            return _layer_unit(name, owners if not others else [name], calls)
    raise _no_structure(model)


def _check_called_once(name: str, calls: _Calls) -> None:
    if calls.by_name[name].times > 1:
        raise FusionError(
            f"'{name}' of {type(calls.model).__name__} is called more than once: it can be "
            "neither added nor removed"
        )


def _no_structure(model: nn.Module) -> FusionError:
    return FusionError(
        f"no depth structure was found in {type(model).__name__}: it is neither a chain of layers "
        "nor has it residual blocks. Where layers do follow each other that can be added or left "
        "out, say so: LayerMatching(structure=lambda network: DepthStructure.given(network, ...))"
    )


def _rest(model: nn.Module, stages: Iterable[Stage], calls: _Calls) -> tuple[str, ...]:
    """Return the modules outside all units that own tensors, in the order of their calls."""
    inside = tuple(f"{m}." for stage in stages for unit in stage.units for m in unit.modules)
    owners = dict.fromkeys(module_of(key) for key in model.state_dict())
    order = {name: number for number, name in enumerate(calls.by_name)}
    return tuple(
        sorted(
            (owner for owner in owners if not f"{owner}.".startswith(inside)),
            # A module that is not called itself counts as called where its parent is.
            key=lambda name: max(order.get(part, -1) for part in _with_parents(name)),
        )
    )


def _with_parents(name: str) -> Iterator[str]:
    yield ""
    for end, letter in enumerate(name):
        if letter == ".":
            yield name[:end]
    yield name
