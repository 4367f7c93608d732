"""The Flower App in simulations/: data, settings, report, and one real run of it."""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

import flwr_fusion as ff
from flwr_fusion.strategy import Distillation, FusionStrategy
from flwr_fusion.strategy.configured_method import ConfiguredMethod
from tests.conftest import SIMULATIONS
from tests.support.grid import InProcessGrid
from tests.support.services import free_ports, printed_by

sys.path.insert(0, str(SIMULATIONS))

from fusion_simulation import client_app, server_app
from fusion_simulation.comparison import (
    WEIGHTINGS,
    ClientModel,
    Compared,
    Comparison,
    Row,
    Sweep,
    over_seeds,
)
from fusion_simulation.data import (
    DATASETS,
    LabelledImages,
    check_label_skill,
    load_partition,
    load_raw_split,
    load_split,
    partition_indices,
)
from fusion_simulation.evaluation import RoundAccuracy, load_arrays
from fusion_simulation.methods import averaged, fused_by, fusion_methods, own_models
from fusion_simulation.repetition import trained_clients
from fusion_simulation.report import Report, output_folder
from fusion_simulation.settings import Settings, architecture
from fusion_simulation.strategies import STRATEGIES, LastReplies, build_strategy
from fusion_simulation.task import Recipe, accuracy, build_model, class_probabilities, train
from safetensors.torch import load_file

PNG = b"\x89PNG\r\n\x1a\n"
APP = tomllib.loads((SIMULATIONS / "pyproject.toml").read_text())
DEFAULTS: dict[str, Any] = APP["tool"]["flwr"]["app"]["config"]


def settings_of(**changes: Any) -> Settings:
    """Return the app's own defaults with changes; keys have underscores for hyphens."""
    changed = {key.replace("_", "-"): value for key, value in changes.items()}
    return Settings.from_run_config(DEFAULTS | changed)


# --- The app's pyproject.toml ---------------------------------------------------------------------


def test_app_does_not_make_flower_install_anything_else() -> None:
    assert APP["project"]["dependencies"] == []
    # `flwr run` rewrites the file of a user who has this table.
    assert "federations" not in APP["tool"]["flwr"]


def test_every_setting_has_a_default_and_is_read() -> None:
    assert settings_of().to_dict() == DEFAULTS


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("dataset", "imagenet", list(DATASETS)),
        ("partition", "pathological", ["label-skill", "dirichlet", "iid"]),
        ("models", "vgg", ["mlp", "lenet", "mlp-64-32"]),
        ("models", "mlp-64-x", ["mlp", "lenet"]),
        ("models", "mlp-0", ["mlp", "lenet"]),
        ("special_label", 10, ["0", "9"]),
        ("special_label", -1, ["0", "9"]),
        ("head", "replace", ["serve", "send"]),
    ],
)
def test_unknown_values_are_refused_with_the_allowed_ones(
    key: str, value: Any, allowed: list[str]
) -> None:
    with pytest.raises(ValueError, match=key.replace("_", "-")) as refusal:
        settings_of(**{key: value})
    assert str(value) in str(refusal.value)
    for choice in allowed:
        assert choice in str(refusal.value)


@pytest.mark.parametrize(("key", "value"), [("strategy", "fedsgd"), ("combine", "stack")])
def test_unknown_strategies_are_refused_with_the_allowed_ones(key: str, value: str) -> None:
    models = {"mlp-8": build_model("mlp-8", "digits", 0)}
    with pytest.raises(ValueError, match=f"{key}='{value}'") as refusal:
        build_strategy(settings_of(**{key: value}), models, torch.zeros(2, 1, 8, 8))
    for choice in STRATEGIES if key == "strategy" else ["mean"]:
        assert choice in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha", 0.0),
        ("learning_rate", -0.1),
        ("local_epochs", 0),
        ("batch_size", 0),
        ("num_server_rounds", 0),
        ("momentum", 1.0),
        ("combine_rounds", -1),
        ("proximal_mu", -0.1),
        ("distill_rounds", -1),
        ("repetitions", 0),
        ("seed", -1),
        ("data_dir", "relative/path"),
        ("output_dir", "results"),
        ("alpha", "0.5"),
        ("shared_start", 1),
        ("local_epochs", 1.5),
        ("local_epochs", True),
    ],
)
def test_bad_values_are_refused_by_key(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key.replace("_", "-")):
        settings_of(**{key: value})


