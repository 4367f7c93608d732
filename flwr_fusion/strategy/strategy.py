"""The strategy that runs any fusion method inside Flower, over one architecture or several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from logging import ERROR, INFO, WARNING
from typing import Any, Unpack, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from torch import Tensor, nn

from flwr_fusion.after.repair import tracks_statistics
from flwr_fusion.client import EXCHANGED_KEYS, STATISTICS_RECORD
from flwr_fusion.depth.start import common_start
from flwr_fusion.errors import FusionError, check_count
from flwr_fusion.exchanged import exchanged_of
from flwr_fusion.graph.groups import verified_graph
from flwr_fusion.report import FusionReport
from flwr_fusion.strategy.aggregation import Aggregator, check_own_start, nodes_of
from flwr_fusion.strategy.arguments import StrategyArguments, fedavg_arguments
from flwr_fusion.strategy.checkpoint import Checkpoint, CheckpointFolder
from flwr_fusion.strategy.configured_method import ConfiguredMethod, FusionMethod, check_schedule
from flwr_fusion.strategy.culprits import Contributions
from flwr_fusion.strategy.global_models import GlobalModels, load_arrays, named_architectures
from flwr_fusion.strategy.heads import NORMS, CalibratedHeads, Head
from flwr_fusion.strategy.metrics import (
    aggregated_metrics,
    figures_of,
    log_fusion,
    log_nothing_fused,
    log_rejections,
    log_replies,
    round_metrics,
)
from flwr_fusion.strategy.nodes import NodeArchitectures
from flwr_fusion.strategy.reasons import Rejection, printable
from flwr_fusion.strategy.received_statistics import Wanted
from flwr_fusion.strategy.refinement_steps import Refinement
from flwr_fusion.strategy.replies import (
    Answer,
    Expected,
    TrainingReplies,
    Update,
    Validation,
    counts_of,
    read_evaluation,
    read_training,
    read_weight,
)
from flwr_fusion.strategy.run import EvaluateFunction, Run, run_of
from flwr_fusion.strategy.waiting import (
    ImpatientGrid,
    NotEnoughNodesError,
    Patience,
    PatientGrid,
    patience_of,
)

_OWN_STARTS: set[Callable[..., Result]] = set()
"""The start() of subclasses that have been marked as their own."""


class FusionStrategy(FedAvg):
    """Federated learning in which a fusion method takes the place of the average.

    Clients are ordinary Flower clients: one array record, one metric record with the number of
    examples. Every reply is checked; a bad one is logged with its node and reason, counted in the
    round's metrics as ``rejected`` and ``rejected-REASON`` (`Reason`), and left out.

    With several architectures every node is asked once which of them it runs (it answers with
    `flwr_fusion.client.declare_architecture`), and always gets the global model in its own. After
    every round the networks of all clients are fused once for each architecture in use.

    Parameters
    ----------
    method : callable
        A fusion method: ``method(models, weights, **options)`` that returns a `FusionResult`.
        Where it takes ``example_inputs``, ``target`` (the architecture), ``reference`` (the global
        model that was sent out) or ``statistics`` (what `flwr_fusion.client.attach_statistics` put
        on the replies, None for a reply without), it receives them.
    model : nn.Module or mapping of str to nn.Module
        What clients train: one network, or the networks of the federation by name. Not modified;
        of several the weights only serve to make the common start.
    example_inputs : Tensor, tuple or dict
        What all of them are called with; one or two samples.
    options : mapping of str to Any, optional
        Options of the method.
    only_first_rounds : mapping of str to int, optional
        Options of the method that hold in the first rounds only, with the number of rounds, for
        steps that help early and cost late: ``{"combine": 3}``. Afterwards the method's default
        holds.
    validation : Validation, optional
        Limits for the clients' number of examples and size of update.
    refine : FineTuning, Distillation or an object like them, optional
        What is done with the fused network after the fusion, in the rounds that it names. If it
        fails, the fused network stays as it is.
    keep_local : sequence of str, optional
        Patterns of the names of tensors that stay at the clients, such as ``("head.*", "*.bn*")``:
        they are neither sent, expected nor fused. Channels that they index do not move. The
        clients learn them from the config (`flwr_fusion.client.load_global`, `shared_arrays`).
        ``evaluate_fn`` and the ``Result`` have the arrays that travel; `global_models` the
        model's own values beside them.
    only : sequence of str, optional
        Patterns of the only tensors that travel, such as ``("*lora_*",)``.
    head : {"serve", "send"}, optional
        What becomes of the calibrated head (`flwr_fusion.calibrated_head`), which is made every
        round of the class moments that clients attach to their replies to evaluation
        (`flwr_fusion.client.attach_class_moments`). "serve": ``evaluate_fn``, the ``Result`` and
        `global_models` have the model with it, while clients train from the fused head; "send": it
        takes the fused head's place. In rounds without class moments, or with too few samples, the
        fused head stays, which is logged. Default: None.
    min_train_replies : int
        A round with fewer good replies, or fewer than the method needs, keeps the last good model.
        Default: 1.
    checkpoint_dir : str or Path, optional
        Folder in which every round leaves a checkpoint: a safetensors file for each architecture,
        and JSON with metrics, rejections, report and hashes. One run at a time may use it.
    resume : bool
        Go on from the latest whole checkpoint in `checkpoint_dir`, where there is one.
    keep_checkpoints : int
        How many of the latest checkpoints are kept. Default: 3.
    architecture : str, optional
        Of several, the one of the arrays given to `start`, passed to ``evaluate_fn`` and kept in
        the ``Result``. Default: the first.
    query_timeout : float
        Seconds to wait for the nodes' architectures. Default: 60.
    **arguments
        Arguments of Flower's ``FedAvg``, which keep their names and meaning.

    Attributes
    ----------
    reports : dict of int to FusionReport
        What each round's fusion did, in the chosen architecture.
    architecture_reports : dict of int to (dict of str to FusionReport)
        The same for every architecture in use.
    architecture_metrics : dict of int to (dict of str to MetricRecord)
        For each round the evaluation metrics of each architecture's clients, where there are
        several.
    fused_nodes : dict of int to list of int
        For each round the nodes whose updates were fused: client 0, 1, ... of its report.
    rejections : dict of int to list of Rejection
        For each round the replies to training that were left out, and why.

    Raises
    ------
    FusionError
        If an argument is unknown or bad, or an architecture cannot be traced or fused.

    Examples
    --------
    >>> import torch
    >>> from torch import Tensor, nn
    >>> import flwr_fusion as ff
    >>> from flwr_fusion.strategy import FusionStrategy
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> greedy = {"matching": ff.Matching(sweep="greedy")}
    >>> strategy = FusionStrategy(ff.ot_fusion, model, torch.zeros(1, 4), greedy, resume=False)
    """

    def __init__(
        self,
        method: FusionMethod,
        model: nn.Module | Mapping[str, nn.Module],
        example_inputs: Any,
        options: Mapping[str, Any] | None = None,
        **arguments: Unpack[StrategyArguments],
    ) -> None:
        self.method = ConfiguredMethod(method, {} if options is None else options)
        super().__init__(**fedavg_arguments(arguments, self.method.option_names))
        self.example_inputs = example_inputs
        self.only_first_rounds = arguments.get("only_first_rounds") or {}
        self.validation = arguments.get("validation") or Validation()
        if not isinstance(self.validation, Validation):
            raise FusionError(f"validation must be a Validation(...), not {self.validation!r:.60}")
        self.min_train_replies = arguments.get("min_train_replies", 1)
        self.resume = arguments.get("resume", False)
        self.reports: dict[int, FusionReport] = {}
        self.architecture_reports: dict[int, dict[str, FusionReport]] = {}
        self.architecture_metrics: dict[int, dict[str, MetricRecord]] = {}
        self.fused_nodes: dict[int, list[int]] = {}
        self.rejections: dict[int, list[Rejection]] = {}
        exchanged = exchanged_of(arguments.get("keep_local"), arguments.get("only"))
        networks = named_architectures(model)
        self._models = GlobalModels(networks, arguments.get("architecture"), exchanged)
        names, chosen = list(self._models.architectures), self.architecture
        self._nodes = NodeArchitectures(names, chosen, arguments.get("query_timeout", 60.0))
        folder, kept = arguments.get("checkpoint_dir"), arguments.get("keep_checkpoints", 3)
        self._checkpoints = None if folder is None else CheckpointFolder(folder, kept)
        self._asked: list[Metadata] = []
        self._runs_itself = False
        self._recorder: Run | None = None
        self._returned: ArrayRecord | None = None
        self._had_nodes = False
        check_count("min_train_replies", self.min_train_replies)
        if self.resume and folder is None:
            raise FusionError("resume=True needs checkpoint_dir=: the folder to go on from")
        self.method.check_options()
        check_schedule(self.only_first_rounds, self.method.options)
        self._aggregator = Aggregator(self._models, example_inputs, arguments.get("refine"))
        self._heads = self._calibrated_heads(arguments.get("head"))
        self._aggregator.warn_of_fixed_networks()
        start = self._models.architectures
        rule = self.method.rule
        # A rule that needs the model that was sent out needs networks that come from one.
        early = self._models.has_several and rule is not None and rule.needs_sent
        if early:
            start = common_start(start, example_inputs=example_inputs)
        self._aggregator.try_out(self.method, start)
        self._aggregator.try_out_refinement(self.method)
        if self._models.has_several and not early:
            start = common_start(start, example_inputs=example_inputs)
        self._models.set_all(start)

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        # A loop of a subclass's own is the strategy's own start, too; only a wrapper's is not.
        if cls.start is not FusionStrategy.start and cls.start not in _OWN_STARTS:
            setattr(cls, "start", _as_own_start(cls.start))  # noqa: B010

    @property
    def architecture(self) -> str:
        """The architecture whose arrays ``evaluate_fn`` and Flower's ``Result`` see."""
        return self._models.chosen

    @property
    def refine(self) -> Refinement | None:
        """What is done with the fused network after the fusion."""
        return self._aggregator.refine

    @property
    def head(self) -> Head | None:
        """What becomes of the calibrated head."""
        return None if self._heads is None else self._heads.use

    @property
    def architectures(self) -> dict[str, nn.Module]:
        """The networks of the federation by name; "model" where there is only one."""
        return self._models.architectures

    @property
    def arrays(self) -> dict[str, ArrayRecord]:
        """The global model by architecture, as it was last fused or sent.

        `global_models` has the present one of architectures that nobody runs, too.
        """
        return self._models.arrays

    @property
    def node_architectures(self) -> dict[int, str]:
        """The architecture of every node that takes part; empty where there is only one."""
        return self._nodes.by_node

    def global_models(self) -> dict[str, nn.Module]:
        """Return the present global model in every architecture, as new networks.

        With ``head="serve"`` they have the calibrated head, where there is one.
        """
        self._aggregator.bring_up_to_date(self.method, self._models.architectures)
        served = {} if self._heads is None else self._heads.served
        return {
            name: load_arrays(model, served.get(name, self._models.arrays[name]))
            for name, model in self._models.architectures.items()
        }

    def served_arrays(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return what ``evaluate_fn`` and the ``Result`` see of the global model.

        Parameters
        ----------
        arrays : ArrayRecord
            The global model in the chosen architecture, as clients train from it.

        Returns
        -------
        ArrayRecord
            With ``head="serve"`` the model with the calibrated head, where there is one.
        """
        if self._heads is None:
            return arrays
        if self._heads.use == "send":
            return self._models.arrays[self.architecture]
        return self._heads.served.get(self.architecture, arrays)

    def arrays_beside(self) -> dict[str, dict[str, ArrayRecord]]:
        """Return the arrays of a checkpoint beside those that clients train from, by kind."""
        return {} if self._heads is None else self._heads.kept()

    def summary(self) -> None:
        """Log the architectures, the fusion method and its options, then FedAvg's configuration."""
        for name, model in self._models.architectures.items():
            size = sum(parameter.numel() for parameter in model.parameters())
            groups = verified_graph(model, self.example_inputs).groups
            fixed = sum(group.fixed for group in groups)
            text = (
                "\t├──> Architecture '%s'%s: %d parameters, %d channel groups can move, %d cannot"
            )
            chosen = " (global model)" if name == self.architecture else ""
            log(INFO, text, name, chosen, size, len(groups) - fixed, fixed)
        log(INFO, "\t├──> Fusion: %s", self.method)
        if self.head is not None:
            log(INFO, "\t├──> Calibrated head: %s", self.head)
        if self._checkpoints is not None:
            log(INFO, "\t├──> Checkpoints: %s", self._checkpoints.path)
        super().summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
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
        initial_arrays : ArrayRecord, optional
            The first global model in the chosen architecture; not used where the run goes on from a
            checkpoint. With several architectures the others' are fused from it. Default: the
            model's own weights; of several architectures their `common_start`, which is the better
            one for training from scratch; in a second start of one strategy, where the first has
            ended.
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
            The last good global model in the chosen architecture, and the metrics of all rounds.

        Raises
        ------
        FusionError
            If the arrays do not fit the model, if there are checkpoints and `resume` is not set,
            if none of them is whole or the latest is of another network, or if another run writes
            to their folder.
        """
        self._had_nodes = False
        self._nodes.forget()
        with nullcontext() if self._checkpoints is None else self._checkpoints.reserved():
            done = self._checkpoint_to_resume()
            if done is not None:
                self._tell_of_another_method(done)
                self._models.restore(done)
                if self._heads is not None:
                    self._heads.restore(done)
            elif initial_arrays is not None:
                self._models.start_from(initial_arrays)
                if self._heads is not None:
                    self._heads.forget()
                self._aggregator.bring_up_to_date(self.method, self._models.architectures)
            self.fused_nodes.clear()
            self.rejections.clear()
            with self._own_rounds():
                result = run_of(self, self._checkpoints, done).rounds_of(
                    cast(Grid, PatientGrid(grid, Patience(timeout))),
                    self._models.arrays[self.architecture],
                    num_rounds,
                    evaluate_fn,
                    train_config=train_config,
                    evaluate_config=evaluate_config,
                )
            first = 1 if done is None else done.server_round + 1
            if first <= num_rounds and not self.fused_nodes:
                log_nothing_fused(first, num_rounds, self.rejections)
            return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send every sampled node the global model in its own architecture, as FedAvg does.

        From the second round on, a round for which too few nodes are connected in time is left
        out.
        """
        if patience_of(grid) is not None:
            self._runs_itself = True
        elif not self._runs_itself:
            check_own_start(self.method, self._aggregator, self._checkpoints, self.head)
        else:
            self._enter_own_loop()
        if not self._is_without_its_head(arrays):
            self._models.set_chosen(arrays, "the arrays to send")
        arrays, config = self._models.arrays[self.architecture], self._with_patterns(config)
        configure = partial(super().configure_train, server_round, arrays, config)
        return self._asking(configure, grid, self.min_train_nodes)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure evaluation as training; leave it out if too few nodes are connected."""
        if not self._is_without_its_head(arrays):
            self._models.arrays[self.architecture] = arrays
        config = self._with_patterns(config)
        configure = partial(super().configure_evaluate, server_round, arrays, config)
        return self._asking(configure, grid, self.min_evaluate_nodes)

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
        arrays, metrics = self._aggregated(server_round, replies)
        self._returned = self._returned if arrays is None else arrays
        if self._recorder is not None:
            self._recorder.record_train(server_round, arrays, metrics)
        return arrays, metrics

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Aggregate the metrics of all good replies, and of each architecture's on their own."""
        metrics = self._aggregated_evaluation(server_round, replies)
        if self._recorder is not None:
            self._recorder.record_evaluate(server_round, metrics)
        return metrics

    def _aggregated(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        method = self.method_of_round(server_round)
        if not self._runs_itself and method.is_auto:
            log(INFO, "rounds of another strategy's start(): combine='auto' is the mean")
            method = method.by_the_mean()
        received = read_training(replies, self._expected(), self._wanted_statistics(method))
        updates: Sequence[Update] = received.updates
        rejections = received.rejections
        self.rejections[server_round] = rejections
        log_replies("aggregate_train", len(updates), rejections)
        if not updates and not rejections:
            return None, None
        counts = counts_of(rejections)
        needed = max(self.min_train_replies, method.least_clients)
        if len(updates) < needed:
            few = method.least_clients > self.min_train_replies
            by = str(method.rule) if few else "min_train_replies"
            text = "aggregate_train: %d good replies in round %s, %s needs %d; the model stays"
            log(ERROR, text, len(updates), server_round, by, needed)
            return None, round_metrics(counts)
        self._tell_of_statistics(received, method)
        try:
            given = Contributions(tuple(updates), tuple(received.statistics))
            model_of, used = self._expected().model_of, self._nodes.in_use()
            fused = self._aggregator.fuse_round(server_round, method, given, model_of, used, needed)
        except FusionError as error:
            text = "aggregate_train: round %s cannot be fused, the model stays: %s (clients %s)"
            log(ERROR, text, server_round, error, nodes_of(updates))
            return None, round_metrics(counts)
        log_rejections("aggregate_train", fused.rejections)
        rejections += fused.rejections
        updates = fused.given.updates
        log_fusion(method, fused.reports)
        self._models.replace(fused.arrays)
        if self._heads is not None:
            self._heads.replaced(fused.arrays)
            self._heads.note_norms(updates, self._nodes.name_of)
        report = fused.reports[self.architecture]
        self.reports[server_round] = report
        self.architecture_reports[server_round] = fused.reports
        self.fused_nodes[server_round] = [update.node_id for update in updates]
        left_out = {r.node_id for r in fused.rejections if not r.keeps_update}
        measured = [answer for answer in received.measured if answer.node_id not in left_out]
        aggregate, key = self.train_metrics_aggr_fn, self.weighted_by_key
        clients = aggregated_metrics(aggregate, measured, key)
        figures = counts_of(rejections) | figures_of(report, fused.given.statistics)
        return fused.arrays[self.architecture], round_metrics(figures, clients)

    def _aggregated_evaluation(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        good, rejections = read_evaluation(replies, self._expected())
        used: dict[str, float] = {}
        if self._heads is not None:
            weights = {a.node_id: read_weight(a.content, self.weighted_by_key) for a in good}
            count, unusable = self._heads.calibrate(
                server_round, good, weights, self._nodes.name_of
            )
            used, rejections = {"with-class-moments": count}, [*rejections, *unusable]
        log_replies("aggregate_evaluate", len(good), rejections)
        if self._models.has_several:
            by_name: dict[str, list[Answer]] = {}
            for answer in good:
                by_name.setdefault(self._nodes.name_of(answer.node_id), []).append(answer)
            evaluated = {name: self._evaluated(answers, {}) for name, answers in by_name.items()}
            self.architecture_metrics[server_round] = {n: m for n, m in evaluated.items() if m}
        return self._evaluated(good, used | (counts_of(rejections) if rejections else {}))

    def method_of_round(self, server_round: int) -> ConfiguredMethod:
        """Return the method that fuses a round, without the options whose rounds are over."""
        over = {name for name, last in self.only_first_rounds.items() if server_round > last}
        return self.method.without(over)

    def global_arrays(self, arrays: ArrayRecord) -> dict[str, ArrayRecord]:
        """Return the global model by architecture, for a checkpoint.

        Parameters
        ----------
        arrays : ArrayRecord
            The global model in the chosen architecture.

        Returns
        -------
        dict of str to ArrayRecord
            Only those that it has been fused into.
        """
        return self._models.present(arrays)

    def details_of(self, server_round: int) -> dict[str, Any]:
        """Return what a round's checkpoint says of it beside its metrics, ready for JSON."""
        reports = self.architecture_reports.get(server_round, {})
        return {
            "method": self.method_of_round(server_round).name,
            "fused_nodes": self.fused_nodes.get(server_round, []),
            "node_architectures": {str(n): name for n, name in self._nodes.by_node.items()},
            "rejected": [
                {"node": r.node_id, "reason": r.reason, "text": r.text}
                for r in self.rejections.get(server_round, [])
            ],
            "reports": {name: report.to_dict() for name, report in reports.items()},
            NORMS: {} if self._heads is None else self._heads.norms(),
        }

    def _with_patterns(self, config: ConfigRecord) -> ConfigRecord:
        """Return a config that tells clients which tensors travel."""
        if self._models.exchanged.is_all:
            return config
        patterns = {key: list(v) for key, v in self._models.exchanged.named().items()}
        return ConfigRecord({**config, **{EXCHANGED_KEYS[k]: v for k, v in patterns.items()}})

    def _calibrated_heads(self, head: Head | None) -> CalibratedHeads | None:
        if head is None:
            return None
        if not self.fraction_evaluate:
            raise FusionError(
                f"head={head!r} needs fraction_evaluate above 0: class moments come with the "
                "replies to evaluation"
            )
        return CalibratedHeads(head, self._models, self.example_inputs, self.method.rule)

    def _checkpoint_to_resume(self) -> Checkpoint | None:
        if self._checkpoints is None:
            return None
        if self.resume:
            found = self._checkpoints.latest()
            if found is None:
                log(INFO, "no checkpoint in %s: the federation begins anew", self._checkpoints.path)
            return found
        rounds = self._checkpoints.rounds()
        if rounds:
            raise FusionError(
                f"{self._checkpoints.path} holds checkpoints of rounds {rounds}: set resume=True "
                "to go on from the latest, or choose an empty checkpoint_dir"
            )
        return None

    def _tell_of_another_method(self, done: Checkpoint) -> None:
        written, own = done.details.get("method"), self.method_of_round(done.server_round).name
        if written not in (None, own):
            text = "the checkpoint of round %s was fused by %s, this strategy goes on with %s"
            log(WARNING, text, done.server_round, printable(str(written)), own)

    def _asking(
        self, configure: Callable[[Grid], Iterable[Message]], grid: Grid, least: int
    ) -> Iterable[Message]:
        """Return the messages of an exchange, and remember who is asked; none without nodes."""
        seconds = (patience_of(grid) or Patience()).for_nodes()
        if self._had_nodes:
            grid = cast(Grid, ImpatientGrid(grid, seconds))
        needed = max(least, self.min_available_nodes)
        known = self._nodes.answered(grid, self._construct_messages, needed, seconds)
        try:
            messages = self._addressed(configure(known))
        except NotEnoughNodesError as reason:
            log(ERROR, "too few nodes, the model stays: %s", reason)
            messages = []
        self._had_nodes = self._had_nodes or bool(messages)
        self._asked = [message.metadata for message in messages]
        return messages

    def _addressed(self, messages: Iterable[Message]) -> list[Message]:
        """Give every message the arrays of its node's architecture; one content for each."""
        contents: dict[str, RecordDict] = {}
        result = list(messages)
        for message in result if self._models.has_several else ():
            name = self._nodes.name_of(message.metadata.dst_node_id)
            if name not in contents:
                self._aggregator.bring_up_to_date(self.method, [name])
                contents[name] = RecordDict(
                    {**message.content, self.arrayrecord_key: self._models.arrays[name]}
                )
            message.content = contents[name]
        return result

    def _expected(self) -> Expected:
        """Return what the replies to the last messages must be."""

        def model_of(node: int) -> nn.Module:
            return self._models.architectures[self._nodes.name_of(node)]

        def sent_to(node: int) -> ArrayRecord | None:
            return self._models.sent(self._nodes.name_of(node))

        def template_of(node: int) -> Mapping[str, Tensor]:
            return self._models.template(self._nodes.name_of(node))

        keys = self.arrayrecord_key, self.weighted_by_key
        return Expected(self._asked, model_of, template_of, sent_to, self.validation, *keys)

    def _evaluated(
        self, answers: Sequence[Answer], counts: Mapping[str, float]
    ) -> MetricRecord | None:
        if not answers:
            return round_metrics(counts) if counts else None
        aggregate, key = self.evaluate_metrics_aggr_fn, self.weighted_by_key
        return round_metrics(counts, aggregated_metrics(aggregate, answers, key))

    @contextmanager
    def _own_rounds(self) -> Iterator[None]:
        """Mark rounds as those of the strategy itself, not of another one that wraps it."""
        before, self._runs_itself = self._runs_itself, True
        try:
            yield
        finally:
            self._runs_itself, self._recorder = before, None

    def _is_without_its_head(self, arrays: ArrayRecord) -> bool:
        """Whether arrays are what was fused, as a subclass's loop passes on, and not what is sent.

        With ``head="send"`` that has the calibrated head beside it.
        """
        return self.head == "send" and self._returned is not None and arrays == self._returned

    def _enter_own_loop(self) -> None:
        """Record rounds that a subclass's start() runs; say what it cannot do."""
        if self._recorder is not None:
            return
        folder = self._checkpoints
        if folder is not None and (self.resume or folder.rounds()):
            raise FusionError(
                f"the start() of {type(self).__name__} runs its rounds itself, and only "
                f"FusionStrategy.start goes on from checkpoints ({folder.path} holds those of "
                f"rounds {folder.rounds()}): leave resume=True out, and choose an empty "
                "checkpoint_dir"
            )
        if self.head is not None:
            text = "the start() of %s runs its rounds itself: it evaluates and returns the model"
            text += " without the calibrated head, which global_models() of the strategy has; what"
            text += " it passes on must be what aggregate_train has returned"
            log(WARNING, text, type(self).__name__)
        self._recorder = run_of(self, folder, None)

    def _wanted_statistics(self, method: ConfiguredMethod) -> Wanted:
        """Return what a round uses of the clients' statistics.

        Under a wrapper nothing: they would pass by its noise.
        """
        if not self._runs_itself or not method.takes("statistics"):
            return "none"
        if method.reads_moments:
            return "all"
        repaired = method.repairs_from_statistics and any(
            tracks_statistics(module)
            for model in self._models.architectures.values()
            for module in model.modules()
        )
        return "activations" if repaired else "none"

    def _tell_of_statistics(self, received: TrainingReplies, method: ConfiguredMethod) -> None:
        sent = any(STATISTICS_RECORD in update.content for update in received.updates)
        if sent and not self._runs_itself:
            log(WARNING, "statistics are used in rounds of the strategy's own start() only")
        lacking = sum(measured is None for measured in received.statistics)
        if method.rule is not None and method.rule.needs_statistics and lacking:
            text = "%d of %d replies have no usable statistics; see flwr_fusion.client"
            log(WARNING, text, lacking, len(received.statistics))


def _as_own_start(start: Callable[..., Result]) -> Callable[..., Result]:
    @wraps(start)
    def own(self: FusionStrategy, *arguments: Any, **named: Any) -> Result:
        with self._own_rounds():
            return start(self, *arguments, **named)

    _OWN_STARTS.add(own)
    return own
