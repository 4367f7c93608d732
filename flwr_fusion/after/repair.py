"""Repairing a fused network: the statistics of its BatchNorm layers, the scale of its channels.

Averaged channels vary less than the clients' channels do, more so from layer to layer, and the
running statistics of BatchNorm layers are not those of the fused network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flwr_fusion.errors import FusionError, check_option
from flwr_fusion.fusion import Client
from flwr_fusion.graph.groups import ChannelGraph
from flwr_fusion.maps import Maps, coverage_along, map_channels
from flwr_fusion.networks import detached_state, key_of, tied_tensors
from flwr_fusion.observe import batches_of, run, watch
from flwr_fusion.precision import widest_of
from flwr_fusion.rules.robust import trimmed_mean
from flwr_fusion.statistics.moments import RunningMoments, input_moments

Repair = Literal["auto", "none", "batchnorm", "rescale"]
REPAIRS = ("auto", "none", "batchnorm", "rescale")
RECOMPUTED = "BatchNorm recomputed on calibration data"
FROM_CLIENTS = "BatchNorm from the clients' statistics"
NOTHING_KNOWN = "none: clients of most of the weight sent no statistics of BatchNorm layers"
RESCALED = "channels rescaled to the clients' activations"
BATCHNORM = nn.modules.batchnorm._BatchNorm
# Below this share of its mean a channel's deviation is rounding.
_LEAST_DEVIATION = 1e-5
_FUSED = "the fused network"
# Of fewer values the median is no protection against one of them.
_FEWEST_FOR_MEDIAN = 3


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

    Where a few clients must not decide, all three are medians over the clients.
    """

    mean: Tensor
    variance: Tensor
    deviation: Tensor


def check_repair(repair: Repair, calibration: Any, statistics: object) -> None:
    """Refuse a repair that does not exist, or lacks the data that it needs."""
    check_option("repair", repair, REPAIRS)
    if repair == "batchnorm" and calibration is None and statistics is None:
        raise FusionError("repair='batchnorm' needs calibration= or statistics=")
    if repair == "rescale" and calibration is None:
        raise FusionError("repair='rescale' needs calibration=")


def repair_network(
    fused: nn.Module,
    repair: Repair,
    clients: Sequence[Client],
    maps: Sequence[Maps],
    graph: ChannelGraph,
    calibration: Any,
    *,
    moved: bool,
    few_cannot_decide: bool,
) -> str:
    """Repair a fused network in place."""
    chosen = _chosen(repair, fused, calibration is not None, clients, moved)
    if chosen == RECOMPUTED:
        recompute_batchnorm(fused, calibration)
    elif chosen == RESCALED:
        measured = [_measured(client, calibration) for client in clients]
        goals = activation_goals(measured, maps, detached_state(fused), few_cannot_decide)
        tied = tied_tensors(fused)
        layers = [name for name in _free_layers(graph) if key_of(name, "weight") not in tied]
        rescale_activations(fused, layers, goals, calibration)
    elif chosen == FROM_CLIENTS:
        goals = activation_goals(clients, maps, detached_state(fused), few_cannot_decide)
        return chosen if batchnorm_from_clients(fused, goals) else NOTHING_KNOWN
    return chosen


def _chosen(
    repair: Repair, model: nn.Module, calibration: bool, clients: Sequence[Client], moved: bool
) -> str:
    """Return what can be repaired."""
    normalised = any(tracks_statistics(module) for module in model.modules())
    measured = any(client.statistics is not None for client in clients)
    # In a federation it depends on the round whether clients have sent any.
    from_clients = FROM_CLIENTS if measured else NOTHING_KNOWN
    if repair == "auto":
        if normalised:
            return RECOMPUTED if calibration else from_clients if measured else "none"
        return RESCALED if calibration and moved else "none"
    if repair == "batchnorm":
        if not normalised:
            raise FusionError("repair='batchnorm': no BatchNorm layer tracks running statistics")
        return RECOMPUTED if calibration else from_clients
    if repair == "rescale":
        if normalised:
            raise FusionError(
                "repair='rescale' is for networks without BatchNorm: use repair='batchnorm'"
            )
        return RESCALED
    return "none"


def _measured(client: Client, calibration: Any) -> Client:
    """Return a client with statistics of what its own network does on the calibration inputs."""
    batches = batches_of(calibration)
    found = input_moments(client.model(), batches, samples=None, detail="diagonal")
    present = {n: s for n, s in found.items() if key_of(n, "weight") not in client.absent}
    return replace(client, statistics=present)


def _free_layers(graph: ChannelGraph) -> list[str]:
    """Return the layers that write channels of free groups; outputs keep their scale."""
    free = (group for group in graph.groups if not group.fixed and not group.linear)
    return sorted({layer for group in free for layer, _ in graph.activation_places(group)})


