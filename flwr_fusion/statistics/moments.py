"""What a client measures on its own data for the server: a few moments per layer.

The server needs them to combine networks by least squares and to repair a fused network. They are
sums over samples, never single samples: see `input_moments` for what they reveal and how to send
less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import length_hint
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flwr_fusion.errors import (
    FusionError,
    check_count,
    check_number,
    check_option,
    check_positive,
)
from flwr_fusion.networks import all_finite, key_of
from flwr_fusion.observe import batch_size, run, watch
from flwr_fusion.precision import widened

DETAILS = ("full", "block", "diagonal")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = nn.modules.batchnorm._BatchNorm
MAX_LAYER_BYTES = 4_000_000
# More rows of one layer and batch tell little more: neighbouring patches are nearly the same.
_ROWS_PER_SAMPLE = 16


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Moments of one layer's inputs and outputs on a client's data.

    Parameters
    ----------
    second : Tensor or None
        Second moments ``E[x x^T]`` of the layer's inputs, not centred, float32, as blocks of shape
        (blocks, n, n) over channels x kernel positions: one block for all (full), a block for
        every channel (block), or blocks of one (diagonal). For a convolution x is a patch. None
        where they were not measured, and for norm layers.
    mean : Tensor or None
        ``E[x]``, shape (channels * kernel positions,).
    activation_mean, activation_variance : Tensor
        Shape (outputs,): of the layer's outputs; of a BatchNorm layer's inputs.
    """

    second: Tensor | None
    mean: Tensor | None
    activation_mean: Tensor
    activation_variance: Tensor

    @property
    def detail(self) -> str:
        """How much of the second moments there is: "full", "block", "diagonal", or "none"."""
        if self.second is None:
            return "none"
        if len(self.second) == 1:
            return "full"
        return "diagonal" if self.second.shape[1] == 1 else "block"


Statistics = Mapping[str, LayerStatistics]


