"""A run of a strategy: counted on from a checkpoint, and written to new ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from logging import ERROR, INFO
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from flwr_fusion.strategy.checkpoint import Checkpoint, CheckpointFolder, History

if TYPE_CHECKING:
    from flwr_fusion.strategy.strategy import FusionStrategy

EvaluateFunction = Callable[[int, ArrayRecord], MetricRecord | None]


class Run(Strategy):
    """A strategy's rounds, counted from the checkpoint that they go on from.

    Flower counts the rounds of every start from 1. Between it and the strategy, this one adds the
    rounds that are done, so that the strategy, its subclasses, the clients, ``evaluate_fn`` and
    the ``Result`` all see the true number.

    Parameters
    ----------
    strategy : FusionStrategy
        What runs.
    folder : CheckpointFolder, optional
        Where every round is written.
    done : Checkpoint, optional
        What the run goes on from.
    """

    def __init__(
        self, strategy: FusionStrategy, folder: CheckpointFolder | None, done: Checkpoint | None
    ) -> None:
        self._strategy = strategy
        self._folder = folder
        self._done = 0 if done is None else done.server_round
        self._history = History() if done is None else done.history
        self._arrays = ArrayRecord()
        self._written: Checkpoint | None = None

    def rounds_of(
        self,
        grid: Grid,
        arrays: ArrayRecord,
        num_rounds: int,
        evaluate_fn: EvaluateFunction | None,
        **arguments: Any,
    ) -> Result:
        """Run the rounds that are not done, and return the result of all of them."""
        self._arrays = arrays
        if self._done:
            text = "Going on after round %s of %s: what Flower calls round 1 is round %s"
            log(INFO, text, self._done, num_rounds, self._done + 1)
        result = self.start(
            grid,
            arrays,
            max(0, num_rounds - self._done),
            evaluate_fn=None if evaluate_fn is None else self._counting(evaluate_fn),
            **arguments,
        )
        result.arrays = self._strategy.served_arrays(self._arrays)
        for kind in History.__dataclass_fields__:
            setattr(result, kind, dict(getattr(self._history, kind)))
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure the round of the true number, from what evaluation has made of the model."""
        number = self._done + server_round
        return self._strategy.configure_train(number, self._arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate, then write the checkpoint."""
        number = self._done + server_round
        arrays, metrics = self._strategy.aggregate_train(number, replies)
        self.record_train(number, arrays, metrics)
        return arrays, metrics

    def record_train(
        self, number: int, arrays: ArrayRecord | None, metrics: MetricRecord | None
    ) -> None:
        """Keep what a round's training has come to, and write its checkpoint."""
        if arrays is not None:
            self._strategy.arrays[self._strategy.architecture] = arrays
        self._arrays = self._strategy.arrays[self._strategy.architecture]
        self._keep(self._history.train_metrics_clientapp, number, metrics)
        if self._strategy.head is None:
            self._write(number)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure the round of the true number, of the model that clients train from next."""
        number = self._done + server_round
        return self._strategy.configure_evaluate(number, self._arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Aggregate, then add the metrics to the checkpoint."""
        number = self._done + server_round
        metrics = self._strategy.aggregate_evaluate(number, replies)
        self.record_evaluate(number, metrics)
        return metrics

    def record_evaluate(self, number: int, metrics: MetricRecord | None) -> None:
        """Keep a round's evaluation; with a head the round is whole, and written, only now."""
        self._keep(self._history.evaluate_metrics_clientapp, number, metrics)
        if self._strategy.head is None:
            self._add_to_checkpoint()
        else:
            self._arrays = self._strategy.arrays[self._strategy.architecture]
            self._write(number)

    def summary(self) -> None:
        """Log the strategy's own summary."""
        self._strategy.summary()

    def _counting(self, evaluate_fn: EvaluateFunction) -> EvaluateFunction:
        kept = self._history.evaluate_metrics_serverapp

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            number = self._done + server_round
            if server_round == 0 and number in kept:
                return kept[number]
            metrics = evaluate_fn(number, self._strategy.served_arrays(arrays))
            self._keep(kept, number, metrics)
            self._add_to_checkpoint()
            return metrics

        return evaluate

    def _write(self, number: int) -> None:
        """Write the round's checkpoint; a disk that is full does not end the federation."""
        if self._folder is None:
            return
        models = self._strategy.global_arrays(self._arrays)
        details, beside = self._strategy.details_of(number), self._strategy.arrays_beside()
        checkpoint = Checkpoint(number, models, self._history, details, beside)
        self._written = None
        try:
            self._folder.write(checkpoint)
            self._written = checkpoint
        except OSError as error:
            log(ERROR, "no checkpoint of round %s: %s", number, error)

    def _add_to_checkpoint(self) -> None:
        if self._folder is None or self._written is None:
            return
        try:
            self._folder.update(self._written)
        except Exception as error:  # It may have been removed or changed in any way.
            text = "the metrics of round %s are not in its checkpoint: %r"
            log(ERROR, text, self._written.server_round, error)

    @staticmethod
    def _keep(
        kept: dict[int, MetricRecord], server_round: int, metrics: MetricRecord | None
    ) -> None:
        if metrics is not None:
            kept[server_round] = metrics


def run_of(
    strategy: FusionStrategy, folder: CheckpointFolder | None, done: Checkpoint | None
) -> Run:
    """Return the run of a strategy; Flower logs its class, which therefore has the same name."""
    named: type[Run] = type(type(strategy).__name__, (Run,), {})
    return named(strategy, folder, done)