def activation_goals(
    clients: Sequence[Client],
    maps: Sequence[Maps],
    template: Mapping[str, Tensor],
    few_cannot_decide: bool = False,
) -> dict[str, ActivationGoal]:
    """Return what the clients' activations are in the fused network's channels.

    Layers of which clients of half of the weight or less sent statistics are left out: those of
    the others are unknown, and one client alone could decide.
    """
    goals = {}
    for layer in dict.fromkeys(name for client in clients for name in client.statistics or ()):
        keys = (key_of(layer, kind) for kind in ("weight", "running_mean"))
        key = next((key for key in keys if key in template), None)
        if key is None or key in clients[0].correspondence.factors:
            continue
        pairs = [(c, m) for c, m in zip(clients, maps, strict=True) if key not in c.absent]
        known = [(c, m) for c, m in pairs if layer in (c.statistics or {})]
        if 2 * sum(c.weight for c, _ in known) <= sum(c.weight for c, _ in pairs):
            continue
        if few_cannot_decide and len(known) < min(_FEWEST_FOR_MEDIAN, len(pairs)):
            continue
        parts = [_in_fused_channels(layer, key, client, chosen) for client, chosen in known]
        mean, variance, share = (torch.stack(part) for part in zip(*parts, strict=True))
        if bool((share.sum(0) <= 0).any()):
            continue
        middle = _middle_goal if few_cannot_decide else _mixture_goal
        device = template[key].device
        precise = widest_of(device)
        goals[layer] = middle(*(t.to(device, precise) for t in (mean, variance, share)))
    return goals


def _in_fused_channels(
    layer: str, key: str, client: Client, maps: Maps
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance and weight of a client's activations for every fused channel."""
    measured = (client.statistics or {})[layer]
    mean, variance = (
        map_channels(values.double(), 0, (key, 0), client.correspondence, maps)
        for values in (measured.activation_mean, measured.activation_variance)
    )
    covered = coverage_along(key, client.correspondence, maps)
    coverage = torch.ones_like(mean) if covered is None else covered[1].to(mean)
    return mean, variance, client.weight * coverage


def _mixture_goal(mean: Tensor, variance: Tensor, share: Tensor) -> ActivationGoal:
    """Return the goal of clients by their weights, from shapes (clients, channels)."""
    share = share / share.sum(0)
    middle = (share * mean).sum(0)
    # Variance of a mixture: E[x^2] - E[x]^2 over all clients' samples.
    square = (share * (variance + mean.square())).sum(0)
    deviation = (share * variance.sqrt()).sum(0)  # REPAIR averages it as such.
    return ActivationGoal(middle, (square - middle.square()).clamp(min=0), deviation)


def _middle_goal(mean: Tensor, variance: Tensor, share: Tensor) -> ActivationGoal:
    """Return the goal of which no few clients decide, from shapes (clients, channels)."""
    middle = trimmed_mean(mean, share > 0, 0.5)
    # The mixture's variance is the mean of v_k + (m_k - m)^2.
    about = trimmed_mean(variance + (mean - middle).square(), share > 0, 0.5)
    return ActivationGoal(middle, about, trimmed_mean(variance.sqrt(), share > 0, 0.5))


def recompute_batchnorm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace the running statistics of a network by its own on calibration data, in place."""
    layers = [module for module in model.modules() if tracks_statistics(module)]
    moments = {module: RunningMoments() for module in layers}

    def normalise(module: nn.Module, inputs: Tensor, _output: None) -> None:
        assert isinstance(module, BATCHNORM)
        # (samples, channels, ...) as (channels, values): each channel has one mean and variance.
        rows = inputs.movedim(1, 0).flatten(1)
        if rows.shape[1] < 2:
            raise FusionError("BatchNorm needs more than one value per channel: larger batches")
        moments[module].add(rows, 0)
        # The layer normalises by what it now holds: this batch's own statistics.
        _set_running(module, *_moments(rows))

    with watch(layers, normalise, before=True):
        run(model, batches, _FUSED)
    for module, total in moments.items():
        if total.count:
            assert isinstance(module, BATCHNORM)
            _set_running(module, *total.finish())


def batchnorm_from_clients(model: nn.Module, goals: Mapping[str, ActivationGoal]) -> bool:
    """Set running statistics to those of the mixture of all clients; return whether any was."""
    done = False
    for name, module in model.named_modules():
        if name in goals and isinstance(module, BATCHNORM) and tracks_statistics(module):
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

    def rescale(module: nn.Module, _inputs: Tensor, output: Tensor) -> Tensor:
        axis = 1 if isinstance(module, nn.modules.conv._ConvNd) else output.dim() - 1
        rows = output.movedim(axis, 0).flatten(1)
        moments[module].add(rows, 0)
        scale, shift = _affine(module, modules[module], *_moments(rows))
        shape = [-1 if a == axis else 1 for a in range(output.dim())]
        return output * scale.to(output).view(shape) + shift.to(output).view(shape)

    with watch(modules, rescale):
        run(model, batches, _FUSED)
    for module, goal in modules.items():
        if moments[module].count:
            _rescale_parameters(module, *_affine(module, goal, *moments[module].finish()))


def tracks_statistics(module: nn.Module) -> bool:
    """Whether a layer normalises by running statistics."""
    return isinstance(module, BATCHNORM) and module.running_mean is not None


def _set_running(module: BATCHNORM, mean: Tensor, variance: Tensor) -> None:
    assert module.running_mean is not None
    assert module.running_var is not None
    new = [mean.to(module.running_mean), variance.clamp(min=0).to(module.running_var)]
    if all(bool(torch.isfinite(values).all()) for values in new):  # Half precision overflows.
        module.running_mean.copy_(new[0])
        module.running_var.copy_(new[1])


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of values of shape (channels, samples)."""
    alone = RunningMoments()
    alone.add(rows, 0)
    return alone.finish()


def _affine(
    module: nn.Module, goal: ActivationGoal, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the scale and shift that bring activations to their goal."""
    # REPAIR (Jordan et al. 2023, section 3): z -> s (z - mean) + goal mean, s = goal sd / sd.
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