@pytest.mark.parametrize("name", ["ot", "nt", "cla"])
def test_distillation_is_a_step_of_the_strategies(name: str) -> None:
    models = {"mlp-8": build_model("mlp-8", "digits", 0)}
    chosen = settings_of(strategy=name, distill_rounds=2)
    images = torch.randn(20, 1, 8, 8)
    strategy = build_strategy(chosen, models, images[:2], images)
    assert isinstance(strategy, FusionStrategy)
    assert isinstance(strategy.refine, Distillation)
    assert list(strategy.refine.rounds) == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"strategy": "fedavg"}, "it distils nothing"), ({"calibration": 0}, "needs calibration")],
)
def test_distillation_needs_a_strategy_and_images(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(distill_rounds=1, **changes)


def test_least_squares_need_the_clients_statistics() -> None:
    with pytest.raises(ValueError, match=r"combine='least-squares'.*statistics=true.*'auto'"):
        settings_of(combine="least-squares", statistics=False)
    assert not settings_of(combine="auto", statistics=False).sends_statistics


@pytest.mark.parametrize(
    ("strategy", "combine", "sent"),
    [
        ("ot", "auto", True),
        ("cla", "least-squares", True),
        ("ot", "mean", False),
        ("cla", "median", False),
        ("nt", "auto", False),
        ("fedavg", "auto", False),
    ],
)
def test_statistics_are_sent_to_strategies_that_take_them(
    strategy: str, combine: str, sent: bool
) -> None:
    assert settings_of(strategy=strategy, combine=combine).sends_statistics == sent


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "nt"])
def test_a_calibrated_head_is_for_strategies_with_a_rule(strategy: str) -> None:
    with pytest.raises(ValueError, match=rf"head='serve'.*ot and cla.*'{strategy}'"):
        settings_of(strategy=strategy, head="serve")


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": "mnist"},
        {"models": "lenet"},
        {"models": "mlp-3,mlp-4", "strategy": "cla"},
        {"num_server_rounds": 2},
        {"partition": "iid"},
        {"distill_rounds": 1},
        {"head": "serve"},
        {"repetitions": 1},
    ],
)
def test_only_what_takes_seconds_is_repeated(changes: Any) -> None:
    assert list(settings_of(seed=3).further_seeds) == [4, 5]
    assert not settings_of(**changes).further_seeds


@pytest.mark.parametrize(
    "changes",
    [
        {"num_server_rounds": 1},
        {"baseline": False},
        {"strategy": "fedavg"},
        {"strategy": "fedprox"},
        {"models": "mlp-3,mlp-4", "strategy": "cla"},
    ],
)
def test_baseline_is_run_where_there_is_something_to_compare(changes: Any) -> None:
    assert settings_of(num_server_rounds=3).runs_baseline
    assert not settings_of(**({"num_server_rounds": 3} | changes)).runs_baseline


def test_unknown_keys_are_refused_with_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match=r"local-epoch;.*local-epochs"):
        settings_of(local_epoch=1)


def test_architecture() -> None:
    assert architecture("mlp") == ("mlp", (400, 200, 100))
    assert architecture("mlp-4") == ("mlp", (400, 200, 100, 50))
    assert architecture("mlp-64-32") == ("mlp", (64, 32))
    assert architecture("lenet") == ("lenet", ())
    assert architecture("resnet-8") == ("resnet", (8, 1))
    assert architecture("resnet-20-4") == ("resnet", (20, 4))
    assert architecture("resnet-18") == ("resnet", (18, 1))
    assert architecture("vgg-13-8") == ("vgg", (13, 8))
    assert architecture("vgg-11") == ("vgg", (11, 64))


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_can_be_built(name: str) -> None:
    models = {"mlp-8": build_model("mlp-8", "digits", 0)}
    strategy = build_strategy(settings_of(strategy=name), models, torch.zeros(2, 1, 8, 8))
    assert strategy.fraction_evaluate == 0


# --- Data and partitions --------------------------------------------------------------------------


def labels_of(dataset: str = "digits") -> np.ndarray:
    return load_raw_split(dataset, train=True).labels.numpy()


def test_digits_are_split_and_normalised() -> None:
    train, test = (load_split("digits", train=part) for part in (True, False))
    assert len(train) + len(test) == 1797
    assert train.images.shape[1:] == (1, 8, 8)
    assert abs(float(train.images.mean())) < 0.02
    assert float(train.images.std()) == pytest.approx(1, abs=0.02)
    known = {tuple(image.tolist()) for image in train.images.flatten(1)}
    assert not known & {tuple(image.tolist()) for image in test.images.flatten(1)}


@pytest.mark.parametrize("partitions", [2, 3, 7])
@pytest.mark.parametrize("partition", ["dirichlet", "iid"])
def test_every_image_belongs_to_one_client(partition: str, partitions: int) -> None:
    labels = labels_of()
    shares = partition_indices(labels, settings_of(partition=partition), partitions)
    assert len(shares) == partitions
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(labels)))


@pytest.mark.parametrize("special", [0, 4, 9])
def test_label_skill(special: int) -> None:
    labels = labels_of()
    first, second = partition_indices(labels, settings_of(special_label=special), 2)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(len(labels)))
    for label in range(10):
        total = int((labels == label).sum())
        with_first = int((labels[first] == label).sum())
        assert with_first == (total if label == special else round(0.1 * total))
    assert special not in labels[second]


