"""Optimal-transport fusion: match channels, then combine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from flwr_fusion.after.repair import Repair, check_repair, repair_network
from flwr_fusion.errors import FusionError
from flwr_fusion.fusion import Client, Fusion, largest, participants, with_correspondence
from flwr_fusion.graph.groups import verified_graph
from flwr_fusion.matching.barycentre import refine_as_barycentre
from flwr_fusion.matching.certificate import IdentityCertificate
from flwr_fusion.matching.costs import activation_costs
from flwr_fusion.matching.matching import Matching
from flwr_fusion.matching.reference import Reference, choose_reference
from flwr_fusion.matching.sweeps import Alignment, align_by_activations, align_by_weights
from flwr_fusion.networks import (
    assemble_model,
    check_networks_given,
    tied_tensors,
    with_state,
)
from flwr_fusion.observe import check_rereadable
from flwr_fusion.progress import tracked
from flwr_fusion.report import FusionReport, FusionResult, GroupReport
from flwr_fusion.rules import Rule, rule_of
from flwr_fusion.rules.rule import apply_rule, check_enough, check_given
from flwr_fusion.statistics.moments import Statistics

DEFAULT_MATCHING = Matching()


def ot_fusion(
    models: Sequence[nn.Module],
    weights: Sequence[float] | None = None,
    *,
    example_inputs: Any,
    target: nn.Module | None = None,
    reference: nn.Module | None = None,
    matching: Matching = DEFAULT_MATCHING,
    combine: str | Rule = "auto",
    statistics: Sequence[Statistics | None] | None = None,
    calibration: Any = None,
    repair: Repair = "auto",
) -> FusionResult:
    """Fuse networks by matching their channels with optimal transport, then combining them.

    Parameters
    ----------
    models : sequence of nn.Module
        Networks of one architecture, of any widths and any starts. Not modified.
    weights : sequence of float, optional
        Relative weights (sample counts will do), non-negative, not all zero. Default: equal. A
        client of weight 0 takes no part.
    example_inputs : Tensor, tuple or dict
        What the networks are called with; used to trace them, one or two samples will do.
    target : nn.Module, optional
        Network whose architecture the result has. Default: the one with the most parameters.
    reference : nn.Module, optional
        Network of the target's architecture to align to, such as the model that was sent out. It
        is used where at least half of the clients still resemble it (cosine of the weights above
        0.2); otherwise, and by default, the heaviest client is the reference, or the most central
        one where all count the same.
    matching : Matching
        How channels are matched.
    combine : {"auto", "mean", "least-squares", "median", "trimmed-mean", "krum"} or Rule
        How mapped networks are put together: by least squares, layer by layer as close as possible
        to every client on that client's own inputs, as its `statistics` or its update from
        `reference` tell ("auto", by the mean where there are neither) or as its `statistics`,
        which are needed, say ("least-squares"); by their mean; or so that a few bad clients cannot
        decide. `LeastSquares`, `TrimmedMean` and `Krum` objects set options, and any object with
        the members of `Rule` is one. Under the last three names all clients of positive weight
        count the same.
    statistics : sequence of (mapping or None), optional
        For each network its `flwr_fusion.statistics.input_moments`. A network with None counts as
        one with average inputs.
    calibration : Tensor or iterable of batches, optional
        Inputs to match by activations and to repair with; a few hundred samples.
    repair : {"auto", "none", "batchnorm", "rescale"}
        After the fusion: recompute the running statistics of BatchNorm layers on `calibration`,
        or, without it, take them from `statistics`; or rescale channels to the clients' mean and
        deviation on `calibration` (REPAIR), for networks without BatchNorm. "auto" does what the
        network has and the data allow, and leaves channels alone where none has moved.

    Returns
    -------
    FusionResult
        ``fused[out, in] = sum_k merge_k,out W_k unmerge_k,in`` in a new network on the target's
        device.

    Raises
    ------
    FusionError
        If networks, weights or options do not fit together; it names the client, tensor or group.

    References
    ----------
    Singh & Jaggi, "Model Fusion via Optimal Transport", NeurIPS 2020, sections 4.1 to 4.3;
    Ainsworth et al., "Git Re-Basin", ICLR 2023, section 3.2 (joint sweep).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import flwr_fusion as ff
    >>> def network():
    ...     return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> result = ff.ot_fusion([network(), network()], [100, 300], example_inputs=torch.zeros(1, 4))
    >>> [group.name for group in result.report.groups]
    ['0']
    """
    started = time.perf_counter()
    check_networks_given(target, reference)
    steps = Steps.of(matching, combine, statistics, calibration, repair, reference)
    clients = steps.participants(models, weights, statistics)
    target = largest(clients) if target is None else target
    result = fuse_clients(clients, target, example_inputs, reference, steps)
    return replace(result, report=replace(result.report, seconds=time.perf_counter() - started))


@dataclass(frozen=True)
class Steps:
    """How clients in one architecture's layers are matched, combined and repaired."""

    matching: Matching
    rule: Rule
    calibration: Any
    repair: Repair

    @classmethod
    def of(
        cls,
        matching: Matching,
        combine: str | Rule,
        statistics: Sequence[Statistics | None] | None,
        calibration: Any,
        repair: Repair,
        reference: nn.Module | None,
    ) -> Steps:
        """Return the steps that arguments ask for; refuse what they lack."""
        if not isinstance(matching, Matching):
            raise FusionError(f"matching must be a Matching(...), not {matching!r:.60}")
        if matching.by == "activations" and calibration is None:
            raise FusionError("Matching(by='activations') needs calibration=")
        check_rereadable(calibration)
        check_repair(repair, calibration, statistics)
        rule = rule_of(combine)
        check_given(rule, statistics, reference)
        return cls(matching, rule, calibration, repair)

    def participants(
        self,
        models: Sequence[nn.Module],
        weights: Sequence[float] | None,
        statistics: Sequence[Statistics | None] | None,
    ) -> list[Client]:
        """Return the clients that take part, the heaviest first."""
        equal = self.rule.few_cannot_decide
        clients = participants(models, weights, statistics, count_the_same=equal)
        check_enough(self.rule, len(clients))
        return clients


