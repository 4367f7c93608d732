"""The strategy that runs any fusion method inside Flower."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from logging import ERROR, INFO, WARNING
from pathlib import Path
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from torch import nn

from flwr_fusion.errors import FusionError
from flwr_fusion.graph.groups import verified_graph
from flwr_fusion.methods.ot import FusionReport, FusionResult
from flwr_fusion.networks import BuiltOnAccess, with_state
from flwr_fusion.rules.rule import least_clients, wants_statistics
from flwr_fusion.statistics.moments import Statistics
from flwr_fusion.strategy.arrays import arrays_of, check_arrays, check_plausible, state_of
from flwr_fusion.strategy.checkpoint import Checkpoint, CheckpointFolder
from flwr_fusion.strategy.method import (
    FusionMethod,
    check_options,
    check_schedule,
    combine_of,
    takes,
)
from flwr_fusion.strategy.reasons import RejectedReply, Rejection
from flwr_fusion.strategy.refinement import Refinement, check_refinement
from flwr_fusion.strategy.replies import (
    Answer,
    Update,
    Validation,
    answers_of,
    counts_of,
    fitting_metrics,
    good_updates,
    read_statistics,
    read_weight,
)
from flwr_fusion.strategy.run import EvaluateFunction, run_of
from flwr_fusion.strategy.waiting import (
    ImpatientGrid,
    NotEnoughNodesError,
    Patience,
    PatientGrid,
    patience_of,
)

_OWN_METRICS = ("rejected", "share-moved", "with-statistics", "refinement-loss")
ONLY_ARCHITECTURE = "model"
"""Name of the global model in the checkpoints of a strategy with one architecture."""


@dataclass(frozen=True)
class _Received:
    """A round's replies to training."""

    updates: Sequence[Update]
    statistics: list[Statistics | None]
    """Of each update; empty where the method takes none."""
    measured: Sequence[Answer]
    """Those whose metrics fit together."""
    rejections: list[Rejection]


