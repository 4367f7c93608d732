"""Ground costs that are kept while a sweep runs, and updated where maps have changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flwr_fusion.maps import Correspondence, Maps, Selection, axis_sources
from flwr_fusion.matching.costs import Norms, channel_rows, segments_of, weight_cost

# After so many updates a cost is computed anew, or their rounding would add up.
_UPDATES = 10
# Numbers of a tensor that are compared at a time, so that little memory is needed.
_BLOCK = 1 << 22


@dataclass
class _Kept:
    """A group's cost, before negative rounding is cut off, and the maps of its tensors' axes."""

    total: Tensor
    maps: dict[str, Maps]
    updates: int = 0


class KeptCosts:
    """Ground costs by weights between one client's groups and a reference's.

    Given the maps, a group's cost is linear in the client's other axes. So where few channels of
    other groups have changed places, ``C += -2 <A_S / |A|, (B'_S - B_S) / |B|>`` over the changed
    positions S of each tensor is all that differs, with B and B' the client's tensor under the old
    and the new maps. The squared norms stay, as each client channel still counts once.

    Parameters
    ----------
    reference, client : mapping of str to Tensor
        State dicts.
    correspondence : Correspondence
        Positions in both networks.
    norms : mapping of str to (float, float)
        The tensors by which channels are compared, with their norms in reference and client.
    needed : mapping of str to mapping of str to set of str
        For each group and tensor of it: the groups that its other axes carry.
    """

    def __init__(
        self,
        reference: Mapping[str, Tensor],
        client: Mapping[str, Tensor],
        correspondence: Correspondence,
        norms: Norms,
        needed: Mapping[str, Mapping[str, set[str]]],
    ) -> None:
        self.reference = reference
        self.client = client
        self.correspondence = correspondence
        self.norms = norms
        self.needed = needed
        self._kept: dict[str, _Kept] = {}

    def cost(self, group: str, maps: Maps, tensors: Iterable[str]) -> Tensor:
        """Return a group's ground cost over some of its tensors, as `weight_cost` does."""
        read: dict[str, Maps] = {
            name: {g: maps[g] for g in self.needed[group][name]} for name in tensors
        }
        kept = self._kept.get(group)
        if kept is None or kept.updates >= _UPDATES or not self._updated(group, kept, read, maps):
            kept = _Kept(self._full(group, maps, read), read)
            self._kept[group] = kept
        return kept.total.clamp(min=0)

    def _full(self, group: str, maps: Maps, tensors: Iterable[str]) -> Tensor:
        norms = {name: self.norms[name] for name in tensors}
        return weight_cost(group, self.reference, self.client, self.correspondence, maps, norms)

    def _updated(self, group: str, kept: _Kept, read: dict[str, Maps], maps: Maps) -> bool:
        """Bring a kept cost to new maps and more tensors; return whether that is possible."""
        if not kept.maps.keys() <= read.keys():
            return False
        changed = [
            name
            for name, before in kept.maps.items()
            if any(read[name][other] is not before[other] for other in before)
        ]
        involved = [
            m for name in changed for m in (*kept.maps[name].values(), *read[name].values())
        ]
        if not all(isinstance(m, Selection) and m.is_injection for m in involved):
            return False
        for name in changed:
            self._update(group, name, kept, read[name])
        new = read.keys() - kept.maps.keys()
        if new:
            kept.total += self._full(group, maps, [name for name in read if name in new])
        kept.maps = read
        kept.updates += bool(changed)
        return True

    def _update(self, group: str, name: str, kept: _Kept, after: Maps) -> None:
        """Add to a kept cost what one tensor's changed positions make of it."""
        norm, client_norm = self.norms[name]
        for axis, segment in segments_of(group, name, self.correspondence):
            for ours, old, new in self._changed_parts(name, axis, kept.maps[name], after):
                positions = segment.client_positions
                theirs = channel_rows(new, axis, positions) - channel_rows(old, axis, positions)
                kept.total.addmm_(
                    channel_rows(ours, axis, segment.fused_positions),
                    theirs.to(kept.total).T,
                    alpha=-2 / (norm * client_norm),
                )

    def _changed_parts(
        self, name: str, kept_axis: int, before: Maps, after: Maps
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield parts of a tensor that together hold all positions whose maps differ.

        Each of the reference, of the client under the old maps and of the client under the new.
        """
        ours, client = self.reference[name], self.client[name]
        others = [axis for axis in self.correspondence.segments[name] if axis != kept_axis]
        sources = {
            axis: [
                axis_sources(name, axis, client.shape[axis], self.correspondence, maps)
                for maps in (before, after)
            ]
            for axis in others
        }
        if len(others) > 1:
            old, new = client, client
            for axis, (was, now) in sources.items():
                old, new = _taken(old, axis, was), _taken(new, axis, now)
            yield ours, old, new
            return
        [(axis, (was, now))] = sources.items()
        size = max(1, _BLOCK * client.shape[axis] // client.numel())
        for places in torch.split(torch.nonzero(was != now).flatten(), size):
            part = ours.index_select(axis, places.to(ours.device))
            yield part, _taken(client, axis, was[places]), _taken(client, axis, now[places])


def _taken(tensor: Tensor, axis: int, sources: Tensor) -> Tensor:
    """Return the positions of a tensor along an axis, zeros where there is none (-1)."""
    taken = tensor.index_select(axis, sources.clamp(min=0).to(tensor.device))
    nothing = torch.nonzero(sources < 0).flatten().to(tensor.device)
    return taken.index_fill_(axis, nothing, 0) if len(nothing) else taken
