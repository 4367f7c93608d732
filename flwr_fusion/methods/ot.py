"""The fusion methods, each a short composition of the parts of this package."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flwr_fusion.after.refine import RefinementReport
from flwr_fusion.after.repair import (
    FROM_CLIENTS,
    NOTHING_KNOWN,
    RECOMPUTED,
    REPAIRS,
    RESCALED,
    activation_goals,
    batchnorm_from_clients,
    choose_repair,
    recompute_batchnorm,
    rescale_activations,
)
from flwr_fusion.depth.layers import StageMatch
from flwr_fusion.errors import FusionError
from flwr_fusion.graph.groups import ChannelGraph, ChannelGroup, verified_graph
from flwr_fusion.maps import Maps, Unaligned
from flwr_fusion.matching.barycentre import (
    Client,
    most_central,
    refine_as_barycentre,
)
from flwr_fusion.matching.costs import ACTIVATION_COSTS, activation_costs
from flwr_fusion.matching.importance import Scorer, Transplantation, choose_channels
from flwr_fusion.matching.sweeps import (
    Alignment,
    Matching,
    align_by_activations,
    align_by_weights,
)
from flwr_fusion.matching.transport import Solver
from flwr_fusion.networks import (
    assembled,
    check_option,
    check_same_tensors,
    clients_of,
    detached_state,
    largest,
    participants,
    reference_of,
    shares_of,
    tied_tensors,
    with_state,
)
from flwr_fusion.rules.rule import (
    Combine,
    checked_statistics,
    combined,
    is_robust,
    rule_of,
)
from flwr_fusion.statistics.moments import Statistics, input_moments, key_of

ALIGN_BY = ("weights", "activations")
SCHEMES = ("joint", "iterative", "recursive")
Part = tuple[nn.Module, float, str]
Importance = Callable[[nn.Module, ChannelGroup], Tensor]


@dataclass(frozen=True)
class GroupReport:
    """What the matching did to one channel group.

    Parameters
    ----------
    name : str
        The group.
    channels : int
        Its number of channels in the fused network.
    cost : float
        Ground cost of its matched channels relative to that of all pairs (0: identical, 1:
        unrelated), averaged over the clients by weight.
    share_moved : float
        Share of channels that do not stand at their own index, averaged likewise.
    """

    name: str
    channels: int
    cost: float
    share_moved: float


@dataclass(frozen=True)
class LayerReport:
    """Which layers or blocks of clients of another depth correspond to the fused network's.

    Parameters
    ----------
    clients : tuple of int
        The clients, whose layers all correspond in this way.
    stages : tuple of StageMatch
        The corresponding units, stage by stage, with their costs.
    """

    clients: tuple[int, ...]
    stages: tuple[StageMatch, ...]


@dataclass(frozen=True)
class FusionReport:
    """What a fusion did.

    Parameters
    ----------
    method : str
        Name of the method.
    reference : str
        What the clients were aligned to: "client K", "the given reference", or "" for none.
    groups : tuple of GroupReport
        The groups that could move, in forward order.
    seconds : float
        Time of the fusion, tracing included.
    least_squares : dict of str to str
        The layers combined by least squares, with the detail of their moments ("full", "block" or
        "diagonal"); all others are combined by their mean.
    repair : str
        What was repaired after the fusion, or why nothing was.
    layers : tuple of LayerReport
        Which layers correspond, for clients of another depth.
    refinement : RefinementReport, optional
        What a strategy's refinement did to the fused network.
    """

    method: str
    reference: str
    groups: tuple[GroupReport, ...]
    seconds: float
    least_squares: dict[str, str] = field(default_factory=dict)
    repair: str = "none"
    layers: tuple[LayerReport, ...] = ()
    refinement: RefinementReport | None = None

    @property
    def share_moved(self) -> float:
        """Share of all channels that moved."""
        channels = sum(group.channels for group in self.groups)
        moved = sum(group.channels * group.share_moved for group in self.groups)
        return moved / channels if channels else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain numbers, names and lists, ready for JSON."""
        layers = [
            {"clients": own.clients, "stages": [stage.to_dict() for stage in own.stages]}
            for own in self.layers
        ]
        return asdict(self) | {"share_moved": self.share_moved, "layers": layers}


