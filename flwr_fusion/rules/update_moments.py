"""Moments of the update: least squares with nothing asked of the clients.

A gradient step is a sum of (output gradient) x (input)^T, so the change of a weight tells which
directions of its inputs a client has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flwr_fusion.fusion import Client, Fusion
from flwr_fusion.maps import Maps, map_tensor
from flwr_fusion.networks import key_of, module_of, names_of_not_finite
from flwr_fusion.precision import decomposable, widened, widest_of
from flwr_fusion.progress import tracked
from flwr_fusion.rules.ridge import ridge_solution
from flwr_fusion.rules.running_means import running_mean_sums
from flwr_fusion.rules.weight_view import WeightView

if TYPE_CHECKING:
    from flwr_fusion.rules.least_squares import LeastSquares

# Moments are symmetric: half of them is found in strips of at least so many rows.
_STRIPS, _STRIP = 4, 256
# Moments of more inputs are solved in single precision, where the ridge is not smaller than this.
_SMALL, _SAFE_RIDGE = 256, 0.01
# Clients whose last layers agree more than this differ by noise alone, which the mean takes out.
_AGREEMENT_OF_NOISE = 0.2
# Changes of fewer values agree or contradict by chance.
_FEWEST_OUTPUTS = 4


class UpdateSums:
    """The running sums of one weight, a client at a time.

    With the mean ``A``, the weight ``S`` that was sent out and a client's ``W_k``, all in the fused
    channels, ``D_k = W_k - S`` estimates the second moment of the client's inputs,
    ``G_k = D_k^T D_k / |D_k|^2``. Held are ``G = sum_k w_k G_k`` and
    ``R = sum_k w_k (W_k - A) G_k``; the weight is ``A + R (G + r)^-1``, within both bounds.
    """

    def __init__(self, mean: Tensor, sent: Tensor, view: WeightView, options: LeastSquares) -> None:
        self._mean, self._sent, self._view = mean.float(), sent.float(), view
        self._options = options
        blocks, _, size = view.blocks(self._mean).shape
        self._moments = self._mean.new_zeros(blocks, size, size)
        self._residual = torch.zeros_like(view.blocks(self._mean))
        # Of the clients' rows: norm, distance from the mean, weight.
        self._rows = torch.zeros_like(view.row_norms(self._mean)).repeat(3, 1, 1)

    def add(self, value: Tensor, present: Tensor | None, weight: float) -> None:
        """Add a client's weight in the fused channels; ``present``: which values it has, or all."""
        view, difference, update = self._view, value - self._mean, value - self._sent
        if present is not None:
            value, difference, update = value * present, difference * present, update * present
        norms = view.row_norms(value), view.row_norms(difference)
        has_row = torch.ones_like(norms[0])
        if present is not None:
            has_row = (view.row_norms(present) > 0).float()
        self._rows += weight * has_row * torch.stack([*norms, has_row])
        update, rows = view.blocks(update), view.blocks(difference)
        squares = update.square().sum(1)
        # s G + (1 - s) diag(G), G divided by its trace: no client gains by scaling its update.
        size, shrinkage = squares.sum(), self._options.shrinkage
        share = torch.where(size > 0, weight / size, 0.0)
        diagonal = squares * (1 - shrinkage) * share
        self._moments.diagonal(dim1=1, dim2=2).add_(diagonal)
        self._residual.addcmul_(rows, diagonal.unsqueeze(1))
        # (W_k - A) G_k, by whichever product is the smaller one: of the inputs or of the outputs.
        _, outputs, inputs = update.shape
        if outputs < inputs:
            scaled = update * (shrinkage * share)
            _add_lower_products(self._moments, update, scaled)
            self._residual.baddbmm_(rows @ update.mT, scaled)
        else:
            products = update.mT @ update
            products *= shrinkage * share
            self._moments += products
            self._residual.baddbmm_(rows, products)

    def solve(self, strength: float) -> Tensor:
        """Return the combined weight; not a number where no client has moved.

        ``strength`` is the share of the way from the mean to the least-squares solution.
        """
        options, size = self._options, self._moments.shape[1]
        # The ridge bounds the condition by about size / ridge: then single precision will do.
        single = size > _SMALL and options.ridge >= _SAFE_RIDGE
        precision = torch.float32 if single else torch.float64
        moments = decomposable(self._moments).to(precision, copy=True)
        residual = decomposable(self._residual).to(precision)
        solved = ridge_solution(moments, residual, options.ridge)
        change = solved.to(self._mean.device, widest_of(self._mean.device))
        return self._bounded(strength * self._view.weight(change))

    def _bounded(self, change: Tensor) -> Tensor:
        """Return the mean plus its change, within the bound on every row, then on the norm."""
        norms, distances = self._rows[:2] / self._rows[2].clamp(min=1e-12)
        if self._options.bound in ("auto", "change"):
            rows = self._view.row_norms(change)
            scale = (distances / rows.clamp(min=1e-30)).clamp(max=1)
            change = self._view.scaled_rows(change, scale)
        weight = widened(self._mean) + change
        if self._options.bound not in ("auto", "norm"):
            return weight
        # The clients' mean norm is never below that of their mean.
        bound = torch.maximum(norms.norm(), self._mean.norm())
        bounded: Tensor = weight * (bound / weight.norm().clamp(min=1e-30)).clamp(max=1)
        return bounded


