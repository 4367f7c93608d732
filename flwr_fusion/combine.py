"""Putting mapped models together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flwr_fusion.errors import FusionError
from flwr_fusion.maps import Correspondence, Maps, coverage_along, map_tensor


class RunningMean:
    """Weighted mean of clients in the fused network's channels, one client at a time.

    ``fused = sum_k merge_k W_k unmerge_k`` with ``merge_k = diag(c_k w_k / sum_l c_l w_l) M_k``:
    a fused channel is the mean over the clients that have a channel there (coverage ``c_k``).
    Only the running sums are held.

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
        state: Mapping[str, Tensor],
        weight: float,
        correspondence: Correspondence | None = None,
        maps: Maps | None = None,
    ) -> None:
        """Add one client; a negative weight takes it out again.

        Parameters
        ----------
        state : mapping of str to Tensor
            The client's state dict.
        weight : float
            Its weight relative to the other clients'.
        correspondence, maps : optional
            How its channels go into the fused network's; default: as they stand.
        """
        for name, like in self._template.items():
            value = state[name].detach().to(like.device)
            coverage = torch.ones(())
            if correspondence is not None and maps is not None:
                value = map_tensor(value, name, correspondence, maps)
                covered = coverage_along(name, correspondence, maps)
                if covered is not None:
                    coverage = _along(covered[1], covered[0], value.dim())
            self._accumulate(name, value, weight * coverage.to(like.device))

    def _accumulate(self, name: str, value: Tensor, weight: Tensor) -> None:
        kind = _accumulator(value)
        weight = weight.to(kind)
        if name not in self._sums:
            self._sums[name] = value.to(kind) * weight
            self._weights[name] = weight
            return
        if not value.is_floating_point() and value.dim():
            self._check_equal(name, value)
        self._sums[name].addcmul_(value.to(kind), weight)
        self._weights[name] = self._weights[name] + weight

    def _check_equal(self, name: str, value: Tensor) -> None:
        """Refuse to average integer tables (indices, masks) that differ between clients."""
        mean = self._sums[name] / self._weights[name]
        if not torch.equal(mean.round().to(value.dtype), value):
            raise FusionError(
                f"tensor '{name}' holds {value.dtype} values that differ between the clients: "
                "they cannot be averaged"
            )

    def mean(self, uncovered: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean in the template's dtypes.

        Parameters
        ----------
        uncovered : mapping of str to Tensor
            State dict whose values fill channels that no client has; nothing reads them.

        Returns
        -------
        dict of str to Tensor
            A state dict of the fused architecture.
        """
        return {
            name: self._divided(name, self._sums[name].clone(), uncovered) for name in self._sums
        }

    def finish(self, uncovered: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean as `mean` does, in the memory of the sums, which are given up."""
        names = list(self._sums)
        return {name: self._divided(name, self._sums.pop(name), uncovered) for name in names}

    def _divided(self, name: str, total: Tensor, uncovered: Mapping[str, Tensor]) -> Tensor:
        weight, like = self._weights[name], self._template[name]
        total.div_(weight)
        empty = weight.abs() < 1e-12
        if bool(empty.any()):
            total = torch.where(empty, uncovered[name].to(total), total)
        return (total if like.is_floating_point() else total.round()).to(like.dtype)


def _accumulator(value: Tensor) -> torch.dtype:
    """Sum half precision in single, integers in double."""
    if value.is_floating_point():
        return torch.promote_types(value.dtype, torch.float32)
    return torch.float64


def _along(vector: Tensor, axis: int, dimensions: int) -> Tensor:
    shape = [-1 if a == axis else 1 for a in range(dimensions)]
    return vector.view(shape)
