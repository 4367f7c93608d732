"""Merging layers: one layer in the place of several in sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from flwr_fusion.depth.structure import Unit
from flwr_fusion.errors import FusionError
from flwr_fusion.observe import batches_of, record
from flwr_fusion.precision import decomposable, widened

MERGES = ("auto", "least-squares", "sum", "majority", "average", "linear")
_BATCHNORMS = nn.modules.batchnorm._BatchNorm
_CONVOLVE = {3: nn.functional.conv1d, 4: nn.functional.conv2d, 5: nn.functional.conv3d}
# Of the mean square of the inputs: how firmly the fit is held to the product of the layers.
_RIDGE = 0.1


def merged_layer(
    units: Sequence[Unit], model: nn.Module, batches: Iterable[Any] | None, merge: str
) -> tuple[Tensor, Tensor]:
    """Return weight and bias of one layer that does what several in sequence do.

    The product of the layers is ``W_2 D W_1`` and ``b_2 + W_2 D b_1``, where the diagonal ``D``
    stands for the rectifier between them and comes from the pre-activations z of the first layer:
    1 where their sum is positive ("sum"), where more than half of them are ("majority"), or the
    share of positive ones ("average"; Nguyen et al., section 3.2), or 1 everywhere ("linear").
    "least-squares" is the linear layer nearest to what the last layer gives on the batches, held
    to the product by "average"; convolutions are their product. A BatchNorm between the layers is
    folded in; that of the last layer is not.

    Parameters
    ----------
    units : sequence of Unit
        Layers in forward order.
    model : nn.Module
        Their network; not modified.
    batches : iterable of inputs, optional
        What the network is called with; "auto" is "least-squares" with them, "linear" without.
    merge : str
        One of `MERGES`.

    Returns
    -------
    tuple of (Tensor, Tensor)
        Weight and bias in double precision. Kernels have the last layer's size; what the product
        of two convolutions has beyond it is cut off.

    Raises
    ------
    FusionError
        If a layer cannot be merged or the batches are missing.
    """
    if merge == "auto":
        merge = "linear" if batches is None else "least-squares"
    if batches is None and merge != "linear":
        raise FusionError(f"merge={merge!r} needs calibration=")
    share = "average" if merge == "least-squares" else merge
    weight, bias = _affine(units[0], model)
    stride = _stride(model, units[0], 1)
    for before, unit in pairwise(units):
        passed = _passed(model, before, batches, share, weight)
        # The norm of the last layer stays a norm of its own.
        second, second_bias = _affine(unit, model, with_norm=unit is not units[-1])
        per_channel = second if second.dim() == 2 else second.flatten(2).sum(2)
        # W = W_2 D W_1, b = b_2 + W_2 D b_1 (Nguyen et al., section 3.2).
        bias = second_bias + per_channel @ (passed * bias)
        weight = _composed(second, weight * passed.view(-1, *[1] * (weight.dim() - 1)), stride)
        stride = _stride(model, unit, stride)
    if merge == "least-squares" and weight.dim() == 2 and batches is not None:
        return _fitted(units, model, batches, weight, bias)
    return weight, bias


def _passed(
    model: nn.Module, unit: Unit, batches: Iterable[Any] | None, merge: str, like: Tensor
) -> Tensor:
    """Return the diagonal of D behind a layer with its norm."""
    if merge == "linear" or batches is None:
        return like.new_ones(len(like))
    total, positive, samples = like.new_zeros(len(like)), like.new_zeros(len(like)), 0
    axis = 1 if like.dim() > 2 else -1
    for outputs in record_calls(model, [unit.modules[-1]], batches):
        rows = outputs[unit.modules[-1]][1].movedim(axis, 0).flatten(1).to(like)
        total += rows.sum(1)
        positive += (rows > 0).sum(1)
        samples += rows.shape[1]
    share = positive / samples
    return {"sum": total > 0, "majority": share > 0.5, "average": share}[merge].to(like)


def _fitted(
    units: Sequence[Unit], model: nn.Module, batches: Iterable[Any], weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the linear layer nearest to what the layers do on the batches, and to a given one.

    ``argmin sum |W x - z|^2 / n + r |W - W_0|^2`` with x the first layer's inputs (and a constant
    one, where a layer has a bias or a norm), z the last layer's outputs, in closed form.
    """
    first, last = units[0].layer, units[-1].layer
    layers = [model.get_submodule(unit.layer) for unit in units]
    constant = bool(bias.any()) or any(layer.bias is not None for layer in layers)
    start = torch.cat([weight, bias[:, None]], 1) if constant else weight
    inner = start.new_zeros(start.shape[1], start.shape[1])
    cross, samples = torch.zeros_like(start), 0
    for found in record_calls(model, [first, last], batches):
        x = found[first][0].flatten(0, -2).to(start)
        x = torch.cat([x, x.new_ones(len(x), 1)], 1) if constant else x
        z = found[last][1].flatten(0, -2).to(start)
        inner += x.T @ x
        cross += z.T @ x
        samples += len(x)
    inner, cross = inner / samples, cross / samples
    ridge = _RIDGE * float(inner.diagonal().mean().clamp(min=1e-12))
    # W = (E[z x^T] + r W_0) (E[x x^T] + r I)^-1.
    held = decomposable(inner + ridge * torch.eye(len(inner)).to(inner))
    solved = torch.linalg.solve(held, decomposable(cross + ridge * start).T).T.to(start)
    return (solved[:, :-1], solved[:, -1]) if constant else (solved, bias)


