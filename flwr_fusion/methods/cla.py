"""Cross-layer alignment: fusion of networks of different depth."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flwr_fusion.depth.balance import DepthAligned, depth_aligned
from flwr_fusion.depth.layers import (
    LAYER_COSTS,
    LayerCost,
    StageMatch,
    StructuredNetwork,
    match_stages,
)
from flwr_fusion.depth.mapped_statistics import statistics_in_layers_of
from flwr_fusion.depth.merging import MERGES, merged_layer, recorded
from flwr_fusion.depth.resize import group_widths, resized_shape, with_own_widths
from flwr_fusion.depth.structure import DepthStructure, Unit, trace_family
from flwr_fusion.errors import FusionError
from flwr_fusion.graph.checking import is_close, output_vector, random_inputs, random_state
from flwr_fusion.graph.groups import verified_graph
from flwr_fusion.methods.ot import (
    FusionResult,
    LayerReport,
    batches_of,
    check_rereadable,
    fuse_by_transport,
    ot_fusion,
)
from flwr_fusion.networks import (
    BuiltOnAccess,
    architecture_of,
    check_option,
    check_same_function,
    depth_and_size,
    largest,
    participants,
    shares_of,
    with_state,
)
from flwr_fusion.observe import moved_to
from flwr_fusion.rules.rule import check_statistics
from flwr_fusion.statistics.moments import Statistics

BALANCES = ("add", "merge")


def cla_fusion(
    models: Sequence[nn.Module],
    weights: Sequence[float] | None = None,
    *,
    example_inputs: Any,
    target: nn.Module | None = None,
    reference: nn.Module | None = None,
    layer_cost: Literal["auto", "cka", "width", "wasserstein"] | LayerCost = "auto",
    balance: Literal["add", "merge"] = "add",
    merge: Literal["auto", "least-squares", "sum", "majority", "average", "linear"] = "auto",
    first_to_first: bool = True,
    last_to_last: bool = True,
    structure: Callable[[nn.Module], DepthStructure] | None = None,
    calibration: Any = None,
    statistics: Sequence[Statistics | None] | None = None,
    **options: Any,
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
    layer_cost : {"auto", "cka", "width", "wasserstein"} or callable
        Cost of matching two layers: 1 - linear CKA of their pre-activations on `calibration`, the
        squared difference of their widths relative to the widest layer, or the 1-Wasserstein
        distance between their channels' pre-activations. "auto": CKA where there is
        `calibration`, else width. A function ``(client, its_layers, target, target_layers)`` of
        two networks and the names of their layers (or blocks) in a stage returns its own costs, a
        row for each of the client's.
    balance : {"add", "merge"}
        Without `target`: fuse into the layers of the deepest network, each as wide as the widest
        client's, or into the shallowest network (among equals the largest).
    merge : {"auto", "least-squares", "sum", "majority", "average", "linear"}
        What takes the place of two layers: the linear layer nearest to them on `calibration`, or
        ``W_2 D W_1`` with the diagonal D 1 for channels whose pre-activations on `calibration`
        have a positive sum, for those that are positive more often than not, the share of
        positive ones, or 1 for all. "auto": least squares with `calibration`, else "linear".
    first_to_first, last_to_last : bool
        Whether first layers (and last ones) of a stage must be matched to each other.
    structure : callable, optional
        Returns the `DepthStructure` of a network. Default: `DepthStructure.trace`.
    calibration : Tensor or iterable of batches, optional
        A few hundred inputs.
    statistics : sequence of (mapping or None), optional
        For each network its `flwr_fusion.statistics.input_moments`.
    **options
        All other options of `ot_fusion`.

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
    check_rereadable(calibration)
    if not callable(layer_cost):
        check_option("layer_cost", layer_cost, LAYER_COSTS)
    check_option("balance", balance, BALANCES)
    check_option("merge", merge, MERGES)
    order = participants(models, shares_of(models, weights))
    aligner = DepthAligner(
        models,
        _target(models, order, balance) if target is None else target,
        example_inputs,
        _checked_statistics(models, order, statistics),
        structure,
        calibration,
        merge,
    )
    aligner.match(
        order, reference, layer_cost, first_to_first=first_to_first, last_to_last=last_to_last
    )
    if target is None:
        target = aligner.as_wide_as_the_widest(order) if balance == "add" else aligner.target_model
    result = fuse_by_transport(
        BuiltOnAccess(len(models), lambda k: aligner.aligned(k).model),
        weights,
        aligner.absent,
        example_inputs=example_inputs,
        target=target,
        reference=reference,
        calibration=calibration,
        statistics=aligner.statistics(),
        **_transport_options(options),
    )
    seconds = time.perf_counter() - started
    report = replace(result.report, method="cla_fusion", layers=aligner.reports(), seconds=seconds)
    return replace(result, report=report)


def _target(models: Sequence[nn.Module], order: Sequence[int], balance: str) -> nn.Module:
    """Return the deepest network, or the shallowest; among equals the one with most parameters."""
    sign = 1 if balance == "add" else -1

    def rank(k: int) -> tuple[int, int]:
        layers, parameters = depth_and_size(models[k])
        return sign * layers, parameters

    return models[max(order, key=rank)]


def _checked_statistics(
    models: Sequence[nn.Module],
    order: Sequence[int],
    statistics: Sequence[Statistics | None] | None,
) -> Sequence[Statistics | None] | None:
    if statistics is not None:
        check_statistics(statistics, models, order)
    return statistics


def _transport_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of `ot_fusion` that `cla_fusion` has not itself."""
    own = inspect.signature(cla_fusion).parameters
    defaults: dict[str, Any] = {
        name: parameter.default
        for name, parameter in inspect.signature(ot_fusion).parameters.items()
        if name not in own
    }
    unknown = sorted(options.keys() - defaults.keys())
    if unknown:
        raise FusionError(f"unknown options {unknown}; known: {', '.join(sorted(defaults))}")
    return {**defaults, **options}