@pytest.mark.parametrize("partitions", [1, 3])
def test_label_skill_is_for_two_clients(partitions: int) -> None:
    with pytest.raises(ValueError, match=rf"exactly 2 nodes, got {partitions}"):
        partition_indices(labels_of(), settings_of(), partitions)
    with pytest.raises(ValueError, match='--federation-config "num-supernodes=2"'):
        check_label_skill(partitions)


@pytest.mark.parametrize("partition", ["label-skill", "dirichlet", "iid"])
def test_partitions_depend_on_the_seed_alone(partition: str) -> None:
    labels = labels_of()
    shares = [
        partition_indices(labels, settings_of(partition=partition, seed=seed), 2)
        for seed in (3, 3, 4)
    ]
    for one, other in zip(shares[0], shares[1], strict=True):
        assert np.array_equal(one, other)
    assert not all(np.array_equal(a, b) for a, b in zip(shares[0], shares[2], strict=True))


def test_small_alpha_is_more_skewed() -> None:
    labels = labels_of()

    def largest_share(alpha: float) -> float:
        shares = partition_indices(labels, settings_of(partition="dirichlet", alpha=alpha), 4)
        counts = np.array([np.bincount(labels[share], minlength=10) for share in shares])
        return float((counts.max(0) / counts.sum(0)).mean())

    assert largest_share(100.0) < 0.4
    assert largest_share(0.1) > 0.6


def test_impossible_dirichlet_partition_is_refused() -> None:
    settings = settings_of(partition="dirichlet", alpha=0.01)
    with pytest.raises(ValueError, match=r"alpha=0\.01.*20 clients"):
        partition_indices(labels_of()[:150], settings, 20)


def test_client_loads_its_own_share() -> None:
    settings = settings_of(partition="iid")
    shares = partition_indices(labels_of(), settings, 3)
    whole = load_split("digits", train=True)
    for number, share in enumerate(shares):
        own = load_partition(settings, number, 3)
        assert torch.equal(own.images, whole.images[torch.from_numpy(share)])
        assert torch.equal(own.labels, whole.labels[torch.from_numpy(share)])