def fuse_clients(
    clients: Sequence[Client],
    target: nn.Module,
    example_inputs: Any,
    reference: nn.Module | None,
    steps: Steps,
) -> FusionResult:
    """Match, combine and repair clients in the target's layers."""
    graph = verified_graph(target, example_inputs)
    graph.warn_if_fixed()
    clients = with_correspondence(clients, target, graph, example_inputs)
    central_by = steps.matching if steps.rule.few_cannot_decide else None
    base = choose_reference(clients, target, reference, central_by)
    alignments = _alignments(clients, base, target, steps)
    settled = all(alignment.is_identity for alignment in alignments)
    maps = [alignment.maps for alignment in alignments]
    sent = base.state if base.given else None
    tied = frozenset(tied_tensors(target))
    fusion = Fusion(base.state, clients, sent, tied, graph.batch_normalised)
    result = apply_rule(steps.rule, fusion, maps)
    fused = assemble_model(target, result.state)
    repaired = repair_network(
        fused,
        steps.repair,
        clients,
        maps,
        graph,
        steps.calibration,
        moved=not settled,
        few_cannot_decide=steps.rule.few_cannot_decide,
    )
    groups = _group_reports(clients, alignments)
    report = FusionReport("ot_fusion", base.name, groups, 0.0, dict(result.details), repaired)
    return FusionResult(fused, report)


def _alignments(
    clients: Sequence[Client], reference: Reference, target: nn.Module, steps: Steps
) -> list[Alignment]:
    """Return the alignment of every client, to the reference or as a barycentre."""
    matching = steps.matching
    by_activations = matching.by == "activations"
    model = with_state(target, reference.state) if by_activations else None
    certificate = IdentityCertificate(reference.state)

    def aligned(n: int, client: Client) -> Alignment:
        if n == reference.client:
            return Alignment(client.correspondence.identity(), {})
        if model is None:
            return align_by_weights(
                reference.state,
                client.state(),
                client.correspondence,
                matching,
                certificate=certificate,
            )
        costs = activation_costs(
            model,
            client.model(),
            client.correspondence,
            steps.calibration,
            matching.activation_cost,
            client.name,
        )
        align = align_by_activations if matching.sweep == "greedy" else align_by_weights
        return align(
            reference.state, client.state(), client.correspondence, matching, activations=costs
        )

    alignments = [
        aligned(n, client) for n, client in enumerate(tracked(clients, "matching clients"))
    ]
    settled = all(alignment.is_identity for alignment in alignments)
    others = len(clients) - (reference.client is not None)
    refinable = not by_activations and matching.sweep == "joint" and others > 1 and not settled
    # A barycentre is a mean, which one bad client can move anywhere.
    if refinable and not steps.rule.few_cannot_decide:
        return refine_as_barycentre(clients, alignments, reference.state, matching)
    return alignments


def _group_reports(
    clients: Sequence[Client], alignments: Sequence[Alignment]
) -> tuple[GroupReport, ...]:
    reports = []
    for group in clients[0].correspondence.free_groups:
        pairs = [(c.weight, a) for c, a in zip(clients, alignments, strict=True)]
        cost = sum(w * a.costs.get(group.name, 0.0) for w, a in pairs)
        moved = sum(w * a.maps[group.name].share_moved for w, a in pairs)
        reports.append(GroupReport(group.name, group.fused_size, cost, moved))
    return tuple(reports)
