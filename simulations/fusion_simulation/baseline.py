"""FedAvg's own federation, with the same nodes, seeds and rounds as the strategy's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fusion_simulation.comparison import ClientModel
from fusion_simulation.data import LabelledImages
from fusion_simulation.evaluation import (
    RoundAccuracy,
    evaluator,
    load_arrays,
    round_accuracies,
)
from fusion_simulation.nodes import check_nodes
from fusion_simulation.settings import BASELINE, Settings
from fusion_simulation.strategies import LastReplies


@dataclass(frozen=True)
class Baseline:
    """What FedAvg has come to.

    Parameters
    ----------
    model : torch.nn.Module
        Its global model.
    clients : list of ClientModel
        Its clients of the last round.
    rounds : list of RoundAccuracy
        Its accuracy after every round.
    """

    model: nn.Module
    clients: list[ClientModel]
    rounds: list[RoundAccuracy]


def run_baseline(
    grid: Grid, settings: Settings, build: Callable[[str], nn.Module], test: LabelledImages
) -> Baseline | None:
    """Run FedAvg from the strategy's start; return None where it fails, as on one bad reply.

    The strategy's results must not be lost with it.
    """
    replies = LastReplies()
    strategy = FedAvg(fraction_evaluate=0.0, train_metrics_aggr_fn=replies)
    model = build(settings.models)
    evaluate = evaluator(strategy, replies, build(settings.models), test, settings.special_label)
    print("FedAvg's own federation to compare with; baseline=false leaves it out", flush=True)
    try:
        check_nodes(grid, settings)  # FedAvg would wait for them for ever.
        result = strategy.start(
            grid,
            initial_arrays=ArrayRecord(model.state_dict()),
            num_rounds=settings.num_server_rounds,
            # By it the clients know that nobody takes their statistics.
            train_config=ConfigRecord({BASELINE: True}),
            evaluate_fn=evaluate,
        )
    except Exception as error:  # Whatever bad replies make Flower's FedAvg raise.
        print(f"no baseline: FedAvg has failed: {error!r:.300}", flush=True)
        return None
    load_arrays(model, result.arrays)
    return Baseline(model, replies.client_models(build), round_accuracies(result))
