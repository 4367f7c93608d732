"""The strategy that runs any fusion method inside Flower."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from logging import ERROR, INFO, WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import nn

from flwr_fusion.channels import verified_graph
from flwr_fusion.errors import FusionError
from flwr_fusion.fuse import FusionReport, FusionResult
from flwr_fusion.prepare import BuiltOnAccess, with_state
from flwr_fusion.statistics import Statistics
from flwr_fusion.strategy.replies import (
    RejectedReply,
    Update,
    arrays_of,
    check_arrays,
    nodes_with_several_replies,
    read_statistics,
    read_update,
    read_weight,
    state_of,
)

FusionMethod = Callable[..., FusionResult]


class FusionStrategy(FedAvg):
    """Federated learning in which a fusion method takes the place of the average.

    Clients are ordinary Flower clients: one array record, one metric record with the number of
    examples. Every reply is checked; a bad one is logged with its node and reason, counted in the
    round's metrics as ``rejected``, and left out.

    Parameters
    ----------
    method : callable
        A fusion method: ``method(models, weights, **options)`` that returns a `FusionResult`.
        Where it takes ``example_inputs``, ``target`` (the model), ``reference`` (the global model
        that was sent out) or ``statistics`` (what `flwr_fusion.client.attach_statistics` put on
        the replies, None for a reply without), it receives them.
    model : nn.Module
        The global model: its architecture is what clients train. Not modified.
    example_inputs : Tensor, tuple or dict
        What the model is called with; one or two samples.
    only_first_rounds : mapping of str to int, optional
        Options of the method that hold in the first rounds only, with the number of rounds, for
        steps that help early and cost late: ``{"combine": 3}``. Afterwards the method's default
        holds.
    **arguments
        Arguments of Flower's ``FedAvg`` keep their names and meaning; all others are options of
        the method.

    Attributes
    ----------
    reports : dict of int to FusionReport
        What each round's fusion did.

    Raises
    ------
    FusionError
        If an option is unknown, or the model cannot be traced or fused.
    """

    def __init__(
        self,
        method: FusionMethod,
        model: nn.Module,
        example_inputs: Any,
        only_first_rounds: Mapping[str, int] | None = None,
        **arguments: Any,
    ) -> None:
        fedavg = inspect.signature(FedAvg.__init__).parameters.keys() & arguments.keys()
        super().__init__(**{name: arguments.pop(name) for name in fedavg})
        self.method = method
        self.model = model
        self.example_inputs = example_inputs
        self.options = arguments
        self.only_first_rounds = dict(only_first_rounds or {})
        self.reports: dict[int, FusionReport] = {}
        self._sent: ArrayRecord | None = None
        self._asked: set[int] = set()
        _check_options(method, arguments)
        _check_schedule(self.only_first_rounds, arguments)
        # Whatever the method cannot do is refused here, not after the first round of training.
        groups = verified_graph(model, example_inputs).groups
        self._fixed = sum(group.fixed for group in groups)
        self._free = len(groups) - self._fixed
        if not self._free:
            log(WARNING, "no channels of %s can be matched: fusion is plain averaging", type(model))
        self._fuse(method, self.options, [model], [1.0], [None], model, None)

    def summary(self) -> None:
        """Log the fusion method and its options, then FedAvg's configuration."""
        options = ", ".join(f"{name}={value!r:.60}" for name, value in self.options.items())
        log(INFO, "\t├──> Fusion: %s(%s)", getattr(self.method, "__name__", "method"), options)
        log(INFO, "\t│\t└──Channel groups: %d can move, %d are fixed", self._free, self._fixed)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember the global model that is sent out, then configure training as FedAvg does."""
        try:
            check_arrays(arrays, self.model.state_dict())
        except RejectedReply as error:
            raise FusionError(f"the arrays to send do not fit the model: {error}") from error
        self._sent = arrays
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._asked = {message.metadata.dst_node_id for message in messages}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fuse the networks of all good replies.

        Parameters
        ----------
        server_round : int
            The round, from 1.
        replies : iterable of Message
            What the clients sent.

        Returns
        -------
        tuple of (ArrayRecord or None, MetricRecord or None)
            The fused model, or None to keep the last one if there is no good reply; the clients'
            metrics by FedAvg's aggregation with ``rejected`` (bad and error replies) and
            ``share-moved`` (share of channels that the fusion moved); where clients attached
            statistics also ``with-statistics``, the number of usable ones.
        """
        replies = list(replies)
        silent = self._asked - {message.metadata.src_node_id for message in replies}
        if silent:
            log(WARNING, "aggregate_train: no reply from nodes %s", sorted(silent))
        valid, errors = self._check_and_log_replies(replies, is_train=True, validate=False)
        updates = self._good_updates(valid)
        rejected = len(valid) + len(errors) - len(updates)
        if not updates:
            log(ERROR, "aggregate_train: no good reply in round %s; the model stays", server_round)
            return None, MetricRecord({"rejected": rejected})

        def received(k: int) -> nn.Module:
            return loaded(self._model_of(updates[k].node_id), updates[k].arrays)

        models = BuiltOnAccess(len(updates), received)
        weights = [update.weight for update in updates]
        method, options = self.method_of_round(server_round)
        statistics = self._statistics(updates) if _takes(method, "statistics") else []
        if options.get("combine", "mean") != "mean" and None in statistics:
            log(
                WARNING,
                "%d of %d replies have no usable statistics; see flwr_fusion.client",
                statistics.count(None),
                len(statistics),
            )
        arrays, report = self._fuse_updates(
            server_round, partial(self._fuse, method, options, models, weights, statistics)
        )
        self.reports[server_round] = report
        contents = [update.content for update in updates]
        metrics = self._aggregated(self.train_metrics_aggr_fn, contents)
        metrics["rejected"] = rejected
        metrics["share-moved"] = report.share_moved
        if any(own is not None for own in statistics):
            metrics["with-statistics"] = sum(own is not None for own in statistics)
        return arrays, metrics

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Aggregate the metrics of all evaluation replies that carry a usable weight."""
        return self._evaluated(self._good_evaluations(replies))

    def _good_evaluations(self, replies: Iterable[Message]) -> list[Message]:
        valid, _ = self._check_and_log_replies(list(replies), is_train=False, validate=False)
        good = []
        for message in valid:
            try:
                read_weight(message.content, self.weighted_by_key)
                good.append(message)
            except RejectedReply as reason:
                _log_rejection("aggregate_evaluate", message, reason)
        return good

    def _evaluated(self, messages: Sequence[Message]) -> MetricRecord | None:
        contents = [message.content for message in messages]
        return self._aggregated(self.evaluate_metrics_aggr_fn, contents) if contents else None

    def _good_updates(self, messages: Sequence[Message]) -> list[Update]:
        ambiguous = nodes_with_several_replies(messages)
        updates = []
        for message in messages:
            try:
                if message.metadata.src_node_id in ambiguous:
                    raise RejectedReply("the node sent a second reply: which one counts is unknown")
                template = self._model_of(message.metadata.src_node_id).state_dict()
                updates.append(
                    read_update(message, template, self.arrayrecord_key, self.weighted_by_key)
                )
            except RejectedReply as rejection:
                _log_rejection("aggregate_train", message, rejection)
        return updates

    def _aggregated(
        self, aggregate: Callable[[list[RecordDict], str], MetricRecord], contents: list[RecordDict]
    ) -> MetricRecord:
        try:
            return aggregate(contents, self.weighted_by_key)
        except Exception as error:  # What clients put into their metrics must not end the run.
            log(WARNING, "the clients' metrics do not fit together: %r", error)
            return MetricRecord()

    def _model_of(self, node_id: int) -> nn.Module:
        """Return a network of the architecture that a node trains."""
        return self.model

    def _fuse_updates(
        self, server_round: int, fuse: Callable[[nn.Module, nn.Module | None], FusionResult]
    ) -> tuple[ArrayRecord, FusionReport]:
        """Return the next global model; ``fuse`` takes the target and the model sent out."""
        sent = None if self._sent is None else loaded(self.model, self._sent)
        result = fuse(self.model, sent)
        return arrays_of(result.model.state_dict()), result.report

    def method_of_round(self, server_round: int) -> tuple[FusionMethod, Mapping[str, Any]]:
        """Return the method that fuses a round, with its options.

        Parameters
        ----------
        server_round : int
            The round, from 1.

        Returns
        -------
        tuple of (callable, mapping)
            The strategy's own method, and its options without those whose rounds are over.
        """
        over = {name for name, last in self.only_first_rounds.items() if server_round > last}
        return self.method, {n: value for n, value in self.options.items() if n not in over}

    def _statistics(self, updates: Sequence[Update]) -> list[Statistics | None]:
        """Return what the clients measured; None for a reply without usable statistics."""
        statistics: list[Statistics | None] = []
        for update in updates:
            try:
                model = self._model_of(update.node_id)
                statistics.append(read_statistics(update.content, model))
            except RejectedReply as reason:
                log(WARNING, "aggregate_train: node %s: %s", update.node_id, reason)
                statistics.append(None)
        return statistics

    def _fuse(
        self,
        method: FusionMethod,
        options: Mapping[str, Any],
        models: Sequence[nn.Module],
        weights: Sequence[float],
        statistics: Sequence[Statistics | None],
        target: nn.Module,
        reference: nn.Module | None,
    ) -> FusionResult:
        context = {
            "statistics": statistics,
            "example_inputs": self.example_inputs,
            "target": target,
            "reference": reference,
        }
        taken = {name: value for name, value in context.items() if _takes(method, name)}
        return method(models, weights, **taken, **options)


def loaded(model: nn.Module, arrays: ArrayRecord) -> nn.Module:
    """Return a network of a model's architecture with the values of checked arrays."""
    return with_state(model, state_of(arrays, model.state_dict()))


def _takes(method: FusionMethod, name: str) -> bool:
    return name in inspect.signature(method).parameters


def _check_options(method: FusionMethod, options: Mapping[str, Any]) -> None:
    """Refuse options that the method does not have."""
    parameters = inspect.signature(method).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    own = {"models", "weights", "example_inputs", "target", "reference", "statistics"}
    named = {n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    allowed = sorted(named - own)
    unknown = sorted(options.keys() - set(allowed))
    if unknown and (not open_ended or own & set(unknown)):
        raise FusionError(
            f"unknown arguments {unknown}: neither FedAvg's nor options of the fusion method "
            f"({', '.join(allowed)})"
        )


def _check_schedule(schedule: Mapping[str, int], options: Mapping[str, Any]) -> None:
    for name, rounds in schedule.items():
        if name not in options:
            raise FusionError(f"only_first_rounds names '{name}', which is no option given")
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
            raise FusionError(f"only_first_rounds['{name}'] must be a number, not {rounds!r}")


def _log_rejection(where: str, message: Message, reason: Exception) -> None:
    log(WARNING, "%s: rejected node %s: %s", where, message.metadata.src_node_id, reason)
