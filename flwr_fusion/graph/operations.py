"""What operations do to channels: what many have in common, and the table of all.

An operation is seen as the dispatcher sees it, below modules and autograd: a linear layer is a
transposition and a matrix product, attention a few of them. What is not known here fixes the
channels that go into it; it is never guessed. `moving` and `computing` fill the table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from flwr_fusion.graph.labels import (
    MEETS_PLACED,
    Channels,
    Codes,
    Factor,
    Labels,
)
from flwr_fusion.observe import tensors_of

# Takes what it needs to know, the operation's arguments by name and its outputs' shapes.
Operation = Callable[["Operations", Mapping[str, Any], Sequence[tuple[int, ...]]], Any]


class Operations:
    """Labels of operations' outputs, given those of their inputs.

    Parameters
    ----------
    channels : Channels
        All channels of the network.
    labels_of : callable
        Returns a tensor's labels.
    """

    def __init__(self, channels: Channels, labels_of: Callable[[Tensor], Labels]) -> None:
        self.channels = channels
        self.labels_of = labels_of
        self.name = ""
        self.where = ""
        self.normalised: list[Codes] = []
        self.reads: list[Codes] = []
        self.writes: list[Codes] = []

    # What several operations have in common.

    def join(self, shape: Sequence[int], labels: Iterable[Labels]) -> Labels:
        """Return the labels of what is computed position by position from broadcast tensors."""
        shape = tuple(shape)
        operands = [aligned(own, shape, self.channels) for own in labels]
        joined: list[Factor] = []
        pending = [(own, factor) for own in operands for factor in own.factors]
        weight = all(own.weight for own in operands)
        because = next((own.because for own in operands if own.because), "")
        for own, factor in pending:
            still = self._without_placed(factor, own, operands)
            while still is not None:
                meets = next((f for f in joined if f.channel_axes & still.channel_axes), None)
                if meets is None:
                    joined.append(still)
                    break
                joined.remove(meets)
                still = self._unified(meets, still, because)
        factors = tuple(sorted(joined, key=lambda f: f.axes))
        return Labels(shape, factors, weight, because)

    def _without_placed(
        self, factor: Factor, own: Labels, operands: Sequence[Labels]
    ) -> Factor | None:
        """Return what is left of a factor where other operands' positions must not move."""
        if factor.is_constant:
            return None if self._placed(factor.axes, own, operands) else factor
        kept = [a for a in factor.axes if a in factor.over or not self._placed([a], own, operands)]
        because = next((o.because for o in operands if o is not own and o.because), "")
        return self.channels.gathered(factor, kept, because or MEETS_PLACED)

    def _placed(self, axes: Sequence[int], own: Labels, operands: Sequence[Labels]) -> bool:
        return any(
            other.shape[axis] > 1 and other.factor_of(axis) is None
            for axis in axes
            for other in operands
            if other is not own
        )

    def _unified(self, one: Factor, other: Factor, because: str) -> Factor | None:
        """Return the factor of two that share axes, after saying what that means."""
        if other.is_constant:
            return one
        if one.is_constant:
            return other
        common = set(one.axes) & set(other.axes)
        a = self.channels.gathered(one, common, because or MEETS_PLACED)
        b = self.channels.gathered(other, common, because or MEETS_PLACED)
        if a is None or b is None:
            return a or b
        codes = self.channels.unify(a.codes, b.codes, because or MEETS_PLACED)
        return Factor(a.axes, codes, a.over | b.over)

    def kept(
        self, labels: Labels, axes: Iterable[int], because: str, but: tuple[int, ...] = ()
    ) -> Labels:
        """Return labels whose channels other axes than these do not tell apart.

        A factor of exactly the axes ``but`` stays.
        """
        chosen = set(axes)
        gathered = (
            f if but and f.axes == but else self.channels.gathered(f, chosen, because)
            for f in labels.factors
        )
        return replace(labels, factors=tuple(f for f in gathered if f is not None))

    def reduced(self, labels: Labels, axes: Iterable[int], keepdim: bool) -> Labels:
        """Return the labels of what sums or the like over some axes leave."""
        over = {axis % len(labels.shape) for axis in axes} if labels.shape else set()
        self.normalised += [f.codes for f in labels.factors if f.channel_axes & over]
        labels = self._summed(labels, over)
        if keepdim:
            shape = [1 if a in over else size for a, size in enumerate(labels.shape)]
            return replace(labels, shape=tuple(shape))
        rest = [a for a in range(len(labels.shape)) if a not in over]
        position_of = {axis: n for n, axis in enumerate(rest)}
        return labels.at([labels.shape[axis] for axis in rest], position_of)

    def _summed(self, labels: Labels, over: Collection[int]) -> Labels:
        """Return labels without the channels that a sum over some axes takes together."""
        left = tuple(f for f in labels.factors if not f.channel_axes <= set(over))
        rest = [axis for axis in range(len(labels.shape)) if axis not in over]
        return self.kept(replace(labels, factors=left), rest, MEETS_PLACED)

    def fix_all(self, labels: Iterable[Labels], because: str) -> None:
        """Fix all channels of some tensors."""
        for own in labels:
            for factor in own.factors:
                self.channels.fix(factor.codes.ravel(), because)

    def product(
        self,
        one: Labels,
        other: Labels,
        over: tuple[int, int],
        batch: Sequence[tuple[int, int]] = (),
    ) -> Labels:
        """Return the labels of a matrix product, of the axes (batch, free of one, free of other).

        ``out[b.., i, j] = sum over k of one[b.., i, k] other[b.., k, j]``: the channels of k are
        the same on both sides.
        """
        sides = ((one, over[0], [a for a, _ in batch]), (other, over[1], [b for _, b in batch]))
        if one.shape[over[0]] == 1:  # Where it is alone, broadcasting would hide it.
            self._fix_alone(one.factor_of(over[0]), other.factor_of(over[1]), one, other)
        self._note_roles(one, over[0], other, over[1])
        ends = [self._end(*side) for side in sides]
        sizes = np.broadcast_shapes(ends[0].shape, ends[1].shape)
        summed = self._summed(self.join(sizes, ends), {len(batch)})
        shape = [max(one.shape[a], other.shape[b]) for a, b in batch]
        free = []
        for own, k, batch_axes in sides:
            position_of = {a: n for n, a in enumerate(batch_axes)}
            for axis in range(len(own.shape)):
                if axis != k and axis not in batch_axes:
                    position_of[axis] = len(shape)
                    shape.append(own.shape[axis])
            free.append((own, k, batch_axes, position_of))
        padded = replace(summed, shape=(*sizes[:-1], *[1] * (len(shape) - len(batch))))
        joined = self.join(shape, [padded, *(self._free(*side, len(shape)) for side in free)])
        # What a product of weights gives is no weight: the queries of learnt tokens.
        return replace(joined, weight=False)

    def _fix_alone(
        self, end: Factor | None, other_end: Factor | None, one: Labels, other: Labels
    ) -> None:
        for factor, opposite, labels in ((end, other_end, other), (other_end, end, one)):
            if factor is not None and opposite is None:
                self.channels.fix(factor.codes.ravel(), labels.because or MEETS_PLACED)

    def _end(self, own: Labels, k: int, batch_axes: Sequence[int]) -> Labels:
        """Return the labels of a factor's batch axes and of the axis that is summed over."""
        position_of = {a: n for n, a in enumerate((*batch_axes, k))}
        factors, free = [], set[int]()
        for factor in own.factors:
            if k in factor.axes:
                found = self.channels.gathered(factor, position_of, _PRODUCT)
                factors += [found] if found is not None else []
            elif set(factor.axes) <= set(batch_axes):
                factors.append(factor)
            else:
                free.update(factor.axes)
        # Batch axes whose channels differ along free axes as well come in with these.
        shape = [1 if a in free else own.shape[a] for a in position_of]
        return replace(own, factors=tuple(factors)).at(shape, position_of)

    @staticmethod
    def _free(
        own: Labels, k: int, batch_axes: Sequence[int], position_of: Mapping[int, int], count: int
    ) -> Labels:
        """Return the labels of a factor's axes that a product keeps, among the product's axes."""
        factors = [f for f in own.factors if k not in f.axes and not set(f.axes) <= set(batch_axes)]
        labelled = {axis for factor in factors for axis in factor.axes}
        shape = [1] * count
        for axis, position in position_of.items():
            if axis not in batch_axes or axis in labelled:
                shape[position] = own.shape[axis]
        return replace(own, factors=tuple(factors)).at(shape, position_of)

    def _note_roles(self, one: Labels, k: int, other: Labels, j: int) -> None:
        """Remember which axes of weights read channels, and which write them."""
        if one.weight != other.weight:
            weight, axis = (one, k) if one.weight else (other, j)
            for factor in weight.factors:
                (self.reads if axis in factor.axes else self.writes).append(factor.codes.ravel())

    def apart(self, labels: Labels, axis: int) -> Labels:
        """Return labels in which an axis has a factor of its own."""
        factor = labels.factor_of(axis)
        if factor is None or factor.axes == (axis,):
            return labels
        alone = self.channels.gathered(factor, [axis], MEETS_PLACED)
        rest = tuple(f for f in labels.factors if f is not factor)
        return replace(labels, factors=(*rest, *([alone] if alone else [])))

    def vector(self, labels: Labels, axis: int) -> Labels:
        """Return the labels of one axis, as of a vector."""
        factor = self.apart(labels, axis).factor_of(axis)
        factors = () if factor is None else (Factor((0,), factor.codes),)
        return replace(labels, shape=(labels.shape[axis],), factors=factors)

    def along(self, vector: Labels, axis: int, count: int) -> Labels:
        """Return the labels of a vector that stands along one of so many axes."""
        shape = [vector.shape[0] if a == axis else 1 for a in range(count)]
        return vector.at(shape, {0: axis})


