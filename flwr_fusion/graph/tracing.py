"""Tracing: from torch-pruning's dependency graph to channel groups of state-dict tensors."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flwr_fusion.errors import FusionError
from flwr_fusion.graph.checking import call_order
from flwr_fusion.graph.groups import ChannelGroup, Place
from flwr_fusion.networks import owner_of
from flwr_fusion.observe import call

# Operations that mix channels with other axes; torch-pruning takes them for element-wise ones.
_MIXING_OPERATIONS = ("bmm", "scaleddotproduct", "attention")
_ROOT_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)
_VECTOR_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)
_NORMALISED_ACROSS_CHANNELS = (nn.LayerNorm, nn.GroupNorm)


def trace_groups(model: nn.Module, inputs: Any) -> tuple[list[ChannelGroup], frozenset[str]]:
    """Return a network's channel groups in forward order, and the layers that are called.

    The network is in evaluation mode, and all of its parameters take gradients.
    """
    order = call_order(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What torch-pruning gives up is found out below.
        graph, output_layers = _dependency_graph(model, inputs)
        groups = _without_conflicts(_GroupBuilder(model, graph, output_layers, order).groups())
    groups += _input_groups(model, groups, order)
    groups.sort(key=lambda group: _position_in_forward(group, order))
    layers = {name for name, m in model.named_modules() if isinstance(m, _ROOT_LAYERS)}
    return groups, frozenset(layers & order.keys())


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
        with torch.enable_grad():
            graph.build_dependency(
                model,
                example_inputs=inputs,
                forward_fn=call,
                output_transform=remember_roots,
                verbose=False,
            )
    except Exception as error:
        raise FusionError(
            f"the channels of {type(model).__name__} cannot be traced: torch-pruning fails on one "
            f"of its operations, perhaps a channel shuffle ({type(error).__name__}: {error})"
        ) from error
    longest = max(max(p.shape, default=1) for p in model.parameters())
    for node in graph.module2node.values():
        for dependency in node.dependencies:
            dependency.index_mapping = _BoundedMappings(dependency.index_mapping, longest)
    return graph, {module for module, node in graph.module2node.items() if node.grad_fn in roots}


class _BoundedMappings(list[Any]):
    """Torch-pruning's mappings of positions, which refuse to make more than any tensor has.

    Where a reshape does something else than it takes it for, as the shifted windows of Swin, every
    turn of a residual stream multiplies the positions, without an end.
    """

    def __init__(self, mappings: Iterable[Any], longest: int) -> None:
        super().__init__(mappings)
        self._longest = longest

    def __iter__(self) -> Iterator[Any]:
        return (mapping and partial(self._bounded, mapping) for mapping in super().__iter__())

    def _bounded(self, mapping: Callable[[Any], list[Any]], positions: Any) -> list[Any]:
        mapped = mapping(positions)
        if len(mapped) > self._longest:
            raise IndexError(f"{len(mapped)} positions on an axis of at most {self._longest}")
        return mapped


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
        alone = _Traced(layer, is_output=True, channels=channels, positions=channels)
        reason = "the output of this layer cannot be traced"
        return [replace(group, fixed_because=reason) for group in self._split([alone])]

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
        placed = []
        for number, *_ in kind:
            place, positions_of = places[number]
            positions = torch.tensor([sorted(positions_of[c]) for c in channels])
            placed.append(replace(place, positions=positions))
        named = [p for p in placed if p.writes] or placed
        first = min(named, key=lambda p: self.order.get(owner_of(p.tensor), len(self.order)))
        name = owner_of(first.tensor)
        return ChannelGroup(name, len(channels), tuple(placed), fixed_because, normalised)

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
            blocks = (
                positions_of
                if writes
                else _blocks(positions_of, length, self._channels_flattened(item.module))
            )
            places.append((Place(tensor, axis, nothing, writes), blocks))
        return places

    def _channels_flattened(self, layer: Any) -> int:
        """Return the width of the activation that is reshaped before a layer reads it.

        Concatenated channels count together; 0 where nothing is reshaped.
        """
        pending = [(node, False) for node in self.graph.module2node[layer].inputs]
        seen: set[tuple[Any, bool]] = set()
        while pending:
            node, reshaped = pending.pop()
            if (node, reshaped) in seen:
                continue
            seen.add((node, reshaped))
            if node.type == tp.ops.OPTYPE.CONCAT:
                if reshaped:
                    return sum(size or 0 for size in node.module.concat_sizes or ())
            elif node.module in self.names:
                if reshaped:
                    return self.graph.get_out_channels(node.module) or 0
            else:
                reshaped = reshaped or node.type == tp.ops.OPTYPE.RESHAPE
                pending += [(before, reshaped) for before in node.inputs]
        return 0

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


def _out_axis(layer: nn.Module) -> int:
    """Return the axis of a layer's weight that indexes its outputs."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return int(layer.transposed and not _is_depthwise(layer))
    return int(isinstance(layer, nn.Embedding))


def _is_depthwise(module: nn.modules.conv._ConvNd) -> bool:
    return module.groups == module.in_channels == module.out_channels > 1


def _blocks(
    positions_of: dict[int, list[int]], length: int, flattened: int
) -> dict[int, list[int]]:
    """Widen single positions to blocks of columns where a flatten was not traced.

    torch-pruning knows the flatten of four-dimensional activations only; after a Conv1d or Conv3d
    it leaves one position per channel although each of the ``flattened`` channels became
    ``length / flattened`` columns.
    """
    single = all(len(positions) == 1 for positions in positions_of.values())
    if not single or not flattened or length % flattened:
        return positions_of
    block = length // flattened
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
