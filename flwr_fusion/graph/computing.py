"""Operations that compute: products, convolutions, attention, norms, reductions, embeddings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from flwr_fusion.graph.labels import (
    MEETS_PLACED,
    Factor,
    Labels,
)
from flwr_fusion.graph.moving import taken
from flwr_fusion.graph.operations import (
    Operations,
    only_first,
    pointwise,
    register,
)
from flwr_fusion.observe import tensors_of


@register("mm", "dot", "vdot", "mv", "matmul")
def _mm(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    one, other = (op.labels_of(t) for t in tensors_of(args)[:2])
    return op.product(one, other, (len(one.shape) - 1, 0))


@register("bmm")
def _bmm(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    one, other = (op.labels_of(t) for t in tensors_of(args)[:2])
    return op.product(one, other, (2, 1), [(0, 0)])


@register("addmm", "addmv", "addbmm", "baddbmm", "_addmm_activation")
def _addmm(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    added, one, other = (op.labels_of(t) for t in tensors_of(args)[:3])
    batched = len(one.shape) == 3
    over = (len(one.shape) - 1, 1 if batched else 0)
    found = op.product(one, other, over, [(0, 0)] if batched else ())
    return op.join(shapes[0], [added, found])


@register("addr", "ger", "outer")
def _outer(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    one, other = (op.labels_of(t) for t in tensors_of(args)[-2:])
    return op.join(
        shapes[0],
        [one.at((*one.shape, 1), {0: 0}), other.at((1, *other.shape), {0: 1})],
    )


@register("linear")
def _linear(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    x, weight = op.labels_of(args["input"]), op.labels_of(args["weight"])
    found = op.product(x, weight, (len(x.shape) - 1, 1))
    bias = args.get("bias")
    return found if bias is None else op.join(shapes[0], [found, op.labels_of(bias)])


@register(
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
            found = op.channels.gathered(factor, (0, 1), MEETS_PLACED)
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
            channels.fix(rows.codes, inputs.because or MEETS_PLACED)
        if data is not None:
            channels.fix(data.codes, MEETS_PLACED)
        return rows if rows is not None and not transposed else None
    heads = channels.gathered(
        Factor((0, 1), data.codes.reshape(groups, per_in)),
        (0,) if per_in > 1 else (0, 1),
        MEETS_PLACED,
    )
    assert heads is not None
    codes = heads.codes.reshape(groups, 1)
    channels.unify(rows.codes.reshape(groups, -1), codes, inputs.because or MEETS_PLACED)
    return Factor((0,), np.repeat(codes[:, 0], per_out))


@register(
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
    first, *vectors = (op.labels_of(t) for t in tensors_of(args))
    shape = first.shape
    placed = [op.along(v, 1, len(shape)) for v in vectors]
    joined = op.join(shape, [first, *placed])
    return only_first(joined, shapes)


@register("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    first, *vectors = (op.labels_of(t) for t in tensors_of(args))
    count = len(args["normalized_shape"])
    over = range(len(first.shape) - count, len(first.shape))
    if vectors:
        op.normalised += [f.codes for f in first.factors if f.channel_axes & set(over)]
    else:
        first = _within(op, first, over)
    joined = op.join(first.shape, [first, *vectors])
    return only_first(joined, shapes)


@register("native_group_norm", "group_norm")
def _group_norm(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    first, *vectors = (op.labels_of(t) for t in tensors_of(args))
    groups = int(args["group"] if "group" in args else args["num_groups"])
    shape = first.shape
    placed = [op.along(v, 1, len(shape)) for v in vectors]
    joined = op.apart(op.join(shape, [first, *placed]), 1)
    factor = joined.factor_of(1)
    if factor is not None:
        size = shape[1] // groups
        if size > 1:
            op.normalised.append(factor.codes)
        if 1 < groups < shape[1]:
            op.channels.mark(factor.codes, np.arange(shape[1]) // size)
    return only_first(joined, shapes)


@register("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "softmin")
def _along_one(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(tensors_of(args)[0])
    axis = args["dim"] % max(1, len(labels.shape))
    return _within(op, labels, [axis])


def _within(op: Operations, labels: Labels, over: Sequence[int]) -> Labels:
    """Return labels of what is normalised over some axes, whose positions then belong together."""
    op.normalised += [f.codes for f in labels.factors if f.channel_axes & set(over)]
    factors = []
    for factor in labels.factors:
        rest = factor.channel_axes - set(over)
        together = bool(rest) and rest < factor.channel_axes
        found = op.channels.gathered(factor, rest, MEETS_PLACED) if together else factor
        factors += [found] if found is not None else []
    return replace(labels, factors=tuple(factors))


@register("glu")
def _glu(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(args["self"])
    axis = args.get("dim", -1) % len(labels.shape)
    half = labels.shape[axis] // 2
    halves = [taken(labels, axis, np.arange(half) + first) for first in (0, half)]
    return op.join(shapes[0], halves)


@register(
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
    labels = op.labels_of(tensors_of(args)[0])
    dim = args.get("dim")
    if len(tensors_of(args)) > 1:  # The maximum of two tensors.
        return pointwise(op, args, shapes)
    axes = [dim] if isinstance(dim, int) else list(dim or range(len(labels.shape)))
    found = op.reduced(labels, axes, bool(args.get("keepdim", False)))
    return [found] * len(shapes)


@register("embedding")
def _embedding(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    weight, shape = op.labels_of(args["weight"]), tuple(shapes[0])
    kept = op.apart(weight, 1)
    op.writes += [factor.codes.ravel() for factor in kept.factors if factor.axes == (1,)]
    found = kept.at((*[1] * (len(shape) - 1), weight.shape[1]), {1: len(shape) - 1})
    return replace(found, shape=shape, weight=False)


@register("_embedding_bag", "_embedding_bag_forward_only", "embedding_bag")
def _embedding_bag(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    kept = op.apart(op.labels_of(args["weight"]), 1)
    return only_first(replace(kept.at(shapes[0], {1: 1}), weight=False), shapes)


@register(
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
    labels = op.labels_of(tensors_of(args)[0])
    spatial = re.search(r"(\d)d", op.name)
    count = len(labels.shape) - int(spatial[1] if spatial else 1)
    kept = op.kept(labels, range(count), "it is pooled or resampled")
    return [kept] * len(shapes)


@register("grid_sampler", "grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler")
def _grid(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    data, grid = (op.labels_of(t) for t in tensors_of(args)[:2])
    op.fix_all([grid], "it says where to look")
    kept = op.kept(data, (0, 1), "it is resampled")
    return kept


@register(
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
        key, value = (taken(own, last - 2, index) for own in (key, value))
    batch = [(a, a) for a in range(last - 1)]
    scores = op.product(query, key, (last, last), batch)
    mask = args.get("attn_mask", args.get("attn_bias"))
    if isinstance(mask, Tensor):
        scores = op.join(scores.shape, [scores, op.labels_of(mask)])
    found = op.product(scores, value, (last, last - 1), batch)
    return only_first(found, shapes)


@register(
    "fake_quantize_per_channel_affine_cachemask", "_fused_moving_avg_obs_fq_helper_per_channel"
)
def _fake_quantize_channels(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    first = op.labels_of(args["self"])
    scales = (
        op.along(op.labels_of(args[n]), args["axis"], len(first.shape))
        for n in ("scale", "zero_point")
    )
    return [op.join(first.shape, [first, *scales])] * len(shapes)


@register("_weight_norm_interface", "_weight_norm")
def _weight_norm(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    v, g = op.labels_of(args["v"]), op.labels_of(args["g"])
    joined = op.join(shapes[0], [v, g])
    return [joined, *(Labels(tuple(s), (), True) for s in shapes[1:])]


@register("_pack_padded_sequence", "_pad_packed_sequence")
def _sequence(op: Operations, args: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    labels = op.labels_of(tensors_of(args)[0])
    vector = op.vector(labels, len(labels.shape) - 1)
    return only_first(op.along(vector, len(shapes[0]) - 1, len(shapes[0])), shapes)