@pytest.mark.parametrize("dataset", ["mnist", "fashion-mnist", "cifar10"])
def test_missing_data_are_reported_with_the_way_out(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data-dir.*download=true"):
        load_raw_split(dataset, train=True)
    with pytest.raises(FileNotFoundError, match=rf"{dataset}.*download=true"):
        load_raw_split(dataset, train=True, data_dir=str(tmp_path))


def test_mnist(mnist_dir: Path) -> None:
    train = load_raw_split("mnist", train=True, data_dir=str(mnist_dir))
    assert train.images.shape == (60000, 1, 28, 28)
    test = load_split("mnist", train=False, data_dir=str(mnist_dir))
    assert abs(float(test.images.mean())) < 0.02


def test_cifar_folder_with_missing_batches(cifar_dir: Path) -> None:
    folder = cifar_dir / "cifar-10-batches-py"
    batches = [n for n in range(1, 6) if (folder / f"data_batch_{n}").is_file()]
    train = load_raw_split("cifar10", train=True, data_dir=str(cifar_dir))
    assert train.images.shape == (10000 * len(batches), 3, 32, 32)
    assert len(train.labels) == 10000 * len(batches)
    with (folder / f"data_batch_{batches[0]}").open("rb") as file:
        first = pickle.load(file, encoding="latin1")
    assert train.labels[:100].tolist() == first["labels"][:100]
    assert torch.equal(
        train.images[0], torch.as_tensor(first["data"][0].reshape(3, 32, 32), dtype=torch.uint8)
    )
    whole = load_split("cifar10", train=True, data_dir=str(cifar_dir))
    assert whole.images.mean((0, 2, 3)).abs().max() < 0.05


def test_cifar_folder_with_one_batch(cifar_dir: Path, tmp_path: Path) -> None:
    source, folder = (d / "cifar-10-batches-py" for d in (cifar_dir, tmp_path))
    folder.mkdir()
    present = sorted(source.glob("data_batch_*"))[-1]
    for path in (present, source / "test_batch", source / "batches.meta"):
        (folder / path.name).symlink_to(path)
    train = load_raw_split("cifar10", train=True, data_dir=str(tmp_path))
    assert len(train) == 10000


# --- Comparison and report ------------------------------------------------------------------------


def small_comparison() -> Comparison:
    test = load_split("digits", train=False)
    clients = [
        ClientModel(f"Client {'AB'[number]}", build_model("mlp-8-6", "digits", number), examples)
        for number, examples in enumerate((100, 300))
    ]
    few = LabelledImages(test.images[:50], test.labels[:50])
    ot_fusion = ConfiguredMethod(ff.ot_fusion, {"example_inputs": few.images[:2]})
    methods = {"FedAvg": averaged(clients), "OT fusion": fused_by(ot_fusion, clients)}
    return Comparison(clients, few, 4, methods)


def test_comparison_has_a_row_for_every_way() -> None:
    comparison = small_comparison()
    rows = comparison.rows()
    assert [(row.name, row.weights) for row in rows] == [
        ("Client A", "100 images"),
        ("Client B", "300 images"),
        ("FedAvg", "by images"),
        ("OT fusion", "by images"),
        ("Ensemble", "by images"),
        ("FedAvg", "equal"),
        ("OT fusion", "equal"),
        ("Ensemble", "equal"),
    ]
    assert all(0 <= row.accuracy <= 1 for row in rows)
    sweep = comparison.sweep()
    assert sweep.by_images == 0.25
    assert sweep.weights == pytest.approx([n / 10 for n in range(11)])
    # At the ends every way is one client alone.
    for values in sweep.accuracies.values():
        assert values[0] == pytest.approx(rows[1].accuracy)
        assert values[-1] == pytest.approx(rows[0].accuracy)


def test_own_models_take_the_place_of_methods_or_are_added() -> None:
    comparison = small_comparison()
    client = comparison.clients[0].model
    rows = comparison.rows({"OT fusion": client, "OT fusion, distilled": client})
    assert [row.name for row in rows if row.weights == "by images"] == [
        "FedAvg",
        "OT fusion",
        "OT fusion, distilled",
        "Ensemble",
    ]
    assert rows[3].accuracy == rows[4].accuracy == rows[0].accuracy
    assert "OT fusion, distilled" not in [row.name for row in rows if row.weights == "equal"]


def test_figures_over_seeds() -> None:
    tables = [
        Compared(
            [Row("FedAvg", "equal", accuracy, 1.0)],
            Sweep((0.0, 1.0), 0.25, {"FedAvg": (accuracy, 0.5)}),
        )
        for accuracy in (0.2, 0.4, 0.6)
    ]
    found = over_seeds(tables)
    (row,) = found.rows
    assert (row.name, row.weights) == ("FedAvg", "equal")
    assert row.accuracy == pytest.approx(0.4)
    assert row.deviation == pytest.approx(0.2)
    assert (row.special_label_accuracy, row.special_label_deviation) == (1.0, 0.0)
    assert found.sweep == tables[0].sweep
    assert over_seeds(tables[:1]) == tables[0]


def small_report(rounds: int, seeds: int = 1) -> Report:
    accuracies: dict[str, tuple[float, ...]] = {
        "FedAvg": (0.5, 0.2, 0.7),
        "OT fusion": (0.5, 0.6, 0.7),
    }
    deviation = (0.015, 0.0) if seeds > 1 else ()
    history = [RoundAccuracy(k, 0.1 * k, 0.0) for k in range(rounds + 1)]
    return Report(
        replace(settings_of(), num_server_rounds=rounds),
        Compared(
            [
                Row("Client A", "100 images", 0.5, 1.0, *deviation),
                Row("Client B", "300 images", 0.75, 0.0, *deviation),
                Row("FedAvg", "by images", 0.75, 0.0, *deviation),
            ],
            Sweep((0.0, 0.5, 1.0), 0.25, accuracies),
        ),
        history,
        {"federation": 1.5},
        range(seeds),
        history if rounds > 1 else [],
    )


@pytest.mark.parametrize(("rounds", "seeds"), [(1, 1), (1, 5), (3, 1)])
def test_report_is_written(
    rounds: int, seeds: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = small_report(rounds, seeds)
    report.save(tmp_path)
    expected = {"table.md", "metrics.json", "weights.png"} | (
        {"rounds.png"} if rounds > 1 else set()
    )
    assert {path.name for path in tmp_path.iterdir()} == expected
    printed = capsys.readouterr().out
    for name in expected:
        assert str(tmp_path / name) in printed
        if name.endswith(".png"):
            content = (tmp_path / name).read_bytes()
            assert content.startswith(PNG)
            assert len(content) > 5000
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["config"] == settings_of(num_server_rounds=rounds).to_dict()
    assert [entry["server_round"] for entry in metrics["rounds"]] == list(range(rounds + 1))
    assert metrics["baseline"] == (metrics["rounds"] if rounds > 1 else [])
    assert metrics["seeds"] == list(range(seeds))
    assert metrics["table"][1]["accuracy"] == 0.75
    swept = metrics["sweep-over-weight-of-client-A"]["accuracies"]
    assert swept["OT fusion"] == [0.5, 0.6, 0.7]
    row = "75.00 ± 1.50 | 0.00 ± 0.00" if seeds > 1 else "75.00 | 0.00"
    assert f"| Client B | 300 images | {row} |" in (tmp_path / "table.md").read_text()


def axes_of(report: Report, name: str) -> Any:
    """Return the axes of a plot as it would be saved."""
    assert report.compared.sweep is not None
    figure = (
        report._sweep_figure(report.compared.sweep)
        if name == "weights"
        else report._rounds_figure()
    )
    return figure.axes[0]


def test_plot_over_weights_shows_the_scale_and_the_run() -> None:
    axes = axes_of(small_report(1), "weights")
    assert axes.get_ylim() == (0, 101)
    assert [text.get_text().strip() for text in axes.texts] == ["by images"]
    assert [0.25, 0.25] in [list(line.get_xdata()) for line in axes.lines]


def test_plot_over_rounds_has_the_baseline() -> None:
    labels = [line.get_label() for line in axes_of(small_report(3), "rounds").lines]
    assert labels == ["strategy ot", "strategy ot, label 4", "FedAvg", "FedAvg, label 4"]
    without = replace(small_report(3), baseline=[])
    labels = [line.get_label() for line in axes_of(without, "rounds").lines]
    assert labels == ["strategy ot", "strategy ot, label 4"]


@pytest.mark.parametrize("clients", [6, 9])
def test_many_clients_are_shown_by_their_quartiles(clients: int) -> None:
    rows = [Row(f"Client {k}", "10 images", 0.1 * k, 1 - 0.1 * k) for k in range(clients)]
    fused = Row("FedAvg", "by images", 0.9, 0.9)
    report = replace(small_report(1), compared=Compared([*rows, fused], None))
    shown = report.shown_rows()
    assert shown[-1] == fused
    if clients == 6:
        assert shown == [*rows, fused]
        return
    assert [row.name for row in shown[:-1]] == [
        f"Clients, {name}"
        for name in ("lowest", "lower quartile", "median", "upper quartile", "highest")
    ]
    assert [row.accuracy for row in shown[:-1]] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    # Of each column on its own.
    assert [row.special_label_accuracy for row in shown[:-1]] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1]
    )
    assert len(report.to_dict()["table"]) == clients + 1


