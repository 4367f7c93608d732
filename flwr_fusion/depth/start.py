"""One start for architectures of different depth and width, so that their channels correspond."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flwr_fusion.depth.balance import DepthAligned, align_depth, corresponding_tensors
from flwr_fusion.depth.layer_matching import LayerMatching, StructuredNetwork, match_stages
from flwr_fusion.depth.merging import merged_layer
from flwr_fusion.depth.resize import group_widths, resized_shape, with_own_widths
from flwr_fusion.depth.structure import LAYERS, trace_family
from flwr_fusion.errors import FusionError, check_number
from flwr_fusion.gains import with_gains
from flwr_fusion.graph.groups import ChannelGraph, ChannelGroup, verified_graph
from flwr_fusion.graph.outputs import is_close, output_vector, random_inputs, random_state
from flwr_fusion.maps import Correspondence, Maps, Selection, map_tensor
from flwr_fusion.networks import (
    copied,
    depth_and_size,
    detached_state,
    owner_of,
    squared_norm,
    with_state,
)
from flwr_fusion.observe import moved_to
from flwr_fusion.products import in_fused_rank
from flwr_fusion.report import StageMatch


def common_start(
    architectures: Mapping[str, nn.Module], *, example_inputs: Any, noise: float = 0.3
) -> dict[str, nn.Module]:
    """Give networks of different depth and width one start: all compute nearly the same function.

    The shallowest network at the smallest widths is the core. Every architecture starts as the
    core with layers that do nothing added and every channel repeated (Chen et al. 2016), plus
    `noise` times its own weights, less what the core would see of them, so that repeated channels
    can grow apart. Trained from there, a channel of one network has its counterparts in all
    others, which fusion in later rounds needs: networks that start apart have none.

    Parameters
    ----------
    architectures : mapping of str to nn.Module
        Freshly initialised networks by name. Not modified.
    example_inputs : Tensor, tuple or dict
        What all of them are called with.
    noise : float
        Share of an architecture's own weights, non-negative; 0: repeated channels stay equal for
        ever, and a wide network learns no more than the core.

    Returns
    -------
    dict of str to nn.Module
        New networks by the same names.

    Raises
    ------
    FusionError
        If the networks are of different families, or cannot be widened or deepened exactly.

    References
    ----------
    Chen, Goodfellow & Shlens, "Net2Net", ICLR 2016, sections 2.2 and 2.3; the noise that the core
    does not see and the scale of repeated channels are not in the paper.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import flwr_fusion as ff
    >>> wide = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> narrow = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> x = torch.randn(5, 4)
    >>> start = ff.common_start({"wide": wide, "narrow": narrow}, example_inputs=x, noise=0)
    >>> bool(torch.allclose(start["wide"](x), start["narrow"](x), atol=1e-6))
    True
    """
    if not isinstance(architectures, Mapping) or not architectures:
        raise FusionError("architectures must be networks by name, at least one")
    for name, model in architectures.items():
        squared_norm(detached_state(model), f"architecture '{name}'")
    check_number("noise", noise, 0)
    shallowest = min(architectures.values(), key=depth_and_size)
    family = _family(architectures, shallowest, example_inputs)
    core = _core(shallowest, family, example_inputs)
    result = {}
    for name, member in zip(architectures, family, strict=True):
        try:
            result[name] = _grown(core, member, example_inputs, noise)
        except FusionError as error:
            raise FusionError(f"architecture '{name}': {error}") from error
    return result


def _family(
    architectures: Mapping[str, nn.Module], shallowest: nn.Module, example_inputs: Any
) -> list[_Member]:
    """Return all architectures, with their depth structures where one is of another depth."""
    models = list(architectures.values())
    keys = shallowest.state_dict().keys()
    if all(model.state_dict().keys() == keys for model in models):
        return [_Member(model, shallowest, (), example_inputs) for model in models]
    shallow, *structures = trace_family([shallowest, *models], example_inputs)
    reference = StructuredNetwork(shallowest, shallow, "the shallowest")
    members = []
    for (name, model), structure in zip(architectures.items(), structures, strict=True):
        network = StructuredNetwork(model, structure, f"architecture '{name}'")
        members.append(_Member(model, shallowest, (reference, network), example_inputs))
    return members


class _Member:
    """An architecture, and which of its layers correspond to the shallowest one's."""

    def __init__(
        self,
        model: nn.Module,
        shallowest: nn.Module,
        structured: tuple[StructuredNetwork, ...],
        example_inputs: Any,
    ) -> None:
        self.model, self.graph = model, verified_graph(model, example_inputs)
        self._shallow_graph = verified_graph(shallowest, example_inputs)
        self.matches: tuple[StageMatch, ...] = ()
        if structured and model.state_dict().keys() != shallowest.state_dict().keys():
            self._shallow, self._own = structured
            layers = LayerMatching(cost="width")
            self.matches = match_stages(self._shallow, self._own, layers, None)

    def in_own_layers(self, core: nn.Module) -> DepthAligned:
        """Return a network with the shallowest one's layers in the architecture's layers."""
        if not self.matches:
            return DepthAligned(core, frozenset())
        client = replace(self._shallow, model=core)
        return align_depth(
            client,
            self._own,
            self.graph,
            self.matches,
            lambda units: merged_layer(units, core, None, "linear"),
        )

    def widths(self) -> dict[str, int]:
        """Return how many channels the shallowest one's groups have in the architecture."""
        turned = [
            StageMatch(m.target_units, m.client_units, tuple((b, a) for a, b in m.pairs))
            for m in self.matches
        ]
        state = (
            corresponding_tensors(self._own, self._shallow, turned)
            if self.matches
            else self.model.state_dict()
        )
        return group_widths(self._shallow_graph, state)

    def room_behind(self) -> dict[str, int]:
        """Return for layers of the shallowest the least width of those added behind them."""
        room: dict[str, int] = {}
        for match in self.matches:
            counterparts = dict(match.pairs)
            for number, name in enumerate(match.client_units):
                if number not in counterparts:
                    continue
                added = match.target_units[counterparts[number] + 1 : counterparts.get(number + 1)]
                layers = [self.model.get_submodule(unit) for unit in added]
                widths = [len(m.weight) for m in layers if isinstance(m, LAYERS)]
                if widths:
                    room[name] = min(widths)
        return room


