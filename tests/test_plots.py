"""Pictures: what they show, read from the axes; and readable reports."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

import flwr_fusion as ff
from tests.support.architectures import sequential_mlp, with_adapters
from tests.test_depth import VECTORS, mlp

X = torch.zeros(2, 20)


@pytest.fixture(autouse=True)
def _without_display() -> Iterator[None]:
    mpl.use("Agg")
    yield
    plt.close("all")


def report() -> ff.FusionReport:
    return ff.ot_fusion([sequential_mlp(), sequential_mlp()], example_inputs=X).report


def test_groups_are_bars() -> None:
    found = report()
    moved, cost = cast(Any, found.plot())
    assert [bar.get_width() for bar in moved.patches] == pytest.approx(
        [100 * group.share_moved for group in found.groups]
    )
    assert [bar.get_width() for bar in cost.patches] == pytest.approx(
        [group.cost for group in found.groups]
    )
    assert [label.get_text() for label in moved.get_yticklabels()] == [
        f"{group.name} ({group.channels})" for group in found.groups
    ]


def test_what_has_matched_nothing_is_not_drawn() -> None:
    with pytest.raises(ff.FusionError, match="average has matched no channels"):
        ff.average([sequential_mlp()]).report.plot()


def test_reports_are_tables() -> None:
    lines = str(report()).splitlines()
    assert lines[0].startswith("ot_fusion, aligned to client ")
    assert lines[1].split() == ["group", "channels", "moved,", "%", "cost"]
    assert [line.split()[0] for line in lines[2:-1]] == ["0", "2", "4"]
    assert lines[-1] == "repair: none"
    assert "group" not in str(ff.average([sequential_mlp()]).report)


def test_reports_tell_of_layers() -> None:
    found = ff.cla_fusion([mlp(12, 10), mlp(12, 11, 10)], example_inputs=VECTORS[:2]).report
    assert "layers of clients 0: " in str(found)
    stage = next(stage for stage in found.layers[0].stages if stage.cost)
    axes: Any = stage.plot()
    (image,) = axes.images
    assert image.get_array().shape == (len(stage.cost), len(stage.cost[0]))
    (path,) = axes.lines
    assert len(path.get_xdata()) == len(stage.pairs)


def test_stages_of_one_depth_have_no_costs() -> None:
    with pytest.raises(ff.FusionError, match="equally deep"):
        ff.StageMatch(("a",), ("b",), ((0, 0),)).plot()


def test_graphs_are_rows_of_groups() -> None:
    graph = ff.ChannelGraph.trace(with_adapters(), X)
    axes = graph.plot()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"{group.name} ({group.size})" for group in graph.groups]
    layers = [label.get_text() for label in axes.get_xticklabels()]
    assert layers[:3] == ["0.base", "0.lora_A", "0.lora_B"]
    given = plt.figure().subplots()
    assert graph.plot(given) is given


def result(values: list[float]) -> Any:
    rounds = {n: {"accuracy": value} for n, value in enumerate(values)}
    return SimpleNamespace(evaluate_metrics_serverapp=rounds)


def test_runs_are_lines() -> None:
    axes: Any = ff.plot_rounds(result([0.1, 0.5]), result([0.2, 0.4, 0.6]), names=["a", "b"])
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.1, 0.5], [0.2, 0.4, 0.6]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        ((), {}, "no runs"),
        ((3,), {}, "a run is a metrics.json"),
        ((result([0.1]),), {"names": ["a", "b"]}, "1 runs but 2 names"),
        ((result([0.1]),), {"metric": "loss"}, "no metric 'loss'"),
    ],
)
def test_bad_runs_are_refused(runs: tuple[Any, ...], options: Any, message: str) -> None:
    with pytest.raises(ff.FusionError, match=message):
        ff.plot_rounds(*runs, **options)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ff.FusionError, match=r"flwr-fusion\[plots\]"):
        ff.ChannelGraph.trace(nn.Linear(20, 3), X).plot()