@dataclass(frozen=True)
class FusionResult:
    """A fused network and how it came about.

    Parameters
    ----------
    model : nn.Module
        A new network of the target's architecture.
    report : FusionReport
        Costs, moved channels, time.
    """

    model: nn.Module
    report: FusionReport


def average(
    models: Sequence[nn.Module],
    weights: Sequence[float] | None = None,
    *,
    combine: Combine = "mean",
    statistics: Sequence[Statistics | None] | None = None,
) -> FusionResult:
    """Average networks of one architecture, parameter by parameter (FedAvg).

    Parameters
    ----------
    models : sequence of nn.Module
        At least one network; all of one architecture. Not modified.
    weights : sequence of float, optional
        Relative weights (sample counts will do), non-negative, not all zero. Default: equal.
    combine : {"mean", "least-squares", "median", "trimmed-mean", "krum"} or a rule's object
        As for `ot_fusion`; the channels stay as they stand.
    statistics : sequence of (mapping or None), optional
        For each network its `flwr_fusion.statistics.input_moments`.

    Returns
    -------
    FusionResult
        ``sum_k w_k W_k / sum_k w_k``, or its least-squares counterpart, in the first network's
        architecture, dtypes and device.

    Raises
    ------
    FusionError
        If a weight, key, shape or value is bad; it names the client and the tensor.

    References
    ----------
    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    2017, algorithm 1.

    Examples
    --------
    >>> from torch import nn
    >>> import flwr_fusion as ff
    >>> a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    >>> fused = ff.average([a, b], weights=[100, 300]).model
    """
    started = time.perf_counter()
    rule = rule_of(combine)
    shares = shares_of(models, weights)
    first = detached_state(models[0])
    for k, model in enumerate(models):
        check_same_tensors(detached_state(model), first, f"client {k}", "client 0")
    order = participants(models, shares)
    known = checked_statistics(statistics, rule, models, order)
    as_they_stand, tied = Unaligned(), tied_tensors(models[0])
    clients = [Client(partial(_state_of, models, k), shares[k], as_they_stand) for k in order]
    state, details = combined(clients, [{} for _ in order], first, rule, known, tied)
    report = FusionReport("average", "", (), time.perf_counter() - started, details)
    return FusionResult(assembled(models[0], state), report)


