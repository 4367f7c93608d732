"""The command ``flwr-fusion``: look at a network, fuse files, compare runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flwr_fusion.errors import FusionError, InputError
from flwr_fusion.graph.groups import ChannelGraph
from flwr_fusion.methods.average import average
from flwr_fusion.methods.ot import ot_fusion
from flwr_fusion.methods.transplant import neuron_transplantation
from flwr_fusion.networks import check_network
from flwr_fusion.plots import plot_rounds
from flwr_fusion.rules import RULES
from flwr_fusion.runs import curves_of

app = typer.Typer(
    help="Fuse neural networks, and see beforehand whether yours can be.", no_args_is_help=True
)

Model = Annotated[
    str, typer.Option("--model", help="module:factory, a function or class that returns a network")
]
Shape = Annotated[
    str, typer.Option("--input", help="shape of an input with its batch, such as 1,3,32,32")
]
Tokens = Annotated[
    int, typer.Option(help="the input holds integers below this number, such as a vocabulary's")
]


class Method(StrEnum):
    """The methods that take networks of one architecture."""

    OT = "ot"
    TRANSPLANT = "nt"
    AVERAGE = "average"


@contextmanager
def _errors_as_messages() -> Iterator[None]:
    """End with the error's message instead of its traceback."""
    try:
        yield
    except FusionError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def network_of(factory: str) -> nn.Module:
    """Return what a factory named ``module:name`` makes; modules of this folder are found."""
    module_name, _, name = factory.partition(":")
    if not module_name or not name or module_name.endswith(".py"):
        raise FusionError(f"a network is named module:factory, such as nets:Net, not {factory!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        make: Callable[[], Any] = getattr(importlib.import_module(module_name), name)
        network = make() if not isinstance(make, nn.Module) else make
    except Exception as error:  # The factory is the user's.
        takes = isinstance(error, TypeError)
        hint = ". If it needs arguments, name a function that gives them" if takes else ""
        raise FusionError(
            f"{factory} makes no network: {type(error).__name__}: {error}{hint}"
        ) from error
    check_network(factory, network)
    return network


def inputs_of(shape: str, tokens: int) -> Tensor:
    """Return an input of a shape that is given as text."""
    try:
        sizes = [int(size) for size in shape.split(",")]
    except ValueError as error:
        raise FusionError(f"a shape is whole numbers with commas, not {shape!r}") from error
    generator = torch.Generator().manual_seed(0)
    if tokens:
        return torch.randint(tokens, sizes, generator=generator)
    return torch.randn(sizes, generator=generator)


def _traced(network: nn.Module, inputs: Tensor) -> ChannelGraph:
    try:
        return ChannelGraph.trace(network, inputs)
    except InputError as error:
        raise FusionError(
            f"{error}. The input is one tensor of numbers, with --tokens of integers; networks "
            "that take something else are looked at in Python: flwr_fusion.ChannelGraph.trace"
        ) from error


@app.command()
def inspect(
    factory: Annotated[str, typer.Argument(help="module:factory, which returns a network")],
    shape: Shape,
    tokens: Tokens = 0,
    picture: Annotated[
        Path | None, typer.Option(help="draw the groups into this file, such as graph.svg")
    ] = None,
) -> None:
    """Print a network's channel groups, and whether it will be matched."""
    with _errors_as_messages():
        graph = _traced(network_of(factory), inputs_of(shape, tokens))
        typer.echo(graph.summary())
        free = [group for group in graph.groups if not group.fixed]
        typer.echo(
            "fusion matches these channels; what is fixed is averaged by index"
            if free
            else "nothing can be matched: fusion is averaging by index, as FedAvg's"
        )
        if picture is not None:
            _save(graph.plot(), picture)


@app.command()
def fuse(
    files: Annotated[list[Path], typer.Argument(help="safetensors files of one architecture")],
    model: Model,
    shape: Shape,
    out: Annotated[Path, typer.Option(help="where the fused network goes, as safetensors")],
    tokens: Tokens = 0,
    method: Method = Method.OT,
    combine: Annotated[
        str | None, typer.Option(help=f"rule of ot and average: {', '.join(sorted(RULES))}")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="one for each file, such as 100,300; default: equal")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="file of the network that all were trained from (ot)")
    ] = None,
) -> None:
    """Fuse networks that lie in files."""
    with _errors_as_messages():
        networks = [_loaded(file, model) for file in files]
        given = None if weights is None else _numbers(weights)
        sent = None if reference is None else _loaded(reference, model)
        inputs = inputs_of(shape, tokens)
        if method is Method.TRANSPLANT:
            if combine is not None or sent is not None:
                raise FusionError("--combine and --reference are not for --method nt")
            result = neuron_transplantation(networks, given, example_inputs=inputs)
        elif method is Method.AVERAGE:
            result = average(networks, given, combine=combine or "mean", reference=sent)
        else:
            result = ot_fusion(
                networks, given, example_inputs=inputs, combine=combine or "auto", reference=sent
            )
        typer.echo(str(result.report))
        state = {name: tensor.contiguous() for name, tensor in result.model.state_dict().items()}
        save_file(state, out)
        typer.echo(f"fused network: {out.resolve()}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs, or their metrics.json")],
    metric: Annotated[str, typer.Option(help="of each round's metrics")] = "accuracy",
    picture: Annotated[
        Path | None, typer.Option(help="draw the rounds into this file, such as rounds.png")
    ] = None,
) -> None:
    """Print what runs have reached after each round, and draw it."""
    with _errors_as_messages():
        curves = [curve for run in runs for curve in curves_of(run, metric=metric)]
        rounds = sorted({number for curve in curves for number in curve.values})
        table = Table(title=metric)
        table.add_column("run")
        for number in rounds:
            table.add_column(f"round {number}", justify="right")
        for curve in curves:
            cells = (curve.values.get(number) for number in rounds)
            table.add_row(curve.name, *("" if v is None else f"{v:.4f}" for v in cells))
        Console().print(table)
        if picture is not None:
            _save(plot_rounds(*runs, metric=metric), picture)


def _save(axes: Any, picture: Path) -> None:
    axes.figure.savefig(picture)
    typer.echo(f"picture: {picture.resolve()}")


def _loaded(file: Path, factory: str) -> nn.Module:
    network = network_of(factory)
    try:
        network.load_state_dict(load_file(file))
    except Exception as error:
        raise FusionError(
            f"'{file}' cannot be loaded into {factory}, as a safetensors file: {error}"
        ) from error
    return network


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise FusionError(f"weights are numbers with commas, not {text!r}") from error
