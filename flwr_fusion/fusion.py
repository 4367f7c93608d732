"""What is fused: the clients, and what methods and rules know of the fused network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flwr_fusion.errors import FusionError
from flwr_fusion.gains import with_gains
from flwr_fusion.graph.groups import ChannelGraph, verified_graph
from flwr_fusion.maps import (
    Correspondence,
    Maps,
    Unaligned,
    along,
    coverage_along,
    row_blocks,
    row_mapping,
)
from flwr_fusion.networks import (
    architecture_of,
    check_networks,
    check_same_function,
    check_same_modules,
    detached_state,
    squared_norm,
)
from flwr_fusion.statistics.moments import Statistics
from flwr_fusion.statistics.wire import check


@dataclass(frozen=True)
class Client:
    """One client of a fusion.

    Parameters
    ----------
    number : int
        Its place among the networks that were given; negative for one fused on the way.
    model : callable
        Returns the client's network; called whenever it is needed, so that not all clients must be
        in memory at once.
    weight : float
        Its share of the total weight.
    device : torch.device
        Where the fusion computes.
    correspondence : Correspondence
        Its tensor positions and the fused network's.
    statistics : mapping of str to LayerStatistics, optional
        What it measured (`flwr_fusion.statistics.input_moments`).
    absent : frozenset of str
        Tensors that it has not, in whose mean it takes no part: the inside of added blocks.
    depth_aligned : bool
        Whether it was brought to another depth.
    """

    number: int
    model: Callable[[], nn.Module]
    weight: float
    device: torch.device
    correspondence: Correspondence
    statistics: Statistics | None = None
    absent: frozenset[str] = frozenset()
    depth_aligned: bool = False

    @property
    def name(self) -> str:
        """What it is called in messages and reports."""
        return f"client {self.number}" if self.number >= 0 else "what has been fused so far"

    def state(self) -> dict[str, Tensor]:
        """Return its state dict, where the fusion computes; not to be written into."""
        return {n: t.to(self.device) for n, t in detached_state(self.model()).items()}


@dataclass(frozen=True)
class Block:
    """All clients' values of some rows of one tensor, in the fused network's channels.

    Parameters
    ----------
    name : str
        The tensor.
    rows : slice or None
        Its rows; None: all of it.
    values : Tensor
        Shape (clients, ...), at least single precision.
    present : Tensor
        Of the same shape, booleans: what the clients have; other values mean nothing.
    """

    name: str
    rows: slice | None
    values: Tensor
    present: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """Return the block's rows of another tensor, such as the fused one: a view."""
        return tensor if self.rows is None else tensor[self.rows]


@dataclass(frozen=True)
class Fusion:
    """What a rule knows beside the channel maps.

    Parameters
    ----------
    target : mapping of str to Tensor
        State dict of the fused architecture: its shapes, dtypes and device. Its values fill
        channels that no client has.
    clients : sequence of Client
        In an order that does not depend on how they came.
    sent : mapping of str to Tensor, optional
        State dict of the model that was sent out, in the fused channels. None where there is none,
        or where matching has found that the clients do not come from it.
    tied : frozenset of str
        Tensors that several layers share.
    batch_normalised : mapping of str to str
        BatchNorm layers, and the layer whose outputs each of them normalises, as far as is known.
    """

    target: Mapping[str, Tensor]
    clients: Sequence[Client]
    sent: Mapping[str, Tensor] | None = None
    tied: frozenset[str] = frozenset()
    batch_normalised: Mapping[str, str] = field(default_factory=dict)

    def blocks(self, maps: Sequence[Maps]) -> Iterator[Block]:
        """Yield all clients' floating-point tensors in the fused channels, in blocks of rows.

        Parameters
        ----------
        maps : sequence of mapping
            For every client its channel maps.

        Yields
        ------
        Block
            Large tensors in several, unless a transport plan mixes their rows.
        """
        states = [client.state() for client in self.clients]
        mapped = list(zip(self.clients, states, maps, strict=True))
        for name, like in self.target.items():
            if not like.is_floating_point():
                continue
            takes = [
                _as_it_stands(like)
                if name in client.absent
                else row_mapping(state[name].to(like.device), name, client.correspondence, chosen)
                for client, state, chosen in mapped
            ]
            pieces = [list(row_blocks(name, like, c.correspondence, m)) for c, _, m in mapped]
            # Where one client's rows are mixed by a transport plan, all are taken whole.
            for rows in min(pieces, key=len):
                values = torch.stack([take(rows) for take in takes])
                present = torch.stack([_present(name, c, m, like, rows) for c, _, m in mapped])
                precise = values.float() if like.element_size() < 4 else values
                yield Block(name, rows, precise, present)


def _as_it_stands(tensor: Tensor) -> Callable[[slice | None], Tensor]:
    return lambda rows: tensor if rows is None else tensor[rows]


