"""Statistics as they travel: packed by the client, unpacked and checked by the server."""

from __future__ import annotations

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

# By how much single precision may break |E[x y]|^2 <= E[x^2] E[y^2].
_ROUNDING = 1.001
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


def unpack(packed: Mapping[str, Tensor], model: nn.Module) -> dict[str, LayerStatistics]:
    """Return the statistics that `pack` packed, checked against the network they are of.

    Parameters
    ----------
    packed : mapping of str to Tensor
        What was received.
    model : nn.Module
        The network.

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
    statistics = {
        name: _unpacked(name, tensors, modules.get(name)) for name, tensors in layers.items()
    }
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
        (negative mean squares, second moments that contradict the means or each other).
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
    squares = second.diagonal(dim1=1, dim2=2)
    if bool((squares < 0).any()):
        raise FusionError(f"statistics '{name}.second' have negative mean squares")
    roots = squares.sqrt() * _ROUNDING + 1e-6
    products = roots.unsqueeze(1) * roots.unsqueeze(2)
    if bool((mean.reshape(squares.shape).abs() > roots).any() or (second.abs() > products).any()):
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
