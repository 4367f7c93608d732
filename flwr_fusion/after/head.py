"""The calibrated head: a new last layer from what the fused network's last layer reads.

Under label skew most of the damage of averaging sits in the last layer. Given class moments of the
fused network's features on all clients' data, the layer that separates the classes best is a small
convex problem, which the server solves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flwr_fusion.errors import FusionError, check_number, check_option
from flwr_fusion.networks import check_network, detached_state, key_of, with_state
from flwr_fusion.statistics.classes import ClassMoments, added, check_class_moments

Kind = Literal["lda", "soft"]
KINDS = ("lda", "soft")
# Of the mean variance, added to every feature's.
_SHRINKAGE = 0.1
# Fewer samples for each feature tell too little of how features vary together.
_SAMPLES_PER_FEATURE = 2
# Log of the odds against a class that nobody has.
_UNSEEN = math.log(1e-6)
_STEPS = 200


def calibrated_head(
    model: nn.Module,
    class_moments: ClassMoments | Sequence[ClassMoments],
    kind: Kind = "lda",
    *,
    ridge: float = 0.03,
    largest_norm: float | None = None,
) -> nn.Module:
    """Return a network with a new last layer, computed from class moments of its features.

    With ``mu_c = s_c / n_c``, ``pi_c = n_c / N`` and the covariance within the classes
    ``S = (sum x x^T - sum_c n_c mu_c mu_c^T) / N + 0.1 mean(diag) I``:

    * "lda", linear discriminant analysis: ``W = mu S^-1``, ``b_c = -W_c mu_c / 2 + log pi_c``.
    * "soft": from the network's own ``W_0`` the minimum over W and b of
      ``sum_c pi_c log sum_j exp((w_j - w_c) mu_c + b_j - b_c + (w_j - w_c)^T S (w_j - w_c) / 2)
      + ridge (sum_c pi_c |mu_c - mu|^2 / d) |W - W_0|^2`` with the mean mu of all: but for the
      last term an upper bound of the mean cross entropy of Gaussian features. It is convex. Its
      probabilities are as sure as they should be, where those of LDA are far too sure.

    Parameters
    ----------
    model : nn.Module
        The network that the moments are of; it ends with one linear layer with a bias. Not
        modified.
    class_moments : ClassMoments or sequence of ClassMoments
        From `flwr_fusion.statistics.class_moments`; those of several clients are added.
    kind : {"lda", "soft"}
        Which layer.
    ridge : float
        How much the soft layer is held to the one that there is.
    largest_norm : float, optional
        Weight and bias are scaled down so that the weight's norm is at most this.

    Returns
    -------
    nn.Module
        A new network. A class without samples keeps its weights and bias; by LDA its logits are
        very low. Both are scaled, too, where `largest_norm` scales.

    Raises
    ------
    FusionError
        If the network does not end so, the moments are another network's or impossible, or there
        are fewer than two samples for every feature.

    References
    ----------
    Hastie, Tibshirani & Friedman, "The Elements of Statistical Learning", 2009, section 4.3 (LDA);
    Wang et al., "Regularizing Deep Networks with Semantic Data Augmentation", 2020, proposition 1
    (the bound).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import flwr_fusion as ff
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> data = torch.randn(64, 4), torch.randint(3, (64,))
    >>> moments = ff.statistics.class_moments(model, [data])
    >>> calibrated = ff.calibrated_head(model, moments)
    """
    check_network("model", model)
    check_option("kind", kind, KINDS)
    if largest_norm is not None:
        check_number("largest_norm", largest_norm, 0)
    check_number("ridge", ridge, 0)
    moments = _together(class_moments)
    state = detached_state(model)
    keys = [key_of(moments.layer, kind) for kind in ("weight", "bias")]
    if not all(key in state for key in keys) or state[keys[0]].shape != moments.sums.shape:
        raise FusionError(
            f"the class moments are of a layer '{moments.layer}' with "
            f"{tuple(moments.sums.shape)} classes and inputs, which the network does not have"
        )
    weight, bias = (state[key].cpu().double() for key in keys)
    needed = _SAMPLES_PER_FEATURE * weight.shape[1]
    if moments.samples < needed:
        raise FusionError(
            f"{moments.samples:.0f} samples are too few for {weight.shape[1]} features: at least "
            f"{needed} are needed"
        )
    new_weight, new_bias = _lda(moments) if kind == "lda" else _soft(moments, weight, bias, ridge)
    scale = 1.0
    if largest_norm is not None:
        scale = min(1.0, largest_norm / max(float(new_weight.norm()), 1e-30))
    new = zip(keys, (new_weight, new_bias), strict=True)
    return with_state(model, {key: (scale * tensor).to(state[key]) for key, tensor in new})


def _together(given: ClassMoments | Sequence[ClassMoments]) -> ClassMoments:
    parts: Any = [given] if isinstance(given, ClassMoments) else given
    if not isinstance(parts, Sequence) or not parts:
        raise FusionError("class_moments must be ClassMoments, or a list of them, at least one")
    for part in parts:
        if not isinstance(part, ClassMoments):
            raise FusionError(f"class_moments must be ClassMoments, not {part!r:.60}")
        check_class_moments(part)
    moments = added(parts)
    return ClassMoments(
        moments.counts.double(), moments.sums.double(), moments.second.double(), moments.layer
    )


def _distribution(moments: ClassMoments) -> tuple[Tensor, Tensor, Tensor]:
    """Return shares and means of the classes, and the covariance within them; of doubles."""
    covariance = moments.within() / moments.samples
    covariance.diagonal().add_(_SHRINKAGE * covariance.diagonal().mean().clamp(min=1e-12))
    return moments.counts / moments.samples, moments.means(), covariance


def _lda(moments: ClassMoments) -> tuple[Tensor, Tensor]:
    shares, means, covariance = _distribution(moments)
    # W = mu S^-1, b_c = -W_c mu_c / 2 + log pi_c.
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed):
        raise FusionError("the features hardly vary within the classes: there is no LDA of them")
    weight = torch.cholesky_solve(means.T, factor).T
    bias = shares.clamp(min=1e-300).log() - (weight * means).sum(1) / 2
    seen = shares > 0
    # Of a class without samples: the mean of the other classes' rows, at odds of one to a million.
    weight[~seen], bias[~seen] = weight[seen].mean(0), bias[seen].mean() + _UNSEEN
    return weight, bias


def _bound(
    shares: Tensor, means: Tensor, covariance: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Return an upper bound of the mean cross entropy of Gaussian classes."""
    seen = shares > 0
    logits = means[seen] @ weight.T + bias
    products = weight @ covariance @ weight.T
    squares = products.diagonal()
    # (w_j - w_c)^T S (w_j - w_c) for class c in row c.
    spread = squares.unsqueeze(0) + squares[seen].unsqueeze(1) - 2 * products[seen]
    exponents = logits - logits[:, seen].diagonal().unsqueeze(1) + spread / 2
    return (shares[seen] * exponents.logsumexp(1)).sum()


def _soft(
    moments: ClassMoments, weight: Tensor, bias: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    shares, means, covariance = _distribution(moments)
    seen = shares > 0
    # By how far the classes' means are apart: near where the features hardly tell them apart yet,
    # the layer is free, and held the more, the better they do.
    gaps = means - shares @ means
    pull = ridge * (shares * gaps.square().sum(1)).sum() / means.shape[1]
    w, b = weight[seen].requires_grad_(), bias[seen].requires_grad_()
    optimizer = torch.optim.LBFGS(
        [w, b], max_iter=_STEPS, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def layer() -> tuple[Tensor, Tensor]:
        return weight.index_put((seen,), w), bias.index_put((seen,), b)

    def loss() -> Tensor:
        optimizer.zero_grad()
        distance = (w - weight[seen]).square().sum()
        value = _bound(shares, means, covariance, *layer()) + pull * distance
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    new_weight, new_bias = layer()
    return new_weight.detach(), new_bias.detach()