def _present(name: str, client: Client, maps: Maps, like: Tensor, rows: slice | None) -> Tensor:
    """Return which positions of a fused tensor a client has."""
    present = torch.ones((1,) * like.dim(), dtype=torch.bool, device=like.device)
    if name in client.absent:
        present = ~present
    shape = like.shape if rows is None else (len(range(len(like))[rows]), *like.shape[1:])
    covered = coverage_along(name, client.correspondence, maps)
    if covered is not None:
        axis, coverage = covered
        coverage = coverage[rows] if rows is not None and axis == 0 else coverage
        present = present & along(coverage.to(like.device) > 0, axis, like.dim())
    return present.expand(shape)


def shares_of(models: Sequence[nn.Module], weights: Sequence[float] | None) -> list[float]:
    """Return the clients' weights divided by their sum."""
    check_networks(models, "models")
    try:
        weights = [1.0] * len(models) if weights is None else [float(w) for w in weights]
    except (TypeError, ValueError) as error:
        raise FusionError(f"weights must be numbers, not {weights!r:.60}") from error
    if len(weights) != len(models):
        raise FusionError(f"there are {len(models)} models but {len(weights)} weights")
    for k, weight in enumerate(weights):
        if not math.isfinite(weight) or weight < 0:
            raise FusionError(f"the weight of client {k} is {weight}: it must be finite and >= 0")
    total = sum(weights)
    if total <= 0:
        raise FusionError("all weights are zero: at least one client must take part")
    return [weight / total for weight in weights]


def participants(
    models: Sequence[nn.Module],
    weights: Sequence[float] | None,
    statistics: Sequence[Statistics | None] | None = None,
    *,
    count_the_same: bool = False,
) -> list[Client]:
    """Return the clients with a weight, the heaviest first, in whichever order they came.

    They stand as they are: `with_correspondence` finds their positions in a fused network. Bad
    weights, non-finite values and statistics that do not fit are refused, by the client's name.
    """
    shares = shares_of(models, weights)
    if count_the_same:
        shares = shares_of(models, [float(share > 0) for share in shares])
    if isinstance(statistics, Mapping) or not isinstance(statistics, Sequence | None):
        raise FusionError("statistics must be a list with those of every network, or None for one")
    if statistics is not None and len(statistics) != len(models):
        raise FusionError(f"there are {len(models)} models but {len(statistics)} statistics")
    norms = {
        k: squared_norm(detached_state(models[k]), f"client {k}")
        for k, share in enumerate(shares)
        if share > 0
    }
    as_it_stands = Unaligned()
    clients = []
    for k in sorted(norms, key=lambda k: (-shares[k], norms[k])):
        measured = None if statistics is None else statistics[k]
        if measured is not None:
            _check_statistics(measured, models[k], k)
        network = partial(models.__getitem__, k)
        device = _device_of(models[k])
        clients.append(Client(k, network, shares[k], device, as_it_stands, measured))
    return clients


def _check_statistics(statistics: Statistics, model: nn.Module, k: int) -> None:
    try:
        if not isinstance(statistics, Mapping):
            raise FusionError(f"its statistics are no mapping, but {statistics!r:.60}")
        check(statistics, model)
    except FusionError as error:
        raise FusionError(f"client {k}: {error}") from error


def _device_of(model: nn.Module) -> torch.device:
    tensor = next(iter(model.state_dict().values()), torch.empty(0))
    return tensor.device


def largest(clients: Sequence[Client]) -> nn.Module:
    """Return the network with the most parameters; among equals the first."""
    return max(
        (client.model() for client in clients),
        key=lambda model: sum(parameter.numel() for parameter in model.parameters()),
    )


def with_correspondence(
    clients: Sequence[Client], target: nn.Module, graph: ChannelGraph, example_inputs: Any
) -> list[Client]:
    """Return clients in the target's layers with their correspondence to it, by name or refused."""
    linear = _linear_in_all(clients, target, graph, example_inputs)
    own = Correspondence(graph, graph, linear=linear)
    found: dict[Any, Correspondence] = {architecture_of(target): own}
    device = next(target.parameters()).device
    result = []
    for client in clients:
        model = client.model()  # A strategy builds it anew at every access.
        key = architecture_of(model)
        try:
            if key not in found:
                squared_norm(detached_state(target), "the target")
                other = Correspondence(graph, verified_graph(model, example_inputs), linear=linear)
                check_same_modules(model, target)
                found[key] = with_gains(other)
            elif key == architecture_of(target):
                check_same_function(model, target, example_inputs)
        except FusionError as error:
            raise FusionError(f"{client.name} cannot be fused into the target: {error}") from error
        result.append(replace(client, correspondence=found[key], device=device))
    return result


def _linear_in_all(
    clients: Sequence[Client], target: nn.Module, graph: ChannelGraph, example_inputs: Any
) -> set[str]:
    """Return the groups that are linear in the target and in every client's network."""
    linear = {group.name for group in graph.groups if group.linear}
    seen = {architecture_of(target)}
    for client in clients if linear else ():
        model = client.model()
        key = architecture_of(model)
        if key not in seen:
            seen.add(key)
            with suppress(FusionError):  # Whoever cannot be traced is refused by name.
                groups = verified_graph(model, example_inputs).groups
                linear &= {group.name for group in groups if group.linear}
    return linear