def _both(_layer: nn.Module, inputs: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    return inputs.clone(), output.clone()


def record_calls(
    model: nn.Module, names: Sequence[str], batches: Iterable[Any]
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Yield for every batch the first input and the output of some modules' last call."""
    for batch in batches_of(batches):
        yield {name: calls[-1] for name, calls in record(model, names, batch, _both).items()}


def _affine(unit: Unit, model: nn.Module, with_norm: bool = True) -> tuple[Tensor, Tensor]:
    """Return a layer's weight and bias, as precise as can be, its BatchNorm folded in."""
    layer = model.get_submodule(unit.layer)
    weight: Tensor = widened(layer.weight.detach())  # type: ignore[operator]
    if getattr(layer, "groups", 1) > 1 or getattr(layer, "transposed", False):
        raise FusionError(f"layer '{unit.name}' cannot be merged: it is grouped or transposed")
    given = layer.bias
    bias = weight.new_zeros(len(weight)) if given is None else widened(given.detach())  # type: ignore[operator]
    for name in unit.modules[1:] if with_norm else ():
        norm = model.get_submodule(name)
        if not isinstance(norm, _BATCHNORMS) or norm.running_var is None:
            raise FusionError(
                f"layer '{unit.name}' cannot be merged: its {type(norm).__name__} cannot be folded"
            )
        scale = (widened(norm.running_var) + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * widened(norm.weight.detach())
        assert norm.running_mean is not None
        bias = (bias - widened(norm.running_mean)) * scale
        bias = bias if norm.bias is None else bias + widened(norm.bias.detach())
        weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    return weight, bias


def _stride(model: nn.Module, unit: Unit, before: int) -> int:
    """Return how many positions of the first layer's inputs one of this layer's outputs moves."""
    layer = model.get_submodule(unit.layer)
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return before
    if len(set(layer.stride)) > 1 or set(layer.dilation) != {1}:
        raise FusionError(
            f"layer '{unit.name}' cannot be merged: it is dilated, or its strides differ"
        )
    return before * int(layer.stride[0])


def _composed(second: Tensor, first: Tensor, stride: int) -> Tensor:
    """Return the kernel of two layers in sequence, cut to the second's size around its centre."""
    if second.dim() == 2:
        return second @ first
    kernel = second.shape[2:]
    # One step of the second layer is `stride` steps over the first one's inputs.
    spread = second.new_zeros(*second.shape[:2], *((size - 1) * stride + 1 for size in kernel))
    taps = spread
    for axis in range(2, spread.dim()):
        taps = taps[(slice(None),) * axis + (slice(None, None, stride),)]
    taps.copy_(second)
    padding = [size - 1 for size in spread.shape[2:]]
    full = _CONVOLVE[second.dim()](
        first.transpose(0, 1), spread.flip(*range(2, spread.dim())), padding=padding
    ).transpose(0, 1)
    for axis, size in enumerate(kernel, 2):
        full = full.narrow(axis, (full.shape[axis] - size) // 2, size)
    return full
