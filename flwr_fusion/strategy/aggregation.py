"""Fusing a round's updates into every architecture in use, and what is done with the result."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from logging import ERROR, INFO, WARNING
from typing import Any

from flwr.app import ArrayRecord
from flwr.common import log
from torch import nn

from flwr_fusion.errors import FusionError
from flwr_fusion.graph.groups import holding, verified_graph
from flwr_fusion.networks import BuiltOnAccess, copied, with_state
from flwr_fusion.progress import progress_to
from flwr_fusion.report import FusionReport, FusionResult
from flwr_fusion.statistics.moments import Statistics, input_moments
from flwr_fusion.strategy.configured_method import ConfiguredMethod
from flwr_fusion.strategy.culprits import Contributions, without_culprits
from flwr_fusion.strategy.global_models import (
    GlobalModels,
    load_arrays,
    network_over,
)
from flwr_fusion.strategy.reasons import Rejection
from flwr_fusion.strategy.refinement_steps import Refinement, check_refinement
from flwr_fusion.strategy.replies import Update


@dataclass(frozen=True)
class FusedRound:
    """What a round's fusion has come to.

    Parameters
    ----------
    arrays : dict of str to ArrayRecord
        The next global model by architecture.
    reports : dict of str to FusionReport
        The fusion's report by architecture.
    given : Contributions
        What was fused.
    rejections : list of Rejection
        Why some of what came was not.
    """

    arrays: dict[str, ArrayRecord]
    reports: dict[str, FusionReport]
    given: Contributions
    rejections: list[Rejection]


@dataclass(frozen=True)
class _Usable:
    """A fusion's result, and its arrays, which can be sent."""

    result: FusionResult
    arrays: ArrayRecord


