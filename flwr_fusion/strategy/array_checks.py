"""Arrays on the wire: read without trusting what they say of themselves, checked, written."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor, nn

from flwr_fusion.strategy.reasons import Reason, RejectedReply

# Far above any weight of a network, far below where sums of squares overflow single precision.
_LARGEST_VALUE = 1e12
_LARGEST_COUNT = 1e15
# Bytes of headers that are remembered: long ones are somebody's attempt to fill the memory.
_USUAL_HEADER = 256
_KINDS = {"f": "floating-point", "i": "integer", "u": "integer", "b": "boolean"}


def named_arrays(arrays: ArrayRecord, template: Mapping[str, Tensor]) -> ArrayRecord:
    """Return arrays under a model's names, also where they came as a plain list, or peft's.

    ``ArrayRecord([array, ...])`` numbers its arrays: these stand in the order of the state dict.
    peft's ``get_peft_model_state_dict`` leaves the adapter's name out.
    """
    by_peft = {_without_adapter(name): name for name in template}
    if arrays.keys() == by_peft.keys() != template.keys() and len(by_peft) == len(template):
        return ArrayRecord({by_peft[name]: array for name, array in arrays.items()})
    numbered = [str(n) for n in range(len(arrays))]
    if len(arrays) != len(template) or list(arrays) != numbered or set(numbered) == set(template):
        return arrays
    return ArrayRecord(dict(zip(template, arrays.values(), strict=True)))


def _without_adapter(name: str) -> str:
    """Return the name that peft saves a tensor under: ``lora_A.default.weight`` without default."""
    parts = name.split(".")
    for n, part in enumerate(parts):
        if part.startswith("lora_"):
            return ".".join(parts[: n + 1] + parts[n + 2 :])
        if part == "modules_to_save":
            return ".".join(parts[:n] + parts[n + 2 :])
    return name


@dataclass(frozen=True)
class Largest:
    """The largest absolute values in a network's arrays.

    Parameters
    ----------
    values : float
        Of all floating-point arrays but variances.
    variances : float
        Of running variances.
    """

    values: float = 0.0
    variances: float = 0.0


def check_arrays(arrays: ArrayRecord, template: Mapping[str, Tensor]) -> Largest:
    """Reject arrays that are not a model's: names, shapes, kinds, not finite, huge.

    Returns
    -------
    Largest
        How large their values are.
    """
    missing, extra = template.keys() - arrays.keys(), arrays.keys() - template.keys()
    if missing or extra:
        raise RejectedReply(
            Reason.NAMES,
            f"the arrays are not the model's: missing {sorted(missing)[:5]}, "
            f"unknown {sorted(extra)[:5]}{_remedy(arrays, template)}",
        )
    largest = {name: _check_array(name, arrays[name], like) for name, like in template.items()}
    variances = {name for name in largest if _is_variance(name)}
    return Largest(
        max((size for name, size in largest.items() if name not in variances), default=0.0),
        max((largest[name] for name in variances), default=0.0),
    )


def _is_variance(name: str) -> bool:
    return name.rpartition(".")[2] == "running_var"


def _remedy(arrays: ArrayRecord, template: Mapping[str, Tensor]) -> str:
    """Return what may mend arrays of other names."""
    for prefix, source in _PREFIXES.items():
        if {name.removeprefix(prefix) for name in arrays} == set(template):
            return f"; all names begin with {prefix!r}: send the state dict of {source}"
        if {name.removeprefix(prefix) for name in template} == set(arrays):
            return f"; the strategy's model is wrapped: give it {source}"
    if all(name.isdigit() for name in arrays):
        return (
            f"; {len(arrays)} arrays came as a list, and the model has {len(template)}: send all "
            "of its state dict, buffers included, in its order, or ArrayRecord(model.state_dict())"
        )
    return ""


_PREFIXES = {
    "module.": "model.module",
    "_module.": "model._module",
    "_orig_mod.": "model._orig_mod",
}


def without_local(
    arrays: ArrayRecord, template: Mapping[str, Tensor], model: nn.Module
) -> ArrayRecord:
    """Return arrays without those of a model's tensors that do not travel."""
    if len(template) == len(arrays) or not arrays.keys() <= model.state_dict().keys():
        return arrays
    return ArrayRecord({name: array for name, array in arrays.items() if name in template})


