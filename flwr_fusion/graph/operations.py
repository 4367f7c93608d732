"""What operations do to channels: for every operation of PyTorch that networks use, its labels.

An operation is seen as the dispatcher sees it, below modules and autograd: a linear layer is a
transposition and a matrix product, attention a few of them. What is not known here fixes the
channels that go into it; it is never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flwr_fusion.graph.labels import CONSTANT, PLACED, Channels, Codes, Factor, Labels, reshaped

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
        operands = [_aligned(own, shape, self.channels) for own in labels]
        joined: list[Factor] = []
        pending = [(own, factor) for own in operands for factor in own.factors]
        weight = all(own.weight for own in operands)
        because = next((own.because for own in operands if own.because), "")
        for own, factor in pending:
            still = self._without_placed(factor, own, operands, shape)
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
        self, factor: Factor, own: Labels, operands: Sequence[Labels], shape: tuple[int, ...]
    ) -> Factor | None:
        """Return what is left of a factor where other operands' positions must not move."""
        if (factor.codes == CONSTANT).all():
            return None if self._placed(factor.axes, own, operands) else factor
        kept = [a for a in factor.axes if a in factor.over or not self._placed([a], own, operands)]
        because = next((o.because for o in operands if o is not own and o.because), "")
        return self.channels.gathered(factor, kept, because or _PLACES)

    def _placed(self, axes: Sequence[int], own: Labels, operands: Sequence[Labels]) -> bool:
        return any(
            other.shape[axis] > 1 and other.factor_of(axis) is None
            for axis in axes
            for other in operands
            if other is not own
        )

    def _unified(self, one: Factor, other: Factor, because: str) -> Factor | None:
        """Return the factor of two that share axes, after saying what that means."""
        if (other.codes == CONSTANT).all():
            return one
        if (one.codes == CONSTANT).all():
            return other
        common = set(one.axes) & set(other.axes)
        a = self.channels.gathered(one, common, because or _PLACES)
        b = self.channels.gathered(other, common, because or _PLACES)
        if a is None or b is None:
            return a or b
        codes = self.channels.unify(a.codes, b.codes, because or _PLACES)
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
        rest = [a for a in range(len(labels.shape)) if a not in over]
        factors = []
        for factor in labels.factors:
            if factor.channel_axes <= over:
                continue
            found = self.channels.gathered(factor, rest, "")
            factors += [found] if found is not None else []
        labels = replace(labels, factors=tuple(factors))
        if keepdim:
            shape = [1 if a in over else size for a, size in enumerate(labels.shape)]
            return replace(labels, shape=tuple(shape))
        position_of = {axis: n for n, axis in enumerate(rest)}
        return labels.at([labels.shape[axis] for axis in rest], position_of)

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
        summed = self._without_last(self.join(sizes, ends))
        shape = [max(one.shape[a], other.shape[b]) for a, b in batch]
        free = []
        for own, k, batch_axes in sides:
            position_of = {a: n for n, a in enumerate(batch_axes)}
            for axis in range(len(own.shape)):
                if axis != k and axis not in batch_axes:
                    position_of[axis] = len(shape)
                    shape.append(own.shape[axis])
            free.append((own, k, batch_axes, position_of))
        padded = replace(summed, shape=(*summed.shape, *[1] * (len(shape) - len(batch))))
        joined = self.join(shape, [padded, *(self._free(*side, len(shape)) for side in free)])
        # What a product of weights gives is no weight: the queries of learnt tokens.
        return replace(joined, weight=False)

    def _fix_alone(
        self, end: Factor | None, other_end: Factor | None, one: Labels, other: Labels
    ) -> None:
        for factor, opposite, labels in ((end, other_end, other), (other_end, end, one)):
            if factor is not None and opposite is None:
                self.channels.fix(factor.codes.ravel(), labels.because or _PLACES)

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

    def _without_last(self, labels: Labels) -> Labels:
        """Return what a sum over the last axis leaves."""
        last = len(labels.shape) - 1
        factors = []
        for factor in labels.factors:
            if factor.axes == (last,):
                continue
            found = self.channels.gathered(factor, range(last), _PRODUCT)
            factors += [found] if found is not None else []
        return replace(labels, shape=labels.shape[:-1], factors=tuple(factors))

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
        alone = self.channels.gathered(factor, [axis], _PLACES)
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


_PLACES = "it meets positions that must not move"
_PRODUCT = "it is inside a product"


