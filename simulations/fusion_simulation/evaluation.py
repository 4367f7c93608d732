"""Test accuracy of the global model after every round."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg, Result
from torch import nn

from flwr_fusion.strategy import CLAFusion, FusionStrategy
from fusion_simulation.data import LabelledImages
from fusion_simulation.strategies import LastReplies, architecture_names
from fusion_simulation.task import accuracy, class_probabilities, load_sent

IN_ARCHITECTURE = "accuracy-"


@dataclass(frozen=True)
class RoundAccuracy:
    """Test accuracy of the global model after one round."""

    server_round: int
    accuracy: float
    special_label_accuracy: float
    by_architecture: dict[str, float] = field(default_factory=dict)


def evaluator(
    strategy: FedAvg,
    replies: LastReplies,
    model: nn.Module,
    test: LabelledImages,
    special_label: int,
) -> Callable[[int, ArrayRecord], MetricRecord]:
    """Return the function that evaluates the global model, in all architectures, every round.

    It stops a run in which no client has ever been successful, and tells ``replies`` of the model
    that the next round's clients are sent.
    """

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round and not replies.contents and not is_resumed(strategy):
            raise RuntimeError(
                f"nothing was fused in round {server_round}, the log says why{reasons_of(strategy)}"
            )
        load_arrays(model, arrays)
        # It also fuses the global model into architectures that nobody has run so far.
        served = strategy.global_models() if isinstance(strategy, FusionStrategy) else {}
        replies.global_models = models_to_send(strategy, model)
        probabilities = class_probabilities(model, test.images)
        metrics = {
            "accuracy": accuracy(probabilities, test.labels),
            "special-label-accuracy": accuracy(probabilities, test.labels, special_label),
        }
        if isinstance(strategy, CLAFusion):
            for name, other in served.items():
                probabilities = class_probabilities(other, test.images)
                metrics[f"{IN_ARCHITECTURE}{name}"] = accuracy(probabilities, test.labels)
        return MetricRecord(metrics)  # type: ignore[arg-type]

    return evaluate


def models_to_send(strategy: FedAvg, model: nn.Module) -> dict[str, nn.Module]:
    """Return what clients train from next, by the strategy's names; of Flower's it is ``model``.

    With ``head="serve"`` it is not what is evaluated.
    """
    if not isinstance(strategy, FusionStrategy):
        return dict.fromkeys(architecture_names(strategy), copy.deepcopy(model))
    return {
        name: load_arrays(copy.deepcopy(strategy.architectures[name]), arrays)
        for name, arrays in strategy.arrays.items()
    }


def is_resumed(strategy: FedAvg) -> bool:
    """Return whether a strategy goes on from a checkpoint, whose clients are not kept."""
    return isinstance(strategy, FusionStrategy) and strategy.resume


def reasons_of(strategy: FedAvg) -> str:
    """Return why the first reply was left out, as far as the strategy knows."""
    if not isinstance(strategy, FusionStrategy):
        return ": see the log above"
    found = [rejection.text for known in strategy.rejections.values() for rejection in known]
    return f"; the first reason: {found[0]}" if found else ""


def load_arrays(model: nn.Module, arrays: ArrayRecord) -> nn.Module:
    """Load a Flower record into a model and return the model."""
    load_sent(model, arrays.to_torch_state_dict())
    return model


def round_accuracies(result: Result) -> list[RoundAccuracy]:
    """Return the global model's accuracy after every round, from round 0."""
    return [
        RoundAccuracy(
            server_round,
            float(metrics["accuracy"]),  # type: ignore[arg-type]
            float(metrics["special-label-accuracy"]),  # type: ignore[arg-type]
            {
                key.removeprefix(IN_ARCHITECTURE): float(value)  # type: ignore[arg-type]
                for key, value in metrics.items()
                if key.startswith(IN_ARCHITECTURE)
            },
        )
        for server_round, metrics in sorted(result.evaluate_metrics_serverapp.items())
    ]
