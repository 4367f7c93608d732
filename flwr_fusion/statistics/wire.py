"""Statistics as they travel: packed by the client, unpacked and checked by the server."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flwr_fusion.errors import FusionError
from flwr_fusion.networks import key_of
from flwr_fusion.statistics.moments import (
    NORMS,
    LayerStatistics,
    Statistics,
    input_shape,
    measurable_layers,
    tensors_of,
)

# By how much single precision may break what holds for all vectors, relative to E[|x|^2].
_ROUNDING = 1e-5
# Far above any network's values, far below where single precision overflows.
HUGE = 1e15


def pack(statistics: Statistics) -> dict[str, Tensor]:
    """Return statistics as named tensors to send: of symmetric blocks the upper triangle.

    Parameters
    ----------
    statistics : mapping of str to LayerStatistics
        From `input_moments`.

    Returns
    -------
    dict of str to Tensor
        ``LAYER.second`` of shape (blocks, n (n + 1) / 2), ``LAYER.mean``,
        ``LAYER.activation_mean`` and ``LAYER.activation_variance``.
    """
    packed: dict[str, Tensor] = {}
    for name, layer in statistics.items():
        tensors = tensors_of(layer)
        if layer.second is not None:
            tensors["second"] = upper_triangles(layer.second)
        packed |= {key_of(name, kind): tensor for kind, tensor in tensors.items()}
    return packed


def unpack(
    packed: Mapping[str, Tensor], model: nn.Module, max_layer_bytes: int | None = None
) -> dict[str, LayerStatistics]:
    """Return the statistics that `pack` packed, checked against the network they are of.

    Parameters
    ----------
    packed : mapping of str to Tensor
        What was received.
    model : nn.Module
        The network.
    max_layer_bytes : int, optional
        How large a layer's second moments may be, unless they are the diagonal. Default: no limit.

    Returns
    -------
    dict of str to LayerStatistics
        Statistics that pass `check`.

    Raises
    ------
    FusionError
        Naming the layer whose statistics cannot be those of the network.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in packed.items():
        name, _, kind = key.rpartition(".")
        layers.setdefault(name, {})[kind] = tensor
    modules = measurable_layers(model)
    statistics = {}
    for name, tensors in layers.items():
        second, diagonal = tensors.get("second"), tensors.get("mean")
        too_large = (
            second is not None
            and diagonal is not None
            and (second.numel() > max(diagonal.numel(), (max_layer_bytes or math.inf) / 4))
        )
        if too_large:
            raise FusionError(f"the moments of layer '{name}' are larger than max_layer_bytes")
        statistics[name] = _unpacked(name, tensors, modules.get(name))
    check(statistics, model)
    return statistics


def check(statistics: Statistics, model: nn.Module) -> None:
    """Refuse statistics that cannot be those of a network.

    Parameters
    ----------
    statistics : mapping of str to LayerStatistics
        From `input_moments` or `unpack`.
    model : nn.Module
        The network.

    Raises
    ------
    FusionError
        Naming the layer whose statistics are unknown, of a wrong shape, not finite or impossible
        (negative variances, second moments that contradict the means or each other).
    """
    modules = measurable_layers(model)
    for name, layer in statistics.items():
        if not isinstance(layer, LayerStatistics):
            raise FusionError(f"the statistics of layer '{name}' are {layer!r:.60}")
        module = modules.get(name)
        if module is None:
            raise FusionError(f"the network has no layer '{name}' that statistics could be of")
        if (layer.second is None) != (layer.mean is None):
            raise FusionError(f"the statistics of layer '{name}' lack some moments of its inputs")
        if layer.second is not None and layer.mean is not None:
            _check_inputs(name, layer.second, layer.mean, module)
        for kind in ("activation_mean", "activation_variance"):
            check_numbers(f"{name}.{kind}", getattr(layer, kind), [(_outputs(module),)])
        if bool((layer.activation_variance < 0).any()):
            raise FusionError(f"statistics '{name}.activation_variance' are negative")


