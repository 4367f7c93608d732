"""The Flower App in simulations/: data, settings, report, and one real run of it."""

from __future__ import annotations

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
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from torch import Tensor

from flwr_fusion.strategy import Distillation, FusionStrategy
from tests.conftest import SIMULATIONS
from tests.support.grid import InProcessGrid
from tests.support.services import free_ports, printed_by

sys.path.insert(0, str(SIMULATIONS))

from fusion_simulation.comparison import ClientModel, Comparison, Row, Sweep
from fusion_simulation.data import (
    DATASETS,
    LabelledImages,
    check_label_skill,
    load_partition,
    load_raw_split,
    load_split,
    partition_indices,
)
from fusion_simulation.report import Report, RoundAccuracy, output_folder
from fusion_simulation.settings import Settings, architecture
from fusion_simulation.strategies import STRATEGIES, build_strategy
from fusion_simulation.task import Recipe, build_model, train

PNG = b"\x89PNG\r\n\x1a\n"
APP = tomllib.loads((SIMULATIONS / "pyproject.toml").read_text())
DEFAULTS: dict[str, Any] = APP["tool"]["flwr"]["app"]["config"]


def settings_of(**changes: Any) -> Settings:
    """Return the app's own defaults with changes; keys have underscores for hyphens."""
    changed = {key.replace("_", "-"): value for key, value in changes.items()}
    return Settings.from_run_config(DEFAULTS | changed)


# --- The app's pyproject.toml ---------------------------------------------------------------------


def test_app_does_not_make_flower_install_anything_else() -> None:
    assert APP["project"]["dependencies"] == ["flwr[simulation]"]
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
    return Comparison(clients, few, special_label=4)


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
    assert sweep.weights == pytest.approx([n / 10 for n in range(11)])
    # At the ends every way is one client alone.
    for values in sweep.accuracies.values():
        assert values[0] == pytest.approx(rows[1].accuracy)
        assert values[-1] == pytest.approx(rows[0].accuracy)


def small_report(rounds: int) -> Report:
    return Report(
        replace(settings_of(), num_server_rounds=rounds),
        [Row("Client A", "100 images", 0.5, 1.0), Row("Client B", "300 images", 0.75, 0.0)],
        Sweep((0.0, 0.5, 1.0), {"FedAvg": (0.5, 0.2, 0.7), "OT fusion": (0.5, 0.6, 0.7)}),
        [RoundAccuracy(k, 0.1 * k, 0.0) for k in range(rounds + 1)],
        {"federation": 1.5},
    )


@pytest.mark.parametrize("rounds", [1, 3])
def test_report_is_written(rounds: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = small_report(rounds)
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
    assert metrics["table"][1]["accuracy"] == 0.75
    swept = metrics["sweep-over-weight-of-client-A"]["accuracies"]
    assert swept["OT fusion"] == [0.5, 0.6, 0.7]
    assert "| Client B | 300 images | 75.00 | 0.00 |" in (tmp_path / "table.md").read_text()


def test_table_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    small_report(1).show()
    printed = capsys.readouterr().out
    assert "Client A" in printed
    assert "75.00" in printed
    assert "on label 4 %" in printed


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
    table = {(row["name"], row["weights"]): row["accuracy"] for row in metrics["table"]}
    assert table["OT fusion", "by images"] == pytest.approx(accuracies[2])
    for name in ("table.md", "weights.png", "rounds.png"):
        assert (results / name).stat().st_size > 0
        assert str(results / name) in log
    # Nothing is left in the user's working directory, nor in the app.
    assert list(flower.folder.iterdir()) == []


def test_clients_of_different_architectures(tmp_path: Path) -> None:
    from fusion_simulation import client_app, server_app

    config = settings_of(
        strategy="cla",
        models="mlp-24-16,mlp-24-18-16",
        local_epochs=5,
        num_server_rounds=2,
        output_dir=str(tmp_path),
    ).to_dict()
    grid = InProcessGrid(client_app.app, 2)
    for context in grid.contexts:
        context.run_config = config
    server_app.run(grid, Context(1, 0, {}, RecordDict(), config))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    rounds = [entry["by_architecture"] for entry in metrics["rounds"]]
    assert len(rounds) == 3
    assert all(found > 0.7 for found in rounds[2].values())
    table = {(row["name"], row["weights"]): row["accuracy"] for row in metrics["table"]}
    for name in ("mlp-24-16", "mlp-24-18-16"):
        assert table[f"CLA fusion to {name}", "by images"] == pytest.approx(rounds[2][name])
    (layers,) = metrics["layers"].values()
    assert layers["pairs"] == [[0, 0], [1, 2]]
    assert list(metrics["layers"]) == ["mlp-24-16 in mlp-24-18-16"]
    for name in ("layers.png", "rounds.png", "weights.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_several_models_need_the_strategy_for_them() -> None:
    with pytest.raises(ValueError, match=r"models='mlp-3,mlp-4'.*strategy='cla'"):
        settings_of(models="mlp-3,mlp-4")
    settings = settings_of(models="mlp-3,mlp-4", strategy="cla")
    assert [settings.model_of(k) for k in range(3)] == ["mlp-3", "mlp-4", "mlp-3"]
