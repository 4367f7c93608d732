"""Linear groups: clients are put together by the product of two factors, not by its channels.

Between the writer ``A`` (rank x inputs) and the reader ``B`` (outputs x rank) of a linear group
stands nothing but the product ``B A``: any invertible matrix may mix the channels between, and
factors of different ranks have no common channels at all. So a rule is given, in the place of both
factors, the *core* of every client's product in orthonormal bases that span all of them,

    C_k = U^T (s_k B_k A_k) V,

and its core ``C`` becomes the pair of the target's rank that is closest to ``U C V^T``, the
singular values split evenly between its factors. The product itself, outputs x inputs, is nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from flwr_fusion.errors import FusionError
from flwr_fusion.fusion import Client, Fusion
from flwr_fusion.maps import (
    Correspondence,
    Linear,
    Maps,
    along,
    coverage_along,
    map_channels,
    map_tensor,
)
from flwr_fusion.networks import key_of, module_of
from flwr_fusion.precision import decomposed, numbers, thin_svd
from flwr_fusion.statistics.moments import LayerStatistics, Statistics

# Directions that all products have together; beyond, the weakest are left out.
_MOST_DIRECTIONS = 1024
# Less of the clients' weight has not all outputs.
_WHOLE = 1 - 1e-6
# Singular values are zero that are smaller than this share of the largest: single precision.
_NOTHING = 1e-6


@dataclass(frozen=True)
class Factors:
    """A product ``reads @ writes``.

    Parameters
    ----------
    reads : Tensor
        Shape (outputs, rank): what reads the channels, all tensors' other axes in one.
    writes : Tensor
        Shape (rank, inputs): what writes them, biases as one more input.
    """

    reads: Tensor
    writes: Tensor

    def decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return left vectors, singular values and right vectors: ``U diag(s) V^T``, thin."""
        # B = Q_b R_b, A^T = Q_a R_a, so B A = Q_b (R_b R_a^T) Q_a^T: the middle is rank x rank.
        left, upper = decomposed(torch.linalg.qr, self.reads)
        right, other = decomposed(torch.linalg.qr, self.writes.T)
        u, values, vh = thin_svd(upper @ other.T)
        return left @ u, values, right @ vh.T


def balanced(
    left: Tensor, core: Tensor, right: Tensor, rank: int, spare: Tensor
) -> tuple[Factors, float]:
    """Return the factors of a rank that are closest to a product, the singular values split evenly.

    Parameters
    ----------
    left, right : Tensor
        Orthonormal bases, of shapes (outputs, n) and (inputs, m).
    core : Tensor
        Shape (n, m); the product is ``left @ core @ right.T``.
    rank : int
        Of the factors.
    spare : Tensor
        Shape (rank, inputs): what channels write that the product does not need. What reads them
        is zero: they change nothing, but training can use them.

    Returns
    -------
    tuple of (Factors, float)
        And the share of the product's squared norm that is left out (Eckart & Young 1936).
    """
    u, values, vh = thin_svd(core)
    kept = values[:rank]
    used = kept > _NOTHING * values.max() if values.numel() else kept > 0
    roots = kept[used].sqrt()
    vectors, others = left @ u[:, :rank][:, used], vh[:rank][used] @ right.T
    # Vectors have no sign of their own: the largest value shall be positive.
    signs = vectors.gather(0, vectors.abs().argmax(0)[None])[0].sign()
    reads = left.new_zeros(len(left), rank)
    writes = spare.to(left).clone()
    reads[:, : len(roots)] = vectors * signs * roots
    writes[: len(roots)] = (signs * roots)[:, None] * others
    squares = values.square()
    lost, total = numbers([squares[rank:].sum(), squares.sum()])
    return Factors(reads, writes), lost / max(total, 1e-30)


class SpannedDirections:
    """Orthonormal bases of what products have together; one product at a time."""

    def __init__(self) -> None:
        self._left: list[Tensor] = []
        self._right: list[Tensor] = []

    def add(self, factors: Factors, weight: float) -> None:
        """Add a product's directions, each as heavy as it is among the product's own.

        No client can make those of others count as nothing by scaling its product.
        """
        left, values, right = factors.decomposed()
        scale = weight**0.5 * values / values.max().clamp(min=1e-30)
        self._left.append(left * scale)
        self._right.append(right * scale)
        if sum(part.shape[1] for part in self._left) > 2 * _MOST_DIRECTIONS:
            self._left = [_strongest(self._left, orthonormal=False)]
            self._right = [_strongest(self._right, orthonormal=False)]

    def bases(self) -> tuple[Tensor, Tensor]:
        """Return the bases ``U`` (outputs, n) and ``V`` (inputs, m)."""
        return _strongest(self._left), _strongest(self._right)


