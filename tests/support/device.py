"""An accelerator that is not there: tensors of a device of their own, computed on the CPU.

On it nothing mixes with the CPU's tensors unseen, and everything that makes the host wait for the
device (numbers and shapes that are read, copies back) is counted with the line that asked for it.
Without doubles it has no decompositions either, as Apple's MPS.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from flwr_fusion.graph import groups
from flwr_fusion.precision import widest_of

NAME = "simulated"
# What is a number, or has a shape, that depends on values.
_READING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}
_DECOMPOSITIONS = ("linalg_eig", "linalg_qr", "_linalg_", "linalg_inv", "linalg_chol", "cholesky")
# Indices and values to be copied may stand on the CPU.
_MIXING = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_"}


class DeviceTensor(Tensor):
    """A tensor that says it is on a simulated device, around the one on the CPU."""

    on_host: Tensor

    @staticmethod
    def __new__(cls: type[Self], values: Tensor) -> Self:
        made = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(NAME, 0),
        )
        made.on_host = values
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise RuntimeError(f"{func}: its device is not simulated any more")


class SimulatedDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, tensors can be made on a simulated device, and are computed there.

    To be used in a process of its own: PyTorch does not forget a device, and with one neither forks
    nor wraps networks as before.

    Parameters
    ----------
    doubles : bool
        Whether it has double precision and decompositions.
    """

    def __init__(self, *, doubles: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if not hasattr(torch, NAME):
            backend_registration._setup_privateuseone_for_python_backend(NAME)
        self.doubles = doubles
        self.waits: Counter[str] = Counter()
        self._constructors = _Constructors()

    def __enter__(self) -> Self:
        widest_of.cache_clear()
        self._constructors.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._constructors.__exit__(*error)  # type: ignore[no-untyped-call]
        # A trace that was made on the device is no use to a network of the same shapes elsewhere.
        groups._BY_ARCHITECTURE.clear()

    def moved(self, model: nn.Module) -> nn.Module:
        """Return a copy of a network on the device."""
        there: dict[int, Any] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            values = DeviceTensor(tensor.detach().clone())
            trained = isinstance(tensor, nn.Parameter)
            there[id(tensor)] = nn.Parameter(values, tensor.requires_grad) if trained else values
        return copy.deepcopy(model, there)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [x for x in tensors if isinstance(x, DeviceTensor)]
        wanted = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if not ours and (wanted is None or wanted.type != NAME):
            return func(*args, **kwargs)
        mixed = any(x.dim() for x in tensors if not isinstance(x, DeviceTensor))
        if ours and mixed and name not in _MIXING:
            raise RuntimeError(f"{name}: tensors on {NAME} and on the CPU")
        to_host = (wanted is not None and wanted.type == "cpu") or (
            name == "copy_" and not isinstance(args[0], DeviceTensor)
        )
        masked = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if to_host or masked or name in _READING:
            self.waits[_asked_by(sys._getframe(1))] += 1
        if wanted is not None:
            kwargs |= {"device": torch.device("cpu")}
        found = func(*tree_map(_on_host, args), **tree_map(_on_host, kwargs))
        if to_host:
            return found
        wrapped = tree_map(lambda x: self._wrapped(x, ours, name), found)
        if not ours:
            return wrapped
        return return_and_correct_aliasing(func, args, kwargs, wrapped)  # type: ignore[no-untyped-call]

    def _wrapped(self, found: Any, given: list[DeviceTensor], name: str) -> Any:
        if not isinstance(found, Tensor):
            return found
        if not self.doubles and (found.dtype == torch.float64 or name.startswith(_DECOMPOSITIONS)):
            raise TypeError(f"{name}: {NAME} has no float64 and no decompositions")
        # What an operation writes into stays what it is.
        same = [tensor for tensor in given if tensor.on_host is found]
        return same[0] if same else DeviceTensor(found)


class _Constructors(TorchFunctionMode):
    """Makes tensors of numbers on the CPU before they go to a device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if func in (torch.tensor, torch.as_tensor) else None
        made = func(*args, **kwargs)
        return made if device is None else made.to(device)


def _on_host(argument: Any) -> Any:
    return argument.on_host if isinstance(argument, DeviceTensor) else argument


def _asked_by(frame: FrameType | None) -> str:
    """Return the line of the package that an operation comes from."""
    while frame is not None and "/flwr_fusion/" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return "elsewhere"
    code = frame.f_code
    return f"{code.co_filename.rpartition('/flwr_fusion/')[2]}:{frame.f_lineno} {code.co_name}"
