"""Balancing depths: a network in the layers of a deeper or a shallower architecture.

No module is added or taken away: a depth-aligned network is the other architecture with the
network's own widths, filled with its tensors, with layers that do nothing, and with merged layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flwr_fusion.depth.layer_matching import StructuredNetwork
from flwr_fusion.depth.resize import group_widths, resized_shape, with_own_widths
from flwr_fusion.depth.structure import Unit
from flwr_fusion.errors import FusionError
from flwr_fusion.graph.groups import ChannelGraph
from flwr_fusion.networks import key_of, module_of
from flwr_fusion.report import StageMatch

_BATCHNORMS = nn.modules.batchnorm._BatchNorm

Merge = Callable[[Sequence[Unit]], tuple[Tensor, Tensor]]
"""Returns weight and bias of one layer in the place of several."""


@dataclass(frozen=True)
class DepthAligned:
    """A network in the layers of another architecture.

    Parameters
    ----------
    model : nn.Module
        The other architecture with the network's own widths.
    absent : frozenset of str
        Keys of its state dict of which the network has nothing: the inside of residual blocks
        that were added and do nothing.
    """

    model: nn.Module
    absent: frozenset[str]


def align_depth(
    client: StructuredNetwork,
    target: StructuredNetwork,
    graph: ChannelGraph,
    matches: Sequence[StageMatch],
    merge: Merge,
) -> DepthAligned:
    """Bring a network into the layers of another architecture, keeping its own widths.

    Where the target is deeper, layers that do nothing are added: an identity matrix or Dirac
    kernel, an identity BatchNorm, a residual block whose branch is zero. That is exact where an
    activation applied twice is the activation applied once. Where it is shallower, a layer is
    merged into the next one and a residual block left out. (Nguyen et al., section 3.2.)
    """
    state = corresponding_tensors(client, target, matches)
    _merge_layers(client, target, matches, state, merge)
    absent = _add_units(target, matches, graph, state)
    return DepthAligned(with_own_widths(target.model, state), frozenset(absent))


def corresponding_tensors(
    client: StructuredNetwork, target: StructuredNetwork, matches: Sequence[StageMatch]
) -> dict[str, Tensor]:
    """Return the client's tensors under the keys of the target's corresponding units."""
    ours, theirs = client.model.state_dict(), target.model.state_dict()
    pairs = [
        (_owned(ours, a), _owned(theirs, b), a, b)
        for a, b in zip(client.structure.rest, target.structure.rest, strict=True)
    ]
    pairs += [
        (a.tensors(ours), b.tensors(theirs), a.name, b.name)
        for a, b in _pairs(client, target, matches)
    ]
    state: dict[str, Tensor] = {}
    for named, expected, name, counterpart in pairs:
        if named.keys() != expected.keys():
            raise FusionError(
                f"'{name}' has the tensors {sorted(named)}, its counterpart '{counterpart}' "
                f"{sorted(expected)}"
            )
        state |= {expected[relative]: ours[key].detach() for relative, key in named.items()}
    return state


def _owned(keys: Mapping[str, Tensor], module: str) -> dict[str, str]:
    return {key.rpartition(".")[2]: key for key in keys if module_of(key) == module}


def _pairs(
    client: StructuredNetwork, target: StructuredNetwork, matches: Sequence[StageMatch]
) -> Iterator[tuple[Unit, Unit]]:
    """Yield the client's unit and the target's, for all pairs."""
    stages = zip(matches, client.structure.stages, target.structure.stages, strict=True)
    for match, ours, theirs in stages:
        yield from ((ours.units[a], theirs.units[b]) for a, b in match.pairs)


def _merge_layers(
    client: StructuredNetwork,
    target: StructuredNetwork,
    matches: Sequence[StageMatch],
    state: dict[str, Tensor],
    merge: Merge,
) -> None:
    """Merge the client's layers without a counterpart into the next layer that has one."""
    counterparts = dict(_pairs(client, target, matches))
    waiting: list[Unit] = []
    for stage in client.structure.stages:
        for unit in stage.units:
            _check_can_follow(waiting, unit)
            if unit not in counterparts:
                waiting += [] if _is_left_out(unit) else [unit]
            elif waiting:
                merged = merge([*waiting, unit])
                _place(merged, counterparts[unit], unit, target.model, state)
                waiting = []


def _is_left_out(unit: Unit) -> bool:
    if unit.is_block and not unit.switches:
        raise FusionError(
            f"block '{unit.name}' does not pass its input on unchanged: it cannot be left out"
        )
    return unit.is_block


def _check_can_follow(waiting: Sequence[Unit], unit: Unit) -> None:
    if waiting and (waiting[-1].kind, waiting[-1].outputs) != (unit.kind, unit.outputs):
        raise FusionError(
            f"layer '{waiting[-1].name}' has no counterpart and cannot be merged into "
            f"'{unit.name}', which is of another type or size"
        )