def test_table_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    small_report(1).show()
    printed = capsys.readouterr().out
    assert "Client A" in printed
    assert "75.00" in printed
    assert "on label 4 %" in printed


def test_caption_says_what_the_figures_are_of() -> None:
    assert "FedAvg is a federation of its own" in small_report(3).caption
    assert "Mean ± standard deviation of 5 seeds, 0 to 4;" in small_report(1, seeds=5).caption
    assert "Mean" not in small_report(1).caption


def test_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert output_folder(str(tmp_path / "new" / "one")) == (tmp_path / "new" / "one").resolve()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output_folder("").parent == (tmp_path / "flwr_fusion_runs").resolve()


def test_models_depend_on_the_seed_alone() -> None:
    def first(model: torch.nn.Module) -> Tensor:
        return next(model.parameters())

    state = torch.random.get_rng_state()
    one, two, other = (build_model("lenet", "digits", seed) for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first(one), first(two))
    assert not torch.equal(first(one), first(other))
    assert one(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_fedprox_keeps_networks_nearer_to_their_start() -> None:
    data = load_split("digits", train=True)

    def distance(proximal_mu: float) -> float:
        model = build_model("mlp-16", "digits", 0)
        start = [parameter.detach().clone() for parameter in model.parameters()]
        train(model, data, Recipe(1, 0.05, 0.5, 32, proximal_mu), seed=0)
        gaps = zip(model.parameters(), start, strict=True)
        return float(sum((now - then).square().sum() for now, then in gaps))

    assert distance(1.0) < 0.8 * distance(0.0)


# --- A real run -----------------------------------------------------------------------------------


class LocalFlower:
    """The flwr command with a home, ports and a SuperLink of its own."""

    def __init__(self, folder: Path) -> None:
        home, self.folder = folder / "flwr-home", folder / "neutral"
        home.mkdir()
        self.folder.mkdir()
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = ":local-in-memory:"\n'
        )
        ports = free_ports(2)
        self.port = ports[0]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        self.environment = os.environ | {
            "PATH": path,
            "FLWR_HOME": str(home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(ports[0]),
            "FLWR_LOCAL_CONTROL_API_PORT": str(ports[1]),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }

    def __call__(self, *arguments: str) -> str:
        return printed_by(["flwr", *arguments], self.folder, self.environment)

    def json(self, *arguments: str) -> Any:
        printed = self(*arguments, "--format", "json")
        return json.loads(printed[printed.index("{") :])

    def stop(self) -> None:
        """End the SuperLink on this port, and no other process."""
        for pid in self._superlinks():
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 30
        while left := self._superlinks():
            if time.monotonic() > deadline:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.2)

    def _superlinks(self) -> list[int]:
        listed = subprocess.run(
            ["ps", "-A", "-ww", "-o", "pid=,stat=,args="],
            capture_output=True,
            text=True,
            check=True,
        )
        return [
            int(line.split()[0])
            for line in listed.stdout.splitlines()
            if "flower-superlink" in line
            and f"--port {self.port} " in f"{line} "
            and not line.split()[1].startswith("Z")
        ]


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[LocalFlower]:
    started = LocalFlower(tmp_path)
    try:
        yield started
    finally:
        started.stop()