def _strongest(parts: Sequence[Tensor], orthonormal: bool = True) -> Tensor:
    """Return the strongest directions of columns, as long as they are heavy or all of length 1."""
    basis, upper = decomposed(torch.linalg.qr, torch.cat(list(parts), 1))
    u, values, _ = thin_svd(upper)
    # At least one: a core without entries is no tensor to work with.
    count = max(1, int((values > _NOTHING * values.max()).sum()))
    chosen = slice(min(count, _MOST_DIRECTIONS))
    directions: Tensor = basis @ u[:, chosen]
    return directions if orthonormal else directions * values[chosen]


def factors_of(group: Linear, state: Mapping[str, Tensor]) -> Factors:
    """Return the factors of a linear group of the fused network, at least in single precision."""
    return _factors(group, state, _precision(group, state), fused=True)


def _precision(group: Linear, state: Mapping[str, Tensor]) -> torch.dtype:
    """Return the type in which a group's factors can be multiplied, at least single precision."""
    return reduce(torch.promote_types, (state[name].dtype for name in group.tensors), torch.float32)


def client_factors(
    group: Linear,
    state: Mapping[str, Tensor],
    correspondence: Correspondence,
    maps: Maps,
    dtype: torch.dtype,
) -> Factors:
    """Return the factors of a client's linear group; their product in the fused channels.

    What the client's network multiplies it by, beyond the fused network's, is part of it; outputs
    count by how far the client has them.
    """
    mapped = {
        name: _by_coverage(map_tensor(state[name], name, correspondence, maps), covered)
        for name in group.tensors
        for covered in [coverage_along(name, correspondence, maps)]
    }
    factors = _factors(group, mapped, dtype, fused=False)
    return replace(factors, reads=group.scale * factors.reads)


def _by_coverage(tensor: Tensor, covered: tuple[int, Tensor] | None) -> Tensor:
    if covered is None:
        return tensor
    axis, coverage = covered
    return tensor * along(coverage.to(tensor), axis, tensor.dim())


def _factors(
    group: Linear, state: Mapping[str, Tensor], dtype: torch.dtype, fused: bool
) -> Factors:
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for (name, axis), segment in group.places.items():
        tensor = state[name].to(dtype)
        positions = segment.fused_positions if fused else segment.client_positions
        rows = tensor.movedim(axis, 0)[positions.to(tensor.device)]
        parts[segment.writes].append(rows.flatten(1))
    reads, writes = (torch.cat(parts[kind], 1) for kind in (False, True))
    return Factors(reads.T, writes)


