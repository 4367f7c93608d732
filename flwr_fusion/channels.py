"""Channel groups: which axes of which tensors carry the same channels.

A network is a set of channel groups. A group is one set of neurons together with every place
that indexes them: rows of the layers that write them, columns of the layers that read them, norm
scales, running statistics, all branches of a residual sum. Groups are found by torch-pruning's
``DependencyGraph`` and then checked: permuting a group must not change the network.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from flwr_fusion.errors import FusionError

# Operations that mix channels with other axes; torch-pruning takes them for element-wise ones.
_MIXING_OPERATIONS = ("bmm", "scaleddotproduct", "attention")
_ROOT_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)
_VECTOR_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)
_NORMALISED_ACROSS_CHANNELS = (nn.LayerNorm, nn.GroupNorm)


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
    """

    name: str
    size: int
    places: tuple[Place, ...]
    fixed_because: str = ""
    normalised: bool = False

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
        traced = _prepared_copy(model)
        inputs = moved_to(traced, example_inputs)
        order = _call_order(traced, inputs)
        dependency_graph, output_layers = _dependency_graph(traced, inputs)
        tracer = _GroupBuilder(traced, dependency_graph, output_layers, order)
        groups = _without_conflicts(tracer.groups())
        groups += _input_groups(traced, groups, order)
        groups.sort(key=lambda group: _position_in_forward(group, order))
        shapes = {name: tensor.shape for name, tensor in traced.state_dict().items()}
        layers = {n for n, m in traced.named_modules() if isinstance(m, _ROOT_LAYERS)}
        return cls(tuple(groups), shapes, frozenset(layers & order.keys()), traced, inputs)

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
        model = self._model
        state = _random_state(model, generator)
        free = [group for group in self.groups if not group.fixed]
        permutations = {g.name: torch.randperm(g.size, generator=generator) for g in free}
        expected = _output_vector(model, state, self._example_inputs)

        def changes(chosen: dict[str, Tensor]) -> bool:
            permuted = self.permute(state, chosen)
            output = _output_vector(model, permuted, self._example_inputs)
            return not float((output - expected).norm()) <= 1e-3 * float(expected.norm())

        if not changes(permutations):
            return
        wrong = [g for g in free if changes({g.name: permutations[g.name]})]
        listed = "; ".join(
            f"group '{g.name}' ({', '.join(sorted({p.tensor for p in g.places}))})"
            for g in wrong or free
        )
        raise FusionError(
            f"the traced channel groups of {type(self._model).__name__} are wrong: permuting "
            f"{listed} changes its output. The network uses these channels in a way that cannot "
            "be traced (for example a channel shuffle or a flatten after a transpose)."
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


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a network on a tensor, a tuple of arguments or a dict of keyword arguments."""
    args, kwargs = _arguments(inputs)
    return model(*args, **kwargs)


def _prepared_copy(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode and at least float32 whose parameters take gradients."""
    traced = copy.deepcopy(model).eval()
    if not any(p.dtype == torch.float64 for p in traced.parameters()):
        traced = traced.float()
    for parameter in traced.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return traced


def moved_to(model: nn.Module, inputs: Any) -> Any:
    """Bring inputs to the device and the floating-point type of a network.

    Parameters
    ----------
    inputs : Tensor, tuple or dict
        What the network is called with.
    model : nn.Module
        The network.

    Returns
    -------
    Tensor, tuple or dict
        The same structure.
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise FusionError(f"{type(model).__name__} has no parameters: there is nothing to fuse")

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach().to(parameter.device)
        return x.to(parameter.dtype) if x.is_floating_point() else x

    return tree_map(move, inputs)


def _call_order(model: nn.Module, inputs: Any) -> dict[str, int]:
    """Return for every module that is called the number of its first call."""
    order: dict[str, int] = {}
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, _args: Any) -> None:
        order.setdefault(names[module], len(order))

    handles = [module.register_forward_pre_hook(note) for module in names]
    try:
        with torch.no_grad():
            call(model, inputs)
    except Exception as error:
        raise FusionError(
            f"{type(model).__name__} cannot be run on the example inputs: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return order


def _dependency_graph(model: nn.Module, inputs: Any) -> tuple[tp.DependencyGraph, set[Any]]:
    """Return torch-pruning's graph and the layers whose output is the network's."""
    roots: set[Any] = set()

    def remember_roots(output: Any) -> list[Tensor]:
        tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn]
        roots.update(t.grad_fn for t in tensors)
        return tensors

    graph = tp.DependencyGraph()
    # Its LSTM pruner fails; without it the parameters are bare ones and their groups are fixed.
    graph.REGISTERED_PRUNERS.pop(tp.ops.OPTYPE.LSTM)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph.build_dependency(
                model,
                example_inputs=inputs,
                forward_fn=call,
                output_transform=remember_roots,
                verbose=False,
            )
    except Exception as error:
        raise FusionError(
            f"the channels of {type(model).__name__} cannot be traced: {error}"
        ) from error
    return graph, {module for module, node in graph.module2node.items() if node.grad_fn in roots}


@dataclass
class _Traced:
    """One item of a torch-pruning group: a module's axis with (channel, position) pairs."""

    module: Any
    is_output: bool
    channels: list[int]
    positions: list[int]


class _GroupBuilder:
    """Turns torch-pruning's groups into channel groups of state-dict tensors."""

    def __init__(
        self,
        model: nn.Module,
        graph: tp.DependencyGraph,
        output_layers: set[Any],
        order: Mapping[str, int],
    ) -> None:
        self.graph = graph
        self.output_layers = output_layers
        self.order = order
        self.modules = dict(model.named_modules())
        self.names = {module: name for name, module in self.modules.items()}
        self.state = model.state_dict(keep_vars=True)
        self.parameter_names = {p: name for name, p in model.named_parameters()}

    def groups(self) -> list[ChannelGroup]:
        """Return all groups, split where torch-pruning joins channels that cannot be swapped."""
        result: list[ChannelGroup] = []
        written: set[Any] = set()
        for layer in self.graph.module2node:
            if layer in written or not isinstance(layer, _ROOT_LAYERS):
                continue
            pruner = self.graph.get_pruner_of_module(layer)
            channels = list(range(pruner.get_out_channels(layer)))
            try:
                traced = self.graph.get_pruning_group(layer, pruner.prune_out_channels, channels)
            except (IndexError, TypeError, ZeroDivisionError):
                result += self._untraceable(layer, channels)
                continue
            items = [self._item(item) for item in traced]
            written.update(item.module for item in items if item.is_output)
            result += self._split(items)
        for name in self.order:
            layer = self.modules[name]
            if isinstance(layer, _ROOT_LAYERS) and layer not in self.graph.module2node:
                result += self._untraceable(
                    layer, list(range(layer.weight.shape[_out_axis(layer)]))
                )
        return result

    def _untraceable(self, layer: nn.Module, channels: list[int]) -> list[ChannelGroup]:
        """Return a fixed group for a layer whose output torch-pruning cannot follow."""
        own = _Traced(layer, is_output=True, channels=channels, positions=channels)
        reason = "the output of this layer cannot be traced"
        return [replace(group, fixed_because=reason) for group in self._split([own])]

    def _split(self, items: list[_Traced]) -> list[ChannelGroup]:
        """Return one group for every class of channels that stand at the same places."""
        # The products inside nn.MultiheadAttention belong to its heads, not to the stream.
        whole_attention = any(isinstance(i.module, nn.MultiheadAttention) for i in items)
        reasons = (self._reason_to_fix(item, whole_attention) for item in items)
        fixed_because = next(filter(None, reasons), "")
        normalised = any(isinstance(i.module, _NORMALISED_ACROSS_CHANNELS) for i in items)
        places = [place for item in items for place in self._places(item)]
        occurrences: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for number, (place, positions_of) in enumerate(places):
            norm_block = self._norm_block_size(place)
            for channel, positions in positions_of.items():
                block = positions[0] // norm_block
                occurrences[channel].append((number, len(positions), block))
        classes: dict[tuple[tuple[int, ...], ...], list[int]] = defaultdict(list)
        for channel in sorted(occurrences):
            classes[tuple(occurrences[channel])].append(channel)
        return [
            self._group(channels, kind, places, fixed_because, normalised)
            for kind, channels in classes.items()
        ]

    def _group(
        self,
        channels: list[int],
        kind: tuple[tuple[int, ...], ...],
        places: list[tuple[Place, dict[int, list[int]]]],
        fixed_because: str,
        normalised: bool,
    ) -> ChannelGroup:
        own = []
        for number, *_ in kind:
            place, positions_of = places[number]
            positions = torch.tensor([sorted(positions_of[c]) for c in channels])
            own.append(replace(place, positions=positions))
        named = [p for p in own if p.writes] or own
        first = min(named, key=lambda p: self.order.get(owner_of(p.tensor), len(self.order)))
        name = owner_of(first.tensor)
        return ChannelGroup(name, len(channels), tuple(own), fixed_because, normalised)

    def _item(self, item: Any) -> _Traced:
        return _Traced(
            module=item.dep.target.module,
            is_output=self.graph.is_out_channel_pruning_fn(item.dep.handler),
            channels=list(item.root_idxs),
            positions=list(item.idxs),
        )

    def _reason_to_fix(self, item: _Traced, whole_attention: bool) -> str:
        """Say why the channels of a group with this item cannot be permuted, or nothing."""
        module = item.module
        name = self.names.get(module, "")
        if isinstance(module, tp.ops._OutputOp) or (
            item.is_output and module in self.output_layers
        ):
            return "output of the network"
        if isinstance(module, tp.ops._ElementWiseOp) and not whole_attention:
            operation = str(module._grad_fn).lower()
            if any(mixing in operation for mixing in _MIXING_OPERATIONS):
                return "inside an attention or matrix product"
        if isinstance(module, nn.modules.conv._ConvNd) and not _is_depthwise(module):
            if module.groups > 1:
                return f"'{name}' is a grouped convolution"
        elif isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
            return f"'{name}' normalises over more than the channels"
        elif isinstance(module, nn.RNNBase):
            return f"'{name}' is recurrent"
        elif isinstance(module, nn.MultiheadAttention) and not module._qkv_same_embed_dim:
            return f"'{name}' has keys or values of another size"
        elif isinstance(module, nn.Parameter):
            owner = self.parameter_names.get(module, "")
            if isinstance(self.modules.get(owner_of(owner)), nn.RNNBase):
                return f"'{owner_of(owner)}' is recurrent"
            if self._parameter_axis(item) is None:
                return f"parameter '{owner}' has no axis of the channels' size"
        return ""

    def _parameter_axis(self, item: _Traced) -> int | None:
        """Return the axis of a bare parameter that carries the channels (torch-pruning guesses)."""
        shape = item.module.shape
        if all(size == 1 for size in shape):
            return 0
        traced: int = self.graph.module2node[item.module].pruning_dim
        needed = max(item.positions) + 1
        if shape[traced] == needed:
            return traced
        matching = [axis for axis, size in enumerate(shape) if size == needed]
        return matching[0] if len(matching) == 1 else None

    def _places(self, item: _Traced) -> list[tuple[Place, dict[int, list[int]]]]:
        """Return the tensor axes of an item with the positions of each channel."""
        positions_of: dict[int, list[int]] = defaultdict(list)
        for channel, position in zip(item.channels, item.positions, strict=True):
            positions_of[channel].append(position)
        nothing = torch.empty(0, 1, dtype=torch.long)
        places = []
        for tensor, axis, writes in self._axes(item):
            if tensor not in self.state:
                continue
            length = self.state[tensor].shape[axis]
            blocks = _blocks(positions_of, length) if not writes else positions_of
            places.append((Place(tensor, axis, nothing, writes), blocks))
        return places

    def _axes(self, item: _Traced) -> list[tuple[str, int, bool]]:
        """Return (tensor, axis, writes) for the axes of the item's module that are meant."""
        module, name = item.module, self.names.get(item.module, "")
        dot = f"{name}." if name else ""
        if isinstance(module, nn.Parameter):
            axis = self._parameter_axis(item)
            if axis is None or module.numel() == 1:
                return []
            return [(self.parameter_names[module], axis, True)]
        if isinstance(module, nn.modules.conv._ConvNd):
            out = _out_axis(module)
            if item.is_output or _is_depthwise(module):
                return [(f"{dot}weight", out, True), (f"{dot}bias", 0, True)]
            return [(f"{dot}weight", 1 - out, False)]
        if isinstance(module, nn.Linear):
            if item.is_output:
                return [(f"{dot}weight", 0, True), (f"{dot}bias", 0, True)]
            return [(f"{dot}weight", 1, False)]
        if isinstance(module, nn.Embedding):
            return [(f"{dot}weight", 1, True)]
        if isinstance(module, nn.MultiheadAttention):
            # The inside of the heads (rows of in_proj, columns of out_proj) keeps its order.
            return [
                (f"{dot}in_proj_weight", 1, False),
                (f"{dot}out_proj.weight", 0, True),
                (f"{dot}out_proj.bias", 0, True),
            ]
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            return []
        if isinstance(module, _VECTOR_LAYERS):
            vectors = ("weight", "bias", "running_mean", "running_var")
            return [(f"{dot}{vector}", 0, True) for vector in vectors]
        return []

    def _norm_block_size(self, place: Place) -> int:
        """Return how many channels GroupNorm takes together: only those can be swapped."""
        module = self.modules.get(owner_of(place.tensor))
        length: int = self.state[place.tensor].shape[place.axis]
        if isinstance(module, nn.GroupNorm) and module.num_groups < length:
            return length // int(module.num_groups)
        return length


def owner_of(tensor: str) -> str:
    """Return the name of the module that owns a tensor."""
    return tensor.rpartition(".")[0] or tensor


def _out_axis(layer: nn.Module) -> int:
    """Return the axis of a layer's weight that indexes its outputs."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return int(layer.transposed and not _is_depthwise(layer))
    return int(isinstance(layer, nn.Embedding))


def _is_depthwise(module: nn.modules.conv._ConvNd) -> bool:
    return module.groups == module.in_channels == module.out_channels > 1


def _blocks(positions_of: dict[int, list[int]], length: int) -> dict[int, list[int]]:
    """Widen single positions to blocks of columns where a flatten was not traced.

    torch-pruning knows the flatten of four-dimensional activations only; after a Conv1d or Conv3d
    it leaves one position per channel although each channel became ``length / n`` columns.
    """
    n = len(positions_of)
    single = all(len(positions) == 1 for positions in positions_of.values())
    covered = {p for positions in positions_of.values() for p in positions}
    if not single or length == n or length % n or covered != set(range(n)):
        return positions_of
    block = length // n
    return {c: list(range(p * block, (p + 1) * block)) for c, (p,) in positions_of.items()}


def _without_conflicts(groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """Fix groups of which two claim the same position of one tensor."""
    claims: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    for number, group in enumerate(groups):
        for place in group.places:
            for position in place.positions.flatten().tolist():
                claims[place.tensor, place.axis, position].append(number)
    disputed = {n for numbers in claims.values() if len(set(numbers)) > 1 for n in numbers}
    names: dict[str, int] = defaultdict(int)
    result = []
    for number, group in enumerate(groups):
        if number in disputed and not group.fixed:
            group = replace(group, fixed_because="another group claims the same channels")
        names[group.name] += 1
        if names[group.name] > 1:
            group = replace(group, name=f"{group.name}#{names[group.name]}")
        result.append(group)
    return result


def _input_groups(
    model: nn.Module, groups: Iterable[ChannelGroup], order: Mapping[str, int]
) -> list[ChannelGroup]:
    """Return fixed groups for the columns that no group covers: the network's inputs."""
    covered: dict[str, set[int]] = defaultdict(set)
    for group in groups:
        for place in group.places:
            if not place.writes:
                covered[place.tensor].update(place.positions.flatten().tolist())
    result = []
    for name, module in model.named_modules():
        readable = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
        if not readable or name not in order or module.weight.dim() < 2:
            continue
        tensor = f"{name}.weight" if name else "weight"
        axis = 0 if getattr(module, "transposed", False) else 1
        length = module.weight.shape[axis]
        missing = sorted(set(range(length)) - covered[tensor])
        if missing and not (isinstance(module, nn.modules.conv._ConvNd) and _is_depthwise(module)):
            place = Place(tensor, axis, torch.tensor(missing).unsqueeze(1), writes=False)
            group_name = f"input of {name}" if name else "input"
            result.append(ChannelGroup(group_name, len(missing), (place,), "input of the network"))
    return result


def _position_in_forward(group: ChannelGroup, order: Mapping[str, int]) -> tuple[int, int]:
    places = [p for p in group.places if p.writes] or list(group.places)
    reads_only = not any(p.writes for p in group.places)
    return min(order.get(owner_of(p.tensor), len(order)) for p in places), int(not reads_only)


def _random_state(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Return a state dict with generic values of a sensible scale everywhere."""

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    def around_one(tensor: Tensor) -> Tensor:
        return 0.5 + torch.rand(tensor.shape, generator=generator)

    state = model.state_dict(keep_vars=True)
    drawn: dict[int, Tensor] = {}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    result = {}
    for name, tensor in state.items():
        scale = name in parameters and name.endswith("weight") and tensor.dim() <= 1
        draw: Callable[[Tensor], Tensor] | None = None
        if scale or name.endswith("running_var"):
            draw = around_one
        elif name in parameters or name.endswith("running_mean"):
            draw = normal
        if id(tensor) in drawn:  # Tied tensors stay equal.
            result[name] = drawn[id(tensor)]
            continue
        value = tensor.detach().clone()
        if draw is not None and tensor.is_floating_point():
            value = draw(tensor).to(tensor)
            if tensor.dim() > 1:
                value *= (2 / max(1, tensor[0].numel())) ** 0.5
        result[name] = drawn[id(tensor)] = value
    return result


def _output_vector(model: nn.Module, state: Mapping[str, Tensor], inputs: Any) -> Tensor:
    with torch.no_grad():
        output = torch.func.functional_call(
            model, dict(state), *_arguments(inputs), tie_weights=False
        )
    tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    vector = torch.cat([t.flatten().double() for t in tensors])
    if not torch.isfinite(vector).all():
        raise FusionError(
            f"{type(model).__name__} gives non-finite outputs at random weights: "
            "its channel groups cannot be checked"
        )
    return vector


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})
