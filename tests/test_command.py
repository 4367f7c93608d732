"""The command ``flwr-fusion``, as it is called in a folder of the user's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flwr_fusion.command import app, network_of

NETWORKS = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

def words():
    return nn.Sequential(nn.Embedding(20, 8), nn.ReLU(), nn.Linear(8, 3))

class Softmax(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 3))

def broken():
    raise RuntimeError("no weights here")

def nothing():
    return 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with networks and the weights of two of them; the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "user_networks.py").write_text(NETWORKS)
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = network_of("user_networks:net").state_dict()
        save_file(state, tmp_path / f"{seed}.safetensors")
    return tmp_path


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    return result.output


def test_inspect_prints_the_groups(folder: Path) -> None:
    out = run("inspect", "user_networks:net", "--input", "1,6", "--picture", "graph.svg")
    assert "0                  8  free" in out
    assert "fusion matches these channels" in out
    assert (folder / "graph.svg").read_text().lstrip().startswith("<?xml")


def test_inspect_takes_tokens(folder: Path) -> None:
    out = run("inspect", "user_networks:words", "--input", "2,5", "--tokens", "20")
    assert "free" in out


def test_inspect_says_when_nothing_can_be_matched(folder: Path) -> None:
    out = run("inspect", "user_networks:Softmax", "--input", "1,6")
    assert "nothing can be matched" in out


@pytest.mark.parametrize("method", ["ot", "nt", "average"])
def test_fuse_writes_a_network(folder: Path, method: str) -> None:
    out = run(
        *("fuse", "0.safetensors", "1.safetensors", "--model", "user_networks:net"),
        *("--input", "1,6", "--weights", "1,0", "--out", "fused.safetensors", "--method", method),
    )
    assert "fused network: " in out
    fused, own = load_file("fused.safetensors"), load_file("0.safetensors")
    x = torch.randn(5, 6)
    network = network_of("user_networks:net")
    network.load_state_dict(own)
    expected = network(x)
    network.load_state_dict(fused)
    torch.testing.assert_close(network(x), expected)


def test_fuse_takes_a_reference_and_a_rule(folder: Path) -> None:
    files = ["0.safetensors", "0.safetensors", "--model", "user_networks:net", "--input", "1,6"]
    run("fuse", *files, "--out", "f", "--reference", "0.safetensors", "--combine", "median")
    torch.testing.assert_close(load_file("f"), load_file("0.safetensors"))


def metrics(folder: Path, values: list[float], baseline: list[float]) -> None:
    folder.mkdir()
    found = {
        "rounds": [{"server_round": n, "accuracy": v} for n, v in enumerate(values)],
        "baseline": [{"server_round": n, "accuracy": v} for n, v in enumerate(baseline)],
    }
    (folder / "metrics.json").write_text(json.dumps(found))


def test_compare_tables_and_draws_runs(folder: Path) -> None:
    metrics(folder / "ot", [0.1, 0.75], [0.1, 0.5])
    metrics(folder / "nt", [0.1, 0.6, 0.625], [])
    out = run("compare", "ot", "nt/metrics.json", "--picture", "rounds.png")
    for text in ("ot: FedAvg", "0.7500", "0.5000", "0.6250", "round 2"):
        assert text in out
    assert (folder / "rounds.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "user_networks", "--input", "1,6"], "named module:factory"),
        (["inspect", "user_networks:other", "--input", "1,6"], "makes no network: AttributeError"),
        (["inspect", "user_networks:broken", "--input", "1,6"], "RuntimeError: no weights here"),
        (["inspect", "user_networks:nothing", "--input", "1,6"], "must be a network, not int"),
        (["inspect", "no_such_module:net", "--input", "1,6"], "ModuleNotFoundError"),
        (["inspect", "user_networks:net", "--input", "1,x"], "whole numbers with commas"),
        (["inspect", "user_networks:net", "--input", "1,7"], "the example inputs"),
        (["inspect", "user_networks:net", "--input", "1,7"], "with --tokens of integers"),
        (["inspect", "user_networks.py:net", "--input", "1,6"], "such as nets:Net"),
        (["fuse", "0.safetensors", "9.safetensors"], "'9.safetensors' cannot be loaded"),
        (["fuse", "0.safetensors", "--weights", "a"], "weights are numbers with commas"),
        (["fuse", "0.safetensors", "--combine", "mode"], "'mode'"),
        (["fuse", "0.safetensors", "--method", "nt", "--combine", "mean"], "not for --method nt"),
        (["compare", "nowhere"], "is no metrics.json of a run"),
    ],
)
def test_mistakes_end_with_one_line(folder: Path, arguments: list[str], message: str) -> None:
    if arguments[0] == "fuse":
        arguments = [*arguments, "--model", "user_networks:net", "--input", "1,6", "--out", "f"]
    out = run(*arguments, code=1)
    assert out.startswith("error: ")
    assert message in out
    assert "Traceback" not in out


def test_compare_names_the_metrics_that_there_are(folder: Path) -> None:
    metrics(folder / "ot", [0.1], [])
    out = run("compare", "ot", "--metric", "loss", code=1)
    assert "no metric 'loss'" in out
    assert "['accuracy']" in out