class FusionStrategy(FedAvg):
    """Federated learning in which a fusion method takes the place of the average.

    Clients are ordinary Flower clients: one array record, one metric record with the number of
    examples. Every reply is checked; a bad one is logged with its node and reason, counted in the
    round's metrics as ``rejected`` and ``rejected-REASON`` (`Reason`), and left out.

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
    validation : Validation, optional
        Limits for the clients' number of examples and size of update.
    refine : FineTuning, Distillation or an object like them, optional
        What is done with the fused network after the fusion, in the rounds that it names. If it
        fails, the fused network stays as it is.
    min_train_replies : int
        A round with fewer good replies, or fewer than the method needs, keeps the last good model.
    checkpoint_dir : str or Path, optional
        Folder in which every round leaves a checkpoint: a safetensors file for each architecture,
        and JSON with metrics, rejections, report and hashes. One run at a time may use it.
    resume : bool
        Go on from the latest whole checkpoint in `checkpoint_dir`, where there is one.
    keep_checkpoints : int
        How many of the latest checkpoints are kept.
    **arguments
        Arguments of Flower's ``FedAvg`` keep their names and meaning; all others are options of
        the method.

    Attributes
    ----------
    reports : dict of int to FusionReport
        What each round's fusion did.
    fused_nodes : dict of int to list of int
        For each round the nodes whose updates were fused: client 0, 1, ... of its report.
    rejections : dict of int to list of Rejection
        For each round the replies to training that were left out, and why.

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
        validation: Validation | None = None,
        refine: Refinement | None = None,
        min_train_replies: int = 1,
        checkpoint_dir: str | Path | None = None,
        resume: bool = False,
        keep_checkpoints: int = 3,
        **arguments: Any,
    ) -> None:
        fedavg = inspect.signature(FedAvg.__init__).parameters.keys() & arguments.keys()
        super().__init__(**{name: arguments.pop(name) for name in fedavg})
        self.method = method
        self.model = model
        self.example_inputs = example_inputs
        self.options = arguments
        self.only_first_rounds = dict(only_first_rounds or {})
        self.validation = Validation() if validation is None else validation
        self.refine = refine
        self.min_train_replies = min_train_replies
        self.resume = resume
        self.reports: dict[int, FusionReport] = {}
        self.fused_nodes: dict[int, list[int]] = {}
        self.rejections: dict[int, list[Rejection]] = {}
        self._checkpoints = (
            None if checkpoint_dir is None else CheckpointFolder(checkpoint_dir, keep_checkpoints)
        )
        self._sent: ArrayRecord | None = None
        self._asked: list[Metadata] = []
        self._own_start = False
        self._had_nodes = False
        _check_replies_wanted(min_train_replies)
        if resume and checkpoint_dir is None:
            raise FusionError("resume=True needs checkpoint_dir=: the folder to go on from")
        check_options(method, arguments)
        check_schedule(self.only_first_rounds, arguments)
        # Whatever the method cannot do is refused here, not after the first round of training.
        groups = verified_graph(model, example_inputs).groups
        self._fixed = sum(group.fixed for group in groups)
        self._free = len(groups) - self._fixed
        if not self._free:
            log(WARNING, "no channels of %s can be matched: fusion is plain averaging", type(model))
        self._try_out(method, self.options)
        if refine is not None:
            check_refinement(refine, combine_of(method, arguments))
            self._try_out_refinement(refine)

    def _try_out(self, method: FusionMethod, options: Mapping[str, Any]) -> None:
        """Fuse as many copies of the model as a method needs; what it cannot do, it refuses."""
        count = least_clients(combine_of(method, options))
        models, weights = [self.model] * count, [1.0] * count
        self._fuse(method, options, models, weights, [None] * count, self.model, None)

    def _try_out_refinement(self, refine: Refinement) -> None:
        refine.try_out(self.model)

    def summary(self) -> None:
        """Log the fusion method and its options, then FedAvg's configuration."""
        options = ", ".join(f"{name}={value!r:.60}" for name, value in self.options.items())
        log(INFO, "\t├──> Fusion: %s(%s)", getattr(self.method, "__name__", "method"), options)
        log(INFO, "\t│\t└──Channel groups: %d can move, %d are fixed", self._free, self._fixed)
        super().summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFunction | None = None,
    ) -> Result:
        """Run the federation.

        Parameters
        ----------
        grid : Grid
            As for every strategy.
        initial_arrays : ArrayRecord
            The first global model; not used where the run goes on from a checkpoint.
        num_rounds : int
            Number of rounds, those before the checkpoint included.
        timeout : float, optional
            Seconds that training and evaluation wait for replies, and from the second round on
            for nodes. Default for replies: an hour until all clients have answered in a round, then
            three times the longest time that all took, doubled after every round in which some
            were missing, between five minutes and an hour; for nodes: five minutes.
        train_config, evaluate_config, evaluate_fn
            As for Flower's ``Strategy.start``.

        Returns
        -------
        Result
            The last good global model, and the metrics of all rounds.

        Raises
        ------
        FusionError
            If the arrays do not fit the model, if there are checkpoints and `resume` is not set,
            if none of them is whole or the latest is of another network, or if another run writes
            to their folder.
        """
        self._had_nodes = False
        with nullcontext() if self._checkpoints is None else self._checkpoints.reserved():
            done = self._checkpoint_to_resume()
            return run_of(self, self._checkpoints, done).rounds_of(
                cast(Grid, PatientGrid(grid, Patience(timeout))),
                initial_arrays if done is None else self._restored(done),
                num_rounds,
                evaluate_fn,
                train_config=train_config,
                evaluate_config=evaluate_config,
            )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember the global model that is sent out, then configure training as FedAvg does.

        From the second round on, a round for which too few nodes are connected in time is left
        out.
        """
        # Under a wrapper of Flower's, another strategy's start() runs the rounds.
        self._own_start = patience_of(grid) is not None
        self._check_wrapper()
        try:
            check_arrays(arrays, self.model.state_dict())
        except RejectedReply as error:
            raise FusionError(f"the arrays to send do not fit the model: {error}") from error
        self._sent = arrays
        configure = partial(super().configure_train, server_round, arrays, config)
        return self._asking(configure, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure evaluation as FedAvg does; leave it out if too few nodes are connected."""
        configure = partial(super().configure_evaluate, server_round, arrays, config)
        return self._asking(configure, grid)

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
            The fused model, or None to keep the last one if there are not enough good replies;
            the clients' metrics by FedAvg's aggregation with ``rejected`` (replies and nodes left
            out), ``rejected-REASON`` for each reason, and ``share-moved`` (share of channels that
            the fusion moved); after a refinement ``refinement-loss``, that of its last epoch;
            where clients attached statistics ``with-statistics``, the number of usable ones.
        """
        method, options = self.method_of_round(server_round)
        received = self._received(replies, method)
        updates, rejections = received.updates, received.rejections
        self.rejections[server_round] = rejections
        _log_replies("aggregate_train", len(updates), rejections)
        if not updates and not rejections:
            return None, None
        counts = counts_of(rejections)
        needed = max(self.min_train_replies, least_clients(combine_of(method, options)))
        if len(updates) < needed:
            text = "aggregate_train: %d good replies in round %s, %d are needed; the model stays"
            log(ERROR, text, len(updates), server_round, needed)
            return None, _metrics(counts)
        try:
            arrays, report = self._fused_round(server_round, received)
        except FusionError as error:
            text = "aggregate_train: round %s cannot be fused, the model stays: %s (clients %s)"
            log(ERROR, text, server_round, error, _nodes_of(updates))
            return None, _metrics(counts)
        self.reports[server_round] = report
        self.fused_nodes[server_round] = [update.node_id for update in updates]
        clients = self._aggregated(self.train_metrics_aggr_fn, received.measured)
        return arrays, _metrics(counts | _figures(report, received.statistics), clients)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Aggregate the metrics of all evaluation replies that carry a usable weight."""
        answers, rejections = self._good_evaluations(replies)
        return self._evaluated(answers, rejections)

    def global_arrays(self, arrays: ArrayRecord) -> dict[str, ArrayRecord]:
        """Return the global model by architecture, for a checkpoint.

        Parameters
        ----------
        arrays : ArrayRecord
            The global model in the strategy's architecture.

        Returns
        -------
        dict of str to ArrayRecord
            Here there is one architecture, "model".
        """
        return {ONLY_ARCHITECTURE: arrays}

    def details_of(self, server_round: int) -> dict[str, Any]:
        """Return what a round's checkpoint says of it beside its metrics, ready for JSON."""
        report = self.reports.get(server_round)
        return {
            "method": getattr(self.method_of_round(server_round)[0], "__name__", ""),
            "fused_nodes": self.fused_nodes.get(server_round, []),
            "rejected": [
                {"node": r.node_id, "reason": r.reason, "text": r.text}
                for r in self.rejections.get(server_round, [])
            ],
            "report": None if report is None else report.to_dict(),
        }

    def _restored(self, checkpoint: Checkpoint) -> ArrayRecord:
        """Take over the global model of a checkpoint, and return it in the own architecture."""
        return checked(checkpoint, ONLY_ARCHITECTURE, self.model)

    def _checkpoint_to_resume(self) -> Checkpoint | None:
        if self._checkpoints is None:
            return None
        if self.resume:
            return self._checkpoints.latest()
        rounds = self._checkpoints.rounds()
        if rounds:
            raise FusionError(
                f"{self._checkpoints.path} holds checkpoints of rounds {rounds}: set resume=True "
                "to go on from the latest, or choose an empty checkpoint_dir"
            )
        return None

    def _check_wrapper(self) -> None:
        """Refuse what a wrapper would break whose own start() runs the rounds."""
        if self._own_start:
            return
        if wants_statistics(self.options.get("combine")):
            raise FusionError(
                "combine='least-squares' works with the strategy's own start() alone: under a "
                "wrapper, such as Flower's for differential privacy, the clients' statistics would "
                "pass by its clipping and noise"
            )
        if self.refine is not None:
            raise FusionError(
                "refine= works with the strategy's own start() alone: under a wrapper, such as "
                "Flower's for differential privacy, the refined model would depend on single "
                "clients more than its noise covers"
            )
        if self._checkpoints is not None:
            raise FusionError(
                "checkpoint_dir= works with the strategy's own start() alone: under a wrapper, "
                "such as Flower's for differential privacy, checkpoints would hold the model "
                "before its noise is added"
            )

    def _asking(
        self, configure: Callable[[Grid], Iterable[Message]], grid: Grid
    ) -> Iterable[Message]:
        """Return the messages of an exchange, and remember who is asked; none without nodes."""
        if self._had_nodes:
            patience = patience_of(grid) or Patience()
            grid = cast(Grid, ImpatientGrid(grid, patience.for_nodes()))
        try:
            messages = list(configure(grid))
        except NotEnoughNodesError as reason:
            log(ERROR, "too few nodes, the model stays: %s", reason)
            messages = []
        self._had_nodes = self._had_nodes or bool(messages)
        self._asked = [message.metadata for message in messages]
        return messages

    def _good_evaluations(self, replies: Iterable[Message]) -> tuple[list[Answer], list[Rejection]]:
        answers, rejections = answers_of(replies, self._asked)
        weighted = []
        for answer in answers:
            try:
                read_weight(answer.content, self.weighted_by_key)
                weighted.append(answer)
            except RejectedReply as reason:
                rejections.append(Rejection(answer.node_id, reason.reason, str(reason)))
        limit = self.validation.max_examples
        good, odd = fitting_metrics(weighted, self.weighted_by_key, limit)
        _log_replies("aggregate_evaluate", len(good), [*rejections, *odd])
        return good, [*rejections, *odd]

    def _evaluated(
        self, answers: Sequence[Answer], rejections: Sequence[Rejection]
    ) -> MetricRecord | None:
        counts = counts_of(rejections) if rejections else {}
        if not answers:
            return _metrics(counts) if counts else None
        return _metrics(counts, self._aggregated(self.evaluate_metrics_aggr_fn, answers))

    def _aggregated(
        self,
        aggregate: Callable[[list[RecordDict], str], MetricRecord],
        answers: Sequence[Answer],
    ) -> MetricRecord:
        try:
            return aggregate([answer.content for answer in answers], self.weighted_by_key)
        except Exception as error:  # What clients put into their metrics must not end the run.
            log(WARNING, "the clients' metrics cannot be aggregated: %r", error)
            return MetricRecord()

    def _model_of(self, node_id: int) -> nn.Module:
        """Return a network of the architecture that a node trains."""
        return self.model

    def _sent_to(self, node_id: int) -> ArrayRecord | None:
        """Return the arrays that a node was sent."""
        return self._sent

    def _received(self, replies: Iterable[Message], method: FusionMethod) -> _Received:
        """Return what is usable of the replies to training, and why the rest is not."""
        answers, rejections = answers_of(replies, self._asked)
        keys = self.arrayrecord_key, self.weighted_by_key
        updates, bad = good_updates(answers, self._model_of, self._sent_to, self.validation, *keys)
        statistics, unusable = self._statistics(updates, method)
        measured, odd = fitting_metrics(
            [Answer(update.node_id, update.content) for update in updates],
            self.weighted_by_key,
            self.validation.max_examples,
        )
        return _Received(updates, statistics, measured, [*rejections, *bad, *unusable, *odd])

    def _fused_round(
        self, server_round: int, received: _Received
    ) -> tuple[ArrayRecord, FusionReport]:
        """Return the next global model, fused from a round's updates and refined."""
        method, options = self.method_of_round(server_round)
        updates, statistics = received.updates, received.statistics
        if wants_statistics(options.get("combine")) and None in statistics:
            text = "%d of %d replies have no usable statistics; see flwr_fusion.client"
            log(WARNING, text, statistics.count(None), len(statistics))

        def model(k: int) -> nn.Module:
            return loaded(self._model_of(updates[k].node_id), updates[k].arrays)

        models = BuiltOnAccess(len(updates), model)
        weights = [update.weight for update in updates]

        def fuse(target: nn.Module, reference: nn.Module | None) -> FusionResult:
            fused = self._fuse(method, options, models, weights, statistics, target, reference)
            return self._refined(server_round, fused, models, updates)

        return self._fuse_updates(server_round, fuse)

    def _fuse_updates(
        self, server_round: int, fuse: Callable[[nn.Module, nn.Module | None], FusionResult]
    ) -> tuple[ArrayRecord, FusionReport]:
        """Return the next global model; ``fuse`` takes the target and the model sent out."""
        sent = None if self._sent is None else loaded(self.model, self._sent)
        result = fuse(self.model, sent)
        return checked_result(result, self.model), result.report

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

    def _statistics(
        self, updates: Sequence[Update], method: FusionMethod
    ) -> tuple[list[Statistics | None], list[Rejection]]:
        """Return what the clients measured; None for a reply without usable statistics."""
        statistics: list[Statistics | None] = []
        rejections: list[Rejection] = []
        if not takes(method, "statistics"):
            return statistics, rejections
        for update in updates:
            try:
                model = self._model_of(update.node_id)
                statistics.append(read_statistics(update.content, model))
            except RejectedReply as reason:
                rejections.append(Rejection(update.node_id, reason.reason, str(reason)))
                statistics.append(None)
        if not self._own_start and any(own is not None for own in statistics):
            # Under a wrapper they would pass by its clipping and noise.
            log(WARNING, "statistics are used in rounds of the strategy's own start() only")
            statistics = [None] * len(updates)
        return statistics, rejections

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
        taken = {name: value for name, value in context.items() if takes(method, name)}
        return method(models, weights, **taken, **options)

    def _refined(
        self,
        server_round: int,
        fused: FusionResult,
        models: Sequence[nn.Module],
        updates: Sequence[Update],
    ) -> FusionResult:
        """Return the result of a fusion after the round's refinement."""
        if self.refine is None or server_round not in self.refine.rounds:
            return fused
        try:
            # A copy: what fails half-way must not have touched the fused model.
            weights = [update.weight for update in updates]
            refined = self.refine.refined(copy.deepcopy(fused.model), models, weights)
            # In the fused model's own types, whatever the step has made of them.
            model = with_state(fused.model, refined.model.state_dict())
            result = FusionResult(model, replace(fused.report, refinement=refined.report))
            checked_result(result, fused.model)
        except Exception as error:  # The step may be the user's; the round must not be lost.
            text = "round %s: the fused model is not refined: %s (clients %s)"
            reason = error if isinstance(error, FusionError) else repr(error)
            log(ERROR, text, server_round, reason, _nodes_of(updates))
            return fused
        return result


