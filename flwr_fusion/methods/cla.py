"""Cross-layer alignment: fusion of networks of different depth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from flwr_fusion.after.repair import Repair
from flwr_fusion.depth.aligner import DepthAligner
from flwr_fusion.depth.layer_matching import LayerMatching
from flwr_fusion.errors import FusionError
from flwr_fusion.fusion import Client
from flwr_fusion.matching.matching import Matching
from flwr_fusion.methods.ot import DEFAULT_MATCHING, Steps, fuse_clients
from flwr_fusion.networks import check_networks_given, depth_and_size
from flwr_fusion.report import FusionResult
from flwr_fusion.rules import Rule
from flwr_fusion.statistics.moments import Statistics

DEFAULT_LAYERS = LayerMatching()


def cla_fusion(
    models: Sequence[nn.Module],
    weights: Sequence[float] | None = None,
    *,
    example_inputs: Any,
    target: nn.Module | None = None,
    reference: nn.Module | None = None,
    layers: LayerMatching = DEFAULT_LAYERS,
    matching: Matching = DEFAULT_MATCHING,
    combine: str | Rule = "auto",
    statistics: Sequence[Statistics | None] | None = None,
    calibration: Any = None,
    repair: Repair = "auto",
) -> FusionResult:
    """Fuse networks of different depth: match their layers, balance depths, then fuse channels.

    Parameters
    ----------
    models : sequence of nn.Module
        Networks of one family (chains of layers, or residual networks of one block type), of any
        depths, widths and starts. Not modified.
    weights : sequence of float, optional
        Relative weights, non-negative, not all zero. Default: equal.
    example_inputs : Tensor, tuple or dict
        What all networks are called with; one or two samples.
    target : nn.Module, optional
        Network whose architecture the result has: deeper, shallower, wider or narrower. Layers
        are added to networks that are shallower, and merged or left out in those that are deeper.
    reference : nn.Module, optional
        As for `ot_fusion`: a network of the target's architecture to align channels to.
    layers : LayerMatching
        How layers are matched, added and merged.
    matching, combine, statistics, repair
        As for `ot_fusion`.
    calibration : Tensor or iterable of batches, optional
        A few hundred inputs, to match and merge layers with, and as for `ot_fusion`.

    Returns
    -------
    FusionResult
        The fused network; ``report.layers`` says which layers correspond, and at what cost.

    Raises
    ------
    FusionError
        If networks cannot be matched, naming both and the stage; otherwise as `ot_fusion`.

    References
    ----------
    Nguyen et al., "On Cross-Layer Alignment for Model Fusion of Heterogeneous Neural Networks",
    2021, section 3. Biases, BatchNorm, more than two networks, and leaving the inside of added
    blocks out of the mean are not in the paper.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import flwr_fusion as ff
    >>> shallow = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> deep = nn.Sequential(
    ...     nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
    ... )
    >>> result = ff.cla_fusion([shallow, deep], example_inputs=torch.zeros(1, 4))
    >>> [stage.pairs for stage in result.report.layers[0].stages]
    [((0, 0),), ((0, 0),)]
    """
    started = time.perf_counter()
    if not isinstance(layers, LayerMatching):
        raise FusionError(f"layers must be a LayerMatching(...), not {layers!r:.60}")
    check_networks_given(target, reference)
    steps = Steps.of(matching, combine, statistics, calibration, repair, reference)
    clients = steps.participants(models, weights, statistics)
    base = _base(clients, layers.balance) if target is None else target
    aligner = DepthAligner(clients, base, example_inputs, layers, calibration)
    aligner.match(reference)
    if target is None:
        target = aligner.as_wide_as_the_widest() if layers.balance == "add" else base
    aligner.warn_of_narrow_layers(target)
    result = fuse_clients(aligner.clients(), target, example_inputs, reference, steps)
    seconds = time.perf_counter() - started
    report = replace(result.report, method="cla_fusion", layers=aligner.reports(), seconds=seconds)
    return replace(result, report=report)


def _base(clients: Sequence[Client], balance: str) -> nn.Module:
    """Return the deepest network, or the shallowest; among equals the one with most parameters."""
    sign = 1 if balance == "add" else -1

    def rank(model: nn.Module) -> tuple[int, int]:
        layers, parameters = depth_and_size(model)
        return sign * layers, parameters

    return max((client.model() for client in clients), key=rank)