@pytest.mark.timeout(1200)
def test_flwr_run(flower: LocalFlower, tmp_path: Path) -> None:
    results = tmp_path / "results"
    config = f'local-epochs=5 models="mlp-64-32" num-server-rounds=2 output-dir="{results}"'
    app = os.path.relpath(SIMULATIONS, flower.folder)
    started = flower.json("run", app, "--run-config", config)
    assert started["success"], started
    run_id = str(started["run-id"])
    log = flower("log", run_id, "--stream")
    listed = flower.json("list", "--run-id", run_id)
    assert listed["runs"][0]["status"] == "finished:completed", log

    # A run in which every client failed is also completed: what counts is the accuracy.
    metrics = json.loads((results / "metrics.json").read_text())
    assert metrics["config"] == DEFAULTS | {
        "local-epochs": 5,
        "models": "mlp-64-32",
        "num-server-rounds": 2,
        "output-dir": str(results),
    }
    accuracies = [entry["accuracy"] for entry in metrics["rounds"]]
    assert len(accuracies) == 3
    assert accuracies[0] < 0.3
    assert accuracies[2] > 0.8
    table = accuracies_in(metrics)
    assert table["OT fusion, auto", "by images"] == pytest.approx(accuracies[2])
    assert table["FedAvg", "by images"] == pytest.approx(metrics["baseline"][2]["accuracy"])
    for name in ("table.md", "weights.png", "rounds.png"):
        assert (results / name).stat().st_size > 0
        assert str(results / name) in log
    # Nothing is left in the user's working directory, nor in the app.
    assert list(flower.folder.iterdir()) == []


# --- Runs in process ------------------------------------------------------------------------------


def run_in_process(folder: Path, grid: InProcessGrid, **changes: Any) -> dict[str, Any]:
    """Run the app on small networks, and return its metrics."""
    small = {"models": "mlp-32-16", "local_epochs": 3, "repetitions": 1}
    config = settings_of(**(small | {"output_dir": str(folder)} | changes)).to_dict()
    for context in grid.contexts:
        context.run_config = config
    server_app.run(grid, Context(1, 0, {}, RecordDict(), config))
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return metrics


def accuracies_in(metrics: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(row["name"], row["weights"]): row["accuracy"] for row in metrics["table"]}


def without_an_array(partition: int, reply: Message) -> list[Message]:
    """Damage the second client's reply."""
    if partition == 1:
        arrays = reply.content.array_records["arrays"]
        del arrays[next(iter(arrays))]
    return [reply]


def test_default_run_keeps_what_one_client_knows(tmp_path: Path) -> None:
    grid = InProcessGrid(client_app.app, 2)
    metrics = run_in_process(tmp_path, grid, local_epochs=20, models="mlp-64-32", repetitions=2)
    rows = {(row["name"], row["weights"]): row for row in metrics["table"]}
    names = ["FedAvg", "OT fusion by the mean", "OT fusion, auto", "Ensemble"]
    assert list(rows)[2:] == [(name, block) for block in WEIGHTINGS for name in names]
    assert metrics["seeds"] == [0, 1]
    for block in WEIGHTINGS:
        fused, average = rows["OT fusion, auto", block], rows["FedAvg", block]
        assert fused["accuracy"] > average["accuracy"] + 0.05
        assert fused["special_label_accuracy"] > 0.6
        assert fused["deviation"] >= 0
    assert list(metrics["sweep-over-weight-of-client-A"]["accuracies"]) == names
    assert metrics["baseline"] == []
    assert len(grid.partitions_asked("train")) == 2