def _with_axes(labels: Labels, count: int) -> Labels:
    """Return labels of a tensor with so many axes, new ones of size one before the others."""
    new = count - len(labels.shape)
    position_of = {axis: axis + new for axis in range(len(labels.shape))}
    return labels.at((*(1,) * new, *labels.shape), position_of)


def _aligned(labels: Labels, shape: tuple[int, ...], channels: Channels) -> Labels:
    """Return labels with the axes that broadcasting gives a tensor."""
    placed = _with_axes(labels, len(shape))
    factors = []
    for factor in placed.factors:
        repeated = [n for n, a in enumerate(factor.axes) if placed.shape[a] != shape[a]]
        if len(repeated) < len(factor.axes):
            codes = factor.codes.squeeze(tuple(repeated))
            axes = tuple(a for n, a in enumerate(factor.axes) if n not in repeated)
            factors.append(Factor(axes, codes, factor.over & set(axes)))
        else:  # One channel for many positions: a gate.
            channels.single_out(factor.codes.ravel())
    return replace(placed, factors=tuple(factors))


OPERATIONS: dict[str, Operation] = {}


def _register(*names: str) -> Callable[[Operation], Operation]:
    def add(operation: Operation) -> Operation:
        OPERATIONS.update(dict.fromkeys(names, operation))
        return operation

    return add


