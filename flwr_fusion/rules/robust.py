"""Putting mapped models together so that a few bad ones cannot decide: trimmed means, Krum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flwr_fusion.errors import FusionError
from flwr_fusion.maps import Maps, coverage_along, row_mapping
from flwr_fusion.matching.barycentre import Client
from flwr_fusion.rules.least_squares import RunningMean, along, as_it_stands, row_blocks


@dataclass(frozen=True)
class TrimmedMean:
    """The mean of each value over the clients, without the largest and the smallest ones.

    All clients count the same, whatever their weights, because a weight is a number that nobody
    can check.

    Parameters
    ----------
    share : float
        Share of the clients that is left out on either side of every value, rounded down; at 0.5,
        the median is left.

    References
    ----------
    Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML
    2018, definitions 1 and 2.
    """

    share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 0.5:
            raise FusionError(f"share must lie in [0, 0.5], not {self.share!r}")


@dataclass(frozen=True)
class Krum:
    """The mean of those clients that are closest to their neighbours.

    A client's score is the sum of squared distances to its ``n - malicious - 2`` nearest ones, all
    brought into the fused network's channels; the lowest scores are selected. All clients count
    the same, whatever their weights.

    Parameters
    ----------
    malicious : int
        How many clients may be bad; ``2 malicious + 3`` are needed at least.
    selected : int, optional
        How many clients are averaged; 1: Krum, more: Multi-Krum. Default: all but `malicious`.

    References
    ----------
    Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
    NeurIPS 2017, section 4.
    """

    malicious: int = 1
    selected: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("malicious", 0), ("selected", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not value >= least):
                raise FusionError(f"{name} must be at least {least}, not {value!r}")

    @property
    def least_clients(self) -> int:
        """How many clients are needed."""
        return 2 * self.malicious + 3


def trimmed_mean(values: Tensor, present: Tensor, share: float) -> Tensor:
    """Return the trimmed mean of each position over the clients that have it.

    Parameters
    ----------
    values : Tensor
        Of shape (clients, ...).
    present : Tensor
        Which of them count; of a shape that broadcasts to that of `values`.
    share : float
        Share left out on either side, in [0, 0.5].

    Returns
    -------
    Tensor
        Of shape (...); NaN where no client has the position.
    """
    present = present.expand_as(values)
    count = present.sum(0)
    cut = torch.minimum((share * count).floor(), ((count - 1).clamp_min(0) / 2).floor())
    ordered = values.masked_fill(~present, torch.inf).sort(0).values
    rank = torch.arange(len(values), device=values.device).reshape(-1, *(1,) * count.dim())
    kept = (rank >= cut) & (rank < count - cut)
    total = ordered.masked_fill(~kept, 0).sum(0)
    return total / (count - 2 * cut)


def krum_selection(distances: Tensor, rule: Krum) -> list[int]:
    """Return the clients that Krum selects, the best first.

    Parameters
    ----------
    distances : Tensor
        Squared distances of shape (clients, clients).
    rule : Krum
        How.

    Returns
    -------
    list of int
        Their numbers.

    Raises
    ------
    FusionError
        If there are too few clients.
    """
    clients = len(distances)
    if clients < rule.least_clients:
        raise FusionError(
            f"Krum with malicious={rule.malicious} needs at least {rule.least_clients} clients, "
            f"there are {clients}"
        )
    neighbours = distances.clone().fill_diagonal_(torch.inf).sort(1).values
    scores = neighbours[:, : clients - rule.malicious - 2].sum(1)
    selected = clients - rule.malicious if rule.selected is None else min(rule.selected, clients)
    return [int(k) for k in scores.sort(stable=True).indices[:selected]]


def robustly_combined(
    clients: Sequence[Client],
    maps: Sequence[Maps],
    template: Mapping[str, Tensor],
    rule: TrimmedMean | Krum,
) -> dict[str, Tensor]:
    """Return the state dict that a robust rule makes of clients in the fused network's channels.

    All clients are in memory at once.

    Parameters
    ----------
    clients : sequence of Client
        In an order that does not depend on how they came.
    maps : sequence of mapping
        Their channel maps.
    template : mapping of str to Tensor
        State dict of the fused architecture; its values fill channels that no client has.
    rule : TrimmedMean or Krum
        How.

    Returns
    -------
    dict of str to Tensor
        Integer tables are those of all clients, as for `RunningMean`; single integers follow the
        rule.
    """
    chosen = list(range(len(clients)))
    if isinstance(rule, Krum):
        chosen = krum_selection(squared_distances(clients, maps, template), rule)
    whole = {n: t for n, t in template.items() if isinstance(rule, Krum) or not _is_float(t)}
    mean = RunningMean(whole)
    for k in chosen:
        clients[k].join(mean, maps[k])
    state = mean.finish(uncovered=template)
    if isinstance(rule, TrimmedMean):
        for name, rows, values, present in mapped_blocks(clients, maps, template):
            fused = state.setdefault(name, torch.empty_like(template[name]))
            middle = trimmed_mean(values, present, rule.share)
            uncovered = template[name] if rows is None else template[name][rows]
            middle = torch.where(middle.isnan(), uncovered.to(middle), middle)
            (fused if rows is None else fused[rows]).copy_(middle)
        state |= _middle_counters(clients, template, rule.share)
    return {name: state[name] for name in template}


def _middle_counters(
    clients: Sequence[Client], template: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """Return the trimmed mean of single integers, such as numbers of batches."""
    counters = {n: t for n, t in template.items() if not _is_float(t) and not t.dim()}
    if not counters:  # Most networks have none, and to read all clients again takes time.
        return {}
    states = [client.state() for client in clients]
    found = {}
    for name, like in counters.items():
        pairs = zip(clients, states, strict=True)
        own = [s[name].to(like.device) for c, s in pairs if name not in (c.absent or ())]
        if own:
            values = torch.stack(own).double()
            middle = trimmed_mean(values, torch.ones_like(values, dtype=torch.bool), share)
            found[name] = middle.round().to(like.dtype)
    return found


def squared_distances(
    clients: Sequence[Client], maps: Sequence[Maps], template: Mapping[str, Tensor]
) -> Tensor:
    """Return the squared distances between clients in the fused network's channels.

    Positions that one of two clients does not have count as the mean of the others.

    Parameters
    ----------
    clients, maps, template
        As for `robustly_combined`.

    Returns
    -------
    Tensor
        Of shape (clients, clients), in double precision.
    """
    size = len(clients)
    total = torch.zeros(size, size, dtype=torch.float64)
    common = torch.zeros(size, size, dtype=torch.float64)
    for _, _, values, present in mapped_blocks(clients, maps, template):
        shown = present.expand_as(values).flatten(1).double()
        flat = values.flatten(1).double() * shown
        for k in range(size):
            both = shown[k] * shown
            total[k] += ((flat - flat[k]).square() * both).sum(1).cpu()
            common[k] += both.sum(1).cpu()
    return torch.where(common > 0, total / common, torch.inf) * common.max()


def mapped_blocks(
    clients: Sequence[Client], maps: Sequence[Maps], template: Mapping[str, Tensor]
) -> Iterator[tuple[str, slice | None, Tensor, Tensor]]:
    """Yield all clients' floating-point tensors in the fused network's channels, in blocks.

    Yields
    ------
    tuple of (str, slice or None, Tensor, Tensor)
        A tensor's name, its rows (None: all), the values of shape (clients, ...) and which of them
        the clients have.
    """
    states = [client.state() for client in clients]
    joined = list(zip(clients, states, maps, strict=True))
    for name, like in template.items():
        if not _is_float(like):
            continue
        takes = [
            row_mapping(state[name].to(like.device), name, client.correspondence, own)
            if name not in (client.absent or ())
            else as_it_stands(like)
            for client, state, own in joined
        ]
        pieces = [list(row_blocks(name, like, c.correspondence, own)) for c, _, own in joined]
        # Where one client's rows are mixed by a transport plan, all are taken whole.
        for rows in min(pieces, key=len):
            values = torch.stack([take(rows) for take in takes])
            present = torch.stack([_present(name, c, own, like, rows) for c, _, own in joined])
            yield name, rows, values.float() if like.element_size() < 4 else values, present


def _present(name: str, client: Client, maps: Maps, like: Tensor, rows: slice | None) -> Tensor:
    """Return which positions of a fused tensor a client has; broadcasts to its shape."""
    present = torch.ones((1,) * like.dim(), dtype=torch.bool, device=like.device)
    if name in (client.absent or ()):
        present = ~present
    shape = like.shape if rows is None else (len(range(len(like))[rows]), *like.shape[1:])
    covered = coverage_along(name, client.correspondence, maps)
    if covered is not None:
        axis, coverage = covered
        coverage = coverage[rows] if rows is not None and axis == 0 else coverage
        present = present & along(coverage.to(like.device) > 0, axis, like.dim())
    return present.expand(shape)


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point()