def _add_lower_products(moments: Tensor, update: Tensor, scaled: Tensor) -> None:
    """Add ``D^T E`` of proportional D and E to the lower triangle of moments; above it in part."""
    size = update.shape[2]
    step = max(_STRIP, -(-size // _STRIPS))
    for start in range(0, size, step):
        columns = slice(start, start + step)
        part = moments[:, columns, : start + step]
        part.baddbmm_(update[:, :, columns].mT, scaled[:, :, : start + step])


class Agreement:
    """How far the clients' changes of a tensor agree, from 1 (all equal) to 0 (unrelated) or below.

    With changes ``d_k`` and weights ``w_k`` that sum to 1 it is
    ``(|sum_k w_k d_k|^2 / sum_k w_k |d_k|^2 - q) / (1 - q)``, where ``q = sum_k w_k^2`` is what
    unrelated changes give.
    """

    def __init__(self) -> None:
        self._weights: list[float] = []
        self._sum: Tensor | None = None
        self._squares = 0.0

    def add(self, change: Tensor, weight: float) -> None:
        """Add a client's change."""
        self._weights.append(weight)
        self._sum = weight * change + (0 if self._sum is None else self._sum)
        self._squares += weight * float(change.square().sum())

    @property
    def value(self) -> float:
        """The agreement; 0 of a single client, and where nothing has changed."""
        total = sum(self._weights)
        unrelated = sum(weight**2 for weight in self._weights) / max(total, 1e-12) ** 2
        if self._sum is None or not self._squares or unrelated > 1 - 1e-9:
            return 0.0
        found = float(self._sum.square().sum()) / (total * self._squares)
        return (found - unrelated) / (1 - unrelated)


def without_common_shift(change: Tensor) -> Tensor:
    """Return a last layer's change without what all outputs have in common, which softmax ignores.

    Gradients through softmax have no such part. Steps of Adam do: whatever a client lacks goes down
    by as much, at clients that lack different labels alike.
    """
    shared = change.dim() in (1, 2) and len(change) >= _FEWEST_OUTPUTS  # A bias, a linear layer.
    return change - change.mean(0) if shared else change


def strength_of(agreement: float) -> float:
    """Return how far to go from the mean, given how far the clients' last layers agree.

    Where clients hold different labels their changes of the last layer's bias contradict each
    other; where they are samples of one distribution the changes agree, and what is left of the
    updates is noise, of which the mean is the best estimate.
    """
    return min(1.0, max(0.0, 1 - agreement / _AGREEMENT_OF_NOISE))


def last_tensor(target: Mapping[str, Tensor]) -> str:
    """Return the key of the last layer's bias, or of its weight if it has none or a tiny one.

    The last layer is the one that is registered last.
    """
    weights = [name for name, t in target.items() if t.is_floating_point() and t.dim() > 1]
    last = weights[-1] if weights else next(iter(target))
    bias = key_of(module_of(last), "bias")
    return bias if bias in target and len(target[bias]) >= _FEWEST_OUTPUTS else last


def by_update_moments(
    fusion: Fusion, maps: Sequence[Maps], mean: Mapping[str, Tensor], options: LeastSquares
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights that moments of the updates give, and the running means that fit them.

    All else stays the mean. Clients are read after the mean is known, one at a time; held are the
    sums of all weights.
    """
    assert fusion.sent is not None
    strength = options.strength
    if strength == "auto":
        strength = strength_of(_agreement(fusion, maps))
    if not strength:
        return {}, {}
    modules = dict(fusion.clients[0].model().named_modules())
    sums = {
        name: UpdateSums(
            tensor, fusion.sent[name], WeightView.of(name, tensor.shape, modules), options
        )
        for name, tensor in mean.items()
        if tensor.is_floating_point() and tensor.dim() > 1 and name not in fusion.tied
    }
    running_means = running_mean_sums(fusion, mean, modules)
    pairs = list(zip(fusion.clients, maps, strict=True))
    for client, chosen in tracked(pairs, "moments of updates"):
        state = client.state()
        for name, total in sums.items():
            if name not in client.absent:
                value, present = _mapped(state[name], name, client, chosen)
                total.add(value, present, client.weight**options.exponent)
                for means in running_means.get(name, ()):
                    means.add(value, client, state, chosen)
    solved = {name: total.solve(strength) for name, total in sums.items()}
    failed = set(names_of_not_finite(solved))
    weights = {n: t.to(mean[n].dtype) for n, t in solved.items() if n not in failed}
    return weights, {
        means.name: means.moved(weight)
        for name, weight in weights.items()
        for means in running_means.get(name, ())
    }


def _agreement(fusion: Fusion, maps: Sequence[Maps]) -> float:
    """Return how far the clients' changes of the last layer agree."""
    assert fusion.sent is not None
    last, agreement = last_tensor(fusion.target), Agreement()
    for client, chosen in zip(fusion.clients, maps, strict=True):
        if last not in client.absent:
            value, present = _mapped(client.state()[last], last, client, chosen)
            change = value - fusion.sent[last].float()
            change = change if present is None else change * present
            agreement.add(without_common_shift(change), client.weight)
    return agreement.value


def _mapped(tensor: Tensor, name: str, client: Client, maps: Maps) -> tuple[Tensor, Tensor | None]:
    """Return a client's tensor in the fused channels, and which of its values it has; None: all."""
    value = map_tensor(tensor, name, client.correspondence, maps).float()
    if value.shape == tensor.shape:
        return value, None  # Of as many channels each has its place.
    ones = torch.ones_like(tensor, dtype=torch.float32)
    return value, (map_tensor(ones, name, client.correspondence, maps) > 0).float()
