"""An architecture with other widths: sizes of tensors and of the modules that own them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from flwr_fusion.graph.groups import ChannelGraph, ChannelGroup
from flwr_fusion.networks import copied, key_of


def group_widths(graph: ChannelGraph, state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many channels each group has in a network of other widths.

    The architecture's own number where no tensor of the state dict tells.
    """
    return {
        group.name: min(
            _widths(group, graph, state) or _shares(group, graph, state), default=group.size
        )
        for group in graph.groups
    }


def _widths(group: ChannelGroup, graph: ChannelGraph, state: Mapping[str, Tensor]) -> list[int]:
    """Return the group's number of channels in every tensor of which it fills an axis."""
    return [
        state[place.tensor].shape[place.axis] // place.block
        for place in group.places
        if place.tensor in state
        and place.positions.numel() == graph.shapes[place.tensor][place.axis]
    ]


def _shares(group: ChannelGroup, graph: ChannelGraph, state: Mapping[str, Tensor]) -> list[int]:
    """Return the widths of a GroupNorm's group, which has the same share of every axis."""
    if not group.normalised:
        return []
    return [
        state[place.tensor].shape[place.axis] * group.size // graph.shapes[place.tensor][place.axis]
        for place in group.places
        if place.tensor in state and place.block == 1
    ]


def resized_shape(name: str, graph: ChannelGraph, widths: Mapping[str, int]) -> list[int]:
    """Return the shape of a tensor in a network of other widths."""
    shape = list(graph.shapes[name])
    for group in graph.groups:
        for place in group.places:
            if place.tensor == name:
                shape[place.axis] += (widths[group.name] - group.size) * place.block
    return shape


def with_own_widths(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a network with tensors of other widths, its modules' sizes set to fit."""
    network = copied(model)
    replaced: dict[int, nn.Parameter] = {}
    for name, module in network.named_modules():
        for kind, parameter in module._parameters.items():
            if parameter is None:
                continue
            value = state[key_of(name, kind)].to(parameter).clone()
            fresh = nn.Parameter(value, parameter.requires_grad)
            # Tied parameters stay one.
            module._parameters[kind] = replaced.setdefault(id(parameter), fresh)
        for kind, buffer in module._buffers.items():
            if buffer is not None and key_of(name, kind) in state:
                module._buffers[kind] = state[key_of(name, kind)].to(buffer).clone()
        _set_sizes(module)
    return network


def _set_sizes(module: nn.Module) -> None:
    """Set the sizes that a module keeps beside its tensors."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        depthwise = module.groups == module.in_channels == module.out_channels > 1
        module.out_channels = module.weight.shape[0]
        module.groups = module.out_channels if depthwise else module.groups
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        sized = module.weight if module.affine else module.running_mean
        module.num_features = module.num_features if sized is None else len(sized)
    elif isinstance(module, nn.GroupNorm) and module.affine:
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        module.normalized_shape = tuple(module.weight.shape)
