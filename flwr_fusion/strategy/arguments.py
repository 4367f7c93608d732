"""The arguments that all strategies share, spelled out for editors and type checkers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypedDict, cast

from flwr.app import MetricRecord, RecordDict

from flwr_fusion.errors import FusionError
from flwr_fusion.strategy.heads import Head
from flwr_fusion.strategy.refinement_steps import Refinement
from flwr_fusion.strategy.replies import Validation

AggregateMetrics = Callable[[list[RecordDict], str], MetricRecord]


class FedAvgArguments(TypedDict, total=False):
    """Arguments of Flower's ``FedAvg``; they keep their names and meaning."""

    fraction_train: float
    fraction_evaluate: float
    min_train_nodes: int
    min_evaluate_nodes: int
    min_available_nodes: int
    weighted_by_key: str
    arrayrecord_key: str
    configrecord_key: str
    train_metrics_aggr_fn: AggregateMetrics | None
    evaluate_metrics_aggr_fn: AggregateMetrics | None


class StrategyArguments(FedAvgArguments, total=False):
    """Arguments of every strategy of this package, beside ``FedAvg``'s; see `FusionStrategy`."""

    only_first_rounds: Mapping[str, int] | None
    validation: Validation | None
    refine: Refinement | None
    keep_local: Sequence[str] | None
    only: Sequence[str] | None
    head: Head | None
    min_train_replies: int
    checkpoint_dir: str | Path | None
    resume: bool
    keep_checkpoints: int
    architecture: str | None
    query_timeout: float


# What arguments are called in strategies of Flower's older interface.
_FORMER = {
    "fraction_fit": "fraction_train",
    "min_fit_clients": "min_train_nodes",
    "min_evaluate_clients": "min_evaluate_nodes",
    "min_available_clients": "min_available_nodes",
    "fit_metrics_aggregation_fn": "train_metrics_aggr_fn",
    "evaluate_metrics_aggregation_fn": "evaluate_metrics_aggr_fn",
}

# What is given to the strategy's start().
_OF_START = (
    "initial_arrays",
    "num_rounds",
    "timeout",
    "train_config",
    "evaluate_config",
    "evaluate_fn",
)


def fedavg_arguments(arguments: StrategyArguments, options: Sequence[str] = ()) -> FedAvgArguments:
    """Return the arguments that are ``FedAvg``'s; refuse what is no strategy's argument.

    ``options`` are the method's, among which a misspelled one is looked for, too.
    """
    given: dict[str, Any] = dict(arguments)
    unknown = sorted(given.keys() - StrategyArguments.__optional_keys__)
    if unknown:
        names = [*options, *sorted(StrategyArguments.__optional_keys__)]
        if unknown[0] in _OF_START:
            raise FusionError(f"{unknown[0]} is an argument of start(), not of the strategy")
        near = get_close_matches(_FORMER.get(unknown[0], unknown[0]), names, 1)
        hint = f"did you mean {near[0]}? There are" if near else "there are"
        raise FusionError(f"unknown arguments {unknown}: {hint} {', '.join(names)}")
    taken = {name: given[name] for name in FedAvgArguments.__optional_keys__ & given.keys()}
    return cast(FedAvgArguments, taken)