def ot_fusion(
    models: Sequence[nn.Module],
    weights: Sequence[float] | None = None,
    *,
    example_inputs: Any,
    target: nn.Module | None = None,
    reference: nn.Module | None = None,
    align_by: Literal["weights", "activations"] = "weights",
    sweep: Literal["joint", "greedy"] = "joint",
    solver: Literal["exact", "sinkhorn", "unbalanced"] = "exact",
    regularisation: float = 0.05,
    marginal_relaxation: float = 1.0,
    masses: Literal["uniform", "importance"] = "uniform",
    calibration: Any = None,
    activation_cost: Literal["correlation", "euclidean"] = "correlation",
    combine: Combine = "mean",
    statistics: Sequence[Statistics | None] | None = None,
    repair: Literal["auto", "none", "batchnorm", "rescale"] = "auto",
) -> FusionResult:
    """Fuse networks by matching their channels with optimal transport, then averaging.

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
        Network of the target's architecture to align to, such as the global model that the
        clients were trained from. It is used where at least half of the clients still resemble it
        (cosine of the weights above 0.2); otherwise, and by default, the heaviest client is the
        reference, or the most central one where all count the same.
    align_by : {"weights", "activations"}
        Ground cost: squared Euclidean distance of weights, or distance of pre-activations on
        `calibration`.
    sweep : {"joint", "greedy"}
        Coordinate descent over all groups, from incoming and outgoing weights (plus, by
        activations, from pre-activations), by weights refined as a barycentre; or the paper's
        single pass, from incoming weights or from pre-activations alone.
    solver : {"exact", "sinkhorn", "unbalanced"}
        Transport problem between the channels of two networks.
    regularisation : float
        Entropy weight of "sinkhorn" and "unbalanced", relative to the mean cost.
    marginal_relaxation : float
        Marginal weight of "unbalanced", on the same scale.
    masses : {"uniform", "importance"}
        Masses of the channels: equal, or the L2 norm of their incoming weights.
    calibration : Tensor or iterable of batches, optional
        Inputs for ``align_by="activations"`` and for repair; a few hundred samples.
    activation_cost : {"correlation", "euclidean"}
        Distance of pre-activations.
    combine : {"mean", "least-squares", "median", "trimmed-mean", "krum"} or a rule's object
        How mapped models are put together: by their mean, or layer by layer as close as possible
        to every client on that client's own inputs, which needs `statistics`; or so that a few
        bad clients cannot decide. `LeastSquares`, `TrimmedMean` and `Krum` objects set options.
        Under the last three names all clients of positive weight count the same.
    statistics : sequence of (mapping or None), optional
        For each network its `flwr_fusion.statistics.input_moments`. A network with None counts as
        one with average inputs.
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
    return fuse_by_transport(
        models,
        weights,
        {},
        example_inputs=example_inputs,
        target=target,
        reference=reference,
        align_by=align_by,
        sweep=sweep,
        solver=solver,
        regularisation=regularisation,
        marginal_relaxation=marginal_relaxation,
        masses=masses,
        calibration=calibration,
        activation_cost=activation_cost,
        combine=combine,
        statistics=statistics,
        repair=repair,
    )


def fuse_by_transport(
    models: Sequence[nn.Module],
    weights: Sequence[float] | None,
    absent: Mapping[int, frozenset[str]],
    *,
    example_inputs: Any,
    target: nn.Module | None,
    reference: nn.Module | None,
    align_by: str,
    sweep: Literal["joint", "greedy"],
    solver: Literal["exact", "sinkhorn", "unbalanced"],
    regularisation: float,
    marginal_relaxation: float,
    masses: Literal["uniform", "importance"],
    calibration: Any,
    activation_cost: str,
    combine: Combine,
    statistics: Sequence[Statistics | None] | None,
    repair: str,
) -> FusionResult:
    """Fuse networks as `ot_fusion` says, some of which may have been brought to another depth.

    ``absent`` holds the clients brought to another depth, with their tensors that take no part.
    """
    started = time.perf_counter()
    check_option("align_by", align_by, ALIGN_BY)
    check_option("activation_cost", activation_cost, ACTIVATION_COSTS)
    check_option("repair", repair, REPAIRS)
    if align_by == "activations" and calibration is None:
        raise FusionError("align_by='activations' needs calibration=")
    check_rereadable(calibration)
    matching = Matching(sweep, Solver(solver, regularisation, marginal_relaxation), masses)
    rule = rule_of(combine)
    shares = shares_of(models, weights)
    if is_robust(rule):
        shares = shares_of(models, [float(share > 0) for share in shares])
    order = participants(models, shares)
    target = largest(models, order) if target is None else target
    graph = verified_graph(target, example_inputs)
    named = {k: f"client {k}" for k in order}
    clients = clients_of(models, shares, named, target, graph, example_inputs, absent)
    known = checked_statistics(statistics, rule, models, order)
    choose = partial(most_central, matching=matching) if is_robust(rule) else None
    base, base_name, base_client = reference_of(clients, order, target, reference, choose)
    base_model = with_state(target, base) if align_by == "activations" else None

    def aligned(n: int, client: Client) -> Alignment:
        if n == base_client:
            return Alignment(client.correspondence.identity(), {})
        if base_model is None:
            return align_by_weights(base, client.state(), client.correspondence, matching)
        costs = activation_costs(
            base_model, models[order[n]], client.correspondence, calibration, activation_cost
        )
        return _by_activations(base, client, matching, costs)

    alignments = [aligned(n, client) for n, client in enumerate(clients)]
    settled = all(alignment.is_identity for alignment in alignments)
    others = len(clients) - (base_client is not None)
    refinable = align_by == "weights" and sweep == "joint" and others > 1 and not settled
    # A barycentre is a mean, which one bad client can move anywhere.
    if refinable and not is_robust(rule):
        alignments = refine_as_barycentre(clients, alignments, base, matching)
    maps = [alignment.maps for alignment in alignments]
    state, details = combined(clients, maps, base, rule, known, tied_tensors(target))
    fused = assembled(target, state)
    networks = (models[k] for k in order)
    moved = not settled
    sent = None if statistics is None else known
    repaired = _repair(fused, repair, clients, maps, sent, networks, graph, calibration, moved)
    groups = _group_reports(clients, alignments)
    seconds = time.perf_counter() - started
    report = FusionReport("ot_fusion", base_name, groups, seconds, details, repaired)
    return FusionResult(fused, report)


def neuron_transplantation(
    models: Sequence[nn.Module],
    weights: Sequence[float] | None = None,
    *,
    example_inputs: Any,
    target: nn.Module | None = None,
    importance: Literal["l1", "l2"] | Importance = "l2",
    weighted: bool = False,
    scheme: Literal["joint", "iterative", "recursive"] = "joint",
    order: Literal["merge-then-prune", "prune-then-merge"] = "merge-then-prune",
    duplicates: float = 0.25,
    donated: float | None = None,
    calibration: Any = None,
    repair: Literal["auto", "none", "batchnorm", "rescale"] = "auto",
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
    importance : {"l1", "l2"} or callable
        Score of a channel: sum of absolute values or of squares over all its weights, or
        ``importance(model, group)``, which returns one score per channel of a `ChannelGroup`.
    weighted : bool
        Multiply the scores by the clients' weights.
    scheme : {"joint", "iterative", "recursive"}
        All networks at once, one after the other, or in pairs.
    order : {"merge-then-prune", "prune-then-merge"}
        All channels compete, or every network gets an equal number of places.
    duplicates : float
        Channels that differ by less than this share of the spread are one; 0: never.
    donated : float, optional
        Share of places for channels of all networks but the heaviest (partial transplantation).
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
    check_option("scheme", scheme, SCHEMES)
    check_option("repair", repair, REPAIRS)
    check_rereadable(calibration)
    shares = shares_of(models, weights)
    ranked = participants(models, shares)
    target = largest(models, ranked) if target is None else target
    graph = verified_graph(target, example_inputs)
    parts = [(models[k], shares[k], f"client {k}") for k in ranked]
    repairs: list[str] = []

    def fuse_once(chosen: Sequence[Part]) -> Part:
        total = sum(share for _, share, _ in chosen)
        networks = [network for network, _, _ in chosen]
        relative = [share / total for _, share, _ in chosen]
        named = {n: name for n, (_, _, name) in enumerate(chosen)}
        clients = clients_of(networks, relative, named, target, graph, example_inputs, {})
        scorer = _scorer(importance, networks, clients) if callable(importance) else importance
        maps = choose_channels(
            clients, Transplantation(scorer, weighted, order, duplicates, donated)
        )
        unknown: list[Statistics | None] = [None] * len(clients)
        state, _ = combined(clients, maps, detached_state(target), None, unknown, ())
        network = assembled(target, state)
        moved = not all(m.is_identity for own in maps for m in own.values())
        done = _repair(network, repair, clients, maps, None, networks, graph, calibration, moved)
        repairs.append(done)
        return network, total, "fused"

    step = len(parts) if scheme == "joint" else 2
    fused, rest = fuse_once(parts[:step]), parts[step:]
    while rest:
        parts = [*rest, fused] if scheme == "recursive" else [fused, *rest]
        fused, rest = fuse_once(parts[:step]), parts[step:]
    seconds = time.perf_counter() - started
    report = FusionReport("neuron_transplantation", "", (), seconds, repair=repairs[-1])
    return FusionResult(fused[0], report)


def _by_activations(
    base: Mapping[str, Tensor], client: Client, matching: Matching, costs: Mapping[str, Tensor]
) -> Alignment:
    if matching.sweep == "greedy":
        return align_by_activations(costs, client.correspondence, matching)
    return align_by_weights(
        base, client.state(), client.correspondence, matching, activations=costs
    )


def _scorer(
    importance: Importance, networks: Sequence[nn.Module], clients: Sequence[Client]
) -> Scorer:
    """Return a user's importance as a function of client number and group name."""

    def score(n: int, name: str) -> Tensor:
        groups = {group.name: group for group in clients[n].correspondence.client.groups}
        scores = torch.as_tensor(importance(networks[n], groups[name]))
        if scores.shape != (groups[name].size,) or not bool(torch.isfinite(scores).all()):
            raise FusionError(
                f"importance must return {groups[name].size} finite scores for group '{name}'"
            )
        return scores

    return score


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


