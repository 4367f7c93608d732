"""Channel labels: which channel every position of a tensor's axis carries, and what must agree.

Every axis of every parameter starts with channels of its own. Each operation of the network says
which of them are the same ("the columns of this weight are the rows of that one"); what remains
different can be permuted independently. Where several positions of one axis carry the same channel
(the pixels of a flattened feature map, the rows of an attention head) they move together, in their
order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Codes = NDArray[np.int64]
# In the place of a channel's number: where the tensor is constant, and what must not move.
CONSTANT, PLACED = -1, -2
MEETS_PLACED = "it meets positions that must not move"


@dataclass(frozen=True, eq=False)
class Factor:
    """The codes of a tensor along one of its axes, or along several that share their channels.

    Parameters
    ----------
    axes : tuple of int
        The axes, ascending.
    codes : ndarray
        The numbers of the channels, of the sizes of these axes.
    over : frozenset of int
        Those of the axes that are none of the channels: at each position along them, which must not
        move, the others' channels may be different ones (a class token before patches).
    """

    axes: tuple[int, ...]
    codes: Codes
    over: frozenset[int] = frozenset()

    @classmethod
    def constant(cls, axis: int, size: int) -> Factor:
        """Return the factor of an axis along which a tensor is constant."""
        return cls((axis,), np.full(size, CONSTANT))

    @property
    def is_constant(self) -> bool:
        """Whether the tensor is constant along the axes."""
        return bool((self.codes == CONSTANT).all())

    @property
    def channel_axes(self) -> frozenset[int]:
        """The axes of the channels."""
        return frozenset(self.axes) - self.over

    def without(self, axis: int, position: int) -> Factor:
        """Return the factor at one position of one of its axes."""
        place = self.axes.index(axis)
        left = tuple(a for a in self.axes if a != axis)
        codes = self.codes.take([position], axis=place).squeeze(place)
        return Factor(left, codes, self.over & set(left))

    def moved(self, position_of: Mapping[int, int]) -> Factor:
        """Return the factor on axes that have been renamed."""
        axes = [position_of[axis] for axis in self.axes]
        order = np.argsort(axes, kind="stable")
        over = frozenset(position_of[axis] for axis in self.over)
        return Factor(tuple(sorted(axes)), self.codes.transpose(order), over)


@dataclass(frozen=True, eq=False)
class Labels:
    """What is known of a tensor.

    Parameters
    ----------
    shape : tuple of int
        Its shape.
    factors : tuple of Factor
        Its labelled axes, each in one factor; positions along other axes must not move.
    weight : bool
        Whether it is made of parameters and buffers alone.
    because : str
        Why positions along its other axes must not move.
    """

    shape: tuple[int, ...]
    factors: tuple[Factor, ...] = ()
    weight: bool = False
    because: str = ""

    def factor_of(self, axis: int) -> Factor | None:
        """Return the factor whose channels an axis carries."""
        return next((factor for factor in self.factors if axis in factor.channel_axes), None)

    def at(self, shape: Sequence[int], position_of: Mapping[int, int]) -> Labels:
        """Return the labels of a tensor whose axes have been renamed; left-out ones are gone."""
        factors = tuple(
            factor.moved(position_of)
            for factor in self.factors
            if all(axis in position_of for axis in factor.axes)
        )
        return replace(self, shape=tuple(shape), factors=factors)


@dataclass
class Channels:
    """All channels of a network, and what has been found to be the same."""

    count: int = 0
    _same: list[tuple[Codes, Codes]] = field(default_factory=list)
    _fixed: list[tuple[Codes, str, bool]] = field(default_factory=list)
    _marks: list[tuple[Codes, Codes]] = field(default_factory=list)
    _singled_out: int = 1 << 40

    def new(self, count: int) -> Codes:
        """Return new channels."""
        first, self.count = self.count, self.count + count
        return np.arange(first, first + count, dtype=np.int64)

    def unify(self, one: Codes, other: Codes, because: str) -> Codes:
        """Say that positions carry the same channels; return these."""
        one, other = np.broadcast_arrays(one, other)
        differ = (one >= 0) & (other >= 0) & (one != other)
        if differ.any():
            self._same.append((one[differ], other[differ]))
        self.fix(one[other == PLACED], because)
        self.fix(other[one == PLACED], because)
        return np.where(one == CONSTANT, other, one)

    def fix(self, codes: Codes, because: str, *, only_if_used: bool = False) -> None:
        """Say that channels must not move; or only those of which something else is said."""
        codes = codes[codes >= 0]
        if codes.size:
            self._fixed.append((np.unique(codes), because, only_if_used))

    def mark(self, codes: Codes, marks: Codes) -> None:
        """Tell channels apart that are otherwise alike, such as those of blocks of a GroupNorm."""
        known = codes >= 0
        self._marks.append((codes[known], marks[known]))

    def single_out(self, codes: Codes) -> None:
        """Tell every one of some channels apart from all others: it is used in its own way."""
        known = np.unique(codes[codes >= 0])
        first, self._singled_out = self._singled_out, self._singled_out + len(known)
        self.mark(known, np.arange(first, first + len(known)))

    def gathered(self, factor: Factor, keep: Iterable[int], because: str) -> Factor | None:
        """Let channels that differ along other axes move together; fix them if nothing is kept."""
        chosen = set(keep)
        kept = tuple(axis for axis in factor.axes if axis in chosen)
        if kept == factor.axes:
            return factor
        if not factor.channel_axes & set(kept):
            self.fix(factor.codes.ravel(), because)
            return None
        order = [factor.axes.index(a) for a in (*kept, *(a for a in factor.axes if a not in kept))]
        codes = factor.codes.transpose(order)
        codes = codes.reshape(*codes.shape[: len(kept)], -1)
        # The first that is a channel: constants and fixed positions move with anything.
        first = np.take_along_axis(codes, codes.argmax(-1)[..., None], -1)
        self.unify(codes, first, because)
        return Factor(kept, first[..., 0], factor.over & set(kept))

    def resolved(self) -> Resolved:
        """Return which channels are the same, given all that has been said."""
        nothing = np.zeros(0, dtype=np.int64)
        one = np.concatenate([nothing, *(a for a, _ in self._same)])
        other = np.concatenate([nothing, *(b for _, b in self._same)])
        graph = coo_matrix((np.ones(len(one), dtype=bool), (one, other)), (self.count, self.count))
        root = connected_components(graph, directed=False)[1].astype(np.int64)
        because: dict[int, str] = {}
        for codes, reason, _ in self._fixed:
            for number in np.unique(root[codes]).tolist():
                because.setdefault(number, reason)
        touched = np.zeros(self.count, dtype=bool)
        said = (codes for codes, _, only_if_used in self._fixed if not only_if_used)
        for codes in (one, other, *said):
            touched[codes] = True
        marked = np.concatenate([nothing, *(root[codes] for codes, _ in self._marks)])
        marks = np.concatenate([nothing, *(numbers for _, numbers in self._marks)])
        return Resolved(root, because, (marked, marks), touched)


@dataclass(frozen=True, eq=False)
class Resolved:
    """Which channels are the same.

    Parameters
    ----------
    root : ndarray
        For every channel the number that it shares with those that are the same.
    because : dict of int to str
        Of roots that must not move, why.
    marks : tuple of (ndarray, ndarray)
        Roots and their marks.
    touched : ndarray
        Whether anything has been said of a channel.
    """

    root: Codes
    because: dict[int, str]
    marks: tuple[Codes, Codes]
    touched: NDArray[np.bool_]


def reshaped(labels: Labels, shape: Sequence[int], channels: Channels) -> Labels:
    """Return the labels of a tensor that is viewed in another shape."""
    if 0 in labels.shape:
        return replace(labels, shape=tuple(shape), factors=())
    # From the last block to the first, so that the axes before it keep their numbers.
    for inside, outside in reversed(list(_blocks(labels.shape, shape))):
        sizes = tuple(shape[axis] for axis in outside)
        if tuple(labels.shape[axis] for axis in inside) != sizes:
            labels = _with_block(labels, inside.start, len(inside), sizes, channels)
    return labels


def _blocks(shape: Sequence[int], other: Sequence[int]) -> Iterator[tuple[range, range]]:
    """Yield the neighbouring axes of two shapes of equal size that hold the same positions."""
    i = j = 0
    while i < len(shape) or j < len(other):
        first, first_other = i, j
        size = shape[i] if i < len(shape) else 1
        size_other = other[j] if j < len(other) else 1
        i, j = min(i + 1, len(shape)), min(j + 1, len(other))
        while size != size_other:
            if size < size_other:
                size, i = size * shape[i], i + 1
            else:
                size_other, j = size_other * other[j], j + 1
        yield range(first, i), range(first_other, j)


def _with_block(
    labels: Labels, first: int, count: int, sizes: tuple[int, ...], channels: Channels
) -> Labels:
    """Return labels with some neighbouring axes replaced by others of the same total size."""
    inside = range(first, first + count)
    outside = range(first, first + len(sizes))
    shift = len(sizes) - count
    apart = (
        channels.gathered(f, f.channel_axes, MEETS_PLACED) if f.over & set(inside) else f
        for f in labels.factors
    )
    labels = replace(labels, factors=tuple(f for f in apart if f is not None))
    touched = [f for f in labels.factors if set(f.axes) & set(inside)]
    varying = [f for f in touched if not f.is_constant]
    position_of = {a: a if a < first else a + shift for a in range(len(labels.shape))}
    factors = [f.moved(position_of) for f in labels.factors if f not in touched]
    for other in varying[1:]:
        channels.fix(other.codes.ravel(), "it is merged with other channels", only_if_used=True)
    if varying:
        factors.append(_merged(varying[0], labels.shape, inside, outside, sizes))
    elif {a for f in touched for a in f.axes} >= {a for a in inside if labels.shape[a] > 1}:
        factors += [
            Factor.constant(axis, size)
            for axis, size in zip(outside, sizes, strict=True)
            if touched and size > 1
        ]
    shape = (*labels.shape[:first], *sizes, *labels.shape[first + count :])
    return replace(labels, shape=shape, factors=tuple(factors))


def _merged(
    factor: Factor, shape: tuple[int, ...], inside: range, outside: range, sizes: tuple[int, ...]
) -> Factor:
    """Return a factor whose axes inside have become axes outside."""
    before = [a for a in factor.axes if a < inside.start]
    after = [a for a in factor.axes if a >= inside.stop]
    lengths = [*(shape[a] for a in before), *sizes, *(shape[a] for a in after)]
    codes = _spread(factor, shape, inside).reshape(lengths)
    shift = len(outside) - len(inside)
    axes = [*before, *outside, *(a + shift for a in after)]
    over = frozenset(a if a < inside.start else a + shift for a in factor.over)
    found = _simplified(axes, codes, range(len(before), len(before) + len(sizes)))
    return replace(found, over=over)


def _spread(factor: Factor, shape: tuple[int, ...], inside: range) -> Codes:
    """Return a factor's channels over further axes, along which they do not change."""
    axes = sorted({*factor.axes, *inside})
    codes = factor.codes.reshape([shape[a] if a in factor.axes else 1 for a in axes])
    return np.broadcast_to(codes, [shape[a] for a in axes])


def _simplified(axes: Sequence[int], codes: Codes, new: range) -> Factor:
    """Take out new axes along which the channels do not change."""
    alike = [
        n for n in new if codes.shape[n] == 1 or bool((codes == codes.take([0], axis=n)).all())
    ]
    if len(alike) == codes.ndim and alike:  # One channel alone.
        alike.remove(max(new, key=lambda n: codes.shape[n]))
    kept = codes[tuple(0 if n in alike else slice(None) for n in range(codes.ndim))]
    remaining = tuple(axis for n, axis in enumerate(axes) if n not in alike)
    return Factor(remaining, kept)


def constant(shape: tuple[int, ...]) -> Labels:
    """Return the labels of a tensor that is the same everywhere."""
    return Labels(
        shape, tuple(Factor.constant(a, size) for a, size in enumerate(shape) if size > 1)
    )
