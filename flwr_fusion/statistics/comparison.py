"""Clients' statistics compared: with their own networks, and with each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median

from torch import Tensor, nn

from flwr_fusion.networks import key_of
from flwr_fusion.precision import widened
from flwr_fusion.statistics.moments import NORMS, LayerStatistics, Statistics

# Beyond what the momentum explains.
_LARGEST_OWN = 10.0
# Every client measures the network that it has trained, and training makes activations grow.
_LARGEST_ACTIVATIONS = 100.0
_LARGEST_INPUTS = 1000.0
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
        statistics allow after a single step. Of most clients it says something of the network.
    """
    for name, layer in statistics.items():
        module = model.get_submodule(name)
        keys = key_of(name, "running_mean"), key_of(name, "running_var")
        if not isinstance(module, NORMS) or not state.keys() >= set(keys):
            continue
        # running <- (1 - momentum) running + momentum true: at least this share of the true one.
        share = min(0.1, module.momentum or 0.1)
        running = mean_square_of(state[keys[0]] / share, state[keys[1]] / share)
        found = mean_square_of(layer.activation_mean, layer.activation_variance)
        if found > _LARGEST_OWN * max(running, 1e-12):
            return (
                f"the mean square of the activations of layer '{name}' is {found:.3g}, by the "
                f"layer's own running statistics at most {running:.3g}"
            )
    return None


def outliers(statistics: Mapping[int, Statistics], model: nn.Module) -> dict[int, str]:
    """Return the clients whose statistics are implausibly large beside the others', and which.

    Parameters
    ----------
    statistics : mapping of int to Statistics
        Those of clients with one architecture.
    model : nn.Module
        The architecture.

    Returns
    -------
    dict of int to str
        Clients of which the mean square of the activations of a BatchNorm layer is more than 100
        times the median client's, or that of a layer's inputs more than 1000 times; nobody among
        fewer than three.
    """
    by_figure: dict[tuple[str, float], dict[int, float]] = {}
    for client, measured in statistics.items():
        for what, most, size in _mean_squares(measured, model):
            by_figure.setdefault((what, most), {})[client] = size
    odd: dict[int, str] = {}
    for (what, most), sizes in by_figure.items():
        usual = median(sizes.values())
        for client, size in sizes.items() if len(sizes) >= _FEWEST else ():
            if size > most * usual > 0:  # Dead layers are no measure.
                odd.setdefault(client, f"{what} is {size:.3g}, the median client's {usual:.3g}")
    return odd


def mean_square_of(mean: Tensor, variance: Tensor) -> float:
    """Return the mean of ``E[z^2]`` over channels."""
    return float((widened(variance) + widened(mean).square()).mean())


def _mean_squares(measured: Statistics, model: nn.Module) -> Iterator[tuple[str, float, float]]:
    """Yield what is compared, how many times the usual it may be, and how large it is."""
    for name, layer in measured.items():
        if isinstance(model.get_submodule(name), NORMS):
            size = mean_square_of(layer.activation_mean, layer.activation_variance)
            what = f"the mean square of the activations of layer '{name}'"
            yield what, _LARGEST_ACTIVATIONS, size
        if layer.second is not None:
            size = mean_square_of_inputs(layer)
            yield f"the mean square of the inputs of layer '{name}'", _LARGEST_INPUTS, size


def mean_square_of_inputs(layer: LayerStatistics) -> float:
    """Return the mean of ``E[x^2]`` over a layer's inputs, whose second moments there must be."""
    assert layer.second is not None
    return float(widened(layer.second.diagonal(dim1=1, dim2=2)).mean())