def pointwise(op: Operations, args: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> Any:
    """Label what is computed position by position."""
    return [op.join(shape, [op.labels_of(t) for t in tensors_in(args)]) for shape in shapes]


def unknown(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    """Fix what goes into an operation that is not known."""
    because = f"goes through {op.name}" + (f" in '{op.where}'" if op.where else "")
    labels = [op.labels_of(t) for t in tensors_in(args)]
    op.fix_all(labels, because)
    return [Labels(shape, (), all(own.weight for own in labels), because) for shape in shapes]


def tensors_in(args: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors among an operation's arguments."""
    found: list[Tensor] = []
    for value in args.values():
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [v for v in value if isinstance(v, Tensor)]
    return found


@_register(
    "clone",
    "detach",
    "alias",
    "_to_copy",
    "contiguous",
    "lift_fresh",
    "lift_fresh_copy",
    "lift",
    "native_dropout",
    "dropout",
    "resolve_conj",
    "resolve_neg",
)
def _same(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    first = op.labels_of(tensors_in(args)[0])
    return [
        replace(first, shape=tuple(shape))
        if len(shape) == len(first.shape)
        else Labels(tuple(shape))
        for shape in shapes
    ]


@_register("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy")
def _view(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    return reshaped(op.labels_of(args["self"]), shapes[0], op.channels)


@_register("unsqueeze", "squeeze", "unsqueeze_", "squeeze_")
def _resized(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels, shape = op.labels_of(args["self"]), shapes[0]
    gone = [axis for axis, size in enumerate(labels.shape) if size > 1]
    here = [axis for axis, size in enumerate(shape) if size > 1]
    return labels.at(shape, dict(zip(gone, here, strict=True)))


@_register("permute", "transpose", "t", "numpy_T", "mT", "transpose_", "t_", "movedim", "swapaxes")
def _permute(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    count = len(labels.shape)
    order = list(range(count))
    if "dims" in args:
        order = [axis % count for axis in args["dims"]]
    elif "dim0" in args:
        a, b = args["dim0"] % count, args["dim1"] % count
        order[a], order[b] = b, a
    else:
        order = order[:-2] + order[-2:][::-1]
    return labels.at(shapes[0], {axis: n for n, axis in enumerate(order)})


@_register("expand", "expand_copy", "broadcast_to")
def _expand(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    shape = tuple(shapes[0])
    labels = _aligned(op.labels_of(args["self"]), shape, op.channels)
    copies = [
        Factor((axis,), np.full(size, CONSTANT))
        for axis, size in enumerate(shape)
        if size > 1 and labels.shape[axis] == 1
    ]
    return replace(labels, shape=shape, factors=(*labels.factors, *copies))


@_register("repeat", "tile")
def _repeat(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    shape = tuple(shapes[0])
    labels = _with_axes(op.labels_of(args["self"]), len(shape))
    for axis, size in enumerate(shape):
        if size != labels.shape[axis]:
            index = np.arange(size) % labels.shape[axis]
            labels = _taken(labels, axis, index)
    return labels


@_register("repeat_interleave")
def _repeat_interleave(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    return Labels(tuple(shapes[0]), (), True)


def _taken(labels: Labels, axis: int, index: NDArray[np.int64]) -> Labels:
    """Return the labels of chosen positions of an axis; one without channels has none then."""
    shape = [len(index) if a == axis else size for a, size in enumerate(labels.shape)]
    factors = []
    for factor in labels.factors:
        if axis in factor.axes:
            place = factor.axes.index(axis)
            codes = factor.codes.take(index, axis=place)
            if len(index) == 1 and len(factor.axes) > 1:  # One position is no axis of channels.
                left = tuple(a for a in factor.axes if a != axis)
                factors.append(
                    Factor(
                        left, codes.take([0], axis=place).squeeze(place), factor.over & set(left)
                    )
                )
            else:
                factors.append(replace(factor, codes=codes))
        else:
            factors.append(factor)
    if labels.shape[axis] == 1 and len(index) > 1:
        factors.append(Factor((axis,), np.full(len(index), CONSTANT)))
    return replace(labels, shape=tuple(shape), factors=tuple(factors))


def _without(labels: Labels, axis: int, position: int, channels: Channels) -> Labels:
    """Return the labels at one position of an axis."""
    factors = []
    for factor in labels.factors:
        if axis not in factor.axes:
            factors.append(factor)
            continue
        place = factor.axes.index(axis)
        codes = factor.codes.take([position], axis=place).squeeze(place)
        left = frozenset(factor.axes) - {axis}
        if left <= factor.over:
            channels.single_out(codes.reshape(-1))
        else:
            factors.append(Factor(tuple(sorted(left)), codes, factor.over & left))
    position_of = {a: a - (a > axis) for a in range(len(labels.shape)) if a != axis}
    shape = [size for a, size in enumerate(labels.shape) if a != axis]
    return replace(labels, factors=tuple(factors)).at(shape, position_of)


@_register("slice", "slice_copy")
def _slice(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    axis = args.get("dim", 0) % len(labels.shape)
    size = labels.shape[axis]
    end = args.get("end")
    chosen = slice(args.get("start"), None if end is None else end, args.get("step", 1))
    return _taken(labels, axis, np.arange(size)[chosen])


@_register("narrow", "narrow_copy")
def _narrow(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    axis = args["dim"] % len(labels.shape)
    start = int(args["start"])
    return _taken(labels, axis, np.arange(start, start + int(args["length"])))


@_register("select", "select_copy")
def _select(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    axis = args["dim"] % len(labels.shape)
    return _without(labels, axis, int(args["index"]) % labels.shape[axis], op.channels)


@_register(
    "split",
    "split_with_sizes",
    "chunk",
    "unsafe_split",
    "unsafe_chunk",
    "split_copy",
    "unsafe_split_with_sizes",
    "split_with_sizes_copy",
    "tensor_split",
)
def _split(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    axis = args.get("dim", 0) % len(labels.shape)
    result, first = [], 0
    for shape in shapes:
        result.append(_taken(labels, axis, np.arange(first, first + shape[axis])))
        first += shape[axis]
    return result


@_register("unbind", "unbind_copy")
def _unbind(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    axis = args.get("dim", 0) % len(labels.shape)
    return [_without(labels, axis, n, op.channels) for n in range(len(shapes))]


@_register("cat", "concat", "concatenate")
def _cat(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    parts = [op.labels_of(t) for t in args["tensors"] if t.numel() or t.dim() > 1]
    return op_cat(op, parts, args.get("dim", 0), tuple(shapes[0]))


def op_cat(op: Operations, parts: Sequence[Labels], dim: int, shape: tuple[int, ...]) -> Labels:
    """Return the labels of tensors that stand behind one another along an axis."""
    axis = dim % len(shape)
    factors: list[Factor] = []
    alone = [next((f for f in own.factors if f.axes == (axis,)), None) for own in parts]
    if any(factor is not None for factor in alone):
        codes = [
            np.full(own.shape[axis], PLACED) if factor is None else factor.codes
            for own, factor in zip(parts, alone, strict=True)
        ]
        factors.append(Factor((axis,), np.concatenate(codes)))
        parts = [op.kept(own, _other_axes(shape, axis), _PLACES, but=(axis,)) for own in parts]
    others = [
        replace(own, factors=tuple(f for f in own.factors if f.axes != (axis,))) for own in parts
    ]
    stacked = _stacked(others, axis)
    if stacked is None:
        flat = tuple(1 if a == axis else size for a, size in enumerate(shape))
        kept = [op.kept(own, _other_axes(shape, axis), _PLACES) for own in others]
        joined = [
            replace(own, shape=(*own.shape[:axis], 1, *own.shape[axis + 1 :])) for own in kept
        ]
        stacked = op.join(flat, joined).factors
    weight = all(own.weight for own in parts)
    because = next((own.because for own in parts if own.because), "")
    return Labels(shape, tuple(sorted((*stacked, *factors), key=lambda f: f.axes)), weight, because)


def _other_axes(shape: Sequence[int], axis: int) -> list[int]:
    return [a for a in range(len(shape)) if a != axis]


def _stacked(parts: Sequence[Labels], axis: int) -> tuple[Factor, ...] | None:
    """Return the factors of tensors that stand behind one another along an axis without channels.

    Their channels need not be the same; whatever reads them together says so. None where they are
    labelled along different axes.
    """
    own_axes = [{tuple(a for a in f.axes if a != axis): f for f in own.factors} for own in parts]
    if any(found.keys() != own_axes[0].keys() for found in own_axes):
        return None
    result = []
    for axes in own_axes[0]:
        found = [own[axes] for own in own_axes]
        if all(f.axes == axes and np.array_equal(f.codes, found[0].codes) for f in found):
            result.append(found[0])
            continue
        place = sum(a < axis for a in axes)
        repeated = [
            f.codes
            if axis in f.axes
            else np.repeat(np.expand_dims(f.codes, place), own.shape[axis], axis=place)
            for f, own in zip(found, parts, strict=True)
        ]
        spanned = (*axes[:place], axis, *axes[place:])
        over = frozenset().union(*(f.over for f in found)) | {axis}
        result.append(Factor(spanned, np.concatenate(repeated, axis=place), over))
    return tuple(result)


@_register("stack")
def _stack(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    shape = tuple(shapes[0])
    axis = args.get("dim", 0) % len(shape)
    parts = []
    for tensor in args["tensors"]:
        own = op.labels_of(tensor)
        position_of = {a: a + (a >= axis) for a in range(len(own.shape))}
        parts.append(own.at((*own.shape[:axis], 1, *own.shape[axis:]), position_of))
    return op_cat(op, parts, axis, shape)


@_register("constant_pad_nd")
def _pad(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels, pad, shape = op.labels_of(args["self"]), list(args["pad"]), tuple(shapes[0])
    count = len(shape)
    for n in range(len(pad) // 2):
        axis, before, after = count - 1 - n, pad[2 * n], pad[2 * n + 1]
        factor = labels.factor_of(axis)
        sizes = [shape[axis] if a == axis else s for a, s in enumerate(labels.shape)]
        if factor is None or not (before or after):
            labels = replace(labels, shape=tuple(sizes))
            continue
        widths = [(before, after) if a == axis else (0, 0) for a in factor.axes]
        inner = [slice(max(-b, 0), None if a >= 0 else a) for b, a in widths]
        grown = np.pad(
            factor.codes[tuple(inner)],
            [(max(b, 0), max(a, 0)) for b, a in widths],
            constant_values=CONSTANT,
        )
        rest = (f for f in labels.factors if f is not factor)
        labels = replace(labels, shape=tuple(sizes), factors=(replace(factor, codes=grown), *rest))
    return labels


@_register("mm", "dot", "vdot", "mv", "matmul")
def _mm(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    one, other = (op.labels_of(t) for t in tensors_in(args)[:2])
    return op.product(one, other, (len(one.shape) - 1, 0))


@_register("bmm")
def _bmm(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    one, other = (op.labels_of(t) for t in tensors_in(args)[:2])
    return op.product(one, other, (2, 1), [(0, 0)])


@_register("addmm", "addmv", "addbmm", "baddbmm", "_addmm_activation")
def _addmm(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    added, one, other = (op.labels_of(t) for t in tensors_in(args)[:3])
    batched = len(one.shape) == 3
    over = (len(one.shape) - 1, 1 if batched else 0)
    found = op.product(one, other, over, [(0, 0)] if batched else ())
    return op.join(shapes[0], [added, found])


@_register("addr", "ger", "outer")
def _outer(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    one, other = (op.labels_of(t) for t in tensors_in(args)[-2:])
    return op.join(
        shapes[0],
        [one.at((*one.shape, 1), {0: 0}), other.at((1, *other.shape), {0: 1})],
    )


@_register("linear")
def _linear(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    x, weight = op.labels_of(args["input"]), op.labels_of(args["weight"])
    found = op.product(x, weight, (len(x.shape) - 1, 1))
    bias = args.get("bias")
    return found if bias is None else op.join(shapes[0], [found, op.labels_of(bias)])


@_register(
    "convolution",
    "_convolution",
    "cudnn_convolution",
    "mkldnn_convolution",
    "convolution_overrideable",
    "conv1d",
    "conv2d",
    "conv3d",
)
def _convolution(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    x = args["input"] if "input" in args else args["self"]
    transposed, groups = bool(args.get("transposed")), int(args.get("groups", 1))
    data = op.kept(op.labels_of(x), (0, 1), "a convolution goes over it")
    weight = _plane(op, op.labels_of(args["weight"]))
    shape = tuple(shapes[0])
    batch = data.factor_of(0)
    if batch is not None and batch.axes != (0,):
        data = op.kept(data, (1,), "a convolution goes over it")
    read = 0 if transposed else 1
    inputs = op.vector(data, 1)
    if groups == 1:
        written = op.product(op.along(inputs, 1, 2), weight, (1, read)).factor_of(1)
    else:
        written = _grouped(op, inputs, weight, groups, transposed, data.shape[1], shape[1])
    rows = [] if written is None else [Factor((1,), written.codes)]
    kept = [f for f in data.factors if f.axes == (0,)]
    result = Labels(shape, (*kept, *rows), False, data.because)
    bias = args.get("bias")
    if bias is None:
        return result
    return op.join(shape, [result, op.along(op.labels_of(bias), 1, len(shape))])


def _plane(op: Operations, weight: Labels) -> Labels:
    """Return the labels of a kernel's channels, of its first two axes."""
    factors = []
    for factor in weight.factors:
        if set(factor.axes) & {0, 1}:
            found = op.channels.gathered(factor, (0, 1), _PLACES)
            factors += [found] if found is not None else []
        else:
            op.channels.fix(factor.codes.ravel(), "it is a kernel's position", only_if_used=True)
    return replace(weight, shape=weight.shape[:2], factors=tuple(factors))


def _grouped(
    op: Operations,
    inputs: Labels,
    weight: Labels,
    groups: int,
    transposed: bool,
    count_in: int,
    count_out: int,
) -> Factor | None:
    """Return the outputs' labels of a convolution in groups, which move as wholes.

    The layer's second axis, the channels inside of a group, keeps its order.
    """
    channels = op.channels
    rows = op.vector(weight, 0).factor_of(0)
    inner = weight.factor_of(1)
    if inner is not None and weight.shape[1] > 1:
        channels.fix(inner.codes.ravel(), "it is inside a convolution's groups", only_if_used=True)
    per_in, per_out = count_in // groups, count_out // groups
    data = inputs.factor_of(0)
    if data is None or rows is None:
        if rows is not None:
            channels.fix(rows.codes, inputs.because or _PLACES)
        if data is not None:
            channels.fix(data.codes, _PLACES)
        return rows if rows is not None and not transposed else None
    heads = channels.gathered(
        Factor((0, 1), data.codes.reshape(groups, per_in)), (0,) if per_in > 1 else (0, 1), _PLACES
    )
    assert heads is not None
    codes = heads.codes.reshape(groups, 1)
    channels.unify(rows.codes.reshape(groups, -1), codes, inputs.because or _PLACES)
    return Factor((0,), np.repeat(codes[:, 0], per_out))


@_register(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "_batch_norm_no_update",
    "_batch_norm_with_update",
    "batch_norm",
    "_batch_norm_with_update_functional",
    "native_instance_norm",
    "miopen_batch_norm",
)
def _batch_norm(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    first, *vectors = (op.labels_of(t) for t in tensors_in(args))
    shape = first.shape
    placed = [op.along(v, 1, len(shape)) for v in vectors]
    joined = op.join(shape, [first, *placed])
    return [joined if tuple(s) == shape else Labels(tuple(s)) for s in shapes]


@_register("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    first, *vectors = (op.labels_of(t) for t in tensors_in(args))
    count = len(args["normalized_shape"])
    over = range(len(first.shape) - count, len(first.shape))
    if vectors:
        op.normalised += [f.codes for f in first.factors if f.channel_axes & set(over)]
    else:
        first = _within(op, first, over)
    joined = op.join(first.shape, [first, *vectors])
    return [joined if tuple(s) == first.shape else Labels(tuple(s)) for s in shapes]


@_register("native_group_norm", "group_norm")
def _group_norm(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    first, *vectors = (op.labels_of(t) for t in tensors_in(args))
    groups = int(args["group"] if "group" in args else args["num_groups"])
    shape = first.shape
    placed = [op.along(v, 1, len(shape)) for v in vectors]
    joined = op.join(shape, [first, *placed])
    factor = joined.factor_of(1)
    if factor is not None:
        if factor.axes != (1,):
            joined = op.apart(joined, 1)
            factor = joined.factor_of(1)
        assert factor is not None
        size = shape[1] // groups
        if size > 1:
            op.normalised.append(factor.codes)
        if 1 < groups < shape[1]:
            op.channels.mark(factor.codes, np.arange(shape[1]) // size)
    return [joined if tuple(s) == shape else Labels(tuple(s)) for s in shapes]


@_register("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "softmin")
def _along_one(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(tensors_in(args)[0])
    axis = args["dim"] % max(1, len(labels.shape))
    return _within(op, labels, [axis])


def _within(op: Operations, labels: Labels, over: Sequence[int]) -> Labels:
    """Return labels of what is normalised over some axes, whose positions then belong together."""
    op.normalised += [f.codes for f in labels.factors if f.channel_axes & set(over)]
    factors = []
    for factor in labels.factors:
        rest = factor.channel_axes - set(over)
        together = bool(rest) and rest < factor.channel_axes
        found = op.channels.gathered(factor, rest, _PLACES) if together else factor
        factors += [found] if found is not None else []
    return replace(labels, factors=tuple(factors))


@_register("glu")
def _glu(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    axis = args.get("dim", -1) % len(labels.shape)
    half = labels.shape[axis] // 2
    halves = [_taken(labels, axis, np.arange(half) + first) for first in (0, half)]
    return op.join(shapes[0], halves)


@_register(
    "sum",
    "mean",
    "amax",
    "amin",
    "var",
    "std",
    "prod",
    "logsumexp",
    "norm",
    "linalg_vector_norm",
    "var_mean",
    "std_mean",
    "_is_all_true",
    "_is_any_true",
    "count_nonzero",
    "nanmean",
    "nansum",
    "any",
    "all",
    "max",
    "min",
    "aminmax",
    "median",
)
def _reduction(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(tensors_in(args)[0])
    dim = args.get("dim")
    if len(tensors_in(args)) > 1:  # The maximum of two tensors.
        return pointwise(op, args, shapes)
    axes = [dim] if isinstance(dim, int) else list(dim or range(len(labels.shape)))
    found = op.reduced(labels, axes, bool(args.get("keepdim", False)))
    return [found for _ in shapes]


@_register("embedding")
def _embedding(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    weight, shape = op.labels_of(args["weight"]), tuple(shapes[0])
    kept = op.apart(weight, 1)
    op.writes += [factor.codes.ravel() for factor in kept.factors if factor.axes == (1,)]
    found = kept.at((*[1] * (len(shape) - 1), weight.shape[1]), {1: len(shape) - 1})
    return replace(found, shape=shape, weight=False)


@_register("_embedding_bag", "_embedding_bag_forward_only", "embedding_bag")
def _embedding_bag(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    kept = op.apart(op.labels_of(args["weight"]), 1)
    first = replace(kept.at(tuple(shapes[0]), {1: 1}), weight=False)
    return [first, *(Labels(tuple(s)) for s in shapes[1:])]


@_register("index_select")
def _index_select(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    axis = args["dim"] % max(1, len(labels.shape))
    return _taken(labels, axis, args["index"].detach().cpu().numpy().reshape(-1))


@_register("index", "_unsafe_index")
def _index(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels, indices = op.labels_of(args["self"]), args["indices"]
    chosen = [a for a, index in enumerate(indices) if index is not None]
    shape = tuple(shapes[0])
    if (
        len(chosen) == 1
        and indices[chosen[0]].dtype != torch.bool
        and indices[chosen[0]].dim() == 1
    ):
        index = indices[chosen[0]].detach().cpu().numpy()
        return _taken(labels, chosen[0], index % labels.shape[chosen[0]])
    widths = [indices[a].dim() if indices[a].dtype == torch.bool else 1 for a in chosen]
    gone = {a for n, a in enumerate(chosen) for a in range(a, a + widths[n])}
    rest = [a for a in range(len(labels.shape)) if a not in gone]
    kept = op.kept(labels, rest, "it is chosen by an index")
    new = len(shape) - len(rest)
    together = sorted(gone) == list(range(min(gone), max(gone) + 1))
    first = min(gone) if together else 0
    position_of = {a: n if n < first else n + new for n, a in enumerate(rest)}
    return kept.at(shape, position_of)


@_register("gather", "take_along_dim")
def _gather(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    axis = args["dim"] % max(1, len(labels.shape))
    whole = [a for a, s in enumerate(labels.shape) if a != axis and shapes[0][a] == s]
    kept = op.kept(labels, whole, "it is chosen by an index")
    return replace(kept, shape=tuple(shapes[0]))


@_register(
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "index_add",
    "index_copy",
    "index_fill",
    "index_reduce",
    "scatter_",
    "scatter_add_",
    "scatter_reduce_",
    "index_add_",
    "index_copy_",
    "index_fill_",
    "select_scatter",
    "slice_scatter",
    "diagonal_scatter",
)
def _scatter(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    shape = tuple(shapes[0])
    axis = args.get("dim", 0) % max(1, len(shape))
    source = args.get("src", args.get("source"))
    whole = [a for a in range(len(shape)) if a != axis]
    parts = [op.kept(op.labels_of(args["self"]), whole, "it is chosen by an index")]
    if isinstance(source, Tensor) and source.dim() == len(shape):
        own = op.kept(op.labels_of(source), whole, "it is chosen by an index")
        parts.append(
            replace(own, shape=tuple(1 if a == axis else s for a, s in enumerate(own.shape)))
        )
    parts[0] = replace(parts[0], shape=tuple(1 if a == axis else s for a, s in enumerate(shape)))
    flat = tuple(1 if a == axis else s for a, s in enumerate(shape))
    fitting = [p for p in parts if all(s in (1, f) for s, f in zip(p.shape, flat, strict=True))]
    if len(fitting) < len(parts):
        op.fix_all(parts, "it is chosen by an index")
        return Labels(shape)
    return replace(op.join(flat, parts), shape=shape)


@_register(
    "cumsum",
    "cumprod",
    "cummax",
    "cummin",
    "logcumsumexp",
    "sort",
    "topk",
    "argsort",
    "flip",
    "roll",
    "cumsum_",
)
def _ordered(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    dims = args.get("dim", args.get("dims", -1))
    over = {a % max(1, len(labels.shape)) for a in ([dims] if isinstance(dims, int) else dims)}
    rest = [a for a in range(len(labels.shape)) if a not in over]
    kept = op.kept(labels, rest, "its order counts")
    return [replace(kept, shape=tuple(shape)) for shape in shapes]


@_register(
    "max_pool2d_with_indices",
    "max_pool2d",
    "max_pool1d",
    "max_pool3d",
    "max_pool3d_with_indices",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "mkldnn_max_pool2d",
    "max_pool1d_with_indices",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_bilinear2d",
    "upsample_trilinear3d",
    "upsample_linear1d",
    "upsample_bicubic2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact3d",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
    "fractional_max_pool2d",
    "max_unpool2d",
    "max_unpool3d",
)
def _over_space(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(tensors_in(args)[0])
    spatial = re.search(r"(\d)d", op.name)
    count = len(labels.shape) - int(spatial[1] if spatial else 1)
    kept = op.kept(labels, range(count), "it is pooled or resampled")
    return [replace(kept, shape=tuple(shape)) for shape in shapes]


@_register("grid_sampler", "grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler")
def _grid(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    data, grid = (op.labels_of(t) for t in tensors_in(args)[:2])
    op.fix_all([grid], "it says where to look")
    kept = op.kept(data, (0, 1), "it is resampled")
    return replace(kept, shape=tuple(shapes[0]))


@_register("pixel_shuffle")
def _pixel_shuffle(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    r = int(args["upscale_factor"])
    labels = op.labels_of(args["self"])
    *lead, c, h, w = labels.shape
    n = len(lead)
    viewed = reshaped(labels, (*lead, c // r**2, r, r, h, w), op.channels)
    order = [*range(n), n, n + 3, n + 1, n + 4, n + 2]
    shape = [viewed.shape[a] for a in order]
    return reshaped(viewed.at(shape, {a: k for k, a in enumerate(order)}), shapes[0], op.channels)


@_register("pixel_unshuffle")
def _pixel_unshuffle(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    r = int(args["downscale_factor"])
    labels = op.labels_of(args["self"])
    *lead, c, h, w = labels.shape
    n = len(lead)
    viewed = reshaped(labels, (*lead, c, h // r, r, w // r, r), op.channels)
    order = [*range(n), n, n + 2, n + 4, n + 1, n + 3]
    shape = [viewed.shape[a] for a in order]
    return reshaped(viewed.at(shape, {a: k for k, a in enumerate(order)}), shapes[0], op.channels)


@_register("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    groups, count = int(args["groups"]), labels.shape[1]
    index = np.arange(count).reshape(groups, count // groups).T.reshape(-1)
    return _taken(labels, 1, index)


@_register(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
    "scaled_dot_product_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
)
def _attention(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    query, key, value = (op.labels_of(args[name]) for name in ("query", "key", "value"))
    last = len(query.shape) - 1
    if query.shape[-3:-2] != key.shape[-3:-2]:  # Several heads of queries for one of keys.
        times = query.shape[-3] // key.shape[-3]
        index = np.repeat(np.arange(key.shape[-3]), times)
        key, value = (_taken(own, last - 2, index) for own in (key, value))
    batch = [(a, a) for a in range(last - 1)]
    scores = op.product(query, key, (last, last), batch)
    mask = args.get("attn_mask", args.get("attn_bias"))
    if isinstance(mask, Tensor):
        scores = op.join(scores.shape, [scores, op.labels_of(mask)])
    found = op.product(scores, value, (last, last - 1), batch)
    return [
        replace(found, shape=tuple(s))
        if len(s) == len(found.shape) and n == 0
        else Labels(tuple(s))
        for n, s in enumerate(shapes)
    ]


@_register(
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "fake_quantize_per_tensor_affine_cachemask",
    "_fused_moving_avg_obs_fq_helper",
    "_fake_quantize_learnable_per_tensor_affine",
)
def _fake_quantize(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    return [replace(labels, shape=tuple(shape)) for shape in shapes]


@_register(
    "fake_quantize_per_channel_affine_cachemask", "_fused_moving_avg_obs_fq_helper_per_channel"
)
def _fake_quantize_channels(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    first = op.labels_of(args["self"])
    scales = (
        op.along(op.labels_of(args[n]), args["axis"], len(first.shape))
        for n in ("scale", "zero_point")
    )
    joined = op.join(first.shape, [first, *scales])
    return [replace(joined, shape=tuple(shape)) for shape in shapes]


@_register("_weight_norm_interface", "_weight_norm")
def _weight_norm(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    v, g = op.labels_of(args["v"]), op.labels_of(args["g"])
    joined = op.join(shapes[0], [v, g])
    return [joined, *(Labels(tuple(s), (), True) for s in shapes[1:])]


@_register("unfold")
def _unfold(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    axis = args["dimension"] % len(labels.shape)
    rest = [a for a in range(len(labels.shape)) if a != axis]
    kept = op.kept(labels, rest, "windows go over it")
    return replace(kept, shape=tuple(shapes[0]))


@_register("im2col")
def _im2col(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.kept(op.labels_of(args["self"]), (0, 1), "windows go over it")
    batch, rows, places = shapes[0]
    size = rows // labels.shape[1]
    spread = Labels(
        (batch, labels.shape[1], size, places), labels.factors, labels.weight, labels.because
    )
    return reshaped(spread, shapes[0], op.channels)


@_register(
    "zeros_like",
    "ones_like",
    "full_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "empty_like",
    "rand_like",
    "randn_like",
    "zero_",
    "fill_",
    "normal_",
    "uniform_",
    "bernoulli_",
    "randint_like",
    "new_empty_strided",
    "zero",
    "fill",
    "exponential_",
    "random_",
)
def _constant(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    return [constant(tuple(shape)) for shape in shapes]


@_register("copy_", "copy")
def _copy(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    return replace(op.join(shapes[0], [op.labels_of(args["src"])]), shape=tuple(shapes[0]))


@_register("_pack_padded_sequence", "_pad_packed_sequence")
def _sequence(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(tensors_in(args)[0])
    vector = op.vector(labels, len(labels.shape) - 1)
    return [
        op.along(vector, len(shape) - 1, len(shape)) if n == 0 else Labels(tuple(shape))
        for n, shape in enumerate(shapes)
    ]


@_register("as_strided", "as_strided_")
def _as_strided(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    # Of the same shape it is another order in memory.
    return labels if labels.shape == tuple(shapes[0]) else unknown(op, args, shapes)


@_register("diagonal", "tril", "triu")
def _triangle(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    count = len(labels.shape)
    kept = op.kept(labels, range(count - 2), "it is a part of a matrix")
    return (
        replace(kept, shape=tuple(shapes[0]))
        if len(shapes[0]) == count
        else Labels(tuple(shapes[0]))
    )


def constant(shape: tuple[int, ...]) -> Labels:
    """Return the labels of a tensor that is the same everywhere."""
    factors = tuple(
        Factor((axis,), np.full(size, CONSTANT)) for axis, size in enumerate(shape) if size > 1
    )
    return Labels(shape, factors)