def test_repetitions_train_as_the_client_app_does() -> None:
    settings = settings_of(models="mlp-16", local_epochs=1, seed=3)
    model = build_model("mlp-16", "digits", 3)
    grid = InProcessGrid(client_app.app, 2)
    for context in grid.contexts:
        context.run_config = settings.to_dict()
    replies = LastReplies()
    strategy = build_strategy(settings, {"mlp-16": model}, torch.zeros(2, 1, 8, 8), replies=replies)
    strategy.start(grid, ArrayRecord(model.state_dict()), 1)
    sent = replies.client_models(lambda name: build_model(name, "digits", 0))
    for theirs, ours in zip(sent, trained_clients(settings, model.state_dict(), 2), strict=True):
        assert (theirs.name, theirs.examples) == (ours.name, ours.examples)
        for one, other in zip(theirs.model.parameters(), ours.model.parameters(), strict=True):
            assert torch.equal(one, other)
        assert theirs.statistics is not None
        assert ours.statistics is not None
        for name, layer in ours.statistics.items():
            assert layer.second is not None
            found = theirs.statistics[name].second
            assert found is not None
            torch.testing.assert_close(found, layer.second)


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "ot"},
        {"strategy": "ot", "statistics": False, "num_server_rounds": 2},
        {"strategy": "ot", "num_server_rounds": 2, "combine_rounds": 1},
        {"strategy": "cla", "models": "mlp-12-8,mlp-12-10-8", "num_server_rounds": 2},
        {"strategy": "ot", "statistics": False, "num_server_rounds": 2, "head": "serve"},
        {"strategy": "nt"},
    ],
    ids=str,
)
def test_the_method_of_the_table_is_the_strategys(changes: Any) -> None:
    # By it the block of equal weights and the points of the sweep are computed.
    settings = settings_of(**({"models": "mlp-16-12", "local_epochs": 2} | changes))
    models = {name: build_model(name, "digits", 0) for name in settings.architectures}
    test = load_split("digits", train=False)
    grid = InProcessGrid(client_app.app, 2)
    for context in grid.contexts:
        context.run_config = settings.to_dict()
    replies = LastReplies()
    calibration = server_app.calibration_images(settings)
    strategy = build_strategy(settings, models, test.images[:2], calibration, replies)
    assert isinstance(strategy, FusionStrategy)
    build = partial(build_model, dataset="digits", seed=0)
    server_app.run_strategy(grid, settings, strategy, replies, build, test)

    clients = replies.client_models(build)
    methods = fusion_methods(settings, strategy, clients, replies.sent, test.images[:2])
    weights = [float(client.examples) for client in clients]
    # Without the calibrated head, which is no part of the method.
    networks = {
        name: load_arrays(copy.deepcopy(strategy.architectures[name]), arrays)
        for name, arrays in strategy.arrays.items()
    }
    own = own_models(replace(settings, head=""), strategy, networks)
    assert own.keys() <= methods.keys()
    for name, model in own.items():
        ours = methods[name](weights)
        for one, other in zip(ours.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_bad_statistics_are_left_out_of_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    model = build_model("mlp-8", "digits", 0)
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": 3}),
            "client": ConfigRecord({"name": "Client A", "model": "mlp-8"}),
            "statistics": ConfigRecord({"safetensors": b"nothing"}),
        }
    )
    replies = LastReplies()
    replies([content], "num-examples")
    (client,) = replies.client_models(lambda name: build_model(name, "digits", 0))
    assert client.statistics is None
    assert "statistics are not in the report" in capsys.readouterr().out


def test_baseline_is_the_federation_of_fedavg(tmp_path: Path) -> None:
    sent: list[bool] = []

    def note(partition: int, reply: Message) -> list[Message]:
        sent.append("statistics" in reply.content.config_records)
        return [reply]

    metrics = run_in_process(
        tmp_path / "ot", InProcessGrid(client_app.app, 2, mutate=note), num_server_rounds=2
    )
    assert sent == [True] * 4 + [False] * 4
    alone = run_in_process(
        tmp_path / "fedavg",
        InProcessGrid(client_app.app, 2),
        num_server_rounds=2,
        strategy="fedavg",
    )
    assert metrics["baseline"] == alone["rounds"]
    assert alone["baseline"] == []
    table, expected = accuracies_in(metrics), accuracies_in(alone)
    for block in WEIGHTINGS:
        assert table["FedAvg", block] == pytest.approx(expected["FedAvg", block])
    assert table["FedAvg", "by images"] == metrics["baseline"][2]["accuracy"]
    assert table["OT fusion, auto", "by images"] == metrics["rounds"][2]["accuracy"]


def test_report_survives_what_fedavg_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = InProcessGrid(client_app.app, 2, mutate=without_an_array)
    metrics = run_in_process(tmp_path, grid, num_server_rounds=2)
    assert metrics["baseline"] == []
    assert "no baseline: FedAvg has failed" in capsys.readouterr().out
    assert len(metrics["rounds"]) == 3


def test_resumed_run_runs_the_whole_baseline(tmp_path: Path) -> None:
    checkpoints = str(tmp_path / "checkpoints")
    rounds = {"checkpoint_dir": checkpoints, "statistics": False}
    run_in_process(tmp_path / "one", InProcessGrid(client_app.app, 2), **rounds)
    resumed = run_in_process(
        tmp_path / "two",
        InProcessGrid(client_app.app, 2),
        resume=True,
        num_server_rounds=2,
        **rounds,
    )
    whole = run_in_process(
        tmp_path / "whole",
        InProcessGrid(client_app.app, 2),
        num_server_rounds=2,
        statistics=False,
    )
    for part in ("rounds", "baseline"):
        assert resumed[part] == whole[part]
    # The rule needs the model that was sent, which here is the checkpoint's.
    assert accuracies_in(resumed) == pytest.approx(accuracies_in(whole))


@pytest.mark.parametrize("name", ["ot", "cla"])
@pytest.mark.parametrize("head", ["serve", "send"])
def test_strategies_are_given_the_head(name: str, head: str) -> None:
    models = {"mlp-8": build_model("mlp-8", "digits", 0)}
    strategy = build_strategy(
        settings_of(strategy=name, head=head), models, torch.zeros(2, 1, 8, 8)
    )
    assert isinstance(strategy, FusionStrategy)
    assert strategy.head == head
    assert strategy.fraction_evaluate == 1


