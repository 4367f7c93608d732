"""The server: runs the strategy, then compares the ways of using the clients' models."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Result
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.strategy import CLAFusion, FusionStrategy
from fusion_simulation.comparison import OT_FUSION, Comparison, Fuse
from fusion_simulation.data import LabelledImages, check_label_skill, load_split
from fusion_simulation.report import Report, RoundAccuracy, output_folder
from fusion_simulation.settings import Settings
from fusion_simulation.strategies import LastReplies, build_strategy
from fusion_simulation.task import accuracy, build_model, class_probabilities

NODES_NEEDED = 2
IN_ARCHITECTURE = "accuracy-"
SECONDS_TO_CONNECT = 60.0
METHOD_NAMES = {
    "fedavg": OT_FUSION,
    "fedprox": "FedProx",
    "ot": OT_FUSION,
    "nt": "Neuron Transplantation",
    "cla": "CLA fusion to",
}
Build = Callable[[str], nn.Module]

app = ServerApp()


@app.main()
def run(grid: Grid, context: Context) -> None:
    """Run the federation and report on it."""
    settings = Settings.from_run_config(context.run_config)
    test = load_split(
        settings.dataset, train=False, data_dir=settings.data_dir, download=settings.download
    )
    build = partial(build_model, dataset=settings.dataset, seed=settings.seed)
    models = {name: build(name) for name in settings.architectures}
    calibration = calibration_images(settings)
    replies = LastReplies()
    strategy = build_strategy(settings, models, test.images[:2], calibration, replies)
    folder = output_folder(settings.output_dir)
    check_nodes(grid, settings)

    begin = time.perf_counter()
    first = next(iter(models.values()))
    # Clients of several architectures start from what their strategy has made for all of them.
    arrays = None if isinstance(strategy, CLAFusion) else ArrayRecord(first.state_dict())
    result = strategy.start(
        grid,
        initial_arrays=arrays,  # type: ignore[arg-type]
        num_rounds=settings.num_server_rounds,
        evaluate_fn=evaluator(strategy, replies, first, test, settings.special_label),
    )
    seconds = {"federation": time.perf_counter() - begin}
    if not replies.contents:
        print("no client has trained in this run: there is nothing to compare", flush=True)
        return
    cla = isinstance(strategy, CLAFusion)
    methods = cla_methods(settings, models, test, calibration) if cla else None
    comparison = Comparison(replies.client_models(build), test, settings.special_label, methods)
    report = compare(settings, strategy, result, build, comparison, seconds)
    if isinstance(strategy, CLAFusion):
        report = replace(report, layers=matched_layers(strategy, settings.num_server_rounds))
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


def calibration_images(settings: Settings) -> Tensor | None:
    """Return the server's images, if it needs any."""
    needed = settings.strategy == "cla" or settings.distill_rounds
    if not needed or not settings.calibration:
        return None
    data = load_split(
        settings.dataset, train=True, data_dir=settings.data_dir, download=settings.download
    )
    generator = torch.Generator().manual_seed(settings.seed)
    return data.images[torch.randperm(len(data), generator=generator)[: settings.calibration]]


def evaluator(
    strategy: FedAvg,
    replies: LastReplies,
    model: nn.Module,
    test: LabelledImages,
    special_label: int,
) -> Callable[[int, ArrayRecord], MetricRecord]:
    """Return the function that evaluates the global model, in all architectures, every round.

    It stops a run in which no client has ever been successful.
    """

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round and not replies.contents and not is_resumed(strategy):
            raise RuntimeError(f"no client trained in round {server_round}{reasons_of(strategy)}")
        probabilities = class_probabilities(load_arrays(model, arrays), test.images)
        metrics = {
            "accuracy": accuracy(probabilities, test.labels),
            "special-label-accuracy": accuracy(probabilities, test.labels, special_label),
        }
        if isinstance(strategy, CLAFusion):
            for name, other in strategy.global_models().items():
                probabilities = class_probabilities(other, test.images)
                metrics[f"{IN_ARCHITECTURE}{name}"] = accuracy(probabilities, test.labels)
        return MetricRecord(metrics)  # type: ignore[arg-type]

    return evaluate


def is_resumed(strategy: FedAvg) -> bool:
    """Return whether a strategy goes on from a checkpoint, whose clients are not kept."""
    return isinstance(strategy, FusionStrategy) and strategy.resume


def reasons_of(strategy: FedAvg) -> str:
    """Return why the first reply was left out, as far as the strategy knows."""
    if not isinstance(strategy, FusionStrategy):
        return ": see the log above"
    found = [rejection.text for known in strategy.rejections.values() for rejection in known]
    return f"; the first reason: {found[0]}" if found else ""


def cla_methods(
    settings: Settings,
    models: Mapping[str, nn.Module],
    test: LabelledImages,
    calibration: Tensor | None,
) -> dict[str, Fuse]:
    """Return the fusion of the clients into each architecture, by name."""
    return {
        f"{METHOD_NAMES['cla']} {name}": partial(
            ff.cla_fusion,
            example_inputs=test.images[:2],
            target=model,
            calibration=calibration,
            repair="auto" if settings.repair == "auto" else "none",
        )
        for name, model in models.items()
    }


def matched_layers(strategy: CLAFusion, server_round: int) -> dict[str, ff.StageMatch]:
    """Return the layers that corresponded in the last round, for each pair of architectures."""
    nodes = strategy.fused_nodes.get(server_round, [])
    names = [strategy.node_architectures[node] for node in nodes]
    return {
        f"{names[layers.clients[0]]} in {target}": stage
        for target, report in strategy.architecture_reports.get(server_round, {}).items()
        for layers in report.layers
        for stage in layers.stages
        # Each pair once, seen from the deeper network.
        if stage.cost and len(stage.target_units) > len(stage.client_units)
    }


def load_arrays(model: nn.Module, arrays: ArrayRecord) -> nn.Module:
    """Load a Flower record into a model and return the model."""
    model.load_state_dict(arrays.to_torch_state_dict())
    return model


def compare(
    settings: Settings,
    strategy: FedAvg,
    result: Result,
    build: Build,
    comparison: Comparison,
    seconds: dict[str, float],
) -> Report:
    """Evaluate the last round's clients in every combination, and collect the report."""
    begin = time.perf_counter()
    rows = comparison.rows(fused_models(settings, strategy, result, build))
    sweep = comparison.sweep() if len(comparison.clients) == NODES_NEEDED else None
    seconds |= {"comparison": time.perf_counter() - begin}
    return Report(settings, rows, sweep, round_accuracies(result), seconds)


def fused_models(
    settings: Settings, strategy: FedAvg, result: Result, build: Build
) -> dict[str, nn.Module] | None:
    """Return the strategy's own models by the name of their method; None for FedAvg."""
    if settings.strategy == "fedavg":
        return None
    method = METHOD_NAMES[settings.strategy]
    rule = f", {settings.combine}" if settings.combines_by_least_squares else ""
    if settings.distill_rounds:
        rule += ", distilled"
    if isinstance(strategy, CLAFusion):
        models = strategy.global_models()
        return {f"{method} {name}{rule}": model for name, model in models.items()}
    return {method + rule: load_arrays(build(settings.models), result.arrays)}


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