def in_fused_rank(
    group: Linear,
    state: Mapping[str, Tensor],
    correspondence: Correspondence,
    maps: Maps,
    target: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return the tensors of a client's linear group in the fused network's rank.

    Parameters
    ----------
    group, state, correspondence, maps
        As for `client_factors`.
    target : mapping of str to Tensor
        State dict of the fused network: where the client's product needs fewer channels, the
        others write what they write here.
    """
    spare = factors_of(group, target).writes
    own = client_factors(group, state, correspondence, maps, spare.dtype)
    left, values, right = own.decomposed()
    factors, _ = balanced(left, torch.diag(values), right, group.fused_size, spare)
    return _written(group, factors, target)


@dataclass(frozen=True)
class _Product:
    """A linear group's product, as a rule is given it.

    Parameters
    ----------
    group : Linear
        The group, in the fused network and in itself.
    left, right : Tensor
        The bases.
    share : Tensor
        Shape (outputs, 1): of the clients' weight, what has each output.
    sent : tuple of Tensor, optional
        The core of the model that was sent out, decomposed: left vectors, singular values and
        right vectors, transposed.
    """

    group: Linear
    left: Tensor
    right: Tensor
    share: Tensor
    sent: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def layer(self) -> str:
        return f"product of {self.group.name}"

    @property
    def key(self) -> str:
        """Name of the core among a rule's tensors."""
        return key_of(self.layer, "weight")

    def core(self, factors: Factors) -> Tensor:
        """Return ``U^T B A V``."""
        core: Tensor = (self.left.T @ factors.reads) @ (factors.writes @ self.right)
        return core

    def core_of_client(self, factors: Factors) -> Tensor:
        """Return a client's core, for a mean over those that have an output.

        Beyond its rank it is that of the model that was sent out: nobody who could not hold a
        direction has unlearnt it.
        """
        core = self.core(replace(factors, reads=factors.reads / self.share))
        rank = factors.reads.shape[1]
        if self.sent is None or rank >= self.group.fused_size:
            return core
        u, values, vh = self.sent
        beyond: Tensor = (u[:, rank:] * values[rank:]) @ vh[rank:]
        return core + beyond


@dataclass(frozen=True)
class _ClientByProducts(Client):
    """A client with the cores of its products in the place of their factors."""

    products: Sequence[_Product] = ()
    maps: Maps = field(default_factory=dict)

    def state(self) -> dict[str, Tensor]:
        state = super().state()
        own = {group.name: group for group in self.correspondence.linear}
        cores = {
            p.key: p.core_of_client(self._factors(own[p.group.name], state, p.left.dtype))
            for p in self.products
            if p.key not in self.absent
        }
        factors = self.correspondence.factors
        return {name: t for name, t in state.items() if name not in factors} | cores

    def _factors(self, group: Linear, state: Mapping[str, Tensor], dtype: torch.dtype) -> Factors:
        return client_factors(group, state, self.correspondence, self.maps, dtype)


@dataclass(frozen=True)
class ByProducts:
    """A fusion in which every linear group is one tensor, its core; and the way back.

    Parameters
    ----------
    fusion : Fusion
        What a rule is given.
    """

    fusion: Fusion
    _given: Fusion
    _products: Sequence[_Product]

    @classmethod
    def of(
        cls, fusion: Fusion, maps: Sequence[Maps], *, few_cannot_decide: bool
    ) -> ByProducts | None:
        """Return a fusion by products; None where no group is linear.

        Every client is read once, for the directions of its products. ``few_cannot_decide`` is
        said by the rule: then no output may be missing in a client, which has no core without it.
        """
        if not fusion.clients or not fusion.clients[0].correspondence.linear:
            return None
        try:
            products = _products(fusion, maps)
        except RuntimeError as error:
            raise FusionError(f"low-rank factors cannot be multiplied: {error}") from error
        if few_cannot_decide and any(bool((p.share < _WHOLE).any()) for p in products):
            raise FusionError(
                "low-rank factors of clients of several widths cannot be put together by a rule "
                "that keeps few clients from deciding: use the mean, or clients of one width"
            )
        clients = [
            _by_products(client, products, chosen)
            for client, chosen in zip(fusion.clients, maps, strict=True)
        ]
        target = _with_cores(fusion.target, products)
        sent = None if fusion.sent is None else _with_cores(fusion.sent, products)
        return cls(replace(fusion, target=target, clients=clients, sent=sent), fusion, products)

    def state(self, combined: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the fused network's state dict, and for each product what its rank leaves out."""
        found = {name: t for name, t in combined.items() if name in self._given.target}
        details = {}
        for product in self._products:
            group, target = product.group, self._given.target
            spare = factors_of(group, target).writes
            core = combined[product.key]
            factors, lost = balanced(
                product.left, core, product.right, group.fused_size, spare.to(core)
            )
            found |= _written(group, factors, target)
            details[product.layer] = (
                f"rank {group.fused_size} of {min(core.shape)}: {lost:.2%} of its square left out"
            )
        return found, details


def _products(fusion: Fusion, maps: Sequence[Maps]) -> list[_Product]:
    groups = fusion.clients[0].correspondence.linear
    spans = {group.name: SpannedDirections() for group in groups}
    shares: dict[str, Tensor] = {}
    whole = {group.name: 0.0 for group in groups}
    for client, chosen in zip(fusion.clients, maps, strict=True):
        state = client.state()
        for group in client.correspondence.linear:
            if group.tensors & client.absent:
                continue
            dtype = _precision(group, fusion.target)
            factors = client_factors(group, state, client.correspondence, chosen, dtype)
            spans[group.name].add(factors, client.weight)
            covered = client.weight * _covered(group, fusion.target, client, chosen)
            shares[group.name] = shares.get(group.name, 0) + covered
            whole[group.name] += client.weight
    for group in groups:
        if fusion.sent is not None:
            spans[group.name].add(factors_of(group, fusion.sent), 1.0)
        elif not whole[group.name]:  # Nobody takes part: the target's values stay.
            spans[group.name].add(factors_of(group, fusion.target), 1.0)
    products = [
        _Product(
            replace(group, scale=1.0),
            *_bases(spans[group.name], group, fusion.clients),
            _usable(shares, whole, group),
        )
        for group in groups
    ]
    if fusion.sent is None:
        return products
    cores = [product.core(factors_of(product.group, fusion.sent)) for product in products]
    return [
        replace(product, sent=thin_svd(core)) for product, core in zip(products, cores, strict=True)
    ]


def _bases(
    span: SpannedDirections, group: Linear, clients: Sequence[Client]
) -> tuple[Tensor, Tensor]:
    """Return the bases of a group's products.

    That of the inputs is all of them where a client has sent their moments, which tell of
    directions that no product has.
    """
    left, right = span.bases()
    if any(_moments_of_inputs(group, client) is not None for client in clients):
        right = torch.eye(len(right), dtype=right.dtype, device=right.device)
    return left, right


def _usable(shares: Mapping[str, Tensor], whole: Mapping[str, float], group: Linear) -> Tensor:
    """Return the outputs' shares of the weight that takes part; 1 where nobody does."""
    share = shares.get(group.name, torch.ones(()))
    share = share / max(whole[group.name], 1e-30)
    return torch.where(share > 0, share, 1.0)


def _covered(group: Linear, target: Mapping[str, Tensor], client: Client, maps: Maps) -> Tensor:
    """Return for each output of a product, as a column, how much of it a client has."""
    parts = []
    for (name, axis), segment in group.places.items():
        if segment.writes:
            continue
        tensor = target[name]
        covered = coverage_along(name, client.correspondence, maps)
        ones = _by_coverage(torch.ones(tensor.shape, device=tensor.device), covered)
        parts.append(ones.movedim(axis, 0)[segment.fused_positions.to(tensor.device)][0].flatten())
    return torch.cat(parts)[:, None]


def _by_products(client: Client, products: Sequence[_Product], maps: Maps) -> Client:
    own = {group.name: group for group in client.correspondence.linear}
    absent = {p.key for p in products if own[p.group.name].tensors & client.absent}
    return _ClientByProducts(
        client.number,
        client.model,
        client.weight,
        client.device,
        client.correspondence,
        _statistics(client, products, maps),
        (client.absent - client.correspondence.factors) | absent,
        client.depth_aligned,
        products,
        maps,
    )


def _statistics(client: Client, products: Sequence[_Product], maps: Maps) -> Statistics | None:
    """Return a client's statistics, of products those of their inputs in the products' bases."""
    if client.statistics is None:
        return None
    layers = {module_of(name) for p in products for name in p.group.tensors}
    found = {name: layer for name, layer in client.statistics.items() if name not in layers}
    for product in products:
        moments = _input_moments(product, client, maps)
        if moments is not None:
            found[product.layer] = moments
    return found


def _input_moments(product: _Product, client: Client, maps: Maps) -> LayerStatistics | None:
    """Return moments of a product's inputs, in the fused channels and the product's basis."""
    layer = _moments_of_inputs(product.group, client)
    if layer is None:
        return None
    assert layer.second is not None
    assert layer.mean is not None
    key = next(name for name, _ in _writers(product.group) if name.endswith("weight"))
    second, mean = layer.second[0].to(product.right), layer.mean.to(product.right)
    for axis in (0, 1):
        second = map_channels(second, axis, (key, 1), client.correspondence, maps)
    mean = map_channels(mean, 0, (key, 1), client.correspondence, maps)
    if len(mean) + 1 == len(product.right):  # The bias is one more input.
        second = torch.cat([second, mean[None]])
        mean = torch.cat([mean, mean.new_ones(1)])
        second = torch.cat([second, mean[:, None]], 1)
    if len(mean) != len(product.right):
        return None
    right, outputs = product.right, product.left.new_zeros(product.left.shape[1])
    return LayerStatistics((right.T @ second @ right)[None], mean @ right, outputs, outputs)


def _writers(group: Linear) -> list[tuple[str, int]]:
    return [place for place, segment in group.places.items() if segment.writes]


def _moments_of_inputs(group: Linear, client: Client) -> LayerStatistics | None:
    """Return a client's moments of what goes into a product; None of several layers' inputs."""
    layers = {module_of(name) for name, _ in _writers(group)}
    layer = (client.statistics or {}).get(min(layers))
    known = layer is not None and layer.second is not None and layer.detail == "full"
    return layer if known and len(layers) == 1 else None


def _with_cores(state: Mapping[str, Tensor], products: Sequence[_Product]) -> dict[str, Tensor]:
    """Return a state dict with cores, each in the place of the last of its factors."""
    last = {}
    for product in products:
        names = [name for name in state if name in product.group.tensors]
        last[names[-1]] = product
    factors = frozenset().union(*(p.group.tensors for p in products))
    found = {}
    for name, tensor in state.items():
        if name in last:
            found[last[name].key] = last[name].core(factors_of(last[name].group, state))
        elif name not in factors:
            found[name] = tensor
    return found


def _written(group: Linear, factors: Factors, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a product's factors, in the target's shapes and dtypes."""
    rest = {False: factors.reads.T, True: factors.writes}
    found = {}
    for (name, axis), segment in group.places.items():
        like = target[name]
        rows = torch.empty_like(like).movedim(axis, 0)
        index = segment.fused_positions.to(like.device)
        shape = rows[index].shape
        size = shape[1:].numel()
        rows[index] = rest[segment.writes][:, :size].reshape(shape).to(like)
        rest[segment.writes] = rest[segment.writes][:, size:]
        found[name] = rows.movedim(0, axis).contiguous()
    return found
