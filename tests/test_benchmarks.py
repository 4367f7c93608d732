"""The experiments' runner; all experiments run at the smoke scale in .ci/run."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fusion_simulation.data import LabelledImages, MixedImages, load_split
from fusion_simulation.task import MLP, Recipe, ResNet, build_model
from torch import nn

from benchmarks.__main__ import main
from benchmarks.bench import Bench, Shuffled
from benchmarks.compared_methods import pruned, sliced_average
from benchmarks.declarations import GROUP, SCALES, SMOKE, Experiment, Printed, Scores
from benchmarks.experiments import EXPERIMENTS, cost
from benchmarks.experiments.depth import in_own_layers
from benchmarks.experiments.mixed_federation import METHODS, mixed_federation
from benchmarks.experiments.mixed_federation import Setting as MixedSetting
from benchmarks.experiments.robust import ATTACKS, attacked
from benchmarks.experiments.rounds import FEDAVG, LEAST_SQUARES, MEAN, Method, Setting, to_accuracy
from benchmarks.federation import Client, Round, divided, federate
from benchmarks.report import draw, table
from benchmarks.runner import Cell, Setup
from tests.conftest import REPOSITORY

CHEAP = ("nt-self-fusion", "cla-layer-costs")


def not_measured(bench: Bench) -> Scores:
    raise AssertionError("a table is made of what was measured before")


def run(results: Path, *arguments: str) -> None:
    main(["run", *CHEAP, *arguments, "--results", str(results), "--jobs", "1"])


def bench_in(folder: Path) -> Bench:
    return Bench(SMOKE, 0, "", folder)


def cell_in(results: Path, experiment: str = CHEAP[0], case: int = 0, digits: int = 1257) -> Cell:
    return Cell(Setup("smoke", results, "", "cpu", {"digits": digits}), experiment, case, 0)


# --- The runner -----------------------------------------------------------------------------------


def test_experiments_are_listed_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(EXPERIMENTS)


def test_printed_figures_are_of_experiments() -> None:
    text = (REPOSITORY / "benchmarks" / "printed.toml").read_text(encoding="utf-8")
    for name in tomllib.loads(text):
        assert name in EXPERIMENTS
        assert Printed.of(name).figures


def test_finished_cells_are_skipped_and_the_report_has_tables_and_figures(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(tmp_path, "--scale", "smoke")
    folder = tmp_path / "smoke"
    first = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert first
    report = (folder / "report.md").read_text(encoding="utf-8")
    for name in CHEAP:
        assert EXPERIMENTS[name].title in report
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "| without the guard |" in report
    kept, missing = (cell_in(tmp_path, name) for name in CHEAP)
    marked = {"seconds": 60.0, "scores": {"marked": {"at once": 12.5}}}
    kept.path.write_text(json.dumps(marked), encoding="utf-8")
    missing.path.unlink()
    capsys.readouterr()
    run(tmp_path, "--scale", "smoke")
    printed = capsys.readouterr().out
    assert "| marked | 12.50 |" in printed
    assert missing.name in printed
    assert kept.name not in printed
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == first


def test_a_failed_experiment_is_named_and_the_others_are_finished(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # A folder stands where its result should go.
    cell_in(tmp_path).path.with_suffix(".part").mkdir(parents=True)
    with pytest.raises(SystemExit, match=f"{CHEAP[0]}, seed 0"):
        run(tmp_path, "--scale", "smoke", "--seeds", "0")
    printed = capsys.readouterr().out
    assert "IsADirectoryError" in printed
    assert EXPERIMENTS[CHEAP[1]].title in printed


def test_a_result_is_of_its_settings_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cells = [
        cell_in(tmp_path),
        cell_in(tmp_path, CHEAP[1]),
        cell_in(tmp_path, digits=1000),
        *(cell_in(tmp_path, "rounds-mlp-mnist", case) for case in (0, 1)),
    ]
    paths = {cell.path for cell in cells}
    monkeypatch.setitem(SCALES, "smoke", replace(SMOKE, unlabelled=50))
    paths.add(cell_in(tmp_path).path)
    assert len(paths) == len(cells) + 1


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"mnist cannot be read.*--data-dir"):
        run(tmp_path)


def test_results_that_cannot_be_written_end_it_at_once(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.touch()
    with pytest.raises(SystemExit, match=r"--results: .*file' cannot be written"):
        run(taken, "--scale", "smoke")


@pytest.mark.parametrize("wrong", [["nonsense"], ["--seeds", "-1"], ["--jobs", "0"]])
def test_wrong_arguments_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--scale", "smoke", *wrong])


# --- The bench ------------------------------------------------------------------------------------


def test_the_server_has_images_that_no_network_is_trained_on(tmp_path: Path) -> None:
    bench = bench_in(tmp_path)
    trained, unlabelled = bench.images(SMOKE.mnist), bench.unlabelled(SMOKE.mnist)
    assert len(unlabelled) == SMOKE.unlabelled
    gaps = torch.cdist(unlabelled.flatten(1), trained.images.flatten(1))
    assert bool((gaps > 0).all())


def test_networks_are_read_from_the_cache(tmp_path: Path) -> None:
    bench = bench_in(tmp_path)
    first = bench.network(SMOKE.mnist, SMOKE.mlp, 0)
    (path,) = tmp_path.rglob("*.safetensors")
    again = bench.network(SMOKE.mnist, SMOKE.mlp, 0)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    other = bench.network(SMOKE.mnist, SMOKE.mlp, 1)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
    assert sorted(tmp_path.rglob("*")) != [path]


def test_batches_hold_every_image_once_and_differ_between_epochs() -> None:
    images = torch.arange(40.0).reshape(40, 1, 1, 1)
    loader = Shuffled(LabelledImages(images, torch.arange(40)), 8, 0)
    epochs = [torch.cat([labels for _, labels in loader]) for _ in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(40)) for epoch in epochs)
    assert not torch.equal(*epochs)
    mixed = torch.cat(list(MixedImages(images.expand(-1, 1, 4, 4), 8, 0)))
    assert mixed.shape == (40, 1, 4, 4)
    assert float(mixed.min()) >= 0
    assert float(mixed.max()) <= 39


def test_sliced_average_is_the_mean_over_the_networks_that_have_a_value() -> None:
    wide, narrow = MLP([3, 4, 2]), MLP([3, 2, 2])
    result = sliced_average([wide, narrow], wide).state_dict()
    w, n = wide.state_dict(), narrow.state_dict()
    first = "layers.0.weight"
    torch.testing.assert_close(result[first][:2], (w[first][:2] + n[first]) / 2)
    torch.testing.assert_close(result[first][2:], w[first][2:])
    small = sliced_average([wide, narrow], narrow).state_dict()
    last = "layers.1.weight"
    torch.testing.assert_close(small[last], (w[last][:, :2] + n[last]) / 2)


def test_longest_chain_copies_the_first_blocks_of_every_stage() -> None:
    shallow, deep = ResNet(1, 8, 1), ResNet(1, 14, 1)
    result = in_own_layers(shallow, deep, torch.zeros(2, 1, 8, 8)).state_dict()
    for stage, block in ((0, 0), (1, 2), (2, 4)):
        name = "conv2.weight"
        copied = shallow.state_dict()[f"blocks.{stage}.{name}"]
        assert torch.equal(result[f"blocks.{block}.{name}"], copied)
        kept = f"blocks.{block + 1}.{name}"
        assert torch.equal(result[kept], deep.state_dict()[kept])
    for name in ("conv.weight", "fc.weight"):
        assert torch.equal(result[name], shallow.state_dict()[name])


def test_pruning_takes_a_share_of_every_layer_but_the_last() -> None:
    model = build_model("vgg-11-8", "digits", 0)
    small = pruned(model, torch.zeros(2, 1, 8, 8), 0.5)
    widths = [layer.out_channels for layer in small.modules() if isinstance(layer, nn.Conv2d)]
    assert widths == [4, 8, 16, 16, 32, 32, 32, 32]
    assert small(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


# --- Federations ----------------------------------------------------------------------------------


def curve(folder: Path, start: str, method: Method) -> list[float]:
    setting = Setting("mlp", "federation", "dirichlet-0.5", start, method)
    (row,) = to_accuracy(bench_in(folder), setting).values()
    assert list(row) == ["1", "2"]
    return list(row.values())


def test_from_a_shared_start_the_mean_of_matched_networks_is_fedavg(tmp_path: Path) -> None:
    average = curve(tmp_path, "shared", FEDAVG)
    assert curve(tmp_path, "shared", MEAN) == average
    assert curve(tmp_path, "own", FEDAVG) != average
    assert curve(tmp_path, "shared", LEAST_SQUARES) != average


def test_clients_start_from_the_global_network_after_their_own_start() -> None:
    images = load_split("digits", train=True)
    recipe = Recipe(1, 0.0, 0.0, 32)
    own, sent = (build_model("mlp-8", "digits", seed) for seed in (1, 2))
    received: list[nn.Module] = []

    def keep(ended: Round, name: str) -> nn.Module:
        received.append(ended.trained[0])
        return ended.sent[name]

    list(federate([Client(images, "a", own)], {"a": sent}, recipe, lambda *_: 0, [keep, keep]))
    for model, expected in zip(received, (own, sent), strict=True):
        assert model is not expected
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(("partition", "clients"), [("label-skill", 2), ("iid", 3)])
def test_every_image_is_one_clients(partition: str, clients: int) -> None:
    data = load_split("digits", train=True)
    numbered = LabelledImages(torch.arange(len(data)), data.labels)
    shares = divided(numbered, partition, clients, np.random.default_rng(0))
    assert len(shares) == clients
    assert sorted(torch.cat([own.images for own in shares]).tolist()) == list(range(len(data)))


def test_clients_that_are_not_fused_keep_to_their_architecture(tmp_path: Path) -> None:
    setting = MixedSetting("federation", "dirichlet-0.5", (), METHODS[0])
    scores = mixed_federation(bench_in(tmp_path), setting)
    names = [row.split(GROUP) for row in scores]
    assert names == [[name, METHODS[0].name] for name in ("deep-wide", "shallow", "narrow")]


def test_attacks_are_what_they_are_called() -> None:
    good, mislabelled = (build_model("mlp-8", "digits", seed) for seed in (0, 1))
    bad = {attack: attacked(attack, good, mislabelled, 0) for attack in ATTACKS}
    assert bad["none"] is None
    assert bad["wrong labels"] is mislabelled
    inverted = bad["inverted"]
    assert inverted is not None
    for own, other in zip(inverted.parameters(), good.parameters(), strict=True):
        assert torch.equal(own, -3 * other)


def test_a_fusion_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    cost.print_measured("OT fusion", 16)
    measured: Mapping[str, float] = json.loads(capsys.readouterr().out)
    assert measured["seconds"] > 0
    assert measured["mebibytes"] >= 0


# --- Tables and figures ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "printed", "expected"),
    [
        (
            "ab",
            {"a": "93.1"},
            "| step | a | a (paper) | b |\n| --- | --- | --- | --- |\n"
            "| OT | 90.00 ± 1.41 | 93.1 | 90.00 ± 1.41 |",
        ),
        (
            "a",
            {"a": "93.1", "end": "94.0"},
            "| step | a | a (paper) | end (paper) |\n| --- | --- | --- | --- |\n"
            "| OT | 90.00 ± 1.41 | 93.1 | 94.0 |",
        ),
        (
            "abcde",
            {"a": "93.1"},
            "| step | a | b | c | d | e |\n| --- | --- | --- | --- | --- | --- |\n"
            f"| OT |{' 90.00 ± 1.41 |' * 5}\n| OT (paper) | 93.1 |  |  |  |  |",
        ),
    ],
)
def test_printed_figures_stand_beside_ours_or_below_wide_tables(
    columns: str, printed: dict[str, str], expected: str
) -> None:
    experiment = Experiment("x", "X", not_measured, "step", "a paper")
    repetitions: list[Scores] = [{"OT": dict.fromkeys(columns, value)} for value in (89.0, 91.0)]
    assert table(experiment, repetitions, Printed({"OT": printed})) == expected
    assert "paper" not in table(experiment, repetitions, Printed({}))


def test_shares_are_of_all_repetitions() -> None:
    experiment = Experiment("x", "X", not_measured, "cost", "a paper", counts=True)
    repetitions: list[Scores] = [{"cka": {layers: 100.0}} for layers in ("1, 2", "1, 3", "1, 3")]
    assert "| cka | 33 | 67 |" in table(experiment, repetitions, Printed({}))


def test_curves_in_groups_are_compared_with_their_baseline(tmp_path: Path) -> None:
    experiment = Experiment(
        "x",
        "X",
        not_measured,
        "round",
        "a paper",
        rows="data / start / method",
        curve=True,
        in_table=("1", "3"),
        decimals=1,
        deviation=False,
        baseline="FedAvg",
    )
    curves = {"FedAvg": (10.0, 20.0, 30.0), "OT": (15.0, 18.0, 30.0)}
    groups = [f"{data} / {start}" for data in ("iid", "skewed") for start in ("shared", "own")]
    # Measured method by method, and put together by group.
    repetitions: list[Scores] = [
        {
            f"{group} / {name}": {str(k): more + v for k, v in enumerate(curve, start=1)}
            for name, curve in curves.items()
            for group in groups
        }
        for more in (0.0, 2.0)
    ]
    header, _, *lines = table(experiment, repetitions, Printed({})).splitlines()
    assert header == (
        "| data | start | method | round 1 | round 3 | least difference from FedAvg (round) |"
    )
    assert lines[:3] == [
        "| iid | shared | FedAvg | 11.0 | 31.0 | +0.0 (1) |",
        "| iid | shared | OT | 16.0 | 31.0 | -2.0 (2) |",
        "| iid | own | FedAvg | 11.0 | 31.0 | +0.0 (1) |",
    ]
    draw(experiment, repetitions, tmp_path / "curves.png")
    draw(replace(experiment, curve=False), repetitions, tmp_path / "bars.png")
    for name in ("curves", "bars"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
