"""Putting mapped models together so that a few bad ones cannot decide: trimmed means, Krum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from flwr_fusion.errors import check_count, check_number
from flwr_fusion.fusion import Client, Fusion
from flwr_fusion.maps import Maps
from flwr_fusion.precision import widened
from flwr_fusion.rules.mean import Mean, RunningMean, is_batch_counter


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

    needs_statistics: ClassVar[bool] = False
    ignores_statistics: ClassVar[bool] = True
    needs_sent: ClassVar[bool] = False
    least_clients: ClassVar[int] = 1
    few_cannot_decide: ClassVar[bool] = True

    share: float = 0.2

    def __post_init__(self) -> None:
        check_number("share", self.share, 0, 0.5)

    def combine(self, fusion: Fusion, maps: Sequence[Maps]) -> dict[str, Tensor]:
        """Return the trimmed mean of every value; all clients are in memory at once.

        Integer tables are those of all clients, as for `Mean`; single integers follow the rule.
        """
        tables = RunningMean({n: t for n, t in fusion.target.items() if not t.is_floating_point()})
        for client, chosen in zip(fusion.clients, maps, strict=True):
            tables.add(client, chosen)
        state = tables.finish(uncovered=fusion.target)
        for block in fusion.blocks(maps):
            like = fusion.target[block.name]
            fused = block.of(state.setdefault(block.name, torch.empty_like(like)))
            middle = trimmed_mean(block.values, block.present, self.share)
            fused.copy_(torch.where(middle.isnan(), block.of(like).to(middle), middle))
        return state | _middle_counters(fusion.clients, fusion.target, self.share)


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

    needs_statistics: ClassVar[bool] = False
    ignores_statistics: ClassVar[bool] = True
    needs_sent: ClassVar[bool] = False
    few_cannot_decide: ClassVar[bool] = True

    malicious: int = 1
    selected: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("malicious", 0), ("selected", 1)):
            value = getattr(self, name)
            if value is not None:
                check_count(name, value, least)

    @property
    def least_clients(self) -> int:
        """How many clients are needed."""
        return 2 * self.malicious + 3

    def combine(self, fusion: Fusion, maps: Sequence[Maps]) -> dict[str, Tensor]:
        """Return the mean of the selected clients; all are in memory at once."""
        chosen = krum_selection(squared_distances(fusion, maps), self)
        selected = replace(fusion, clients=[fusion.clients[k] for k in chosen])
        mean = Mean().combine(selected, [maps[k] for k in chosen])
        # Counters are in no distance.
        return mean | _middle_counters(fusion.clients, fusion.target, 0.5)


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
    # Of n values in order the mean of those with rank in [c, n - c), c = floor(share n), at most
    # floor((n - 1) / 2): at share 0.5 the median (Yin et al. 2018, definitions 1 and 2).
    count = present.sum(0)
    cut = torch.minimum((share * count).floor(), ((count - 1).clamp_min(0) / 2).floor())
    ordered = values.masked_fill(~present, torch.inf).sort(0).values
    rank = torch.arange(len(values), device=values.device).reshape(-1, *(1,) * count.dim())
    kept = (rank >= cut) & (rank < count - cut)
    total = ordered.masked_fill(~kept, 0).sum(0)
    return total / (count - 2 * cut)


def krum_selection(distances: Tensor, rule: Krum) -> list[int]:
    """Return the places of the clients that Krum selects, the best first.

    ``distances`` are squared, of shape (clients, clients), for at least `Krum.least_clients`.
    """
    clients = len(distances)
    # s(i) = sum of |V_i - V_j|^2 over the n - f - 2 nearest j (Blanchard et al. 2017, section 4).
    neighbours = distances.clone().fill_diagonal_(torch.inf).sort(1).values
    scores = neighbours[:, : clients - rule.malicious - 2].sum(1)
    selected = clients - rule.malicious if rule.selected is None else min(rule.selected, clients)
    return [int(k) for k in scores.sort(stable=True).indices[:selected]]


def _middle_counters(
    clients: Sequence[Client], template: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """Return the trimmed mean of single integers, such as numbers of batches."""
    counters = {n: t for n, t in template.items() if not t.is_floating_point() and t.numel() == 1}
    if not counters:  # Most networks have none, and to read all clients again takes time.
        return {}
    states = [client.state() for client in clients]
    found = {}
    for name, like in counters.items():
        pairs = zip(clients, states, strict=True)
        counts = [state[name].to(like.device) for c, state in pairs if name not in c.absent]
        if counts:
            values = widened(torch.stack(counts))
            middle = trimmed_mean(values, torch.ones_like(values, dtype=torch.bool), share)
            middle = middle.clamp(min=0) if is_batch_counter(name) else middle
            found[name] = middle.round().to(like.dtype)
    return found


def squared_distances(fusion: Fusion, maps: Sequence[Maps]) -> Tensor:
    """Return the squared distances between clients in the fused network's channels.

    Positions that one of two clients does not have count as the mean of the others.
    """
    size = len(fusion.clients)
    total = torch.zeros(size, size, dtype=torch.float64)
    common = torch.zeros(size, size, dtype=torch.float64)
    for block in fusion.blocks(maps):
        if bool(block.present.all()):
            total += _all_squared_distances(block.values.reshape(size, -1)).cpu()
            common += block.values[0].numel()
            continue
        present = widened(block.present.reshape(size, -1))
        flat = widened(block.values.reshape(size, -1)) * present
        for k in range(size):
            both = present[k] * present
            # Mean squared difference over what both have, times the number of all values.
            total[k] += ((flat - flat[k]).square() * both).sum(1).cpu()
            common[k] += both.sum(1).cpu()
    return torch.where(common > 0, total / common, torch.inf) * common.max()


def _all_squared_distances(rows: Tensor) -> Tensor:
    """Return the squared distances between rows, from one product of theirs."""
    # About their mean, or the distances of near rows would drown in the rows' own lengths.
    centred = widened(rows)
    centred = centred - centred.mean(0)
    products = centred @ centred.T
    squares = products.diagonal()
    return (squares[:, None] + squares - 2 * products).clamp_(min=0).fill_diagonal_(0)
