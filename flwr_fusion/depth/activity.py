"""How much of a layer's pre-activation its rectifier lets pass, for merging layers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flwr_fusion.depth.structure import Unit
from flwr_fusion.errors import FusionError
from flwr_fusion.inputs import call, evaluation_mode, moved_to
from flwr_fusion.statistics import Statistics

MERGES = ("sum", "majority", "average")


def measured_activity(model: nn.Module, unit: Unit, batches: Iterable[Any], merge: str) -> Tensor:
    """Return the diagonal of D in ``W_2 D W_1`` from a layer's pre-activations z on inputs.

    Parameters
    ----------
    model : nn.Module
        The network; not modified.
    unit : Unit
        The layer with its norm; its output is the pre-activation.
    batches : iterable of inputs
        What the network is called with.
    merge : {"sum", "majority", "average"}
        1 where the sum of z is positive, where more than half of all z are, or the share of
        positive z. (Nguyen et al., section 3.2 and appendix.)

    Returns
    -------
    Tensor
        Shape (channels,), double precision, in [0, 1].
    """
    layer, last = model.get_submodule(unit.layer), model.get_submodule(unit.modules[-1])
    axis = 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1
    total, positive, samples = torch.zeros(()), torch.zeros(()), 0

    def record(_module: nn.Module, _args: Any, output: Tensor) -> None:
        nonlocal total, positive, samples
        rows = output.detach().movedim(axis, 0).flatten(1).double()
        total = total.to(rows.device) + rows.sum(1)
        positive = positive.to(rows.device) + (rows > 0).double().sum(1)
        samples += rows.shape[1]

    handle = last.register_forward_hook(record)
    try:
        with evaluation_mode(model), torch.no_grad():
            for batch in batches:
                call(model, moved_to(model, batch))
    except Exception as error:
        raise FusionError(f"the network cannot be run on the calibration: {error}") from error
    finally:
        handle.remove()
    if not samples:
        raise FusionError("calibration has no inputs: give a batch, or batches, of real inputs")
    share = positive / samples
    return {"sum": total > 0, "majority": share > 0.5, "average": share}[merge].double()


def activity_from_statistics(
    model: nn.Module, unit: Unit, statistics: Statistics, merge: str
) -> Tensor | None:
    """Return the diagonal of D as if pre-activations were normal, from what a client measured.

    Parameters
    ----------
    model : nn.Module
        The network.
    unit : Unit
        The layer with its norm.
    statistics : mapping of str to LayerStatistics
        The client's.
    merge : {"sum", "majority", "average"}
        As for `measured_activity`; the first two agree for normal variables.

    Returns
    -------
    Tensor or None
        Shape (channels,); None if the client did not measure the layer.
    """
    known = statistics.get(unit.layer)
    if known is None:
        return None
    mean, deviation = known.activation_mean.double(), known.activation_variance.double().sqrt()
    for name in unit.modules[1:]:
        norm = model.get_submodule(name)
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None:
            return None
        scale = (norm.running_var.double().cpu() + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight.detach().double().cpu()
        mean = (mean - norm.running_mean.double().cpu()) * scale  # type: ignore[union-attr]
        mean = mean if norm.bias is None else mean + norm.bias.detach().double().cpu()
        deviation = deviation * scale.abs()
    if merge != "average":
        return (mean > 0).double()
    ratio = mean / deviation.clamp(min=1e-12)
    return 0.5 * (1 + torch.erf(ratio / math.sqrt(2)))