def size_in_bytes(statistics: Statistics) -> int:
    """Return how many bytes of numbers `pack` makes of statistics.

    Parameters
    ----------
    statistics : mapping of str to LayerStatistics
        From `input_moments`.

    Returns
    -------
    int
        Bytes, without names and headers.
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in pack(statistics).values())


def largest_size(model: nn.Module, max_layer_bytes: int) -> int:
    """Return how many bytes of numbers statistics of a network can have within a limit.

    Parameters
    ----------
    model : nn.Module
        The network.
    max_layer_bytes : int
        How large a layer's second moments may be, unless they are the diagonal.

    Returns
    -------
    int
        Bytes, without names and headers.
    """
    total = 0
    for module in measurable_layers(model).values():
        total += 8 * _outputs(module)
        if not isinstance(module, NORMS):
            inputs = math.prod(input_shape(module))
            total += 4 * inputs + max(4 * inputs, min(max_layer_bytes, 2 * inputs * (inputs + 1)))
    return total


def _outputs(module: nn.Module) -> int:
    """Return the number of a layer's activations that are measured."""
    if isinstance(module, NORMS):
        return module.num_features
    assert isinstance(module.weight, Tensor)
    return len(module.weight)


def _block_shapes(module: nn.Module) -> list[tuple[int, int]]:
    """Return number and size of the blocks that a layer's second moments can have."""
    channels, kernel = input_shape(module)
    sizes = [1, kernel]
    if getattr(module, "groups", 1) == 1:
        sizes.append(channels * kernel)
    return [(channels * kernel // n, n) for n in sizes]


def _unpacked(
    name: str, tensors: Mapping[str, Tensor], module: nn.Module | None
) -> LayerStatistics:
    outputs = {"activation_mean", "activation_variance"}
    if tensors.keys() not in (outputs, outputs | {"second", "mean"}):
        raise FusionError(f"layer '{name}' has no statistics of the kinds {sorted(tensors)}")
    packed, second = tensors.get("second"), None
    if packed is not None:
        if module is None or isinstance(module, NORMS):
            raise FusionError(f"the network has no layer '{name}' whose inputs are measured")
        # Before anything is allocated: a few bytes can claim any number of triangles.
        triangles = {(count, n * (n + 1) // 2): n for count, n in _block_shapes(module)}
        check_numbers(f"{name}.second", packed, list(triangles))
        second = symmetric(packed, triangles[packed.shape[0], packed.shape[1]])
    return LayerStatistics(
        second,
        tensors.get("mean"),
        tensors["activation_mean"],
        tensors["activation_variance"],
    )


def upper_triangles(blocks: Tensor) -> Tensor:
    """Return the upper triangles of symmetric blocks, one in a row."""
    rows, columns = torch.triu_indices(*blocks.shape[1:])
    return blocks[:, rows, columns].contiguous()


def symmetric(packed: Tensor, n: int) -> Tensor:
    """Return symmetric blocks from their upper triangles."""
    rows, columns = torch.triu_indices(n, n)
    blocks = packed.new_zeros(len(packed), n, n)
    blocks[:, rows, columns] = packed
    blocks[:, columns, rows] = packed
    return blocks


def _check_inputs(name: str, second: Tensor, mean: Tensor, module: nn.Module) -> None:
    """Check the moments of a layer's inputs."""
    if isinstance(module, NORMS):
        raise FusionError(f"the inputs of layer '{name}' have no second moments")
    channels, kernel = input_shape(module)
    shapes = [(count, n, n) for count, n in _block_shapes(module)]
    check_numbers(f"{name}.mean", mean, [(channels * kernel,)])
    check_numbers(f"{name}.second", second, shapes)
    if bool((second.diagonal(dim1=1, dim2=2) < 0).any()):
        raise FusionError(f"statistics '{name}.second' have negative mean squares")
    means = mean.double().reshape(len(second), -1)
    # E[x x^T] - E[x] E[x]^T, the covariance, is positive semi-definite.
    covariance = second.double() - means.unsqueeze(2) * means.unsqueeze(1)
    rounding = _ROUNDING * second.diagonal(dim1=1, dim2=2).double().sum(1, keepdim=True) + 1e-6
    covariance.diagonal(dim1=1, dim2=2).add_(rounding)
    lopsided = (second - second.mT).abs() > rounding.unsqueeze(2)
    if bool(lopsided.any()) or bool(torch.linalg.cholesky_ex(covariance).info.any()):
        raise FusionError(f"statistics '{name}.second' contradict the means or each other")


def check_numbers(name: str, tensor: Tensor, shapes: Sequence[tuple[int, ...]]) -> Tensor:
    """Return a tensor of one of some shapes; refuse others, and values that are not finite."""
    if tuple(tensor.shape) not in shapes or tensor.dtype != torch.float32:
        raise FusionError(
            f"statistics '{name}' are {tensor.dtype} of shape {tuple(tensor.shape)}, not float32 "
            f"of shape {' or '.join(map(str, shapes))}"
        )
    if not bool((tensor.abs() < HUGE).all()):
        raise FusionError(f"statistics '{name}' have values that are not finite or huge")
    return tensor