def check_plausible(arrays: ArrayRecord, template: Mapping[str, Tensor]) -> None:
    """Check arrays that have passed `check_arrays` for negative variances and huge counters.

    No training leads to them.
    Counters may be negative: noise that a client adds to all it sends makes them so.
    """
    for name, like in template.items():
        is_variance = _is_variance(name)
        is_counter = like.numel() == 1 and not like.is_floating_point()
        if not is_variance and not is_counter:
            continue
        values = decode_array(name, arrays[name], tuple(like.shape))
        if is_variance and values.size and values.min() < 0:
            raise RejectedReply(Reason.MAGNITUDE, f"array '{name}' has negative variances")
        if is_counter and abs(int(values.item())) > _LARGEST_COUNT:
            raise RejectedReply(Reason.MAGNITUDE, f"counter '{name}' is {values.item()}")


def _check_array(name: str, array: Array, like: Tensor) -> float:
    """Check one array; return its largest absolute value, 0 where it holds no real numbers."""
    values = decode_array(name, array, tuple(like.shape))
    expected = torch.empty(0, dtype=like.dtype).float() if like.is_floating_point() else like
    kind = np.asarray(expected.new_empty(0).cpu().numpy()).dtype.kind
    if _KINDS.get(values.dtype.kind) != _KINDS[kind]:
        raise RejectedReply(
            Reason.TYPE, f"array '{name}' holds {values.dtype}, not {_KINDS[kind]} numbers"
        )
    if values.dtype.kind != "f" or not values.size:
        return 0.0
    # Both are NaN where any value is.
    largest = max(abs(float(values.max())), abs(float(values.min())))
    if not math.isfinite(largest):
        raise RejectedReply(Reason.NON_FINITE, f"array '{name}' has non-finite values")
    if largest > min(_LARGEST_VALUE, torch.finfo(like.dtype).max):
        raise RejectedReply(Reason.MAGNITUDE, f"array '{name}' has values up to {largest:.1e}")
    return largest


def decode_array(name: str, array: Array, shape: tuple[int, ...]) -> NDArray[Any]:
    """Read an array without trusting its header: nothing is allocated that was not received.

    Parameters
    ----------
    name : str
        Name for messages.
    array : Array
        The serialised array.
    shape : tuple of int
        The shape that it must have.

    Returns
    -------
    ndarray
        A read-only view of the received bytes.

    Raises
    ------
    RejectedReply
        If the bytes are no array, or one of another shape or length.
    """
    header = _header_of(array.data)
    try:
        received, fortran_order, dtype = _read_header(header)
    except Exception as error:
        raise RejectedReply(Reason.UNREADABLE, f"array '{name}' cannot be read: {error}") from error
    if received != shape:
        raise RejectedReply(
            Reason.SHAPE, f"array '{name}' has shape {received}, the model's has {shape}"
        )
    if dtype.kind not in _KINDS or dtype.itemsize > 8:
        raise RejectedReply(
            Reason.TYPE, f"array '{name}' holds {dtype}, not numbers that PyTorch has"
        )
    size = math.prod(shape) * dtype.itemsize
    payload = memoryview(array.data)[len(header) :]
    if len(payload) != size:
        raise RejectedReply(
            Reason.UNREADABLE, f"array '{name}' has {len(payload)} bytes of data instead of {size}"
        )
    flat: NDArray[Any] = np.frombuffer(payload, dtype)
    return flat.reshape(shape[::-1]).T if fortran_order else flat.reshape(shape)


def _header_of(data: bytes) -> bytes:
    """Return the bytes before an array's values: in npy's format they begin with their length."""
    begin = 10 if data[6:7] == b"\1" else 12
    return data[: begin + int.from_bytes(data[8:begin], "little")]


def _read_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return the shape, the order and the type that a header tells."""
    # All clients' arrays of a name have the same header, and parsing it takes a while.
    return _remembered(header) if len(header) <= _USUAL_HEADER else _parsed(header)


@lru_cache(maxsize=4096)
def _remembered(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    return _parsed(header)


def _parsed(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    stream = io.BytesIO(header)
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    return read(stream)


def state_of(arrays: ArrayRecord, template: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of arrays that have passed `check_arrays`, in the model's dtypes."""
    return {name: tensor.clone() for name, tensor in shared_state(arrays, template).items()}


def shared_state(arrays: ArrayRecord, template: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors in the memory of the arrays: they must not be written into."""
    state = {}
    with warnings.catch_warnings():
        # PyTorch warns of what is read-only.
        warnings.simplefilter("ignore", UserWarning)
        for name, like in template.items():
            values = decode_array(name, arrays[name], tuple(like.shape))
            native = np.asarray(values, dtype=values.dtype.newbyteorder("="))
            state[name] = torch.from_numpy(native).to(like.dtype)
    return state


def arrays_of(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Return a state dict as an array record; types that NumPy lacks travel in single precision."""
    return ArrayRecord({name: Array(_as_numpy(tensor)) for name, tensor in state.items()})


def _as_numpy(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu()
    try:
        return np.asarray(tensor.numpy())
    except TypeError:
        return np.asarray(tensor.float().numpy())
