"""What every fusion is compared with."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def sliced_average(models: Sequence[nn.Module], target: nn.Module) -> nn.Module:
    """Return the average of networks of other widths, the smaller as top-left slices (HeteroFL).

    Every value of the target is the mean over the networks that have it; what none has stays.

    Parameters
    ----------
    models : sequence of nn.Module
        Networks with the target's tensors, of any widths.
    target : nn.Module
        Network of the width that is wanted. Not modified.

    Returns
    -------
    nn.Module
        The average.

    References
    ----------
    Diao et al., "HeteroFL", ICLR 2021, equation 3.
    """
    result = copy.deepcopy(target)
    states = [model.state_dict() for model in models]
    averaged = {
        name: _covering_mean([state[name] for state in states], own)
        for name, own in result.state_dict().items()
    }
    result.load_state_dict(averaged)
    return result


def _covering_mean(parts: Sequence[Tensor], own: Tensor) -> Tensor:
    total, count = torch.zeros_like(own, dtype=torch.float64), torch.zeros_like(own)
    for part in parts:
        common = tuple(slice(min(a, b)) for a, b in zip(part.shape, own.shape, strict=True))
        total[common] += part[common]
        count[common] += 1
    return torch.where(count > 0, total / count.clamp(min=1), own).to(own.dtype)