def _place(
    merged: tuple[Tensor, Tensor],
    counterpart: Unit,
    unit: Unit,
    target: nn.Module,
    state: dict[str, Tensor],
) -> None:
    """Put a merged layer into its counterpart; a BatchNorm can take the place of a bias."""
    weight, bias = merged
    key = key_of(counterpart.layer, "weight")
    state[key] = weight.to(state[key])
    key = key_of(counterpart.layer, "bias")
    if key in state:
        state[key] = bias.to(state[key])
        return
    for name in counterpart.modules[1:]:
        key = key_of(name, "running_mean")
        if isinstance(target.get_submodule(name), _BATCHNORMS) and key in state:
            state[key] = state[key] - bias.to(state[key])
            return
    if bool(bias.any()):
        raise FusionError(f"layer '{unit.name}' has no bias to take that of the merged layers")


def _add_units(
    target: StructuredNetwork,
    matches: Sequence[StageMatch],
    graph: ChannelGraph,
    state: dict[str, Tensor],
) -> set[str]:
    """Add the target's units without a counterpart; return the keys of which nothing is known."""
    absent: set[str] = set()
    widths = group_widths(graph, state)
    for match, stage in zip(matches, target.structure.stages, strict=True):
        present = {b for _, b in match.pairs}
        for number, unit in enumerate(stage.units):
            if number in present:
                continue
            if unit.is_block:
                absent |= _add_block(unit, target.model, graph, widths, state)
            elif number:
                _add_layer(unit, stage.units[number - 1], target.model, state)
            else:
                following = stage.units[min(present)]
                size = state[key_of(following.layer, "weight")].shape[1]
                _add_layer(unit, None, target.model, state, size)
    return absent


def _add_block(
    unit: Unit,
    target: nn.Module,
    graph: ChannelGraph,
    widths: Mapping[str, int],
    state: dict[str, Tensor],
) -> set[str]:
    """Add a residual block whose branch is zero; return its keys that the client lacks."""
    if not unit.switches:
        raise FusionError(
            f"block '{unit.name}' does not pass its input on unchanged: it cannot be added"
        )
    like = target.state_dict()
    keys = set(unit.tensors(like).values())
    for key in keys:
        # All zero, so that the inside of the block says nothing when channels are compared.
        state[key] = like[key].new_zeros(resized_shape(key, graph, widths))
    return keys - set(unit.switches)


def _add_layer(
    unit: Unit,
    before: Unit | None,
    target: nn.Module,
    state: dict[str, Tensor],
    channels: int | None = None,
) -> None:
    """Add a layer, with its BatchNorm, that gives back its inputs."""
    if before is not None:
        channels = len(state[key_of(before.layer, "weight")])
    like = target.state_dict()
    key = key_of(unit.layer, "weight")
    kernel = like[key].shape[2:]
    groups = getattr(target.get_submodule(unit.layer), "groups", 1)
    if groups > 1:
        raise FusionError(f"layer '{unit.name}' is grouped: one that does nothing cannot be added")
    assert channels is not None
    weight = like[key].new_zeros(channels, channels, *kernel)
    state[key] = nn.init.dirac_(weight) if kernel else nn.init.eye_(weight)
    if key_of(unit.layer, "bias") in like:
        state[key_of(unit.layer, "bias")] = weight.new_zeros(channels)
    for name in unit.modules[1:]:
        norm = target.get_submodule(name)
        if not isinstance(norm, _BATCHNORMS) or norm.running_var is None:
            raise FusionError(
                f"layer '{unit.name}' has a {type(norm).__name__}: one that does nothing cannot "
                "be added"
            )
        state |= _identity_batchnorm(name, norm, before, state, weight.new_zeros(channels))


def _identity_batchnorm(
    name: str,
    norm: nn.modules.batchnorm._BatchNorm,
    before: Unit | None,
    state: Mapping[str, Tensor],
    zeros: Tensor,
) -> dict[str, Tensor]:
    """Return a BatchNorm that changes nothing, in evaluation mode and, nearly, in training.

    Its statistics are those of rectified normal variables with the mean and deviation that the
    BatchNorm of the layer before gives them.
    """
    mean, variance = zeros, zeros + 1 - norm.eps
    scale, shift = (_value(state, before, kind) for kind in ("weight", "bias"))
    if norm.affine and scale is not None and shift is not None:
        mean, variance = _rectified_moments(shift, scale.abs())
    tensors = {"running_mean": mean, "running_var": variance}
    if norm.affine:
        tensors |= {"weight": (variance + norm.eps).sqrt(), "bias": mean}
    if norm.num_batches_tracked is not None:
        tensors["num_batches_tracked"] = norm.num_batches_tracked.clone()
    return {key_of(name, kind): tensor for kind, tensor in tensors.items()}


def _value(state: Mapping[str, Tensor], unit: Unit | None, kind: str) -> Tensor | None:
    """Return a tensor of a unit's norm."""
    keys = [key_of(name, kind) for name in unit.modules[1:]] if unit is not None else []
    return next((state[key] for key in keys if key in state), None)


def _rectified_moments(mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of ``max(z, 0)`` for normal z."""
    # z ~ N(m, s^2), r = m / s: E z+ = m Phi(r) + s phi(r),
    # E (z+)^2 = (m^2 + s^2) Phi(r) + m s phi(r).
    ratio = mean / deviation.clamp(min=1e-12)
    below = 0.5 * (1 + torch.erf(ratio / math.sqrt(2)))
    density = torch.exp(-0.5 * ratio.square()) / math.sqrt(2 * math.pi)
    first = mean * below + deviation * density
    second = (mean.square() + deviation.square()) * below + mean * deviation * density
    return first, (second - first.square()).clamp(min=0)
