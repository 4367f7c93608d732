"""What two networks multiply the products of their linear groups by, LoRA's ``alpha / rank``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flwr_fusion.errors import FusionError
from flwr_fusion.graph.groups import ChannelGraph
from flwr_fusion.graph.outputs import in_precision, outputs, random_inputs, random_state
from flwr_fusion.maps import Correspondence, Linear, map_tensor
from flwr_fusion.precision import widest_for

# Gradients of networks that compute the same are parallel, up to the rounding of parts that the
# network computes in single precision.
_PARALLEL = 1 - 1e-6


def with_gains(correspondence: Correspondence) -> Correspondence:
    """Return a correspondence with what the client's network multiplies each product by.

    Relative to the fused network. Both get the same random values; of every linear group the first
    channel alone is written, and nothing reads it. There the gradient of an output by the weights
    that would read it is ``gain * g``, with the same ``g``.

    Raises
    ------
    FusionError
        If the gradients of a group are not parallel: the networks differ in more than a factor.
    """
    if not correspondence.linear:
        return correspondence
    ours, theirs = _states(correspondence)
    of_fused = _gradients(correspondence.fused, ours, correspondence)
    of_client = _gradients(correspondence.client, theirs, correspondence)
    return correspondence.with_scales(
        {
            group.name: _ratio(group, of_fused[group.name], of_client[group.name])
            for group in correspondence.linear
        }
    )


def _states(correspondence: Correspondence) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return values for the fused network and for the client's, at which to compare them.

    Channels that only one of them has are zero.
    """
    drawn = random_state(correspondence.client.model, torch.Generator().manual_seed(0))
    linear = {group.name for group in correspondence.linear}
    back = Correspondence(correspondence.client, correspondence.fused, linear=linear)
    ours = _moved(drawn, correspondence)
    return ours, _moved(ours, back)


def _moved(state: Mapping[str, Tensor], correspondence: Correspondence) -> dict[str, Tensor]:
    """Return values at the same places of another network; of factors the first channel alone."""
    identity = correspondence.identity()
    moved = {name: map_tensor(t, name, correspondence, identity) for name, t in state.items()}
    for group in correspondence.linear:
        for (name, axis), segment in group.places.items():
            shape = list(moved[name].shape)
            shape[axis] = correspondence.fused.shapes[name][axis]
            values = moved[name].new_zeros(shape)
            if segment.writes:
                first = moved[name].movedim(axis, 0)[segment.client_positions[0]]
                values.movedim(axis, 0)[segment.fused_positions[0]] = first
            moved[name] = values
    return moved


def _gradients(
    graph: ChannelGraph, values: Mapping[str, Tensor], correspondence: Correspondence
) -> dict[str, Tensor]:
    """Return for each linear group the gradient of an output by what reads its first channel."""
    generator = torch.Generator().manual_seed(1)
    precise = widest_for(values.values())
    inputs = in_precision(random_inputs(graph.example_inputs, generator), precise)
    state = in_precision(dict(values), precise)
    is_fused = graph is correspondence.fused
    places = [
        (group.name, name, axis, s.fused_positions if is_fused else s.client_positions)
        for group in correspondence.linear
        for (name, axis), s in group.places.items()
        if not s.writes
    ]
    leaves = {name: state[name].clone().requires_grad_() for _, name, _, _ in places}
    with torch.enable_grad():
        found = outputs(graph.model, {**state, **leaves}, inputs)
        total = torch.zeros((), dtype=precise)
        for tensor in found:
            weights = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            total = total + (tensor * weights.to(tensor)).sum().cpu()
    gradients = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    identity = correspondence.identity()
    parts: dict[str, list[Tensor]] = {}
    for group, name, axis, positions in places:
        gradient = gradients[name]
        if not is_fused:
            gradient = map_tensor(gradient, name, correspondence, identity)
        row = gradient.movedim(axis, 0)[positions[0]]
        parts.setdefault(group, []).append(row.flatten())
    return {group: torch.cat(rows) for group, rows in parts.items()}


def _ratio(group: Linear, ours: Tensor, theirs: Tensor) -> float:
    product, size = float(ours @ theirs), float(ours.norm())
    if size > 0 and product > _PARALLEL * size * float(theirs.norm()):
        return product / size**2
    raise FusionError(
        f"what reads the linear group '{group.name}' computes something else than the target's"
    )
