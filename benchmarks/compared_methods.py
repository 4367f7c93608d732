"""Ways of putting networks together that several experiments compare."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.statistics import Statistics, input_moments

BY_ACTIVATIONS = ff.Matching(by="activations")
UNGUARDED = ff.Transplantation(duplicates=0.0)
PLAIN = "plain average"
ENSEMBLE = "ensemble"
CONTROL = "best single network, trained on"
# Fused once, there are no later rounds in which the moments' noise could build up.
ONE_SHOT = ff.LeastSquares(shrinkage=0.9, ridge=0.01)
STATISTICS_BATCH = 256

Fuse = Callable[..., ff.FusionResult]
Scheme = Literal["joint", "iterative", "recursive"]
Repair = Literal["auto", "batchnorm"]


def moments(model: nn.Module, images: Tensor) -> Statistics:
    """Return the input moments of a network's layers on some images."""
    return input_moments(model, torch.split(images, STATISTICS_BATCH))


def by_matching(calibration: Tensor, statistics: Sequence[Statistics]) -> dict[str, Fuse]:
    """Return optimal transport with every way of matching, and the plain average, by name.

    Parameters
    ----------
    calibration : torch.Tensor
        Inputs for matching by activations and for repair.
    statistics : sequence of Statistics
        The networks' input moments.

    Returns
    -------
    dict of str to callable
        Each takes the networks and their weights.
    """
    ot_fusion = partial(ff.ot_fusion, example_inputs=calibration[:2])
    with_images = partial(ot_fusion, calibration=calibration, repair="none")
    return {
        PLAIN: ff.average,
        "OT by weights, greedy": partial(ot_fusion, matching=ff.Matching(sweep="greedy")),
        "OT by activations, greedy": partial(
            with_images, matching=ff.Matching(by="activations", sweep="greedy")
        ),
        "OT by weights, joint": ot_fusion,
        "OT by activations, joint": partial(with_images, matching=BY_ACTIVATIONS),
        "OT by weights, joint, repaired": partial(ot_fusion, calibration=calibration),
        "OT by weights, least squares": partial(
            ot_fusion, combine=ONE_SHOT, statistics=statistics, repair="none"
        ),
    }


def fused(
    models: Sequence[nn.Module], calibration: Tensor, schemes: Sequence[Scheme] = ("joint",)
) -> dict[str, nn.Module]:
    """Return what networks of one architecture are fused to, by method; repaired where it helps.

    Parameters
    ----------
    models : sequence of torch.nn.Module
        The networks.
    calibration : torch.Tensor
        Inputs to match and to repair with.
    schemes : sequence of str
        In which ways more than two networks are transplanted.

    Returns
    -------
    dict of str to torch.nn.Module
        The fused networks.
    """
    x = calibration[:2]
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in models[0].modules())
    data = calibration if normed else None
    transplant = partial(ff.neuron_transplantation, models, example_inputs=x)
    return {
        PLAIN: ff.average(models).model,
        "OT": ff.ot_fusion(models, example_inputs=x, calibration=data).model,
        "OT by activations, repaired": ff.ot_fusion(
            models, example_inputs=x, matching=BY_ACTIVATIONS, calibration=calibration
        ).model,
        **{
            "NT" if scheme == "joint" else f"NT {scheme}": transplant(
                transplantation=ff.Transplantation(scheme=scheme), calibration=data
            ).model
            for scheme in schemes
        },
        "NT, repaired": transplant(calibration=calibration).model,
    }


def average_with_norms(models: Sequence[nn.Module], calibration: Tensor) -> nn.Module:
    """Return the plain average with BatchNorm recomputed; without, it is near chance."""
    return ot_with_norms([ff.average(models).model], calibration, repair="batchnorm")


def ot_with_norms(
    models: Sequence[nn.Module], calibration: Tensor, repair: Repair = "auto"
) -> nn.Module:
    """Return networks fused by optimal transport, with BatchNorm recomputed."""
    return ff.ot_fusion(
        models, example_inputs=calibration[:2], calibration=calibration, repair=repair
    ).model


def pruned(model: nn.Module, example_inputs: Tensor, sparsity: float) -> nn.Module:
    """Return a network without a share of every layer's channels, those of least L2 norm."""
    # A dependency of the comparison alone: pip install -e '.[dev]'.
    import torch_pruning

    result = copy.deepcopy(model)
    last = [layer for layer in result.modules() if isinstance(layer, nn.Linear)][-1]
    torch_pruning.pruner.MagnitudePruner(
        result,
        example_inputs,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=sparsity,
        ignored_layers=[last],
    ).step()
    return result


def sliced_average(models: Sequence[nn.Module], target: nn.Module) -> nn.Module:
    """Return the average of networks of other widths, the smaller as top-left slices (HeteroFL).

    Every value of the target is the mean over the networks that have it; what none has stays.

    Parameters
    ----------
    models : sequence of nn.Module
        Networks with the target's tensors, of any widths.
    target : nn.Module
        Network of the width that is wanted. Not modified.

    Returns
    -------
    nn.Module
        The average.

    References
    ----------
    Diao et al., "HeteroFL", ICLR 2021, equation 3.
    """
    result = copy.deepcopy(target)
    states = [model.state_dict() for model in models]
    averaged = {
        name: _covering_mean([state[name] for state in states], own)
        for name, own in result.state_dict().items()
    }
    result.load_state_dict(averaged)
    return result


def _covering_mean(parts: Sequence[Tensor], own: Tensor) -> Tensor:
    total, count = torch.zeros_like(own, dtype=torch.float64), torch.zeros_like(own)
    for part in parts:
        common = tuple(slice(min(a, b)) for a, b in zip(part.shape, own.shape, strict=True))
        total[common] += part[common]
        count[common] += 1
    return torch.where(count > 0, total / count.clamp(min=1), own).to(own.dtype)
