"""The server: runs the strategy, then compares the ways of using the clients' models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Result
from safetensors.torch import save_file
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.strategy import CLAFusion
from fusion_simulation.baseline import Baseline, run_baseline
from fusion_simulation.comparison import ClientModel, Compared, Comparison, over_seeds
from fusion_simulation.data import LabelledImages, load_split
from fusion_simulation.evaluation import (
    evaluator,
    load_arrays,
    models_to_send,
    round_accuracies,
)
from fusion_simulation.methods import fusion_methods, own_models, with_baseline
from fusion_simulation.nodes import NODES_NEEDED, check_nodes
from fusion_simulation.repetition import trained_clients
from fusion_simulation.report import Report, output_folder
from fusion_simulation.settings import Settings
from fusion_simulation.strategies import (
    LastReplies,
    architecture_names,
    build_strategy,
    checkpointed_models,
)
from fusion_simulation.task import build_model

Build = Callable[[str], nn.Module]

app = ServerApp()


@app.main()
def run(grid: Grid, context: Context) -> None:
    """Run the federation and report on it."""
    settings = Settings.from_run_config(context.run_config)
    test = load_split(
        settings.dataset, train=False, data_dir=settings.data_dir, download=settings.download
    )
    build = partial(
        build_model, dataset=settings.dataset, seed=settings.seed, data_dir=settings.data_dir
    )
    models = {name: build(name) for name in settings.architectures}
    replies = LastReplies()
    calibration = calibration_images(settings)
    strategy = build_strategy(settings, models, test.images[:2], calibration, replies)
    folder = output_folder(settings.output_dir)
    check_nodes(grid, settings)

    seconds: dict[str, float] = {}
    with timed(seconds, "federation"):
        result = run_strategy(grid, settings, strategy, replies, build, test)
    if not replies.contents:
        print("no client has trained in this run: there is nothing to compare", flush=True)
        return
    baseline = None
    if settings.runs_baseline:
        with timed(seconds, "baseline"):
            baseline = run_baseline(grid, settings, build, test)
    with timed(seconds, "comparison"):
        tables = compare_all(settings, strategy, result, replies, build, test, baseline)
    report = Report(
        settings,
        over_seeds(tables),
        round_accuracies(result),
        seconds,
        range(settings.seed, settings.seed + len(tables)),
        [] if baseline is None else baseline.rounds,
        matched_layers(strategy, settings.num_server_rounds),
    )
    report.show()
    report.save(folder)
    served = final_models(settings, strategy, result, build)
    trained = models_to_send(strategy, next(iter(served.values()))) if settings.head else {}
    save_models(folder, served, trained)


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Note the time of a part of the run."""
    begin = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - begin


def run_strategy(
    grid: Grid,
    settings: Settings,
    strategy: FedAvg,
    replies: LastReplies,
    build: Build,
    test: LabelledImages,
) -> Result:
    """Run the rounds."""
    first = build(settings.architectures[0])
    # Clients of several architectures start from what their strategy has made for all of them.
    arrays = None if isinstance(strategy, CLAFusion) else ArrayRecord(first.state_dict())
    replies.global_models = checkpointed_models(settings, strategy)
    return strategy.start(
        grid,
        initial_arrays=arrays,  # type: ignore[arg-type]
        num_rounds=settings.num_server_rounds,
        evaluate_fn=evaluator(strategy, replies, first, test, settings.special_label),
    )


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


def final_models(
    settings: Settings, strategy: FedAvg, result: Result, build: Build
) -> dict[str, nn.Module]:
    """Return the global model after the last round, by the strategy's names."""
    if isinstance(strategy, CLAFusion):
        return strategy.global_models()
    (name,) = architecture_names(strategy)
    return {name: load_arrays(build(settings.models), result.arrays)}


def save_models(
    folder: Path, served: Mapping[str, nn.Module], trained: Mapping[str, nn.Module]
) -> None:
    """Write the final models beside the table, and print where they are.

    Parameters
    ----------
    folder : pathlib.Path
        The run's folder.
    served : mapping of str to torch.nn.Module
        The global model in every architecture, with the calibrated head where there is one.
    trained : mapping of str to torch.nn.Module
        With a calibrated head: what clients would train from next.
    """
    for kind, models in (("model", served), ("model-as-trained", trained)):
        for name, model in models.items():
            path = folder / (
                f"{kind}-{name}.safetensors" if len(models) > 1 else f"{kind}.safetensors"
            )
            state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
            save_file(state, path)
            print(f"{kind}: {path}", flush=True)


def matched_layers(strategy: FedAvg, server_round: int) -> dict[str, ff.StageMatch]:
    """Return the layers that corresponded in the last round, for each pair of architectures."""
    if not isinstance(strategy, CLAFusion) or len(strategy.architectures) == 1:
        return {}
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


def compare_all(
    settings: Settings,
    strategy: FedAvg,
    result: Result,
    replies: LastReplies,
    build: Build,
    test: LabelledImages,
    baseline: Baseline | None,
) -> list[Compared]:
    """Compare the last round's clients, and the same clients with further seeds."""
    clients = replies.client_models(build)
    own = own_models(settings, strategy, final_models(settings, strategy, result, build))
    compared = compare(settings, strategy, clients, replies.sent, test, own, baseline)
    # A client that is missing in this run would be in the others' tables.
    seeds = settings.further_seeds if len(clients) == NODES_NEEDED else range(0)
    if seeds:
        print(f"the same with {len(seeds) + 1} seeds in all (repetitions)", flush=True)
    return [compared, *(repeat(replace(settings, seed=n), strategy, test) for n in seeds)]


def compare(
    settings: Settings,
    strategy: FedAvg,
    clients: Sequence[ClientModel],
    sent: Mapping[str, nn.Module],
    test: LabelledImages,
    own: Mapping[str, nn.Module],
    baseline: Baseline | None = None,
) -> Compared:
    """Evaluate a round's clients in every combination."""
    methods = fusion_methods(settings, strategy, clients, sent, test.images[:2])
    if baseline is not None:
        methods, own = with_baseline(baseline, clients, methods, own)
    return Comparison(clients, test, settings.special_label, methods).compared(own)


def repeat(settings: Settings, strategy: FedAvg, test: LabelledImages) -> Compared:
    """Return the table of round 1 with another seed, whose clients train in this process.

    Without the sweep over weights, which takes most of a comparison's time.
    """
    sent = build_model(settings.models, settings.dataset, settings.seed, data_dir=settings.data_dir)
    clients = trained_clients(settings, sent.state_dict(), NODES_NEEDED)
    models = dict.fromkeys(architecture_names(strategy), sent)
    methods = fusion_methods(settings, strategy, clients, models, test.images[:2])
    return Compared(Comparison(clients, test, settings.special_label, methods).rows(), None)
