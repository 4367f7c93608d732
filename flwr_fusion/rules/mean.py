"""The weighted mean of mapped clients, one client at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flwr_fusion.fusion import Client, Fusion
from flwr_fusion.maps import Maps, along, coverage_along, map_tensor, row_blocks, row_mapping
from flwr_fusion.precision import widest_of


@dataclass(frozen=True)
class Mean:
    """The mean of the clients by weight; from a shared start, what FedAvg makes of them.

    References
    ----------
    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    2017, algorithm 1.
    """

    needs_statistics: ClassVar[bool] = False
    ignores_statistics: ClassVar[bool] = True
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
        # On the CPU, where they are asked which are zero.
        self._weights: dict[str, Tensor] = {}
        self._tables: dict[str, list[tuple[Tensor, float]]] = {}

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
            if is_table(like):
                mapped = map_tensor(value, name, client.correspondence, maps)
                self._vote(name, mapped.to(like.dtype), sign * client.weight)
                continue
            share = sign * _share(name, like, client, maps)
            if name not in self._sums:
                self._sums[name] = torch.zeros(like.shape, dtype=share.dtype, device=like.device)
                self._weights[name] = torch.zeros_like(share)
            self._weights[name] = self._weights[name] + share
            take = row_mapping(value, name, client.correspondence, maps)
            share = share.to(like.device)
            for rows in row_blocks(name, like, client.correspondence, maps):
                self._accumulate(name, take(rows).to(share.dtype), share, rows)

    def _accumulate(self, name: str, part: Tensor, share: Tensor, rows: slice | None) -> None:
        total = self._sums[name]
        if rows is not None:
            total = total[rows]
            share = share[rows] if share.dim() and len(share) > 1 else share
        total.addcmul_(part, share)

    def _vote(self, name: str, table: Tensor, weight: float) -> None:
        """Count a client's table of integers, which has no mean."""
        tables = self._tables.setdefault(name, [])
        for n, (other, sum_of_weights) in enumerate(tables):
            if torch.equal(other, table):
                tables[n] = (other, sum_of_weights + weight)
                return
        tables.append((table, weight))

    def _elected(self, name: str) -> Tensor:
        """Return the table that most of the weight has; among equals that of the first client."""
        tables = self._tables[name]
        if len(tables) > 1:
            warnings.warn(
                f"tensor '{name}' holds {tables[0][0].dtype} values that differ between the "
                "clients: they cannot be averaged, and those of most of the weight are kept",
                stacklevel=2,
            )
        return max(tables, key=lambda pair: pair[1])[0].clone()

    def mean(self, uncovered: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean in the template's dtypes; ``uncovered`` fills what no client has."""
        return self._divided(lambda name: self._sums[name].clone(), uncovered)

    def finish(self, uncovered: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean as `mean` does, in the memory of the sums, which are given up."""
        return self._divided(lambda name: self._sums.pop(name), uncovered)

    def _divided(
        self, take: Callable[[str], Tensor], uncovered: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        found = {}
        for name, like in self._template.items():
            if name in self._tables:
                found[name] = self._elected(name)
            elif name in self._sums:
                found[name] = self._quotient(name, take(name), uncovered)
            else:
                found[name] = uncovered[name].to(like.device, like.dtype, copy=True)
            if is_batch_counter(name):
                found[name].clamp_(min=0)
        return found

    def _quotient(self, name: str, total: Tensor, uncovered: Mapping[str, Tensor]) -> Tensor:
        weight, like = self._weights[name], self._template[name]
        total.div_(weight.to(total.device))
        empty = weight.abs() < 1e-12
        if bool(empty.any()):
            total = torch.where(empty.to(total.device), uncovered[name].to(total), total)
        return (total if _is_number(like) else total.round()).to(like.dtype)


def _share(name: str, like: Tensor, client: Client, maps: Maps) -> Tensor:
    """Return a client's weight in a tensor's sums: of every written position, or one for all."""
    covered = coverage_along(name, client.correspondence, maps)
    coverage = torch.ones(()) if covered is None else along(covered[1], covered[0], like.dim())
    return (client.weight * coverage).to(_accumulator(like))


def _accumulator(value: Tensor) -> torch.dtype:
    """Sum half precision in single, integers in double where there is double precision."""
    if _is_number(value):
        return torch.promote_types(value.dtype, torch.float32)
    return widest_of(value.device)


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def is_batch_counter(name: str) -> bool:
    """Whether a tensor counts the batches of a BatchNorm layer.

    One below zero, as noise that a client adds may make it, has the layer divide by zero.
    """
    return name.rpartition(".")[2] == "num_batches_tracked"


def is_table(tensor: Tensor) -> bool:
    """Whether a tensor holds several integers or truth values: indices, a mask; no counter."""
    return not _is_number(tensor) and tensor.numel() > 1
