"""The strategy for clients of different architectures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from logging import INFO, WARNING
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from torch import nn

from flwr_fusion.client import ARCHITECTURE_KEY, ARCHITECTURE_RECORD
from flwr_fusion.depth.start import common_start
from flwr_fusion.errors import FusionError
from flwr_fusion.methods.cla import cla_fusion
from flwr_fusion.methods.ot import FusionReport, FusionResult
from flwr_fusion.rules.rule import least_clients
from flwr_fusion.strategy.arrays import arrays_of, check_arrays
from flwr_fusion.strategy.checkpoint import Checkpoint
from flwr_fusion.strategy.fusion import FusionStrategy, checked, checked_result, loaded
from flwr_fusion.strategy.reasons import Reason, RejectedReply
from flwr_fusion.strategy.refinement import Refinement
from flwr_fusion.strategy.replies import Answer, answers_of
from flwr_fusion.strategy.waiting import KnownNodes

# How often a node that does not answer is asked which architecture it runs.
_MOST_QUESTIONS = 3


class CLAFusion(FusionStrategy):
    """Federated learning of clients whose networks differ in depth and width.

    Every node is asked once which architecture it runs, and always gets the global model in its
    own. After every round the networks of all clients are fused once for each architecture in
    use. With one architecture nobody is asked, and any Flower client will do.

    Parameters
    ----------
    architectures : mapping of str to nn.Module
        The networks of the federation by name: chains of layers, or residual networks of one
        block type. Not modified; their weights only serve to make the common start.
    example_inputs : Tensor, tuple or dict
        What all of them are called with; one or two samples.
    architecture : str, optional
        The one of the arrays given to `start`, passed to ``evaluate_fn`` and kept in the
        ``Result``. Default: the first.
    query_timeout : float
        Seconds to wait for the nodes' architectures.
    **arguments
        Options of `flwr_fusion.cla_fusion`, of `FusionStrategy` and arguments of Flower's
        ``FedAvg``.

    Attributes
    ----------
    arrays : dict of str to ArrayRecord
        The global model in every architecture as it was last fused or sent; `global_models` has
        the present one of architectures that nobody runs, too.
    node_architectures : dict of int to str
        The architecture of every node that takes part.
    architecture_reports : dict of int to (dict of str to FusionReport)
        For each round what the fusion into each architecture did.
    architecture_metrics : dict of int to (dict of str to MetricRecord)
        For each round the evaluation metrics of each architecture's clients.

    Raises
    ------
    FusionError
        If the architectures cannot be fused into each other, or an option is unknown.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from flwr_fusion.strategy import CLAFusion
    >>> shallow = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> deep = nn.Sequential(
    ...     nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)
    ... )
    >>> strategy = CLAFusion({"shallow": shallow, "deep": deep}, torch.zeros(1, 4))
    >>> sorted(strategy.global_models())
    ['deep', 'shallow']
    """

    def __init__(
        self,
        architectures: Mapping[str, nn.Module],
        example_inputs: Any,
        architecture: str | None = None,
        query_timeout: float = 60.0,
        **arguments: Any,
    ) -> None:
        if not isinstance(architectures, Mapping) or not architectures:
            raise FusionError("CLAFusion needs its architectures by name, at least one")
        odd = [name for name in architectures if not isinstance(name, str) or not name]
        if odd:
            raise FusionError(f"architectures have names, texts that are not empty, not {odd}")
        self.architecture = next(iter(architectures)) if architecture is None else architecture
        if self.architecture not in architectures:
            raise FusionError(
                f"architecture {self.architecture!r} is not among {sorted(architectures)}"
            )
        self.architectures = dict(architectures)
        self.query_timeout = query_timeout
        self.node_architectures: dict[int, str] = {}
        self.architecture_reports: dict[int, dict[str, FusionReport]] = {}
        self.architecture_metrics: dict[int, dict[str, MetricRecord]] = {}
        self._left_out: set[int] = set()
        self._questions: dict[int, int] = {}
        self._present: set[int] = set()
        super().__init__(
            cla_fusion, self.architectures[self.architecture], example_inputs, **arguments
        )
        # Whatever cannot be fused into what is refused here, not after the first round.
        for name in self.architectures if len(self.architectures) > 1 else ():
            self._try_to_fuse_into(name)
        start = common_start(self.architectures, example_inputs=example_inputs)
        self.arrays = {name: arrays_of(model.state_dict()) for name, model in start.items()}
        self._up_to_date = set(start)

    def start(
        self, grid: Grid, initial_arrays: ArrayRecord | None = None, *args: Any, **kwargs: Any
    ) -> Result:
        """Run the federation.

        Parameters
        ----------
        grid : Grid
            As for every strategy.
        initial_arrays : ArrayRecord, optional
            The first global model in the chosen architecture, such as one trained before; the
            other architectures' are fused from it. Default: the architectures' `common_start`,
            which is the better one for training from scratch; in a second start of one strategy,
            where the first has ended.
        *args, **kwargs
            As for Flower's ``Strategy.start`` (``num_rounds``, ``timeout``, ``evaluate_fn``, ...).

        Returns
        -------
        Result
            Arrays and metrics in the chosen architecture; see `global_models` for the others.
        """
        self.node_architectures.clear()
        self._left_out.clear()
        self._questions.clear()
        if initial_arrays is not None:
            self._start_from(initial_arrays)
        return super().start(grid, self.arrays[self.architecture], *args, **kwargs)

    def global_models(self) -> dict[str, nn.Module]:
        """Return the present global model in every architecture, as new networks."""
        for name in self.architectures:
            self._bring_up_to_date(name)
        return {
            name: loaded(model, self.arrays[name]) for name, model in self.architectures.items()
        }

    def summary(self) -> None:
        """Log the architectures, then what `FusionStrategy` logs."""
        for name, model in self.architectures.items():
            size = sum(parameter.numel() for parameter in model.parameters())
            chosen = " (global model)" if name == self.architecture else ""
            log(INFO, "\t├──> Architecture '%s'%s: %d parameters", name, chosen, size)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send every sampled node the global model in its own architecture."""
        self.arrays[self.architecture] = arrays
        messages = super().configure_train(server_round, arrays, config, self._known(grid))
        return self._in_own_architectures(messages)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send every sampled node the global model in its own architecture."""
        self.arrays[self.architecture] = arrays
        messages = super().configure_evaluate(server_round, arrays, config, self._known(grid))
        return self._in_own_architectures(messages)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Aggregate the metrics of all good replies, and of each architecture's on their own."""
        good, rejections = self._good_evaluations(replies)
        by_name: dict[str, list[Answer]] = {}
        for answer in good:
            by_name.setdefault(self._name_of(answer.node_id), []).append(answer)
        evaluated = {name: self._evaluated(answers, ()) for name, answers in by_name.items()}
        self.architecture_metrics[server_round] = {n: m for n, m in evaluated.items() if m}
        return self._evaluated(good, rejections)

    def global_arrays(self, arrays: ArrayRecord) -> dict[str, ArrayRecord]:
        """Return the global model in every architecture that it has been fused into.

        Parameters
        ----------
        arrays : ArrayRecord
            The global model in the chosen architecture.

        Returns
        -------
        dict of str to ArrayRecord
            The others are fused from these when they are needed.
        """
        fused = {name: self.arrays[name] for name in sorted(self._up_to_date)}
        return fused | {self.architecture: arrays}

    def details_of(self, server_round: int) -> dict[str, Any]:
        """Return what a round's checkpoint says of it beside its metrics, ready for JSON."""
        reports = self.architecture_reports.get(server_round, {})
        nodes = {str(node): name for node, name in self.node_architectures.items()}
        return super().details_of(server_round) | {
            "node_architectures": nodes,
            "report": {name: report.to_dict() for name, report in reports.items()},
        }

    def _restored(self, checkpoint: Checkpoint) -> ArrayRecord:
        unknown = sorted(checkpoint.arrays.keys() - self.architectures.keys())
        if unknown:
            raise FusionError(
                f"the checkpoint of round {checkpoint.server_round} has architectures {unknown}, "
                f"which are not among {sorted(self.architectures)}"
            )
        names = {self.architecture, *checkpoint.arrays}
        self.arrays |= {name: checked(checkpoint, name, self.architectures[name]) for name in names}
        self._up_to_date = names
        return self.arrays[self.architecture]

    def _check_wrapper(self) -> None:
        super()._check_wrapper()
        if not self._own_start and len(self.architectures) > 1:
            raise FusionError(
                "clients of several architectures need the strategy's own start(): a wrapper, such "
                "as Flower's for differential privacy, sees the arrays of one architecture only"
            )

    def _try_out_refinement(self, refine: Refinement) -> None:
        for name, model in self.architectures.items():
            try:
                refine.try_out(model)
            except FusionError as error:
                raise FusionError(f"architecture {name!r}: {error}") from error

    def _try_to_fuse_into(self, name: str) -> None:
        models = list(self.architectures.values()) * least_clients(self.options.get("combine"))
        weights, statistics = [1.0] * len(models), [None] * len(models)
        target = self.architectures[name]
        try:
            self._fuse(self.method, self.options, models, weights, statistics, target, None)
        except FusionError as error:
            clients = ", ".join(f"client {k} is {n!r}" for k, n in enumerate(self.architectures))
            raise FusionError(
                f"the architectures cannot be fused into {name!r}: {error} ({clients})"
            ) from error

    def _start_from(self, arrays: ArrayRecord) -> None:
        """Make the arrays the global model, and fuse it into the other architectures."""
        try:
            check_arrays(arrays, self.model.state_dict())
        except RejectedReply as error:
            raise FusionError(
                f"the initial arrays do not fit architecture {self.architecture!r}: {error}"
            ) from error
        self.arrays[self.architecture] = arrays
        self._up_to_date = {self.architecture}
        for name in self.architectures:
            self._bring_up_to_date(name)

    def _bring_up_to_date(self, name: str) -> None:
        """Fuse the global model into an architecture that nobody has run so far."""
        if name not in self._up_to_date:
            model = self.architectures[name]
            chosen = loaded(self.model, self.arrays[self.architecture])
            # There are no statistics of the global model.
            options = {n: v for n, v in self.options.items() if n != "combine"}
            result = self._fuse(self.method, options, [chosen], [1.0], [None], model, None)
            self.arrays[name] = arrays_of(result.model.state_dict())
            self._up_to_date.add(name)

    def _sent_to(self, node_id: int) -> ArrayRecord | None:
        return self.arrays[self._name_of(node_id)]

    def _name_of(self, node_id: int) -> str:
        return self.node_architectures.get(node_id, self.architecture)

    def _model_of(self, node_id: int) -> nn.Module:
        return self.architectures[self._name_of(node_id)]

    def _in_own_architectures(self, messages: Iterable[Message]) -> list[Message]:
        """Give every message the arrays of its node's architecture; one content for each."""
        contents: dict[str, RecordDict] = {}
        result = []
        for message in messages:
            name = self._name_of(message.metadata.dst_node_id)
            if name not in contents:
                self._bring_up_to_date(name)
                contents[name] = RecordDict(
                    {**message.content, self.arrayrecord_key: self.arrays[name]}
                )
            message.content = contents[name]
            result.append(message)
        return result

    def _fuse_updates(
        self, server_round: int, fuse: Callable[[nn.Module, nn.Module | None], FusionResult]
    ) -> tuple[ArrayRecord, FusionReport]:
        """Fuse the updates once for every architecture in use."""
        present = (name for node, name in self.node_architectures.items() if node in self._present)
        used = {self.architecture, *present}
        reports: dict[str, FusionReport] = {}
        fused: dict[str, ArrayRecord] = {}
        for name, model in self.architectures.items():
            if name in used:
                result = fuse(model, loaded(model, self.arrays[name]))
                fused[name] = checked_result(result, model)
                reports[name] = result.report
        self.arrays |= fused
        self._up_to_date = set(fused)
        self.architecture_reports[server_round] = reports
        return self.arrays[self.architecture], reports[self.architecture]

    def _known(self, grid: Grid) -> Grid:
        """Return the grid without the nodes whose architecture is not known."""
        if len(self.architectures) == 1:
            return grid
        return cast(Grid, KnownNodes(grid, self._nodes))

    def _nodes(self, grid: Grid) -> list[int]:
        """Return the nodes that take part, asking those that have not answered yet."""
        nodes = list(grid.get_node_ids())
        new = [n for n in nodes if n not in self.node_architectures and n not in self._left_out]
        if new:
            self._ask(new, grid)
        known = [node for node in nodes if node in self.node_architectures]
        self._present = set(known)
        hopeless = nodes and self._left_out.issuperset(nodes)
        if not self.node_architectures and hopeless and len(nodes) >= self.min_available_nodes:
            raise FusionError(
                f"none of {len(nodes)} nodes runs a known architecture: its ClientApp must answer "
                "queries with flwr_fusion.client.declare_architecture, and one of the names "
                f"{sorted(self.architectures)}"
            )
        return known

    def _ask(self, nodes: list[int], grid: Grid) -> None:
        question = RecordDict(
            {ARCHITECTURE_RECORD: ConfigRecord({"known": list(self.architectures)})}
        )
        messages = list(self._construct_messages(question, nodes, MessageType.QUERY))
        asked = [message.metadata for message in messages]
        replies = grid.send_and_receive(messages, timeout=self.query_timeout)
        answers, rejections = answers_of(replies, asked)
        for answer in answers:
            name, reason = self._declared(answer)
            if name is not None:
                self.node_architectures[answer.node_id] = name
            else:
                self._leave_out(answer.node_id, reason)
        for rejection in rejections:
            node = rejection.node_id
            # A node that was busy or away may still answer; a ClientApp that cannot never will.
            self._questions[node] = self._questions.get(node, 0) + 1
            if node in self.node_architectures:  # It gave the same answer twice.
                continue
            if rejection.reason is Reason.ERROR or self._questions[node] >= _MOST_QUESTIONS:
                text = f"it did not say which architecture it runs: {rejection.text}"
                self._leave_out(node, text)

    def _leave_out(self, node: int, reason: str) -> None:
        self._left_out.add(node)
        log(WARNING, "node %s is left out: %.300s", node, reason)

    def _declared(self, answer: Answer) -> tuple[str | None, str]:
        """Return the architecture that a node has declared, or why there is none."""
        record = answer.content.config_records.get(ARCHITECTURE_RECORD)
        name = record.get(ARCHITECTURE_KEY) if record is not None else None
        if not isinstance(name, str):
            return None, "its answer names no architecture"
        if name not in self.architectures:
            return None, f"it runs {name!r:.60}, which is not among {sorted(self.architectures)}"
        return name, ""
