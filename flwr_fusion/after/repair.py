"""Repairing a fused network: the statistics of its BatchNorm layers, the scale of its channels.

Averaged channels vary less than the clients' channels do, more so from layer to layer, and the
running statistics of BatchNorm layers are not those of the fused network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flwr_fusion.errors import FusionError
from flwr_fusion.maps import Correspondence, Maps, coverage_along, map_channels
from flwr_fusion.observe import call, evaluation_mode, moved_to
from flwr_fusion.statistics.moments import RunningMoments, Statistics, key_of

REPAIRS = ("auto", "none", "batchnorm", "rescale")
RECOMPUTED = "BatchNorm recomputed on calibration data"
FROM_CLIENTS = "BatchNorm from the clients' statistics"
NOTHING_KNOWN = "none: no client sent statistics of BatchNorm layers"
RESCALED = "channels rescaled to the clients' activations"
BATCHNORM = nn.modules.batchnorm._BatchNorm
# Below this share of its mean a channel's deviation is rounding.
_LEAST_DEVIATION = 1e-5


@dataclass(frozen=True)
class ActivationGoal:
    """Mean, variance and deviation that a fused layer's channels should have.

    Parameters
    ----------
    mean : Tensor
        Shape (channels,): the clients' weighted mean.
    variance : Tensor
        Variance of the mixture of all clients: the mean variance plus that of the means.
    deviation : Tensor
        The clients' weighted mean standard deviation.
    """

    mean: Tensor
    variance: Tensor
    deviation: Tensor


def choose_repair(
    repair: str,
    model: nn.Module,
    calibration: bool,
    statistics: Sequence[Statistics | None] | None,
    moved: bool,
) -> str:
    """Return what can be repaired.

    Parameters
    ----------
    repair : {"auto", "none", "batchnorm", "rescale"}
        What is asked for.
    model : nn.Module
        The fused network.
    calibration : bool
        Whether there are calibration inputs.
    statistics : sequence of (mapping or None), or None
        The clients' statistics; None where none were asked for.
    moved : bool
        Whether channels of different index have been put together.

    Returns
    -------
    str
        One of ``RECOMPUTED``, ``FROM_CLIENTS``, ``RESCALED``, ``NOTHING_KNOWN`` and "none".

    Raises
    ------
    FusionError
        If the network or the data lack what is asked for.
    """
    normalised = any(_tracks(module) for module in model.modules())
    known = any(own is not None for own in statistics or ())
    if repair == "auto":
        if normalised:
            return RECOMPUTED if calibration else FROM_CLIENTS if known else "none"
        return RESCALED if calibration and moved else "none"
    if repair == "batchnorm":
        if not normalised:
            raise FusionError("repair='batchnorm': no BatchNorm layer tracks running statistics")
        if not calibration and statistics is None:
            raise FusionError("repair='batchnorm' needs calibration= or statistics=")
        # In a federation it depends on the round whether clients have sent any.
        return RECOMPUTED if calibration else FROM_CLIENTS if known else NOTHING_KNOWN
    if repair == "rescale":
        if normalised:
            raise FusionError(
                "repair='rescale' is for networks without BatchNorm: use repair='batchnorm'"
            )
        if not calibration:
            raise FusionError("repair='rescale' needs calibration=")
        return RESCALED
    return "none"


def activation_goals(
    clients: Sequence[tuple[float, Statistics, Correspondence, Maps]],
    template: Mapping[str, Tensor],
) -> dict[str, ActivationGoal]:
    """Return what the clients' activations are in the fused network's channels.

    Parameters
    ----------
    clients : sequence of (float, mapping, Correspondence, mapping)
        Weight, statistics and maps of every client that has statistics.
    template : mapping of str to Tensor
        State dict of the fused network.

    Returns
    -------
    dict of str to ActivationGoal
        By layer, on the template's device, over the clients that have statistics of it. Layers
        with channels that none of them has are left out.
    """
    goals = {}
    for layer in dict.fromkeys(name for _, statistics, _, _ in clients for name in statistics):
        keys = (key_of(layer, kind) for kind in ("weight", "running_mean"))
        key = next((key for key in keys if key in template), None)
        if key is None:
            continue
        sums = torch.zeros(4, len(template[key]), dtype=torch.float64)
        for weight, statistics, correspondence, maps in clients:
            own = statistics.get(layer)
            if own is None:
                continue
            mean, variance = (
                map_channels(values.double(), 0, (key, 0), correspondence, maps)
                for values in (own.activation_mean, own.activation_variance)
            )
            covered = coverage_along(key, correspondence, maps)
            share = weight * (1.0 if covered is None else covered[1].double())
            values = torch.stack([mean, variance + mean.square(), variance.sqrt()])
            sums[:3] += share * values
            sums[3] += share
        if bool((sums[3] <= 0).any()):
            continue
        mean, square, deviation = (sums[:3] / sums[3]).to(template[key].device)
        goals[layer] = ActivationGoal(mean, (square - mean.square()).clamp(min=0), deviation)
    return goals


def recompute_batchnorm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace the running statistics of a network by its own on calibration data, in place.

    Parameters
    ----------
    model : nn.Module
        The network. Everything but its BatchNorm layers runs in evaluation mode.
    batches : iterable of inputs
        Batches of what the network is called with; every sample counts alike.

    Raises
    ------
    FusionError
        If there are no inputs, or the network cannot be run on them.
    """
    layers = [module for module in model.modules() if _tracks(module)]
    moments = {module: RunningMoments() for module in layers}

    def normalise(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        assert isinstance(module, BATCHNORM)
        inputs = args[0] if args else next(iter(kwargs.values()))
        rows = inputs.movedim(1, 0).flatten(1)
        if rows.shape[1] < 2:
            raise FusionError("BatchNorm needs more than one value per channel: larger batches")
        moments[module].add(rows, 0)
        # The layer normalises by what it now holds: this batch's own statistics.
        _set_running(module, *_moments(rows))

    handles = [module.register_forward_pre_hook(normalise, with_kwargs=True) for module in layers]
    _run(model, batches, handles)
    for module, total in moments.items():
        if total.count:
            assert isinstance(module, BATCHNORM)
            _set_running(module, *total.finish())


def batchnorm_from_clients(model: nn.Module, goals: Mapping[str, ActivationGoal]) -> bool:
    """Replace the running statistics of a network by those of the mixture of all clients, in place.

    Parameters
    ----------
    model : nn.Module
        The network.
    goals : mapping of str to ActivationGoal
        From `activation_goals`; a BatchNorm layer that is not in it keeps its statistics.

    Returns
    -------
    bool
        Whether any layer was repaired.
    """
    done = False
    for name, module in model.named_modules():
        if name in goals and isinstance(module, BATCHNORM) and _tracks(module):
            _set_running(module, goals[name].mean, goals[name].variance)
            done = True
    return done


def rescale_activations(
    model: nn.Module,
    layers: Iterable[str],
    goals: Mapping[str, ActivationGoal],
    batches: Iterable[Any],
) -> None:
    """Rescale each channel so that its mean and deviation are the clients' weighted ones, in place.

    ``W <- s W``, ``b <- s (b - mean) + goal mean`` with ``s = goal deviation / deviation``, the
    fused network's mean and deviation measured behind layers that are rescaled already. Without a
    bias only the deviation can be set. Constant channels keep their weights.

    Parameters
    ----------
    model : nn.Module
        The network.
    layers : iterable of str
        The layers to rescale.
    goals : mapping of str to ActivationGoal
        From `activation_goals`.
    batches : iterable of inputs
        Calibration data.

    Raises
    ------
    FusionError
        If there are no inputs, or the network cannot be run on them.

    References
    ----------
    Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation Repair", ICLR
    2023, section 3.
    """
    modules = {model.get_submodule(name): goals[name] for name in layers if name in goals}
    moments = {module: RunningMoments() for module in modules}

    def rescale(module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        axis = 1 if isinstance(module, nn.modules.conv._ConvNd) else output.dim() - 1
        rows = output.movedim(axis, 0).flatten(1)
        moments[module].add(rows, 0)
        scale, shift = _affine(module, modules[module], *_moments(rows))
        shape = [-1 if a == axis else 1 for a in range(output.dim())]
        return output * scale.to(output).view(shape) + shift.to(output).view(shape)

    _run(model, batches, [module.register_forward_hook(rescale) for module in modules])
    for module, goal in modules.items():
        if moments[module].count:
            _rescale_parameters(module, *_affine(module, goal, *moments[module].finish()))


def _tracks(module: nn.Module) -> bool:
    return isinstance(module, BATCHNORM) and module.running_mean is not None


def _set_running(module: BATCHNORM, mean: Tensor, variance: Tensor) -> None:
    assert module.running_mean is not None
    assert module.running_var is not None
    new = [mean.to(module.running_mean), variance.clamp(min=0).to(module.running_var)]
    if all(bool(torch.isfinite(values).all()) for values in new):  # Half precision overflows.
        module.running_mean.copy_(new[0])
        module.running_var.copy_(new[1])


def _run(model: nn.Module, batches: Iterable[Any], handles: Sequence[RemovableHandle]) -> None:
    """Call a network on every batch, in evaluation mode; then remove the hooks."""
    seen = False
    try:
        with evaluation_mode(model), torch.no_grad():
            for batch in batches:
                call(model, moved_to(model, batch))
                seen = True
    except Exception as error:
        raise FusionError(
            f"the fused network cannot be run on the calibration inputs: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise FusionError("calibration has no inputs: give a batch, or batches, of real inputs")


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of values of shape (channels, samples)."""
    alone = RunningMoments()
    alone.add(rows, 0)
    return alone.finish()


def _affine(
    module: nn.Module, goal: ActivationGoal, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the scale and shift that bring activations to their goal."""
    deviation = variance.sqrt()
    constant = deviation <= _LEAST_DEVIATION * mean.abs() + 1e-12
    scale = torch.where(constant, 1.0, goal.deviation / deviation.clamp(min=1e-12))
    if module.bias is None:
        return scale, torch.zeros_like(scale)
    return scale, torch.where(constant, 0.0, goal.mean - scale * mean)


def _rescale_parameters(module: nn.Module, scale: Tensor, shift: Tensor) -> None:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.mul_(scale.to(weight).view(-1, *(1 for _ in weight.shape[1:])))
        if isinstance(bias, Tensor):
            bias.copy_(bias * scale.to(bias) + shift.to(bias))
