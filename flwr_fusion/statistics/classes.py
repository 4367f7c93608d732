"""Class moments: what the last layer of a network reads of every class.

From them the server computes a new last layer (`flwr_fusion.calibrated_head`). They are sums over
samples, so those of several clients are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flwr_fusion.errors import FusionError, TooFewSamplesError, check_count
from flwr_fusion.networks import key_of
from flwr_fusion.observe import evaluation_mode, output_of, watch
from flwr_fusion.statistics.moments import (
    check_clipping,
    clipped,
    evenly,
    nearest_positive,
    source_of_noise,
    with_noise,
    with_symmetric_noise,
)
from flwr_fusion.statistics.wire import HUGE, check_numbers, symmetric, upper_triangles

MOST_SAMPLES = 1e9
# By how much sums in single precision may break what holds for all vectors.
_ROUNDING = 1e-4
_MOST_TIMES = 50


@dataclass(frozen=True, eq=False)
class ClassMoments:
    """Sums over samples of a last layer's inputs x, by class.

    Parameters
    ----------
    counts : Tensor
        Shape (classes,), float32: number of samples ``n_c`` of every class.
    sums : Tensor
        Shape (classes, d): ``s_c``, the sum of x over the samples of class c.
    second : Tensor
        Shape (d, d): the sum of ``x x^T`` over all samples.
    layer : str
        Name of the last layer.
    """

    counts: Tensor
    sums: Tensor
    second: Tensor
    layer: str

    @property
    def samples(self) -> float:
        """Number of samples of all classes."""
        return float(self.counts.sum())

    def scaled(self, factor: float) -> ClassMoments:
        """Return the moments with every sample counted ``factor`` times."""
        return ClassMoments(
            factor * self.counts, factor * self.sums, factor * self.second, self.layer
        )

    def means(self) -> Tensor:
        """Return the means of the classes, shape (classes, d); of one without samples 0."""
        return self.sums / self.counts.clamp(min=1e-12).unsqueeze(1)

    def within(self) -> Tensor:
        """Return the scatter within the classes, ``sum x x^T - sum_c s_c s_c^T / n_c``."""
        means = self.means()
        return self.second - means.T @ (self.counts.unsqueeze(1) * means)


def class_moments(
    model: nn.Module,
    labelled_batches: Iterable[Any],
    *,
    samples: int | None = 512,
    least_count: int = 1,
    clip: float | None = None,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> ClassMoments:
    """Measure sums of the last layer's inputs for every class, in one pass over labelled data.

    The counts are the client's histogram of labels, and the sum of a class with one sample is that
    sample's features: `least_count` leaves out rare classes. With `clip` every vector of inputs is
    scaled down to this norm, and replacing one sample changes the counts by at most ``sqrt(2)``,
    the sums by ``2 clip`` and the second moments by ``sqrt(2) clip**2`` (Euclidean), **where the
    network does not depend on the samples**, or has been released with noise; Gaussian noise of
    ``noise`` times these is the Gaussian mechanism for each of the tensors. Noise comes first:
    which classes are rare is then decided by the noisy counts, and at least by one sample.

    Parameters
    ----------
    model : nn.Module
        The network; its output is that of one linear layer with a bias. It is run in evaluation
        mode, not modified.
    labelled_batches : iterable of (inputs, labels)
        The labels are whole numbers of shape (samples,). Where the iterable has a length, batches
        are taken evenly from all of it; otherwise its first ones, so shuffle it.
    samples : int, optional
        How many samples suffice. None: all.
    least_count : int
        Classes with fewer samples are left out.
    clip : float, optional
        Largest norm of a vector of inputs.
    noise : float
        Standard deviation of the noise, relative to the sensitivity. Needs `clip`.
    generator : torch.Generator, optional
        Source of the noise, on the CPU. Default: one of its own, seeded by the system.

    Returns
    -------
    ClassMoments
        On the CPU, float32.

    Raises
    ------
    FusionError
        If there are no batches, no single last layer, or no labels of its classes; a
        `flwr_fusion.errors.TooFewSamplesError` if no class has enough samples.

    References
    ----------
    Hastie, Tibshirani & Friedman, "The Elements of Statistical Learning", 2009, section 4.3; Dwork
    & Roth, "The Algorithmic Foundations of Differential Privacy", 2014, appendix A.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import flwr_fusion as ff
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> batch = torch.randn(32, 4), torch.randint(3, (32,))
    >>> ff.statistics.class_moments(model, [batch]).sums.shape
    torch.Size([3, 8])
    """
    check_clipping(clip, noise)
    check_count("least_count", least_count)
    sums: ClassMoments | None = None
    for batch in evenly(labelled_batches, samples):
        inputs, labels = _parts(batch)
        layer, features = last_layer(model, inputs)
        head = model.get_submodule(layer)
        assert isinstance(head, nn.Linear)
        # Not every device has double precision.
        part = _sums_of(layer, clipped(features.cpu().double(), clip), labels, head.out_features)
        sums = part if sums is None else added([sums, part])
    if sums is None:
        raise FusionError("there are no labelled batches to measure class moments on")
    return _released(sums, least_count, clip, noise, source_of_noise(generator))


def last_layer(model: nn.Module, inputs: Any) -> tuple[str, Tensor]:
    """Return the name of the linear layer whose output is the network's, and what it reads.

    Raises
    ------
    FusionError
        If there is none, it has no bias, or it gives more than one vector for a sample.
    """
    calls: list[tuple[nn.Linear, Tensor]] = []
    names: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }

    def see(module: nn.Module, given: Tensor, output: Tensor) -> None:
        if isinstance(module, nn.Linear) and given.dim() == 2:
            calls.append((module, given.detach()))

    with watch(names, see), evaluation_mode(model), torch.no_grad():
        logits = output_of(model, inputs, "the network", "labelled inputs")
    refused = "a calibrated head needs a network that ends with one linear layer with a bias: "
    if not isinstance(logits, Tensor):
        raise FusionError(f"{refused}this one returns {type(logits).__name__}")
    with torch.no_grad():  # Computed again: what follows a layer may have worked in place.
        last = [
            (module, given)
            for module, given in calls
            if logits.shape == (len(given), module.out_features)
            and torch.allclose(module(given), logits, rtol=1e-3, atol=1e-5, equal_nan=True)
        ]
    if not last:
        raise FusionError(
            f"{refused}of this one, something follows its last linear layer, or it is called with "
            "more than a vector for each sample"
        )
    if len(last) > 1:
        raise FusionError(f"{refused}this one has {len(last)} that give what it returns")
    (module, features), name = last[0], names[last[0][0]]
    if module.bias is None or key_of(name, "weight") not in model.state_dict():
        raise FusionError(f"{refused}layer '{name}' has no bias, or no weight of its own")
    return name, features


def added(parts: Sequence[ClassMoments]) -> ClassMoments:
    """Return the moments of all samples together; refuse those of different layers."""
    if len({(part.layer, part.sums.shape) for part in parts}) > 1:
        raise FusionError(f"the class moments are of layers {sorted({p.layer for p in parts})}")
    return ClassMoments(
        torch.stack([part.counts for part in parts]).sum(0),
        torch.stack([part.sums for part in parts]).sum(0),
        torch.stack([part.second for part in parts]).sum(0),
        parts[0].layer,
    )


def scaled_to(parts: Sequence[ClassMoments], weights: Sequence[float]) -> ClassMoments:
    """Return clients' moments together, in proportion to weights.

    Their number of samples stays how many there are.
    """
    unit = sum(part.samples for part in parts) / sum(weights)
    pairs = zip(parts, weights, strict=True)
    return added([part.scaled(unit * weight / part.samples) for part, weight in pairs])


def with_absent(now: ClassMoments, before: ClassMoments) -> ClassMoments:
    """Return moments with the earlier sums of classes that nobody has now.

    Their samples are taken to vary about their means as the others do now.
    """
    absent = (now.counts == 0) & (before.counts > 0)
    # As many samples as if the earlier round had had no more than this one.
    share = min(1.0, now.samples / before.samples)
    counts, sums = share * before.counts * absent, share * before.sums * absent.unsqueeze(1)
    means = sums / counts.clamp(min=1e-12).unsqueeze(1)
    covariance = now.within() / now.samples
    second = now.second + means.T @ sums + counts.sum() * covariance
    return ClassMoments(now.counts + counts, now.sums + sums, second, now.layer)


def with_shares(moments: ClassMoments, shares: Tensor) -> ClassMoments:
    """Return moments as of samples in other shares of the classes that are in both.

    The shares may be of any sum. The classes' means and the covariance within them stay. A sample
    counts as fifty at most: the mean of few tells little.
    """
    both = (moments.counts > 0) & (shares > 0)
    unit = moments.counts[both].sum() / shares[both].sum().clamp(min=1e-30)
    counts = torch.where(both, unit * shares, moments.counts)
    counts = counts.minimum(_MOST_TIMES * moments.counts)
    means = moments.means()
    sums = counts.unsqueeze(1) * means
    return ClassMoments(counts, sums, moments.within() + means.T @ sums, moments.layer)


def pack_classes(moments: ClassMoments) -> dict[str, Tensor]:
    """Return class moments as named tensors to send: of the second moments the upper triangle."""
    packed = {
        "counts": moments.counts,
        "sums": moments.sums,
        "second": upper_triangles(moments.second[None])[0],
    }
    return {key_of(moments.layer, kind): t.contiguous() for kind, t in packed.items()}


def unpack_classes(packed: Mapping[str, Tensor], model: nn.Module, layer: str) -> ClassMoments:
    """Return what `pack_classes` packed, checked against the layer that it must be of.

    Raises
    ------
    FusionError
        If tensors are missing, of wrong shapes, not finite, or cannot be sums over samples.
    """
    head = model.get_submodule(layer)
    assert isinstance(head, nn.Linear)
    d, classes = head.in_features, head.out_features
    shapes = {"counts": (classes,), "sums": (classes, d), "second": (d * (d + 1) // 2,)}
    if packed.keys() != {key_of(layer, kind) for kind in shapes}:
        raise FusionError(f"class moments of layer '{layer}' are needed, not {sorted(packed)[:5]}")
    counts, sums, triangle = (
        check_numbers(f"{layer}.{kind}", packed[key_of(layer, kind)], [shape])
        for kind, shape in shapes.items()
    )
    moments = ClassMoments(counts, sums, symmetric(triangle[None], d)[0], layer)
    check_class_moments(moments)
    return moments


def check_class_moments(moments: ClassMoments) -> None:
    """Refuse class moments that cannot be sums over samples."""
    tensors = (moments.counts, moments.sums, moments.second)
    if not all(bool((tensor.abs() < HUGE).all()) for tensor in tensors):
        raise FusionError("the class moments have values that are not finite or huge")
    if bool((moments.counts < 0).any()) or not 0 < moments.samples <= MOST_SAMPLES:
        raise FusionError(
            f"the class moments are of {moments.samples:g} samples, some of them perhaps negative"
        )
    if bool((moments.sums[moments.counts == 0] != 0).any()):
        raise FusionError("the class moments have sums of classes without samples")
    # What is left within the classes is a sum of squares.
    scale = float(moments.second.diagonal().sum())
    shifted = moments.within().double()
    shifted.diagonal().add_(_ROUNDING * max(scale, 0.0) + 1e-6)
    if scale < 0 or bool(torch.linalg.cholesky_ex(shifted).info):
        raise FusionError("the class moments contradict each other: no samples can have them")


def _parts(batch: Any) -> tuple[Any, Tensor]:
    """Return inputs and labels of a batch."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise FusionError(
            f"labelled batches must be pairs (inputs, labels), not {type(batch).__name__}: give "
            "such pairs, or to attach_class_moments labelled=, a function of a batch that returns "
            "both"
        )
    inputs, labels = batch
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
        raise FusionError("labels must be a tensor of whole numbers, one for each sample")
    return inputs, labels