def _core(shallowest: nn.Module, family: Sequence[_Member], example_inputs: Any) -> nn.Module:
    """Return the shallowest network, every channel group as small as the smallest network's.

    A layer that is added behind others gives back what they give, so it must be as wide.
    """
    graph = verified_graph(shallowest, example_inputs)
    widths = {group.name: group.size for group in graph.groups}
    for member in family:
        theirs, room = member.widths(), member.room_behind()
        for group in graph.groups:
            layers = {owner_of(place.tensor) for place in group.places if place.writes}
            limits = [room[layer] for layer in layers & room.keys()]
            widths[group.name] = min(widths[group.name], theirs[group.name], *limits)
    state = {
        name: _first(tensor, resized_shape(name, graph, widths))
        for name, tensor in detached_state(shallowest).items()
    }
    return with_own_widths(shallowest, state)


def _first(tensor: Tensor, shape: list[int]) -> Tensor:
    """Return a tensor's first channels, at the scale of a layer with fewer inputs."""
    part = tensor[tuple(slice(size) for size in shape)].clone()
    if tensor.dim() > 1 and tensor.is_floating_point():
        part *= (tensor[0].numel() / part[0].numel()) ** 0.5
    return part


def _grown(core: nn.Module, member: _Member, example_inputs: Any, noise: float) -> nn.Module:
    """Return a network that computes the core's function in its own architecture, plus noise."""
    growth = _Growth(core, member, example_inputs)
    drawn, state = detached_state(member.model), growth.grow(core)
    quiet = growth.absent | growth.correspondence.factors
    quiet |= {name for name, tensor in state.items() if not bool(tensor.any())}
    noisy = {
        name: tensor
        + noise * (drawn[name] - _seen_by_core(drawn[name], name, growth.graph, growth.maps))
        for name, tensor in state.items()
        # The last tensors of blocks that do nothing are zero and stay so.
        if name not in quiet and tensor.dim() > 1 and tensor.is_floating_point()
    }
    return with_state(member.model, {**state, **noisy})