@dataclass
class DepthAligner:
    """Brings the clients of other depths into the target's layers."""

    models: Sequence[nn.Module]
    target_model: nn.Module
    example_inputs: Any
    known: Sequence[Statistics | None] | None = None
    structure: Callable[[nn.Module], DepthStructure] | None = None
    calibration: Any = None
    merge: str = "auto"
    absent: dict[int, frozenset[str]] = field(default_factory=dict)
    _structures: dict[int, DepthStructure] = field(default_factory=dict)
    _matches: dict[int, tuple[StageMatch, ...]] = field(default_factory=dict)
    _merged: dict[tuple[int, tuple[str, ...]], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def match(
        self,
        order: Sequence[int],
        reference: nn.Module | None,
        layer_cost: str | LayerCost,
        **constraints: bool,
    ) -> None:
        """Match the layers of every architecture that differs from the target's in depth.

        The heaviest client of an architecture decides for all of it, compared with the heaviest
        client of the target's architecture, else with the reference, else with the target.
        """
        keys = self.target_model.state_dict().keys()
        others = [k for k in order if self.models[k].state_dict().keys() != keys]
        if not others:
            return
        first: dict[Any, int] = {}
        for k in others:
            first.setdefault(architecture_of(self.models[k]), k)
        named = {"the target": self.target_model} | {
            f"client {k}": self.models[k] for k in first.values()
        }
        structures = dict(zip(named, self._traced(named), strict=True))
        same = [k for k in order if k not in others]
        anchor = self.models[same[0]] if same else reference or self.target_model
        self.graph = verified_graph(self.target_model, self.example_inputs)
        self.target = StructuredNetwork(self.target_model, structures["the target"], "the target")
        for k in others:
            model, name = self.models[k], f"client {k}"
            deciding = first[architecture_of(model)]
            self._structures[k] = structures[f"client {deciding}"]
            if k == deciding:
                self._matches[k] = match_stages(
                    self._client(k),
                    replace(self.target, model=anchor),
                    layer_cost,
                    self.calibration,
                    **constraints,
                )
                self._check_exact(k)
                self.absent[k] = self.aligned(k).absent
            else:
                self._matches[k] = self._matches[deciding]
                try:
                    check_same_function(model, self.models[deciding], self.example_inputs)
                except FusionError as error:
                    raise FusionError(f"{name} is not as client {deciding}: {error}") from error
                self.absent[k] = self.absent[deciding]

    def aligned(self, k: int) -> DepthAligned:
        """Return a client in the target's layers."""
        if k not in self._structures:
            return DepthAligned(self.models[k], frozenset())
        return self._aligned(self._client(k), k)

    def as_wide_as_the_widest(self, order: Sequence[int]) -> nn.Module:
        """Return the target's layers, every channel group as large as the largest client's."""
        if not self._structures:
            return largest(self.models, order)
        widths = {group.name: 0 for group in self.graph.groups}
        for k in order:
            own = group_widths(self.graph, self.aligned(k).model.state_dict())
            widths = {name: max(width, own[name]) for name, width in widths.items()}
        state = {
            name: tensor.new_zeros(resized_shape(name, self.graph, widths))
            for name, tensor in self.target_model.state_dict().items()
        }
        return with_own_widths(self.target_model, state)

    def statistics(self) -> list[Statistics | None] | None:
        """Return the clients' statistics by the target's layers."""
        if self.known is None:
            return None
        return [
            statistics_in_layers_of(self.target, self._client(k), self._matches[k], own)
            if own is not None and k in self._structures
            else own
            for k, own in enumerate(self.known)
        ]

    def reports(self) -> tuple[LayerReport, ...]:
        """Return which layers correspond, for each architecture of another depth."""
        clients: dict[tuple[StageMatch, ...], list[int]] = {}
        for k, matches in self._matches.items():
            clients.setdefault(matches, []).append(k)
        return tuple(LayerReport(tuple(sorted(own)), stages) for stages, own in clients.items())

    def _traced(self, named: Mapping[str, nn.Module]) -> list[DepthStructure]:
        """Return the depth structures of networks, given by hand or traced together."""
        models = list(named.values())
        who = ", ".join(f"{name} ({type(model).__name__})" for name, model in named.items())
        try:
            if self.structure is None:
                return trace_family(models, self.example_inputs)
            structures = [self.structure(model) for model in models]
        except FusionError as error:
            raise FusionError(f"{who}: {error}") from error
        if not all(isinstance(own, DepthStructure) for own in structures):
            raise FusionError("structure must return a DepthStructure")
        return structures

    def _client(self, k: int) -> StructuredNetwork:
        # The model is not kept: a strategy builds one client's network at a time.
        return StructuredNetwork(self.models[k], self._structures[k], f"client {k}")

    def _aligned(self, network: StructuredNetwork, k: int) -> DepthAligned:
        def merge(units: Sequence[Unit]) -> tuple[Tensor, Tensor]:
            return self._merge(k, units)

        try:
            return depth_aligned(network, self.target, self.graph, self._matches[k], merge)
        except FusionError as error:
            raise FusionError(f"{self._refusal(network)}: {error}") from error

    def _merge(self, k: int, units: Sequence[Unit]) -> tuple[Tensor, Tensor]:
        """Return one layer in the place of several of a client's, remembering it."""
        key = (k, tuple(unit.name for unit in units))
        if key not in self._merged:
            batches = None if self.calibration is None else batches_of(self.calibration)
            self._merged[key] = merged_layer(units, self.models[k], batches, self.merge)
        return self._merged[key]

    def _check_exact(self, k: int) -> None:
        """Refuse to add layers where that changes the function of the client's architecture."""
        network, matches = self._client(k), self._matches[k]
        generator = torch.Generator().manual_seed(0)
        drawn = with_state(network.model, random_state(network.model, generator)).eval()
        deeper = self._aligned(replace(network, model=drawn), k).model.eval()
        inputs = random_inputs(drawn, self.example_inputs, generator)
        try:
            if any(len(m.client_units) > len(m.target_units) for m in matches):
                exact = self._added_units_do_nothing(deeper, inputs, matches)
            else:
                exact = is_close(
                    output_vector(deeper, deeper.state_dict(), moved_to(deeper, inputs)),
                    output_vector(drawn, drawn.state_dict(), inputs),
                )
        except FusionError as error:
            raise FusionError(f"{self._refusal(network)}: {error}") from error
        if not exact:
            raise FusionError(
                f"{self._refusal(network)}: layers that should do nothing change its function. Its "
                "activation applied twice must be the activation applied once (ReLU is, tanh and "
                "GELU are not), and the inputs of the first layer are not rectified; merge layers "
                "instead, into a shallower target"
            )

    def _added_units_do_nothing(
        self, deeper: nn.Module, inputs: Any, matches: Sequence[StageMatch]
    ) -> bool:
        """Whether every unit behind an added one reads what the added one has read."""
        pairs = [
            (name, following)
            for match in matches
            for number, (name, following) in enumerate(pairwise(match.target_units))
            if number not in {b for _, b in match.pairs}
        ]
        names = [name for pair in pairs for name in pair]
        (found,) = recorded(deeper, names, [inputs])
        return all(is_close(found[b][0].double(), found[a][0].double()) for a, b in pairs)

    def _refusal(self, network: StructuredNetwork) -> str:
        return f"{network.title} cannot be brought to the depth of {self.target.title}"