def _sums_of(layer: str, features: Tensor, labels: Tensor, classes: int) -> ClassMoments:
    if len(labels) != len(features) or bool(((labels < 0) | (labels >= classes)).any()):
        raise FusionError(f"labels must be from 0 to {classes - 1}, one for each sample")
    chosen = nn.functional.one_hot(labels.cpu().long(), classes).to(features)
    return ClassMoments(chosen.sum(0), chosen.T @ features, features.T @ features, layer)


def _released(
    moments: ClassMoments,
    least_count: int,
    clip: float | None,
    noise: float,
    generator: torch.Generator,
) -> ClassMoments:
    """Return what a client tells: without rare classes, with noise where it is asked for."""
    counts, sums, second = moments.counts, moments.sums, moments.second
    if noise and clip is not None:
        counts = with_noise(counts, 2**0.5 * noise, generator)
        sums = with_noise(sums, 2 * noise * clip, generator)
        second = with_symmetric_noise(second[None], 2**0.5 * noise * clip**2, generator)[0]
    rare = counts < max(least_count, 1)
    if not noise:
        # The samples of a rare class leave the second moments as its mean; their scatter cannot be
        # told from the others'.
        second = second - (sums[rare] / counts[rare].clamp(min=1).unsqueeze(1)).T @ sums[rare]
    counts, sums = counts.masked_fill(rare, 0), sums.masked_fill(rare[:, None], 0)
    if noise:
        # What noise has made impossible would be refused.
        within = ClassMoments(counts, sums, second, moments.layer).within()
        second = second - within + nearest_positive(within[None])[0]
    released = ClassMoments(counts.float(), sums.float(), second.float(), moments.layer)
    if not released.samples > 0:
        text = f"no class has {max(least_count, 1)} samples: there is nothing to tell"
        raise TooFewSamplesError(text)
    return released
