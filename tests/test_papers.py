"""The suite of the papers' experiments; all of them run at the smoke scale in .ci/run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import SIMULATIONS

sys.path.insert(0, str(SIMULATIONS))

import papers
from experiments.baselines import sliced_average
from experiments.bench import SMOKE, Bench, Experiment, Scores, Shuffled
from experiments.clafusion import in_own_layers
from experiments.otfusion import pruned
from experiments.report import table
from fusion_simulation.data import LabelledImages, MixedImages
from fusion_simulation.task import MLP, ResNet, build_model

CHEAP = ("nt-self-fusion", "cla-layer-costs")


def not_measured(bench: Bench) -> Scores:
    raise AssertionError("a table is made of what was measured before")


def run(monkeypatch: pytest.MonkeyPatch, results: Path, *arguments: str) -> None:
    command = ["papers.py", *arguments, "--results", str(results), "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", command)
    papers.main()


def bench_in(folder: Path) -> Bench:
    return Bench(SMOKE, 0, "", folder)


def test_experiments_are_listed_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(monkeypatch, tmp_path, "--list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(papers.EXPERIMENTS)
    assert not list(tmp_path.iterdir())


def test_finished_cells_are_skipped_and_the_report_has_tables_and_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(monkeypatch, tmp_path, "--smoke", *CHEAP)
    folder = tmp_path / "smoke"
    first = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert first
    report = (folder / "report.md").read_text(encoding="utf-8")
    for name in CHEAP:
        assert papers.EXPERIMENTS[name].title in report
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "| without the guard |" in report
    kept = folder / f"{CHEAP[0]}_0.json"
    marked = {"scale": repr(SMOKE), "seconds": 60.0, "scores": {"marked": {"at once": 12.5}}}
    kept.write_text(json.dumps(marked), encoding="utf-8")
    (folder / f"{CHEAP[1]}_0.json").unlink()
    capsys.readouterr()
    run(monkeypatch, tmp_path, "--smoke", *CHEAP)
    printed = capsys.readouterr().out
    assert "| marked | 12.50 |" in printed
    assert f"{CHEAP[1]}, seed 0" in printed
    assert f"{CHEAP[0]}, seed 0" not in printed
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == first


def test_a_failed_experiment_is_named_and_the_others_are_finished(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # A folder stands where its result should go.
    (tmp_path / "smoke" / f"{CHEAP[0]}_0.part").mkdir(parents=True)
    with pytest.raises(SystemExit, match=f"{CHEAP[0]}, seed 0"):
        run(monkeypatch, tmp_path, "--smoke", *CHEAP)
    printed = capsys.readouterr().out
    assert "IsADirectoryError" in printed
    assert papers.EXPERIMENTS[CHEAP[1]].title in printed


def test_results_of_another_scale_are_not_taken(tmp_path: Path) -> None:
    experiment = papers.EXPERIMENTS[CHEAP[0]]
    path = tmp_path / "smoke" / f"{CHEAP[0]}_0.json"
    path.parent.mkdir()
    for scale, taken in ((SMOKE, True), (replace(SMOKE, unlabelled=50), False)):
        path.write_text(json.dumps({"scale": repr(scale), "scores": {}}), encoding="utf-8")
        assert (papers._finished(experiment, SMOKE, 0, tmp_path) is not None) == taken


def test_missing_data_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"cifar10 cannot be read.*--data-dir"):
        run(monkeypatch, tmp_path, *CHEAP)


def test_results_that_cannot_be_written_end_it_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken = tmp_path / "file"
    taken.touch()
    with pytest.raises(SystemExit, match=r"--results: .*file' cannot be written"):
        run(monkeypatch, taken, "--smoke", *CHEAP)


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
    experiment = Experiment("x", "X", "a paper", not_measured, "step", {"OT": printed})
    repetitions: list[Scores] = [{"OT": dict.fromkeys(columns, value)} for value in (89.0, 91.0)]
    assert table(experiment, repetitions, compare=True) == expected
    assert "paper" not in table(experiment, repetitions, compare=False)


def test_shares_are_of_all_repetitions() -> None:
    experiment = Experiment("x", "X", "a paper", not_measured, "cost", {}, counts=True)
    repetitions: list[Scores] = [{"cka": {layers: 100.0}} for layers in ("1, 2", "1, 3", "1, 3")]
    assert "| cka | 33 | 67 |" in table(experiment, repetitions, compare=True)