_PRODUCT = "it is inside a product"


def with_axes(labels: Labels, count: int) -> Labels:
    """Return labels of a tensor with so many axes, new ones of size one before the others."""
    new = count - len(labels.shape)
    position_of = {axis: axis + new for axis in range(len(labels.shape))}
    return labels.at((*(1,) * new, *labels.shape), position_of)


def aligned(labels: Labels, shape: tuple[int, ...], channels: Channels) -> Labels:
    """Return labels with the axes that broadcasting gives a tensor."""
    placed = with_axes(labels, len(shape))
    factors = []
    for factor in placed.factors:
        left = factor
        for axis in factor.axes:
            left = left.without(axis, 0) if placed.shape[axis] != shape[axis] else left
        if left.axes:
            factors.append(left)
        else:  # One channel for many positions: a gate.
            channels.single_out(factor.codes.ravel())
    return replace(placed, factors=tuple(factors))


OPERATIONS: dict[str, Operation] = {}


def register(*names: str) -> Callable[[Operation], Operation]:
    """Note what says what operations of some names do."""

    def add(operation: Operation) -> Operation:
        OPERATIONS.update(dict.fromkeys(names, operation))
        return operation

    return add


def pointwise(op: Operations, args: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> Any:
    """Label what is computed position by position."""
    return [op.join(shape, [op.labels_of(t) for t in tensors_of(args)]) for shape in shapes]


def unknown(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    """Fix what goes into an operation that is not known."""
    because = f"goes through {op.name}" + (f" in '{op.where}'" if op.where else "")
    labels = [op.labels_of(t) for t in tensors_of(args)]
    op.fix_all(labels, because)
    return [Labels(shape, (), all(own.weight for own in labels), because) for shape in shapes]


def only_first(labels: Labels, shapes: Sequence[tuple[int, ...]]) -> list[Labels]:
    """Return labels of the first output alone; the others are statistics and the like."""
    return [labels, *(Labels(shape) for shape in shapes[1:])]
