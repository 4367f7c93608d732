"""The weighted mean of mapped clients, one client at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flwr_fusion.errors import FusionError
from flwr_fusion.fusion import Client, Fusion
from flwr_fusion.maps import Maps, along, coverage_along, row_blocks, row_mapping


@dataclass(frozen=True)
class Mean:
    """The mean of the clients by weight; from a shared start, what FedAvg makes of them.

    References
    ----------
    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    2017, algorithm 1.
    """

    needs_statistics: ClassVar[bool] = False
    needs_sent: ClassVar[bool] = False
    least_clients: ClassVar[int] = 1
    few_cannot_decide: ClassVar[bool] = False

    def combine(self, fusion: Fusion, maps: Sequence[Maps]) -> dict[str, Tensor]:
        """Return the mean over the clients that have a channel, of each channel."""
        mean = RunningMean(fusion.target)
        for client, chosen in zip(fusion.clients, maps, strict=True):
            mean.add(client, chosen)
        return mean.finish(uncovered=fusion.target)


class RunningMean:
    """Weighted mean of clients in the fused network's channels; only the sums are held.

    Parameters
    ----------
    template : mapping of str to Tensor
        State dict of the fused architecture: shapes, dtypes and device.
    """

    def __init__(self, template: Mapping[str, Tensor]) -> None:
        self._template = template
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def add(
        self,
        client: Client,
        maps: Maps,
        *,
        sign: int = 1,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add a client, or with sign -1 take it out again."""
        # fused = sum_k diag(c_k w_k / sum_l c_l w_l) M_k W_k M'_k (merge M, unmerge M'): a fused
        # channel is the mean over the clients that have a channel there (coverage c_k).
        values = client.state() if state is None else state
        for name, like in self._template.items():
            if name in client.absent:
                continue
            value = values[name].detach().to(like.device)
            share = sign * _share(name, like, client, maps)
            if name not in self._sums:
                self._sums[name] = torch.zeros(like.shape, dtype=share.dtype, device=like.device)
                self._weights[name] = torch.zeros_like(share)
            elif not value.is_floating_point() and value.dim():
                self._check_equal(name, value)
            take = row_mapping(value, name, client.correspondence, maps)
            for rows in row_blocks(name, like, client.correspondence, maps):
                self._accumulate(name, take(rows).to(share.dtype), share, rows)
            self._weights[name] = self._weights[name] + share

    def _accumulate(self, name: str, part: Tensor, share: Tensor, rows: slice | None) -> None:
        total = self._sums[name]
        if rows is not None:
            total = total[rows]
            share = share[rows] if share.dim() and len(share) > 1 else share
        total.addcmul_(part, share)

    def _check_equal(self, name: str, value: Tensor) -> None:
        """Refuse to average integer tables (indices, masks) that differ between clients."""
        mean = self._sums[name] / self._weights[name]
        if not torch.equal(mean.round().to(value.dtype), value):
            raise FusionError(
                f"tensor '{name}' holds {value.dtype} values that differ between the clients: "
                "they cannot be averaged"
            )

    def mean(self, uncovered: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean in the template's dtypes; ``uncovered`` fills what no client has."""
        return self._divided(lambda name: self._sums[name].clone(), uncovered)

    def finish(self, uncovered: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean as `mean` does, in the memory of the sums, which are given up."""
        return self._divided(lambda name: self._sums.pop(name), uncovered)

    def _divided(
        self, take: Callable[[str], Tensor], uncovered: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {
            name: self._quotient(name, take(name), uncovered)
            if name in self._sums
            else uncovered[name].to(like.device, like.dtype, copy=True)
            for name, like in self._template.items()
        }

    def _quotient(self, name: str, total: Tensor, uncovered: Mapping[str, Tensor]) -> Tensor:
        weight, like = self._weights[name], self._template[name]
        total.div_(weight)
        empty = weight.abs() < 1e-12
        if bool(empty.any()):
            total = torch.where(empty, uncovered[name].to(total), total)
        return (total if like.is_floating_point() else total.round()).to(like.dtype)


def _share(name: str, like: Tensor, client: Client, maps: Maps) -> Tensor:
    """Return a client's weight in a tensor's sums: of every written position, or one for all."""
    covered = coverage_along(name, client.correspondence, maps)
    coverage = torch.ones(()) if covered is None else along(covered[1], covered[0], like.dim())
    return (client.weight * coverage).to(like.device, _accumulator(like))


def _accumulator(value: Tensor) -> torch.dtype:
    """Sum half precision in single, integers in double."""
    if value.is_floating_point():
        return torch.promote_types(value.dtype, torch.float32)
    return torch.float64
