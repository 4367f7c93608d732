"""Clients' statistics compared: with their own networks, and with each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median

from torch import Tensor, nn

from flwr_fusion.networks import key_of
from flwr_fusion.statistics.moments import NORMS, LayerStatistics, Statistics

# All ran networks of one architecture: what they measure differs by their data alone.
_LARGEST_USUAL = 10.0
_FEWEST = 3


def contradiction(
    statistics: Statistics, model: nn.Module, state: Mapping[str, Tensor]
) -> str | None:
    """Return what of a client's statistics its own BatchNorm layers contradict.

    Parameters
    ----------
    statistics : mapping of str to LayerStatistics
        What it sent.
    model : nn.Module
        Its architecture.
    state : mapping of str to Tensor
        Running means and variances of its network.

    Returns
    -------
    str or None
        Naming the layer whose activations have a mean square more than ten times what its running
        statistics allow after a single step.
    """
    for name, layer in statistics.items():
        module = model.get_submodule(name)
        keys = key_of(name, "running_mean"), key_of(name, "running_var")
        if not isinstance(module, NORMS) or not state.keys() >= set(keys):
            continue
        # running <- (1 - momentum) running + momentum true: at least this share of the true one.
        share = min(0.1, module.momentum or 0.1)
        running = mean_square_of(state[keys[0]], state[keys[1]])
        found = mean_square_of(layer.activation_mean, layer.activation_variance)
        if found * share > _LARGEST_USUAL * max(running, 1e-12):
            return (
                f"the mean square of the activations of layer '{name}' is {found:.3g}, by the "
                f"layer's own running statistics {running:.3g}"
            )
    return None


def outliers(statistics: Mapping[int, Statistics]) -> dict[int, str]:
    """Return the clients whose inputs or activations are implausibly large, and which.

    Parameters
    ----------
    statistics : mapping of int to Statistics
        Those of clients with one architecture.

    Returns
    -------
    dict of int to str
        Clients of which a layer's mean square is more than ten times the median client's; nobody
        among fewer than three.
    """
    by_figure: dict[str, dict[int, float]] = {}
    for client, measured in statistics.items():
        for what, size in _mean_squares(measured):
            by_figure.setdefault(what, {})[client] = size
    odd: dict[int, str] = {}
    for what, sizes in by_figure.items():
        usual = median(sizes.values())
        for client, size in sizes.items() if len(sizes) >= _FEWEST else ():
            if size > _LARGEST_USUAL * usual > 0:  # Dead layers are no measure.
                odd.setdefault(client, f"{what} is {size:.3g}, the median client's {usual:.3g}")
    return odd


def mean_square_of(mean: Tensor, variance: Tensor) -> float:
    """Return the mean of ``E[z^2]`` over channels."""
    return float((variance.double() + mean.double().square()).mean())


def _mean_squares(measured: Statistics) -> Iterator[tuple[str, float]]:
    for name, layer in measured.items():
        size = mean_square_of(layer.activation_mean, layer.activation_variance)
        yield f"the mean square of the activations of layer '{name}'", size
        if layer.second is not None:
            yield f"the mean square of the inputs of layer '{name}'", mean_square_of_inputs(layer)


def mean_square_of_inputs(layer: LayerStatistics) -> float:
    """Return the mean of ``E[x^2]`` over a layer's inputs, whose second moments there must be."""
    assert layer.second is not None
    return float(layer.second.diagonal(dim1=1, dim2=2).double().mean())