class _Growth:
    """How the core's channels and layers become those of an architecture."""

    def __init__(self, core: nn.Module, member: _Member, example_inputs: Any) -> None:
        self.member, self.graph = member, member.graph
        deep = member.in_own_layers(core)
        self.absent = deep.absent
        correspondence = Correspondence(self.graph, verified_graph(deep.model, example_inputs))
        self.correspondence = with_gains(correspondence)
        self.maps = {
            g.name: Selection(torch.arange(g.fused_size) % g.client_size, g.client_size)
            for g in self.correspondence.free_groups
        }
        # At weights drawn at random: a head that starts at zero would hide any change.
        generator = torch.Generator().manual_seed(0)
        drawn = with_state(core, random_state(core, generator)).eval()
        inputs = random_inputs(moved_to(core, example_inputs), generator)
        expected = output_vector(drawn, drawn.state_dict(), inputs)
        evaluated = copied(member.model).eval()
        own_inputs = moved_to(evaluated, inputs)
        for self._scaled in (True, False):
            if is_close(output_vector(evaluated, self.grow(drawn), own_inputs), expected):
                return
        raise FusionError("repeating channels or adding layers that do nothing changes its output")

    def grow(self, core: nn.Module) -> dict[str, Tensor]:
        """Return the state dict of the core's function in the architecture."""
        drawn = detached_state(self.member.model)
        state = detached_state(self.member.in_own_layers(core).model)
        repeated = {
            name: map_tensor(state[name], name, self.correspondence, self.maps).clone()
            for name in drawn
            if name not in self.correspondence.factors
        }
        for group in self.correspondence.linear:
            repeated |= in_fused_rank(group, state, self.correspondence, self.maps, drawn)
        repeated |= {name: drawn[name] for name in self.absent}
        # Scaling a channel needs activations that scale with it, as ReLU does.
        return _evenly_scaled(repeated, self.graph, self.maps) if self._scaled else repeated


def _evenly_scaled(
    state: Mapping[str, Tensor], graph: ChannelGraph, maps: Maps
) -> dict[str, Tensor]:
    """Scale repeated channels so that weights have the size that learning rates are made for.

    A channel that stands at c places is divided by sqrt(c) where it is written, and the weights
    that read it are multiplied: with plain copies they would be c times as small.
    """
    scaled = dict(state)
    for group in graph.groups:
        if group.name not in maps or not _is_written_by_layers_only(group, graph):
            continue
        copies = len(maps[group.name].coverage()) / maps[group.name].client_size
        for place in group.places:
            tensor = scaled[place.tensor].clone()
            rows = tensor.movedim(place.axis, 0)
            index = place.positions.flatten().to(tensor.device)
            rows[index] *= copies**-0.5 if place.writes else copies**0.5
            scaled[place.tensor] = tensor
    return scaled


def _is_written_by_layers_only(group: ChannelGroup, graph: ChannelGraph) -> bool:
    """Whether no norm and no bare parameter fixes the scale of a group's channels."""
    return all(owner_of(p.tensor) in graph.called_layers for p in group.places if p.writes)


def _seen_by_core(tensor: Tensor, name: str, graph: ChannelGraph, maps: Maps) -> Tensor:
    """Return a tensor with all copies of a channel replaced by their mean, along every axis."""
    for group in graph.groups:
        if group.name not in maps:
            continue
        for place in group.places:
            if place.tensor == name:
                # M (M^T M)^-1 M^T projects on what is equal in all copies: what the core sees.
                merge = maps[group.name].merge().T
                mean = (merge / merge.sum(1, keepdim=True)).T @ merge
                tensor = tensor.clone()
                rows = tensor.movedim(place.axis, 0)
                index = place.positions.to(tensor.device)
                rows[index] = torch.tensordot(mean.to(tensor), rows[index], dims=1)
    return tensor
