"""The strategy that runs any fusion method inside Flower."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from logging import ERROR, INFO, WARNING
from typing import Any, overload

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import nn

from flwr_fusion.channels import verified_graph
from flwr_fusion.errors import FusionError
from flwr_fusion.fuse import FusionReport, FusionResult, with_state
from flwr_fusion.strategy.replies import (
    RejectedReply,
    Update,
    arrays_of,
    read_update,
    read_weight,
    state_of,
    without_duplicates,
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
        A fusion method with the signature of `flwr_fusion.ot_fusion`:
        ``method(models, weights, *, example_inputs, target, **options)``. If it also takes
        ``reference``, it receives the global model that was sent out.
    model : nn.Module
        The global model: its architecture is what clients train. Not modified.
    example_inputs : Tensor, tuple or dict
        What the model is called with; one or two samples.
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
        self, method: FusionMethod, model: nn.Module, example_inputs: Any, **arguments: Any
    ) -> None:
        fedavg = inspect.signature(FedAvg.__init__).parameters.keys() & arguments.keys()
        super().__init__(**{name: arguments.pop(name) for name in fedavg})
        self.method = method
        self.model = model
        self.example_inputs = example_inputs
        self.options = arguments
        self.reports: dict[int, FusionReport] = {}
        self._sent: ArrayRecord | None = None
        self._takes_reference = _check_options(method, arguments)
        # Whatever the method cannot do is refused here, not after the first round of training.
        verified_graph(model, example_inputs)
        self._fuse([model], [1.0], None)

    def summary(self) -> None:
        """Log the fusion method and its options, then FedAvg's configuration."""
        options = ", ".join(f"{name}={value!r:.60}" for name, value in self.options.items())
        log(INFO, "\t├──> Fusion: %s(%s)", getattr(self.method, "__name__", "method"), options)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember the global model that is sent out, then configure training as FedAvg does."""
        template = self.model.state_dict()
        if arrays.keys() != template.keys():
            different = sorted(arrays.keys() ^ template.keys())
            raise FusionError(f"the arrays to send are not those of the model: {different[:5]}")
        state_of(arrays, template)
        self._sent = arrays
        return super().configure_train(server_round, arrays, config, grid)

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
            metrics by FedAvg's aggregation with ``rejected`` (replies left out) and
            ``share-moved`` (share of channels that the fusion moved).
        """
        valid, _ = self._check_and_log_replies(list(replies), is_train=True, validate=False)
        updates = self._good_updates(valid)
        rejected = len(valid) - len(updates)
        if not updates:
            log(ERROR, "aggregate_train: no good reply in round %s; the model stays", server_round)
            return None, MetricRecord({"rejected": rejected})
        models = _ReceivedModels(self.model, updates)
        result = self._fuse(models, [update.weight for update in updates], self._sent_model())
        self.reports[server_round] = result.report
        metrics = self._aggregated_metrics(updates)
        metrics["rejected"] = rejected
        metrics["share-moved"] = result.report.share_moved
        return arrays_of(result.model.state_dict()), metrics

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Aggregate the metrics of all evaluation replies that carry a usable weight."""
        valid, _ = self._check_and_log_replies(list(replies), is_train=False, validate=False)
        good = []
        for message in valid:
            try:
                read_weight(message.content, self.weighted_by_key)
                good.append(message.content)
            except RejectedReply as reason:
                _log_rejection("aggregate_evaluate", message, reason)
        return self.evaluate_metrics_aggr_fn(good, self.weighted_by_key) if good else None

    def _good_updates(self, messages: Sequence[Message]) -> list[Update]:
        template = self.model.state_dict()
        updates = []
        for message, reason in without_duplicates(messages):
            try:
                if reason:
                    raise RejectedReply(reason)
                updates.append(
                    read_update(message, template, self.arrayrecord_key, self.weighted_by_key)
                )
            except RejectedReply as rejection:
                _log_rejection("aggregate_train", message, rejection)
        return updates

    def _aggregated_metrics(self, updates: Sequence[Update]) -> MetricRecord:
        contents = [update.content for update in updates]
        try:
            return self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        except (KeyError, TypeError, ValueError) as error:
            log(WARNING, "aggregate_train: the clients' metrics do not fit together: %r", error)
            return MetricRecord()

    def _sent_model(self) -> nn.Module | None:
        if self._sent is None:
            return None
        return _loaded(self.model, self._sent)

    def _fuse(
        self, models: Sequence[nn.Module], weights: Sequence[float], reference: nn.Module | None
    ) -> FusionResult:
        known = {"reference": reference} if self._takes_reference else {}
        return self.method(
            models,
            weights,
            example_inputs=self.example_inputs,
            target=self.model,
            **known,
            **self.options,
        )


class _ReceivedModels(Sequence[nn.Module]):
    """The clients' networks, built one at a time from what was received."""

    def __init__(self, model: nn.Module, updates: Sequence[Update]) -> None:
        self._model = model
        self._updates = updates

    def __len__(self) -> int:
        return len(self._updates)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    @overload
    def __getitem__(self, index: slice) -> list[nn.Module]: ...
    def __getitem__(self, index: int | slice) -> nn.Module | list[nn.Module]:
        if isinstance(index, slice):
            return [_loaded(self._model, update.arrays) for update in self._updates[index]]
        return _loaded(self._model, self._updates[index].arrays)


def _loaded(model: nn.Module, arrays: ArrayRecord) -> nn.Module:
    return with_state(model, state_of(arrays, model.state_dict()))


def _check_options(method: FusionMethod, options: dict[str, Any]) -> bool:
    """Refuse options that the method does not have; say whether it takes a reference."""
    parameters = inspect.signature(method).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    own = {"models", "weights", "example_inputs", "target", "reference"}
    allowed = sorted(parameters.keys() - own)
    unknown = sorted(options.keys() - set(allowed))
    if unknown and (not open_ended or own & set(unknown)):
        raise FusionError(
            f"unknown arguments {unknown}: neither FedAvg's nor options of the fusion method "
            f"({', '.join(allowed)})"
        )
    return "reference" in parameters


def _log_rejection(where: str, message: Message, reason: Exception) -> None:
    log(WARNING, "%s: rejected node %s: %s", where, message.metadata.src_node_id, reason)
