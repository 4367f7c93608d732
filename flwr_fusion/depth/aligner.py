"""Bringing clients of other depths into one architecture's layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from flwr_fusion.depth.balance import DepthAligned, align_depth
from flwr_fusion.depth.layer_matching import (
    LayerMatching,
    StructuredNetwork,
    match_stages,
    width_of,
)
from flwr_fusion.depth.mapped_statistics import statistics_in_layers_of
from flwr_fusion.depth.merging import merged_layer, record_calls
from flwr_fusion.depth.resize import group_widths, resized_shape, with_own_widths
from flwr_fusion.depth.structure import DepthStructure, Unit, trace_family
from flwr_fusion.errors import FusionError
from flwr_fusion.fusion import Client, largest
from flwr_fusion.graph.groups import verified_graph
from flwr_fusion.graph.outputs import is_close, output_vector, random_inputs, random_state
from flwr_fusion.networks import architecture_of, check_same_function, with_state
from flwr_fusion.observe import moved_to
from flwr_fusion.precision import widened
from flwr_fusion.report import LayerReport, StageMatch
from flwr_fusion.statistics.moments import Statistics


class DepthAligner:
    """Brings the clients of other depths into the target's layers.

    Parameters
    ----------
    clients : sequence of Client
        As they came, of any depths.
    target : nn.Module
        The architecture whose layers all get.
    example_inputs : Tensor, tuple or dict
        What all networks are called with.
    layers : LayerMatching
        How layers are matched, added and merged.
    calibration : Tensor or iterable of batches, optional
        Inputs to match and merge layers with.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        target: nn.Module,
        example_inputs: Any,
        layers: LayerMatching,
        calibration: Any,
    ) -> None:
        self.target_model = target
        self.example_inputs = example_inputs
        self._clients = clients
        self._layers = layers
        self._calibration = calibration
        self._absent: dict[int, frozenset[str]] = {}
        self._structures: dict[int, DepthStructure] = {}
        self._matches: dict[int, tuple[StageMatch, ...]] = {}
        self._merged: dict[tuple[int, tuple[str, ...]], tuple[Tensor, Tensor]] = {}

    def match(self, reference: nn.Module | None) -> None:
        """Match the layers of every architecture that differs from the target's in depth.

        The heaviest client of an architecture decides for all of it, compared with the heaviest
        client of the target's architecture, else with the reference, else with the target.
        """
        keys = self.target_model.state_dict().keys()
        others = [n for n, c in enumerate(self._clients) if c.model().state_dict().keys() != keys]
        if not others:
            return
        first: dict[Any, int] = {}
        for n in others:
            first.setdefault(architecture_of(self._clients[n].model()), n)
        named = {"the target": self.target_model} | {
            self._clients[n].name: self._clients[n].model() for n in first.values()
        }
        structures = dict(zip(named, self._traced(named), strict=True))
        same = [n for n in range(len(self._clients)) if n not in others]
        anchor = self._clients[same[0]].model() if same else reference or self.target_model
        self.graph = verified_graph(self.target_model, self.example_inputs)
        self.target = StructuredNetwork(self.target_model, structures["the target"], "the target")
        for n in others:
            self._match_client(n, first[architecture_of(self._clients[n].model())], structures)
            if n in first.values():
                compared = replace(self.target, model=anchor)
                self._matches[n] = match_stages(
                    self._network(n), compared, self._layers, self._calibration
                )
                self._check_exact(n)
                self._absent[n] = self._aligned(self._network(n), n).absent

    def _match_client(
        self, n: int, deciding: int, structures: Mapping[str, DepthStructure]
    ) -> None:
        """Give a client the structure and the matches of the one that decides for its like."""
        client, decider = self._clients[n], self._clients[deciding]
        self._structures[n] = structures[decider.name]
        if n == deciding:
            return
        self._matches[n], self._absent[n] = self._matches[deciding], self._absent[deciding]
        try:
            check_same_function(client.model(), decider.model(), self.example_inputs)
        except FusionError as error:
            raise FusionError(f"{client.name} is not as {decider.name}: {error}") from error

    def clients(self) -> list[Client]:
        """Return all clients in the target's layers, in their order."""
        return [
            replace(
                client,
                model=partial(self._aligned_model, n),
                statistics=self._statistics(n),
                absent=self._absent[n],
                depth_aligned=True,
            )
            if n in self._structures
            else client
            for n, client in enumerate(self._clients)
        ]

    def as_wide_as_the_widest(self) -> nn.Module:
        """Return the target's layers, every channel group as large as the largest client's."""
        if not self._structures:
            return largest(self._clients)
        widths = {group.name: 0 for group in self.graph.groups}
        for n, client in enumerate(self._clients):
            model = self._aligned_model(n) if n in self._structures else client.model()
            theirs = group_widths(self.graph, model.state_dict())
            widths = {name: max(width, theirs[name]) for name, width in widths.items()}
        state = {
            name: tensor.new_zeros(resized_shape(name, self.graph, widths))
            for name, tensor in self.target_model.state_dict().items()
        }
        return with_own_widths(self.target_model, state)

    def warn_of_narrow_layers(self, target: nn.Module) -> None:
        """Warn where layers that are added have fewer channels than they must pass on."""
        architectures = {matches: n for n, matches in reversed(self._matches.items())}
        for matches, n in architectures.items():
            network = self._network(n)  # A strategy builds it anew at every access.
            narrow = list(_narrow_layers(network, replace(self.target, model=target), matches))
            if narrow:
                warnings.warn(
                    f"{network.title}: the target's layers {narrow} have no counterpart "
                    "in it and fewer channels than they must pass on, so that the fused network "
                    "computes its function only roughly: take a wider target, or try "
                    "LayerMatching(last_to_last=False)",
                    stacklevel=3,
                )

    def reports(self) -> tuple[LayerReport, ...]:
        """Return which layers correspond, for each architecture of another depth."""
        numbers: dict[tuple[StageMatch, ...], list[int]] = {}
        for n, matches in self._matches.items():
            numbers.setdefault(matches, []).append(self._clients[n].number)
        return tuple(LayerReport(tuple(sorted(k)), stages) for stages, k in numbers.items())

    def _statistics(self, n: int) -> Statistics | None:
        """Return a client's statistics by the target's layers."""
        measured = self._clients[n].statistics
        if measured is None:
            return None
        return statistics_in_layers_of(self.target, self._network(n), self._matches[n], measured)

    def _aligned_model(self, n: int) -> nn.Module:
        return self._aligned(self._network(n), n).model

    def _traced(self, named: Mapping[str, nn.Module]) -> list[DepthStructure]:
        """Return the depth structures of networks, given by hand or traced together."""
        models = list(named.values())
        who = ", ".join(f"{name} ({type(model).__name__})" for name, model in named.items())
        try:
            if self._layers.structure is None:
                return trace_family(models, self.example_inputs)
            structures = [self._layers.structure(model) for model in models]
        except Exception as error:  # The function may be the user's.
            raise FusionError(f"{who}: {error}") from error
        if not all(isinstance(found, DepthStructure) for found in structures):
            raise FusionError("structure must return a DepthStructure")
        return structures

    def _network(self, n: int) -> StructuredNetwork:
        # The model is not kept: a strategy builds one client's network at a time.
        client = self._clients[n]
        return StructuredNetwork(client.model(), self._structures[n], client.name)

    def _aligned(self, network: StructuredNetwork, n: int) -> DepthAligned:
        merge = partial(self._merge, n)
        try:
            return align_depth(network, self.target, self.graph, self._matches[n], merge)
        except FusionError as error:
            raise FusionError(f"{self._refusal(network)}: {error}") from error

    def _merge(self, n: int, units: Sequence[Unit]) -> tuple[Tensor, Tensor]:
        """Return one layer in the place of several of a client's, remembering it."""
        key = (n, tuple(unit.name for unit in units))
        if key not in self._merged:
            model, merge = self._clients[n].model(), self._layers.merge
            self._merged[key] = merged_layer(units, model, self._calibration, merge)
        return self._merged[key]

    def _check_exact(self, n: int) -> None:
        """Refuse to add layers where that changes the function of the client's architecture."""
        network, matches = self._network(n), self._matches[n]
        generator = torch.Generator().manual_seed(0)
        drawn = with_state(network.model, random_state(network.model, generator)).eval()
        deeper = self._aligned(replace(network, model=drawn), n).model.eval()
        inputs = random_inputs(moved_to(drawn, self.example_inputs), generator)
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
        (found,) = record_calls(deeper, names, [inputs])
        return all(is_close(widened(found[b][0]), widened(found[a][0])) for a, b in pairs)

    def _refusal(self, network: StructuredNetwork) -> str:
        return f"{network.title} cannot be brought to the depth of {self.target.title}"


def _narrow_layers(
    client: StructuredNetwork, target: StructuredNetwork, matches: Sequence[StageMatch]
) -> Iterator[str]:
    """Yield the target's layers without a counterpart that are narrower than the client's last."""
    stages = zip(client.structure.stages, target.structure.stages, matches, strict=True)
    for ours, theirs, match in stages:
        counterparts = {b: a for a, b in match.pairs}
        passed = 0
        for number, unit in enumerate(theirs.units):
            if number in counterparts:
                here = width_of(ours.units[counterparts[number]], client.model)
                passed = min(here, width_of(unit, target.model))
            elif not unit.is_block and width_of(unit, target.model) < passed:
                yield unit.name