@dataclass(frozen=True)
class Aggregator:
    """Fuses networks of a federation into its architectures.

    Parameters
    ----------
    models : GlobalModels
        The architectures, and the global model that was sent out.
    example_inputs : Any
        What all networks are called with.
    refine : Refinement, optional
        What is done with the fused networks.
    """

    models: GlobalModels
    example_inputs: Any
    refine: Refinement | None

    def warn_of_fixed_networks(self) -> None:
        """Log the architectures of which no channel can move."""
        for name, model in self.models.architectures.items():
            try:
                is_fixed = verified_graph(model, self.example_inputs).is_fixed
            except FusionError as error:
                if len(self.models.architectures) == 1:
                    raise
                raise FusionError(f"architecture {name!r}: {error}") from error
            if is_fixed:
                text = "no channels of %s can be matched: fusion is plain averaging"
                log(WARNING, text, type(model).__name__)

    def try_out(self, configured: ConfiguredMethod, architectures: Mapping[str, nn.Module]) -> None:
        """Fuse as many copies of all networks as a method needs into each of them.

        Whatever the method cannot do is refused here, not after the first round of training.
        """
        method = configured.to_try_out()
        networks = list(architectures.values()) * method.least_clients
        weights = [1.0] * len(networks)
        statistics = [self._statistics(method, network) for network in networks]
        for name, target in architectures.items():
            try:
                fused = self._fuse(method, networks, weights, statistics, target, target)
                self.models.usable_arrays(name, fused.model)
            except FusionError as error:
                if not self.models.has_several:
                    raise
                clients = ", ".join(f"client {k} is {n!r}" for k, n in enumerate(architectures))
                raise FusionError(
                    f"the architectures cannot be fused into {name!r}: {error} ({clients})"
                ) from error

    def try_out_refinement(self, method: ConfiguredMethod) -> None:
        """Refuse a refinement that does not fit the rule or an architecture."""
        if self.refine is None:
            return
        check_refinement(self.refine, method.rule)
        for name, model in self.models.architectures.items():
            whose = f"architecture {name!r}: " if self.models.has_several else ""
            try:
                self.refine.try_out(model)
            except FusionError as error:
                raise FusionError(f"{whose}{error}") from error
            except Exception as error:  # The step may be the user's.
                text = f"{whose}refine cannot be tried out: {type(error).__name__}: {error}"
                raise FusionError(text) from error

    def bring_up_to_date(self, method: ConfiguredMethod, names: Collection[str]) -> None:
        """Fuse the global model into architectures that nobody has run so far."""
        # No client has a part in it: there is nothing to combine.
        alone = method.without({"combine"})

        def fused_into(model: nn.Module, target: nn.Module) -> nn.Module:
            return self._fuse(alone, [model], [1.0], [None], target, None).model

        for name in names:
            self.models.bring_up_to_date(name, fused_into)

    def fuse_round(
        self,
        server_round: int,
        method: ConfiguredMethod,
        given: Contributions,
        model_of: Callable[[int], nn.Module],
        used: Collection[str],
        needed: int,
    ) -> FusedRound:
        """Fuse a round's contributions into every architecture in use.

        Where that fails, whoever makes it fail is left out, if as many as are needed remain.
        """
        rejections: list[Rejection] = []
        targets = {n: model for n, model in self.models.architectures.items() if n in used}
        with progress_to(partial(log, INFO, "aggregate_train: %s")):
            try:
                results = self._fused(method, given, targets, model_of)
            except FusionError as failure:
                log(WARNING, "round %s: looking for who makes it fail: %s", server_round, failure)
                trial = method.to_try_out()

                def attempt(part: Contributions) -> None:
                    self._fused(trial, part, targets, model_of)

                least = method.least_clients
                given, rejections = without_culprits(attempt, given, least, failure)
                if len(given.updates) < needed:
                    raise
                results = self._fused(method, given, targets, model_of)
        if self.refine is not None and server_round in self.refine.rounds:
            results = {
                name: self._refined(self.refine, server_round, name, fused, given.updates, model_of)
                for name, fused in results.items()
            }
        arrays = {name: fused.arrays for name, fused in results.items()}
        reports = {name: fused.result.report for name, fused in results.items()}
        return FusedRound(arrays, reports, given, rejections)

    def _fused(
        self,
        method: ConfiguredMethod,
        given: Contributions,
        targets: Mapping[str, nn.Module],
        model_of: Callable[[int], nn.Module],
    ) -> dict[str, _Usable]:
        """Return what contributions are fused into, for each architecture."""

        def network(k: int) -> nn.Module:
            update = given.updates[k]
            return network_over(model_of(update.node_id), update.arrays)

        networks = BuiltOnAccess(len(given.updates), cache(network))
        weights = [update.weight for update in given.updates]
        results = {}
        for name, target in targets.items():
            sent = None if self.models.sent(name) is None else self.models.network(name)
            result = self._fuse(method, networks, weights, given.statistics, target, sent)
            results[name] = _Usable(result, self.models.usable_arrays(name, result.model))
        return results

    def _statistics(self, method: ConfiguredMethod, network: nn.Module) -> Statistics | None:
        """Return statistics on the example inputs for a rule that needs some."""
        if method.rule is None or not method.rule.needs_statistics:
            return None
        return input_moments(network, [self.example_inputs], convolutions=True)

    def _fuse(
        self,
        method: ConfiguredMethod,
        networks: Sequence[nn.Module],
        weights: Sequence[float],
        statistics: Sequence[Statistics | None],
        target: nn.Module,
        reference: nn.Module | None,
    ) -> FusionResult:
        context = {"target": target, "reference": reference, "example_inputs": self.example_inputs}
        exchanged = self.models.exchanged
        with nullcontext() if exchanged.is_all else holding(lambda key: not exchanged.takes(key)):
            return method.fuse(networks, weights, statistics, **context)

    def _refined(
        self,
        refine: Refinement,
        server_round: int,
        name: str,
        fused: _Usable,
        updates: Sequence[Update],
        model_of: Callable[[int], nn.Module],
    ) -> _Usable:
        """Return the result of a fusion after the round's refinement."""
        before = fused.result

        def own_network(k: int) -> nn.Module:
            # The step may be the user's: it may do anything with the networks that it is given.
            return load_arrays(model_of(updates[k].node_id), updates[k].arrays)

        networks = BuiltOnAccess(len(updates), own_network)
        try:
            # A copy: what fails half-way must not have touched the fused model.
            weights = [update.weight for update in updates]
            refined = refine.refined(copied(before.model), networks, weights)
            # In the fused model's own types, whatever the step has made of them.
            model = with_state(before.model, refined.model.state_dict())
            losses = tuple(float(loss) for loss in refined.report.losses)
            report = replace(before.report, refinement=replace(refined.report, losses=losses))
            return _Usable(FusionResult(model, report), self.models.usable_arrays(name, model))
        except Exception as error:  # The step may be the user's; the round must not be lost.
            text = "round %s: the fused model is not refined: %s (clients %s)"
            reason = error if isinstance(error, FusionError) else repr(error)
            log(ERROR, text, server_round, reason, nodes_of(updates))
            return fused


def nodes_of(updates: Sequence[Update]) -> dict[int, int]:
    """Return the nodes of a round's clients by number, for messages that name a client."""
    return {k: update.node_id for k, update in enumerate(updates)}


def check_own_start(
    method: ConfiguredMethod, aggregator: Aggregator, checkpoints: object, head: str | None
) -> None:
    """Refuse what a wrapper would break, whose own start() runs the rounds."""
    rule = method.rule
    refused = {
        "a rule that needs the clients' statistics": (
            rule is not None and rule.needs_statistics,
            "they would pass by its clipping and noise",
        ),
        "refine=": (
            aggregator.refine is not None,
            "the refined model would depend on single clients more than its noise covers",
        ),
        "head=": (head is not None, "class moments would pass by its clipping and noise"),
        "checkpoint_dir=": (
            checkpoints is not None,
            "checkpoints would hold the model before its noise is added",
        ),
        "a federation of several architectures": (
            aggregator.models.has_several,
            "it sees the arrays of one architecture only",
        ),
    }
    for what, (asked_for, reason) in refused.items():
        if asked_for:
            raise FusionError(
                f"{what} works in rounds that the strategy's own start() runs. Here another "
                "strategy's runs them, which wraps this one, as those of Flower for differential "
                f"privacy do: {reason}"
            )