@pytest.mark.parametrize("head", ["serve", "send"])
def test_model_with_a_calibrated_head_is_beside_the_fused_one(head: str, tmp_path: Path) -> None:
    grid = InProcessGrid(client_app.app, 2)
    metrics = run_in_process(tmp_path, grid, head=head, num_server_rounds=2)
    table = accuracies_in(metrics)
    calibrated = table["OT fusion, auto, calibrated head", "by images"]
    assert calibrated == metrics["rounds"][2]["accuracy"]
    assert calibrated > table["FedAvg", "by images"]
    assert ("OT fusion, auto", "by images") in table
    assert len(grid.partitions_asked("evaluate")) == 4


def test_clients_evaluate_for_a_calibrated_head() -> None:
    settings = settings_of(models="mlp-8", head="serve")
    model = build_model("mlp-8", "digits", 0)
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "config": ConfigRecord()})
    for head, records in (("", ["metrics"]), ("serve", ["metrics", "class-moments"])):
        grid = InProcessGrid(client_app.app, 2)
        for context in grid.contexts:
            context.run_config = replace(settings, head=head).to_dict()
        message = Message(content, dst_node_id=grid.node_ids[0], message_type="evaluate")
        (reply,) = grid.send_and_receive([message])
        assert not reply.has_error()
        assert list(reply.content) == records
        metrics = reply.content.metric_records["metrics"]
        assert metrics["num-examples"] == len(load_partition(settings, 0, 2))
        assert 0 <= float(metrics["eval-accuracy"]) <= 1  # type: ignore[arg-type]
        assert float(metrics["eval-loss"]) > 0  # type: ignore[arg-type]


def test_clients_of_different_architectures(tmp_path: Path) -> None:
    metrics = run_in_process(
        tmp_path,
        InProcessGrid(client_app.app, 2),
        strategy="cla",
        models="mlp-24-16,mlp-24-18-16",
        local_epochs=5,
        num_server_rounds=2,
    )
    rounds = [entry["by_architecture"] for entry in metrics["rounds"]]
    assert len(rounds) == 3
    assert all(found > 0.7 for found in rounds[2].values())
    table = accuracies_in(metrics)
    for name in ("mlp-24-16", "mlp-24-18-16"):
        assert table[f"CLA fusion to {name}, auto", "by images"] == pytest.approx(rounds[2][name])
        assert (
            f"CLA fusion to {name}, auto" in metrics["sweep-over-weight-of-client-A"]["accuracies"]
        )
    (layers,) = metrics["layers"].values()
    assert layers["pairs"] == [[0, 0], [1, 2]]
    assert list(metrics["layers"]) == ["mlp-24-16 in mlp-24-18-16"]
    assert metrics["baseline"] == []
    for name in ("layers.png", "rounds.png", "weights.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_cla_with_one_architecture_is_compared_with_fedavg(tmp_path: Path) -> None:
    grid = InProcessGrid(client_app.app, 2)
    metrics = run_in_process(tmp_path, grid, strategy="cla", num_server_rounds=2)
    table = accuracies_in(metrics)
    assert table["FedAvg", "by images"] == metrics["baseline"][2]["accuracy"]
    assert ("CLA fusion to mlp-32-16, auto", "equal") in table
    assert metrics["layers"] == {}


def test_several_models_need_the_strategy_for_them() -> None:
    with pytest.raises(ValueError, match=r"models='mlp-3,mlp-4'.*strategy='cla'"):
        settings_of(models="mlp-3,mlp-4")
    settings = settings_of(models="mlp-3,mlp-4", strategy="cla")
    assert [settings.model_of(k) for k in range(3)] == ["mlp-3", "mlp-4", "mlp-3"]


@pytest.mark.parametrize("head", ["", "serve"])
def test_the_final_model_is_saved(head: str, tmp_path: Path) -> None:
    grid = InProcessGrid(client_app.app, 2)
    metrics = run_in_process(tmp_path, grid, head=head, num_server_rounds=2, baseline=False)
    model = build_model("mlp-32-16", "digits", 0)
    test = load_split("digits", train=False)

    def score(name: str) -> float:
        model.load_state_dict(load_file(tmp_path / name))
        return accuracy(class_probabilities(model, test.images), test.labels)

    assert score("model.safetensors") == pytest.approx(metrics["rounds"][-1]["accuracy"])
    assert (tmp_path / "model-as-trained.safetensors").exists() == bool(head)


def test_final_models_of_several_architectures_are_saved(tmp_path: Path) -> None:
    grid = InProcessGrid(client_app.app, 2)
    run_in_process(tmp_path, grid, strategy="cla", models="mlp-16,mlp-16-12")
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == ["model-mlp-16-12.safetensors", "model-mlp-16.safetensors"]
