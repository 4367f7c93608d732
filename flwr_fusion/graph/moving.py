"""Operations that move positions: views, slices, concatenations, padding, indexing, copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flwr_fusion.graph.labels import (
    CONSTANT,
    MEETS_PLACED,
    PLACED,
    Channels,
    Factor,
    Labels,
    constant,
    reshaped,
)
from flwr_fusion.graph.operations import (
    Operations,
    aligned,
    register,
    unknown,
    with_axes,
)
from flwr_fusion.observe import tensors_of


@register(
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
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "fake_quantize_per_tensor_affine_cachemask",
    "_fused_moving_avg_obs_fq_helper",
    "_fake_quantize_learnable_per_tensor_affine",
)
def _same(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    return [op.labels_of(tensors_of(args)[0])] * len(shapes)


@register("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy")
def _view(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    return reshaped(op.labels_of(args["self"]), shapes[0], op.channels)


@register("unsqueeze", "squeeze", "unsqueeze_", "squeeze_")
def _resized(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels, shape = op.labels_of(args["self"]), shapes[0]
    gone = [axis for axis, size in enumerate(labels.shape) if size > 1]
    here = [axis for axis, size in enumerate(shape) if size > 1]
    return labels.at(shape, dict(zip(gone, here, strict=True)))


@register("permute", "transpose", "t", "numpy_T", "mT", "transpose_", "t_", "movedim", "swapaxes")
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


@register("expand", "expand_copy", "broadcast_to")
def _expand(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    shape = tuple(shapes[0])
    labels = aligned(op.labels_of(args["self"]), shape, op.channels)
    copies = [
        Factor.constant(axis, size)
        for axis, size in enumerate(shape)
        if size > 1 and labels.shape[axis] == 1
    ]
    return replace(labels, shape=shape, factors=(*labels.factors, *copies))


@register("repeat", "tile")
def _repeat(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    shape = tuple(shapes[0])
    labels = with_axes(op.labels_of(args["self"]), len(shape))
    for axis, size in enumerate(shape):
        if size != labels.shape[axis]:
            index = np.arange(size) % labels.shape[axis]
            labels = taken(labels, axis, index)
    return labels


@register("repeat_interleave")
def _repeat_interleave(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    return Labels(tuple(shapes[0]), (), True)


def taken(labels: Labels, axis: int, index: NDArray[np.int64]) -> Labels:
    """Return the labels of chosen positions of an axis; one without channels has none then."""
    shape = [len(index) if a == axis else size for a, size in enumerate(labels.shape)]
    factors = []
    for factor in labels.factors:
        if axis not in factor.axes:
            factors.append(factor)
        elif len(index) == 1 and len(factor.axes) > 1:  # One position is no axis of channels.
            factors.append(factor.without(axis, int(index[0])))
        else:
            codes = factor.codes.take(index, axis=factor.axes.index(axis))
            factors.append(replace(factor, codes=codes))
    if labels.shape[axis] == 1 and len(index) > 1:
        factors.append(Factor.constant(axis, len(index)))
    return replace(labels, shape=tuple(shape), factors=tuple(factors))


def _without(labels: Labels, axis: int, position: int, channels: Channels) -> Labels:
    """Return the labels at one position of an axis."""
    factors = []
    for factor in labels.factors:
        if axis not in factor.axes:
            factors.append(factor)
            continue
        left = factor.without(axis, position)
        if left.channel_axes:
            factors.append(left)
        else:
            channels.single_out(left.codes.reshape(-1))
    position_of = {a: a - (a > axis) for a in range(len(labels.shape)) if a != axis}
    shape = [size for a, size in enumerate(labels.shape) if a != axis]
    return replace(labels, factors=tuple(factors)).at(shape, position_of)


@register("slice", "slice_copy")
def _slice(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    axis = args.get("dim", 0) % len(labels.shape)
    size = labels.shape[axis]
    end = args.get("end")
    chosen = slice(args.get("start"), None if end is None else end, args.get("step", 1))
    return taken(labels, axis, np.arange(size)[chosen])


@register("narrow", "narrow_copy")
def _narrow(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    axis = args["dim"] % len(labels.shape)
    start = int(args["start"])
    return taken(labels, axis, np.arange(start, start + int(args["length"])))


@register("select", "select_copy")
def _select(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    axis = args["dim"] % len(labels.shape)
    return _without(labels, axis, int(args["index"]) % labels.shape[axis], op.channels)


@register(
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
        result.append(taken(labels, axis, np.arange(first, first + shape[axis])))
        first += shape[axis]
    return result


@register("unbind", "unbind_copy")
def _unbind(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    axis = args.get("dim", 0) % len(labels.shape)
    return [_without(labels, axis, n, op.channels) for n in range(len(shapes))]


@register("cat", "concat", "concatenate")
def _cat(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    parts = [op.labels_of(t) for t in args["tensors"] if t.numel() or t.dim() > 1]
    return _concatenated(op, parts, args.get("dim", 0), tuple(shapes[0]))


def _concatenated(
    op: Operations, parts: Sequence[Labels], dim: int, shape: tuple[int, ...]
) -> Labels:
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
        parts = [op.kept(own, _other_axes(shape, axis), MEETS_PLACED, but=(axis,)) for own in parts]
    others = [
        replace(own, factors=tuple(f for f in own.factors if f.axes != (axis,))) for own in parts
    ]
    stacked = _stacked(others, axis)
    if stacked is None:
        flat = tuple(1 if a == axis else size for a, size in enumerate(shape))
        kept = [op.kept(own, _other_axes(shape, axis), MEETS_PLACED) for own in others]
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


@register("stack")
def _stack(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    shape = tuple(shapes[0])
    axis = args.get("dim", 0) % len(shape)
    parts = []
    for tensor in args["tensors"]:
        own = op.labels_of(tensor)
        position_of = {a: a + (a >= axis) for a in range(len(own.shape))}
        parts.append(own.at((*own.shape[:axis], 1, *own.shape[axis:]), position_of))
    return _concatenated(op, parts, axis, shape)


@register("constant_pad_nd")
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


@register("index_select")
def _index_select(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    axis = args["dim"] % max(1, len(labels.shape))
    return taken(labels, axis, args["index"].detach().cpu().numpy().reshape(-1))


@register("index", "_unsafe_index")
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
        return taken(labels, chosen[0], index % labels.shape[chosen[0]])
    widths = [indices[a].dim() if indices[a].dtype == torch.bool else 1 for a in chosen]
    gone = {a for n, a in enumerate(chosen) for a in range(a, a + widths[n])}
    rest = [a for a in range(len(labels.shape)) if a not in gone]
    kept = op.kept(labels, rest, "it is chosen by an index")
    new = len(shape) - len(rest)
    together = sorted(gone) == list(range(min(gone), max(gone) + 1))
    first = min(gone) if together else 0
    position_of = {a: n if n < first else n + new for n, a in enumerate(rest)}
    return kept.at(shape, position_of)


@register("gather", "take_along_dim")
def _gather(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    axis = args["dim"] % max(1, len(labels.shape))
    whole = [a for a, s in enumerate(labels.shape) if a != axis and shapes[0][a] == s]
    kept = op.kept(labels, whole, "it is chosen by an index")
    return kept


@register(
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


@register(
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
    kept = op.kept(labels, rest, f"goes through {op.name}, where its order counts")
    return [kept] * len(shapes)


@register("pixel_shuffle")
def _pixel_shuffle(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    r = int(args["upscale_factor"])
    labels = op.labels_of(args["self"])
    *lead, c, h, w = labels.shape
    return _shuffled(op, labels, (*lead, c // r**2, r, r, h, w), (0, 3, 1, 4, 2), shapes[0])


@register("pixel_unshuffle")
def _pixel_unshuffle(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    r = int(args["downscale_factor"])
    labels = op.labels_of(args["self"])
    *lead, c, h, w = labels.shape
    return _shuffled(op, labels, (*lead, c, h // r, r, w // r, r), (0, 2, 4, 1, 3), shapes[0])


def _shuffled(
    op: Operations,
    labels: Labels,
    view: Sequence[int],
    order: Sequence[int],
    shape: Sequence[int],
) -> Labels:
    """Return labels of a view whose last axes are put in order and viewed in another shape."""
    viewed = reshaped(labels, view, op.channels)
    lead = len(view) - len(order)
    axes = [*range(lead), *(lead + axis for axis in order)]
    moved = viewed.at([view[axis] for axis in axes], {axis: n for n, axis in enumerate(axes)})
    return reshaped(moved, shape, op.channels)


@register("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    groups, count = int(args["groups"]), labels.shape[1]
    index = np.arange(count).reshape(groups, count // groups).T.reshape(-1)
    return taken(labels, 1, index)


@register("unfold")
def _unfold(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    axis = args["dimension"] % len(labels.shape)
    rest = [a for a in range(len(labels.shape)) if a != axis]
    kept = op.kept(labels, rest, "windows go over it")
    return kept


@register("im2col")
def _im2col(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.kept(op.labels_of(args["self"]), (0, 1), "windows go over it")
    batch, rows, places = shapes[0]
    size = rows // labels.shape[1]
    spread = replace(labels, shape=(batch, labels.shape[1], size, places))
    return reshaped(spread, shapes[0], op.channels)


@register(
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
    return [constant(shape) for shape in shapes]


@register("copy_", "copy")
def _copy(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    return op.join(shapes[0], [op.labels_of(args["src"])])


@register("as_strided", "as_strided_")
def _as_strided(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    # Of the same shape it is another order in memory.
    return labels if labels.shape == tuple(shapes[0]) else unknown(op, args, shapes)


@register("diagonal", "tril", "triu")
def _triangle(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    count = len(labels.shape)
    kept = op.kept(labels, range(count - 2), "it is a part of a matrix")
    return kept if len(shapes[0]) == count else Labels(shapes[0])