def loaded(model: nn.Module, arrays: ArrayRecord) -> nn.Module:
    """Return a network of a model's architecture with the values of checked arrays."""
    return with_state(model, state_of(arrays, model.state_dict()))


def checked_result(result: FusionResult, model: nn.Module) -> ArrayRecord:
    """Return a fused model's arrays; refuse what could not be sent in the next round."""
    arrays = arrays_of(result.model.state_dict())
    try:
        check_arrays(arrays, model.state_dict())
        check_plausible(arrays)
    except RejectedReply as error:
        raise FusionError(f"the fused model cannot be used: {error}") from error
    return arrays


def _nodes_of(updates: Sequence[Update]) -> dict[int, int]:
    """Return the nodes of a round's clients by number, for messages that name a client."""
    return {k: update.node_id for k, update in enumerate(updates)}


def _check_replies_wanted(number: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise FusionError(f"min_train_replies must be at least 1, not {number!r}")


def checked(checkpoint: Checkpoint, name: str, model: nn.Module) -> ArrayRecord:
    """Return a checkpoint's arrays of an architecture, in the order of its model."""
    if name not in checkpoint.arrays:
        raise FusionError(
            f"the checkpoint of round {checkpoint.server_round} holds {sorted(checkpoint.arrays)}, "
            f"not {name!r}: it is of another strategy or other architectures"
        )
    arrays, template = checkpoint.arrays[name], model.state_dict()
    try:
        check_arrays(arrays, template)
    except RejectedReply as error:
        raise FusionError(
            f"the checkpoint of round {checkpoint.server_round} is of another network: {error}"
        ) from error
    return ArrayRecord({key: arrays[key] for key in template})


def _figures(report: FusionReport, statistics: Sequence[Statistics | None]) -> dict[str, float]:
    """Return a round's own metrics, beside the counts of rejections."""
    figures = {"share-moved": report.share_moved}
    if report.refinement is not None and report.refinement.losses:
        figures["refinement-loss"] = report.refinement.losses[-1]
    if any(own is not None for own in statistics):
        figures["with-statistics"] = sum(own is not None for own in statistics)
    return figures


def _metrics(counts: Mapping[str, float], clients: MetricRecord | None = None) -> MetricRecord:
    """Return the clients' metrics with the strategy's own, which no client can replace."""
    own = {key: value for key, value in (clients or {}).items() if not _is_ours(key)}
    return MetricRecord({**own, **counts})


def _is_ours(key: str) -> bool:
    return key in _OWN_METRICS or key.startswith("rejected-")


def _log_replies(where: str, good: int, rejections: Sequence[Rejection]) -> None:
    if good or rejections:
        log(INFO, "%s: %d good replies, %d rejections", where, good, len(rejections))
    for rejection in rejections:
        if rejection.keeps_update:
            log(WARNING, "%s: node %s: %s", where, rejection.node_id, rejection.text)
        else:
            log(
                WARNING,
                "%s: rejected node %s (%s): %s",
                where,
                rejection.node_id,
                rejection.reason,
                rejection.text,
            )