def input_moments(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    samples: int | None = 2048,
    detail: Literal["full", "block", "diagonal"] = "full",
    convolutions: bool = False,
    max_layer_bytes: int = MAX_LAYER_BYTES,
    clip: float | None = None,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> dict[str, LayerStatistics]:
    """Measure moments of every layer's inputs and outputs in one pass over a client's data.

    Second moments and means say which directions of a layer's inputs occur, weighted by how often;
    the first layer's are moments of the data themselves: a client with very few samples, or
    samples that are all alike, reveals them. To send less, send the diagonal alone, or clip every
    input vector and add noise. Where the batch is the first axis and every sample gives a layer
    equally many inputs, and **the network does not depend on the samples**, replacing one of ``n``
    samples changes a layer's means by at most ``2 clip / n`` and its second moments by at most
    ``sqrt(2) clip**2 / n`` (Euclidean); Gaussian noise of ``noise`` times these is the Gaussian
    mechanism for each of the tensors. Such a network is the one that was received, or one already
    released with noise; a network that was trained on the samples moves its hidden layers with each
    of them, by far more. Sequences whose batch is the second axis are outside this statement.

    Parameters
    ----------
    model : nn.Module
        The client's network, as it will be sent, or as it was received where `noise` must count. It
        is run in evaluation mode, not modified.
    batches : iterable of inputs
        What the network is called with, batch by batch. Where the iterable has a length, batches
        are taken evenly from all of it; otherwise its first ones, so shuffle it.
    samples : int, optional
        How many samples suffice. None: all.
    detail : {"full", "block", "diagonal"}
        At most this much of the second moments.
    convolutions : bool
        Whether to measure the inputs of convolutions too; `LeastSquares` needs them only where it
        combines convolutions.
    max_layer_bytes : int
        Layers whose second moments are larger send less: blocks over channels, or the diagonal.
    clip : float, optional
        Largest norm of an input or output vector; longer ones are scaled down to it.
    noise : float
        Standard deviation of the noise, relative to the sensitivity. Needs `clip`.
    generator : torch.Generator, optional
        Source of the noise, on the CPU. Default: one of its own, seeded by the system, because
        noise from a seed that others know hides nothing.

    Returns
    -------
    dict of str to LayerStatistics
        For every linear and convolution layer (transposed ones aside) and every BatchNorm that is
        called, by its name; on the CPU, float32.

    Raises
    ------
    FusionError
        If there are no batches, the network cannot be run on them, or the moments are not finite.

    References
    ----------
    Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023,
    section 3 (moments of inputs); Dwork & Roth, "The Algorithmic Foundations of Differential
    Privacy", 2014, appendix A (Gaussian mechanism).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import flwr_fusion as ff
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> moments = ff.statistics.input_moments(model, [torch.randn(32, 4)])
    >>> moments["2"].second.shape
    torch.Size([1, 8, 8])
    """
    _check_arguments(detail, clip, noise)
    generator = source_of_noise(generator)

    def measures_inputs(module: nn.Module) -> bool:
        return isinstance(module, (nn.Linear, *CONVOLUTIONS) if convolutions else nn.Linear)

    names = {module: name for name, module in measurable_layers(model).items()}
    layers: dict[nn.Module, _Accumulator] = {
        module: _Accumulator(
            module,
            _detail_within(module, detail, max_layer_bytes) if measures_inputs(module) else "none",
            clip,
        )
        for module in names
    }

    def see(module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        layers[module].add(inputs.detach(), output.detach())

    with watch(layers, see):
        seen = run(model, evenly(batches, samples), "the network", "inputs to measure moments on")
    measured = {
        names[module]: accumulator.finish(seen, noise, generator)
        for module, accumulator in layers.items()
        if accumulator.was_called
    }
    for name, layer in measured.items():
        if not all(map(all_finite, tensors_of(layer).values())):
            raise FusionError(f"the moments of layer '{name}' are not finite")
    return measured


def tensors_of(layer: LayerStatistics) -> dict[str, Tensor]:
    """Return the tensors that there are of a layer's statistics, by kind."""
    tensors = {
        "activation_mean": layer.activation_mean,
        "activation_variance": layer.activation_variance,
    }
    if layer.second is not None and layer.mean is not None:
        tensors |= {"second": layer.second, "mean": layer.mean}
    return tensors


def measurable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that statistics can be of, by name.

    Parameters
    ----------
    model : nn.Module
        A network.

    Returns
    -------
    dict of str to nn.Module
        Linear and convolution layers and BatchNorm that have a tensor of their own; transposed
        convolutions and layers whose weight is computed from others are left out.
    """
    keys = model.state_dict().keys()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, NORMS, *CONVOLUTIONS))
        and (key_of(name, "weight") in keys or key_of(name, "running_mean") in keys)
    }


def diagonal_blocks(second: Tensor, n: int) -> Tensor:
    """Return second moments as smaller blocks.

    Parameters
    ----------
    second : Tensor
        Shape (blocks, m, m).
    n : int
        The new blocks' size, a divisor of m.

    Returns
    -------
    Tensor
        Shape (blocks * m / n, n, n): the blocks on the diagonal.
    """
    blocks, m, _ = second.shape
    if m == n:
        return second
    split = second.reshape(blocks, m // n, n, m // n, n)
    return split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(-1, n, n)


def independent_blocks(second: Tensor, mean: Tensor, n: int) -> Tensor:
    """Return second moments as larger blocks, as if what is not known were independent.

    ``E[x y] = E[x] E[y]`` for inputs of different blocks.

    Parameters
    ----------
    second : Tensor
        Shape (blocks, m, m).
    mean : Tensor
        Shape (blocks * m,).
    n : int
        The new blocks' size, a multiple of m.

    Returns
    -------
    Tensor
        Shape (blocks * m / n, n, n); positive semi-definite where the given moments are possible.
    """
    m = second.shape[1]
    means = mean.reshape(-1, n)
    result = means.unsqueeze(2) * means.unsqueeze(1)
    known = result.reshape(-1, n // m, m, n // m, m).diagonal(dim1=1, dim2=3)
    known.copy_(second.reshape(-1, n // m, m, m).permute(0, 2, 3, 1))
    return result


def _check_arguments(detail: str, clip: float | None, noise: float) -> None:
    check_option("detail", detail, DETAILS)
    check_clipping(clip, noise)


def check_clipping(clip: float | None, noise: float) -> None:
    """Refuse a norm to clip to that is not positive, and noise that it does not bound."""
    if clip is not None:
        check_positive("clip", clip)
    check_number("noise", noise, 0)
    if noise and clip is None:
        raise FusionError("noise needs clip: without it a single sample can weigh any amount")


def _detail_within(module: nn.Module, detail: str, max_bytes: int) -> str:
    """Return the greatest detail of a layer's second moments that stays below the limit."""
    channels, kernel = input_shape(module)
    sizes = {"full": (1, channels * kernel), "block": (channels, kernel)}
    if getattr(module, "groups", 1) > 1:  # Input channels of different groups never meet.
        del sizes["full"]
    for name in DETAILS[DETAILS.index(detail) :]:
        blocks, n = sizes.get(name, (0, 0))
        if blocks and blocks * n * (n + 1) // 2 * 4 <= max_bytes:
            return name
    return "diagonal"


def input_shape(module: nn.Module) -> tuple[int, int]:
    """Return the number of input channels and of kernel positions."""
    if isinstance(module, nn.Linear):
        return module.in_features, 1
    assert isinstance(module, CONVOLUTIONS)
    return module.in_channels, math.prod(module.kernel_size)


class RunningMoments:
    """Mean and variance per channel over batches, without differences of large numbers."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None  # About the mean.

    def add(self, values: Tensor, axis: int) -> None:
        """Add values whose channels stand along an axis."""
        others = [other for other in range(values.dim()) if other != axis]
        precise = values.to(torch.promote_types(values.dtype, torch.float32))
        variance, mean = torch.var_mean(precise, others, correction=0)
        count = values.numel() // values.shape[axis]
        mean, squares = widened(mean), widened(variance) * count
        if self._mean is not None and self._squares is not None:
            # Squares about the mean add up to M_a + M_b + (mean_b - mean_a)^2 n_a n_b / n (Chan et
            # al. 1983).
            total = self.count + count
            gap = mean - self._mean
            squares = squares + self._squares
            squares += gap.square() * self.count * count / total
            mean = self._mean + gap * count / total
            count = total
        self._mean, self._squares, self.count = mean, squares, count

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance, as precise as their device has them."""
        assert self._mean is not None
        assert self._squares is not None
        return self._mean, self._squares / self.count


class _Accumulator:
    """Running moments of one layer."""

    def __init__(self, module: nn.Module, detail: str, clip: float | None) -> None:
        self._rows = 0
        self._module = module
        self._detail = detail
        self._clip = clip
        self._second: Tensor | None = None
        self._mean: Tensor | None = None
        self._outputs = RunningMoments()

    @property
    def was_called(self) -> bool:
        """Whether there are any outputs."""
        return self._outputs.count > 0

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add one batch: sums in single precision, totals in double."""
        if not outputs.numel():
            return  # A routed layer may see none of a batch.
        if inputs.dim() == 1:
            inputs, outputs = inputs.unsqueeze(0), outputs.unsqueeze(0)
        if isinstance(self._module, NORMS):
            self._add_outputs(inputs, 1)
        else:
            convolution = isinstance(self._module, CONVOLUTIONS)
            self._add_outputs(outputs, 1 if convolution else outputs.dim() - 1)
        if self._detail == "none":
            return
        rows = clipped(_input_rows(self._module, inputs), self._clip)
        self._rows += len(rows)
        self._mean = _plus(self._mean, rows.sum(0))
        self._second = _plus(self._second, self._products(rows))

    def _products(self, rows: Tensor) -> Tensor:
        if self._detail == "full":
            return (rows.T @ rows).unsqueeze(0)  # sum of x x^T
        if self._detail == "diagonal":
            return rows.square().sum(0).reshape(-1, 1, 1)
        channels, kernel = input_shape(self._module)
        blocks = rows.reshape(-1, channels, kernel).transpose(0, 1)
        products: Tensor = blocks.transpose(1, 2) @ blocks
        return products

    def _add_outputs(self, values: Tensor, axis: int) -> None:
        if self._clip is not None:
            rows = values.movedim(axis, -1).flatten(0, -2).float()
            values, axis = clipped(rows, self._clip), 1
        self._outputs.add(values, axis)

    def finish(self, samples: int, noise: float, generator: torch.Generator) -> LayerStatistics:
        """Return the moments, with noise where it is asked for."""
        second = None if self._second is None else (self._second / self._rows).float().cpu()
        mean = None if self._mean is None else (self._mean / self._rows).float().cpu()
        activation_mean, activation_variance = (t.float().cpu() for t in self._outputs.finish())
        if noise and self._clip is not None:
            # Sensitivities of means of vectors of norm C: 2 C / n, and sqrt(2) C^2 / n of x x^T.
            deviation = 2 * noise * self._clip / samples
            squared = 2**0.5 * noise * self._clip**2 / samples
            # Noise goes on means over samples, E[z] and E[z^2], from which the variance follows.
            raw = activation_variance + activation_mean.square()
            activation_mean = with_noise(activation_mean, deviation, generator)
            raw = with_noise(raw, squared, generator)
            activation_variance = (raw - activation_mean.square()).clamp(min=0)
            if second is not None and mean is not None:
                second = nearest_positive(with_symmetric_noise(second, squared, generator))
                # What noise has made impossible would be refused.
                mean = possible_mean(with_noise(mean, deviation, generator), second)
        return LayerStatistics(second, mean, activation_mean, activation_variance)


def clipped(rows: Tensor, norm: float | None) -> Tensor:
    """Return rows, those longer than a norm scaled down to it."""
    if norm is None:
        return rows
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    scale: Tensor = norm / lengths.clamp(min=norm)
    return rows * scale


def source_of_noise(generator: torch.Generator | None) -> torch.Generator:
    """Return a generator, or a new one seeded by the system: a client's own seed may be known."""
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    return generator


def with_noise(tensor: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Return a tensor with Gaussian noise."""
    return tensor + deviation * torch.randn(tensor.shape, generator=generator)


def with_symmetric_noise(blocks: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Return symmetric blocks with Gaussian noise that is symmetric, too."""
    drawn = deviation * torch.randn(blocks.shape, generator=generator)
    return blocks + drawn.triu() + drawn.triu(1).transpose(1, 2)


def nearest_positive(blocks: Tensor) -> Tensor:
    """Return the nearest positive semi-definite blocks: what noise made negative becomes zero."""
    values, vectors = torch.linalg.eigh(blocks.double())
    positive: Tensor = (vectors * values.clamp(min=0).unsqueeze(1)) @ vectors.transpose(1, 2)
    return positive.float()


def possible_mean(mean: Tensor, second: Tensor) -> Tensor:
    """Return a mean, scaled down where no vectors of these second moments can have it.

    Possible is ``mean^T second^-1 mean <= 1``, block by block: then ``second - mean mean^T``, the
    covariance, is positive semi-definite.
    """
    blocks = second.double()
    means = mean.double().reshape(len(blocks), -1, 1)
    values, vectors = torch.linalg.eigh(blocks)
    least = 1e-6 * values.amax(1, keepdim=True).clamp(min=1e-12)
    # Along directions that do not occur the mean has nothing.
    along = (vectors.mT @ means).squeeze(2).masked_fill(values < least, 0)
    lengths = (along.square() / values.clamp(min=least)).sum(1, keepdim=True).sqrt()
    along = along / lengths.clamp(min=1)
    possible: Tensor = (vectors @ along.unsqueeze(2)).flatten().to(mean)
    return possible


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return widened(part) if total is None else total + widened(part)


def _input_rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return a layer's inputs as (rows, channels * kernel positions), a patch a row."""
    if isinstance(module, nn.Linear):
        rows = inputs.reshape(-1, *inputs.shape[-2:]) if inputs.dim() > 2 else inputs[:, None]
        return _spread(rows, 1).flatten(0, 1).float()
    assert isinstance(module, CONVOLUTIONS)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    patches = nn.functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    spatial = len(module.kernel_size)
    most = round(_ROWS_PER_SAMPLE ** (1 / spatial))
    for axis, size in enumerate(module.kernel_size, start=2):
        dilation, stride = module.dilation[axis - 2], module.stride[axis - 2]
        windows = patches.unfold(axis, (size - 1) * dilation + 1, stride)
        patches = _spread(windows, axis, most)[..., ::dilation]
    # Now (samples, channels, *positions, *kernel).
    return patches.movedim(1, 1 + spatial).flatten(1 + spatial).flatten(0, spatial).float()


def _spread(rows: Tensor, axis: int, most: int = _ROWS_PER_SAMPLE) -> Tensor:
    """Return at most a few positions along an axis, evenly spread."""
    count = rows.shape[axis]
    if count <= most:
        return rows
    index = torch.linspace(0, count - 1, most, device=rows.device).long()
    return rows.index_select(axis, index)


def evenly(batches: Iterable[Any], samples: int | None) -> Iterator[Any]:
    """Yield batches until there are enough samples, evenly from all of a sized iterable."""
    if isinstance(batches, Tensor):
        raise FusionError("batches must be an iterable of batches, not one tensor: give [tensor]")
    if samples is None:
        yield from batches
        return
    check_count("samples", samples)
    total, needed, seen = length_hint(batches), 0, 0
    for n, batch in enumerate(batches):
        size = batch_size(batch)
        needed = needed or -(-samples // max(size, 1))
        # Of all batches the first in every one of as many equal parts as are needed.
        if n and needed < total and n * needed // total == (n - 1) * needed // total:
            continue
        yield batch
        seen += size
        if seen >= samples:
            return
