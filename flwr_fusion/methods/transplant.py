"""Neuron Transplantation: keep the most important channels of all networks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from flwr_fusion.after.repair import Repair, check_repair, repair_network
from flwr_fusion.errors import FusionError
from flwr_fusion.fusion import Client, Fusion, largest, participants, with_correspondence
from flwr_fusion.graph.groups import ChannelGraph, verified_graph
from flwr_fusion.matching.importance import Transplantation, choose_channels
from flwr_fusion.networks import assemble_model, check_networks_given, detached_state
from flwr_fusion.observe import check_rereadable
from flwr_fusion.report import FusionReport, FusionResult
from flwr_fusion.rules.mean import Mean
from flwr_fusion.rules.rule import apply_rule

DEFAULT_TRANSPLANTATION = Transplantation()
# What has been fused on the way is no client that was given.
_ON_THE_WAY = -1


def neuron_transplantation(
    models: Sequence[nn.Module],
    weights: Sequence[float] | None = None,
    *,
    example_inputs: Any,
    target: nn.Module | None = None,
    transplantation: Transplantation = DEFAULT_TRANSPLANTATION,
    calibration: Any = None,
    repair: Repair = "auto",
) -> FusionResult:
    """Fuse networks by keeping the most important channels of all of them.

    Hidden channels are not averaged, channels of different networks do not read each other, and
    output layers are the weighted mean. Near-duplicate channels take one place and are averaged,
    so that networks with a common start are averaged and a network fused with itself is itself.

    Parameters
    ----------
    models : sequence of nn.Module
        Networks of one architecture, of any widths. Not modified.
    weights : sequence of float, optional
        Relative weights, non-negative, not all zero. Default: equal.
    example_inputs : Tensor, tuple or dict
        What the networks are called with.
    target : nn.Module, optional
        Network whose architecture, and so whose widths, the result has. Default: the one with the
        most parameters. With a target as wide as all networks together nothing is dropped
        (merge); fusing that single network into a small target then prunes it.
    transplantation : Transplantation
        Which channels are kept.
    calibration : Tensor or iterable of batches, optional
        Inputs for repair; a few hundred samples.
    repair : {"auto", "none", "batchnorm", "rescale"}
        After the fusion, on `calibration`, as for `ot_fusion`.

    Returns
    -------
    FusionResult
        The fused network; the report holds no costs, because nothing is matched.

    Raises
    ------
    FusionError
        If networks, weights or options do not fit together.

    References
    ----------
    Öz et al., "Model Fusion via Neuron Transplantation", 2024, sections 3 and 4.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import flwr_fusion as ff
    >>> a = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> x = torch.randn(5, 4)
    >>> fused = ff.neuron_transplantation([a, a], example_inputs=x).model
    >>> bool(torch.allclose(fused(x), a(x), atol=1e-6))
    True
    """
    started = time.perf_counter()
    if not isinstance(transplantation, Transplantation):
        raise FusionError(
            f"transplantation must be a Transplantation(...), not {transplantation!r:.60}"
        )
    check_networks_given(target, None)
    check_repair(repair, calibration, None)
    check_rereadable(calibration)
    clients = participants(models, weights)
    target = largest(clients) if target is None else target
    step = _Step(target, example_inputs, transplantation, calibration, repair)
    recursive = transplantation.scheme == "recursive"
    taken = len(clients) if transplantation.scheme == "joint" else 2
    fused, repaired = step.fuse(clients[:taken])
    rest = clients[taken:]
    while rest:
        clients = [*rest, fused] if recursive else [fused, *rest]
        fused, repaired = step.fuse(clients[:taken])
        rest = clients[taken:]
    seconds = time.perf_counter() - started
    report = FusionReport("neuron_transplantation", "", (), seconds, repair=repaired)
    return FusionResult(fused.model(), report)


class _Step:
    """One transplantation of several networks into the target's places."""

    def __init__(
        self,
        target: nn.Module,
        example_inputs: Any,
        transplantation: Transplantation,
        calibration: Any,
        repair: Repair,
    ) -> None:
        self._target = target
        self._example_inputs = example_inputs
        self._graph: ChannelGraph = verified_graph(target, example_inputs)
        self._graph.warn_if_fixed()
        self._transplantation = transplantation
        self._calibration = calibration
        self._repair: Repair = repair

    def fuse(self, chosen: Sequence[Client]) -> tuple[Client, str]:
        """Return what has been fused as one more client, and what was repaired."""
        total = sum(client.weight for client in chosen)
        relative = [replace(client, weight=client.weight / total) for client in chosen]
        clients = with_correspondence(relative, self._target, self._graph, self._example_inputs)
        maps = choose_channels(clients, self._transplantation)
        fusion = Fusion(detached_state(self._target), clients)
        network = assemble_model(self._target, apply_rule(Mean(), fusion, maps).state)
        moved = not all(m.is_identity for chosen_maps in maps for m in chosen_maps.values())
        repaired = repair_network(
            network,
            self._repair,
            clients,
            maps,
            self._graph,
            self._calibration,
            moved=moved,
            few_cannot_decide=False,
        )
        fused = replace(clients[0], number=_ON_THE_WAY, model=lambda: network, weight=total)
        return fused, repaired