def _state_of(models: Sequence[nn.Module], k: int) -> dict[str, Tensor]:
    return detached_state(models[k])


def check_rereadable(calibration: Any) -> None:
    """Refuse calibration inputs that can be read only once."""
    if isinstance(calibration, Iterator):
        raise FusionError(
            "calibration is read once for every client: give a tensor, a list of batches or a "
            "data loader, not a generator"
        )


def batches_of(calibration: Any) -> Any:
    """Return calibration inputs as an iterable of batches."""
    return [calibration] if isinstance(calibration, Tensor) else calibration


def _repair(
    fused: nn.Module,
    repair: str,
    clients: Sequence[Client],
    maps: Sequence[Maps],
    statistics: Sequence[Statistics | None] | None,
    networks: Iterable[nn.Module],
    graph: ChannelGraph,
    calibration: Any,
    moved: bool,
) -> str:
    """Repair a fused network in place; return what was done."""
    chosen = choose_repair(repair, fused, calibration is not None, statistics, moved)
    batches = batches_of(calibration)
    if chosen == RECOMPUTED:
        recompute_batchnorm(fused, batches)
    elif chosen == RESCALED:
        measured = (
            input_moments(network, batches, samples=None, detail="diagonal") for network in networks
        )
        statistics = [
            {n: s for n, s in own.items() if key_of(n, "weight") not in (client.absent or ())}
            for own, client in zip(measured, clients, strict=True)
        ]
    if chosen not in (RESCALED, FROM_CLIENTS) or statistics is None:
        return chosen
    sources = [
        (client.weight, own, client.correspondence, its_maps)
        for client, its_maps, own in zip(clients, maps, statistics, strict=True)
        if own is not None
    ]
    goals = activation_goals(sources, detached_state(fused))
    if chosen == FROM_CLIENTS:
        return chosen if batchnorm_from_clients(fused, goals) else NOTHING_KNOWN
    else:
        tied = tied_tensors(fused)
        layers = [name for name in _free_layers(graph) if key_of(name, "weight") not in tied]
        rescale_activations(fused, layers, goals, batches)
    return chosen


def _free_layers(graph: ChannelGraph) -> list[str]:
    """Return the layers that write channels of free groups; outputs keep their scale."""
    free = (group for group in graph.groups if not group.fixed)
    return sorted({layer for group in free for layer, _ in graph.activation_places(group)})
