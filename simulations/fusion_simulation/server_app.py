"""The server: runs the strategy, then compares the ways of using the clients' models."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result
from torch import nn

from fusion_simulation.comparison import OT_FUSION, Comparison
from fusion_simulation.data import LabelledImages, check_label_skill, load_split
from fusion_simulation.report import Report, RoundAccuracy, output_folder
from fusion_simulation.settings import Settings
from fusion_simulation.strategies import RecordReplies, build_strategy
from fusion_simulation.task import accuracy, build_model, class_probabilities

NODES_NEEDED = 2
SECONDS_TO_CONNECT = 60.0
METHOD_NAMES = {
    "fedavg": OT_FUSION,
    "fedprox": "FedProx",
    "ot": OT_FUSION,
    "nt": "Neuron Transplantation",
}

app = ServerApp()


@app.main()
def run(grid: Grid, context: Context) -> None:
    """Run the federation and report on it."""
    settings = Settings.from_run_config(context.run_config)
    test = load_split(
        settings.dataset, train=False, data_dir=settings.data_dir, download=settings.download
    )
    build = partial(build_model, settings.models, settings.dataset, settings.seed)
    strategy = build_strategy(settings, build(), test.images[:2])
    folder = output_folder(settings.output_dir)
    check_nodes(grid, settings)

    begin = time.perf_counter()
    result = strategy.start(
        grid,
        initial_arrays=ArrayRecord(build().state_dict()),
        num_rounds=settings.num_server_rounds,
        evaluate_fn=evaluator(build, test, settings.special_label),
    )
    seconds = {"federation": time.perf_counter() - begin}
    report = compare(settings, strategy, result, build, test, seconds)
    report.show()
    report.save(folder)


def check_nodes(grid: Grid, settings: Settings) -> None:
    """Wait until there are enough nodes; refuse a number that the partition cannot serve."""
    deadline = time.monotonic() + SECONDS_TO_CONNECT
    while (nodes := len(list(grid.get_node_ids()))) < NODES_NEEDED:
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{NODES_NEEDED} nodes are needed, {nodes} connected "
                f"within {SECONDS_TO_CONNECT:.0f} seconds"
            )
        time.sleep(1)
    if settings.partition == "label-skill":
        check_label_skill(nodes)


def evaluator(
    build: Callable[[], nn.Module], test: LabelledImages, special_label: int
) -> Callable[[int, ArrayRecord], MetricRecord]:
    """Return the function that evaluates the global model after every round."""

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        probabilities = class_probabilities(load_arrays(build(), arrays), test.images)
        return MetricRecord(
            {
                "accuracy": accuracy(probabilities, test.labels),
                "special-label-accuracy": accuracy(probabilities, test.labels, special_label),
            }
        )

    return evaluate


def load_arrays(model: nn.Module, arrays: ArrayRecord) -> nn.Module:
    """Load a Flower record into a model and return the model."""
    model.load_state_dict(arrays.to_torch_state_dict())
    return model


def compare(
    settings: Settings,
    strategy: RecordReplies,
    result: Result,
    build: Callable[[], nn.Module],
    test: LabelledImages,
    seconds: dict[str, float],
) -> Report:
    """Evaluate the last round's clients in every combination, and collect the report."""
    begin = time.perf_counter()
    comparison = Comparison(strategy.client_models(build), test, settings.special_label)
    fused = None if settings.strategy == "fedavg" else load_arrays(build(), result.arrays)
    name = METHOD_NAMES[settings.strategy]
    if settings.combines_by_least_squares:
        name += f", {settings.combine}"
    rows = comparison.rows(fused, name)
    sweep = comparison.sweep() if len(comparison.clients) == NODES_NEEDED else None
    seconds |= {
        "aggregation-last-round": strategy.aggregation_seconds[-1],
        "comparison": time.perf_counter() - begin,
    }
    return Report(settings, rows, sweep, round_accuracies(result), seconds)


def round_accuracies(result: Result) -> list[RoundAccuracy]:
    """Return the global model's accuracy after every round, from round 0."""
    return [
        RoundAccuracy(
            server_round,
            float(metrics["accuracy"]),  # type: ignore[arg-type]
            float(metrics["special-label-accuracy"]),  # type: ignore[arg-type]
        )
        for server_round, metrics in sorted(result.evaluate_metrics_serverapp.items())
    ]
