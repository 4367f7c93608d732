"""What a client measured, brought to the layers of another architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from flwr_fusion.depth.layer_matching import StructuredNetwork
from flwr_fusion.depth.structure import Stage, Unit
from flwr_fusion.networks import key_of
from flwr_fusion.report import StageMatch
from flwr_fusion.statistics.moments import LayerStatistics, Statistics


def statistics_in_layers_of(
    target: StructuredNetwork,
    client: StructuredNetwork,
    matches: Sequence[StageMatch],
    statistics: Statistics,
) -> dict[str, LayerStatistics]:
    """Return a client's statistics as those of its network in the target's layers.

    Merged layers read what the first of them read. The inputs of an added linear layer are those
    of the layer behind it; of other added layers nothing is known.
    """
    renamed = dict(zip(client.structure.rest, target.structure.rest, strict=True))
    result: dict[str, LayerStatistics] = {}
    stages = zip(matches, client.structure.stages, target.structure.stages, strict=True)
    first_merged: Unit | None = None
    for match, ours, theirs in stages:
        counterparts = dict(match.pairs)
        for number, unit in enumerate(ours.units):
            if number not in counterparts:
                first_merged = first_merged or (None if unit.is_block else unit)
                continue
            counterpart = theirs.units[counterparts[number]]
            renamed |= _names(unit, counterpart, statistics)
            if first_merged is not None:
                renamed.pop(unit.layer, None)
                result |= _merged(first_merged, unit, counterpart, client, statistics)
                first_merged = None
        result |= _added(match, ours, theirs, client, statistics)
    moved = {renamed[name]: s for name, s in statistics.items() if name in renamed}
    return moved | result


def _names(unit: Unit, counterpart: Unit, statistics: Statistics) -> dict[str, str]:
    pairs = list(zip(unit.modules, counterpart.modules, strict=True))
    inside = {
        name: b + name[len(a) :]
        for a, b in pairs
        for name in statistics
        if f"{name}.".startswith(f"{a}.")
    }
    return dict(pairs) | inside


def _merged(
    first: Unit, last: Unit, counterpart: Unit, client: StructuredNetwork, statistics: Statistics
) -> dict[str, LayerStatistics]:
    keys = (key_of(unit.layer, "weight") for unit in (first, last))
    kernels = [client.model.state_dict()[key].shape[2:] for key in keys]
    if first.layer not in statistics or last.layer not in statistics or kernels[0] != kernels[1]:
        return {}
    inputs = statistics[first.layer]
    merged = replace(statistics[last.layer], second=inputs.second, mean=inputs.mean)
    return {counterpart.layer: merged}


def _added(
    match: StageMatch, ours: Stage, theirs: Stage, client: StructuredNetwork, statistics: Statistics
) -> dict[str, LayerStatistics]:
    """Return the statistics of added linear layers, which give back what the next layer reads."""
    layers = [unit.layer for stage in client.structure.stages for unit in stage.units]
    present = {b: ours.units[a] for a, b in match.pairs}
    result = {}
    for number, unit in enumerate(theirs.units):
        before = [present[b] for b in present if b < number]
        if number in present or not before or unit.is_block or unit.modules[1:]:
            continue
        following = layers[layers.index(before[-1].layer) + 1 :][:1]
        read = statistics.get(following[0]) if following else None
        width = _outputs(client.model, before[-1])
        if read is None or read.second is None or read.mean is None or len(read.mean) != width:
            continue
        variance = read.second.diagonal(dim1=1, dim2=2).flatten() - read.mean.square()
        result[unit.layer] = LayerStatistics(
            read.second, read.mean, read.mean, variance.clamp(min=0)
        )
    return result


def _outputs(model: nn.Module, unit: Unit) -> int:
    layer = model.get_submodule(unit.layer)
    return int(layer.out_features) if isinstance(layer, nn.Linear) else -1
