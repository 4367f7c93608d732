"""Networks and their state dicts: read, compared, copied, assembled."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from flwr_fusion.errors import FusionError
from flwr_fusion.observe import call, evaluation_mode, moved_to, tensors_of
from flwr_fusion.precision import numbers, widest_of

_PART = 1_000_000
# By the names of their classes, so that nothing must be imported for it.
_WRAPPERS = {
    "OptimizedModule": "model._orig_mod, and compile what comes out",
    "DataParallel": "model.module",
    "DistributedDataParallel": "model.module",
    "FullyShardedDataParallel": "an unsharded model",
}


def key_of(layer: str, kind: str) -> str:
    """Return the key of a layer's tensor; the network itself may be the layer."""
    return f"{layer}.{kind}" if layer else kind


def module_of(tensor: str) -> str:
    """Return the name of the module that owns a tensor; "" is the network itself."""
    return tensor.rpartition(".")[0]


def owner_of(tensor: str) -> str:
    """Return the name of the module that owns a tensor, or of the network's own parameter."""
    return module_of(tensor) or tensor


def check_networks(networks: Any, name: str) -> None:
    """Refuse what is no sequence of networks, and an empty one."""
    if isinstance(networks, nn.Module) and not isinstance(networks, nn.ModuleList):
        raise FusionError(f"{name} must be a sequence of networks, not a single one")
    if not isinstance(networks, (Sequence, nn.ModuleList)):
        raise FusionError(f"{name} must be a list of networks, not {type(networks).__name__}")
    if len(networks) == 0:
        raise FusionError(f"there are no {name}")
    # Other sequences build their networks when they are asked for.
    for k, network in enumerate(networks if isinstance(networks, (list, tuple)) else ()):
        check_network(f"{name}[{k}]", network)


def check_network(name: str, network: Any) -> None:
    """Refuse what is no network."""
    if isinstance(network, type):
        raise FusionError(f"{name} must be a network, not the class {network.__name__}: call it")
    if not isinstance(network, nn.Module):
        raise FusionError(
            f"{name} must be a network, not {type(network).__name__}: load the values of a state "
            "dict into a network first"
        )
    kind = type(network).__name__
    if kind in _WRAPPERS:
        raise FusionError(f"{name} is wrapped by {kind}: pass {_WRAPPERS[kind]}")
    if isinstance(network, torch.jit.ScriptModule):
        raise FusionError(
            f"{name} is compiled by TorchScript: pass the module that it was made of, with the "
            "compiled one's state dict loaded into it"
        )
    for key, tensor in network.state_dict().items():
        if not isinstance(tensor, Tensor) or tensor.is_quantized:
            raise FusionError(
                f"{name}: its state dict holds '{key}', which is no tensor of numbers (a quantised "
                "layer, or extra state): fuse the network before it is quantised"
            )
        if is_lazy(tensor):
            raise FusionError(f"{name}: tensor '{key}' has no shape yet: run the network once")
        if tensor.is_meta:
            raise FusionError(f"{name}: tensor '{key}' has no values, being on the meta device")


def check_networks_given(target: Any, reference: Any) -> None:
    """Refuse a target or a reference that is no network."""
    for name, network in (("target", target), ("reference", reference)):
        if network is not None:
            check_network(name, network)


def detached_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a network's state dict without its autograd graph."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def squared_norm(state: Mapping[str, Tensor], who: str) -> float:
    """Return the sum of squares of all floating-point values; refuse non-finite ones by name."""
    norms: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.detach().resolve_conj())
        if tensor.is_floating_point():
            # In parts: the norm in double precision makes a copy of what it is given.
            parts = torch.split(tensor.detach().flatten(), _PART)
            precise = widest_of(tensor.device)
            norms[name] = torch.linalg.vector_norm(
                torch.stack([torch.linalg.vector_norm(part, dtype=precise) for part in parts])
            )
    found = dict(zip(norms, numbers(norms.values()), strict=True))
    for name, norm in found.items():
        # In single precision squares may be too large for a number of finite values.
        if not math.isfinite(norm) and not all_finite(state[name]):
            raise FusionError(f"{who}: tensor '{name}' has non-finite values")
    return sum(norm * norm for norm in found.values())


def names_of_not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors with a value that is infinite or not a number.

    Found without copies, and with one wait for the device.
    """
    finite: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
            real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
            # Both are NaN if one is. `isfinite` of every value takes 25 times as long, and memory.
            finite[name] = torch.stack(torch.aminmax(real.detach())).isfinite().all()
    found = numbers(finite.values())
    return [name for name, is_finite in zip(finite, found, strict=True) if not is_finite]


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor has no value that is infinite or not a number."""
    return not names_of_not_finite({"": tensor})


def depth_and_size(model: nn.Module) -> tuple[int, int]:
    """Return a network's number of layers with weights, and of parameters."""
    parameters = list(model.parameters())
    return sum(p.dim() > 1 for p in parameters), sum(p.numel() for p in parameters)


def tied_tensors(model: nn.Module) -> set[str]:
    """Return the keys of a network's state dict whose tensor has another key as well."""
    keys: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        keys.setdefault(id(tensor), []).append(name)
    return {name for names in keys.values() if len(names) > 1 for name in names}


def check_same_tensors(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], who: str, whose: str
) -> None:
    """Refuse a state dict with other keys or shapes than the expected one."""
    if state.keys() != expected.keys():
        missing = sorted(expected.keys() - state.keys())
        extra = sorted(state.keys() - expected.keys())
        raise FusionError(
            f"{who} does not have the tensors of {whose}: missing {missing[:5]}, extra {extra[:5]}"
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise FusionError(
                f"{who}: tensor '{name}' has shape {tuple(tensor.shape)}, "
                f"that of {whose} has {tuple(expected[name].shape)}"
            )


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a network, also where its modules hold computed tensors (old weight norms).

    Raises
    ------
    FusionError
        If it cannot be copied.
    """
    return _copied(model, {})


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    # PyTorch copies leaves of the autograd graph only.
    for module in model.modules():
        for value in tree_leaves(vars(module)):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise FusionError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}"
        ) from error


def prepared_copy(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode whose floating-point parameters take gradients."""
    prepared = copied(model).eval()
    for parameter in prepared.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return prepared


def copy_sharing_parameters(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode over the memory of the network's parameters.

    To be run with other values alone: a forward pass may write into its parameters, as that of an
    embedding with a largest norm does.
    """
    parameters = {id(p): nn.Parameter(p.detach(), False) for p in model.parameters()}
    return _copied(model, parameters).eval()


def with_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a network with other values, given for keys of its state dict."""
    loaded = copied(model)
    # The network's own state dict carries the versions that some layers ask for.
    full = loaded.state_dict()
    full.update(state)
    loaded.load_state_dict(full)
    return loaded


def assemble_model(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a network of a model's architecture made of a state dict's tensors, not copies."""
    tensors: dict[int, Any] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        value = state[name]
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, tensor.requires_grad)
        # Of tied tensors the first.
        tensors.setdefault(id(tensor), value)
    return _copied(model, tensors)


def assemble_unchanged(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return `assemble_model`'s network; that it computes what the model does is remembered.

    For networks that nobody changes: of others it would have to be checked.
    """
    assembled = assemble_model(model, state)
    _UNCHANGED[assembled] = ref(model)
    return assembled


_UNCHANGED: WeakKeyDictionary[nn.Module, ref[nn.Module]] = WeakKeyDictionary()


class BuiltOnAccess(Sequence[nn.Module]):
    """Networks that are built one at a time, whenever one is asked for.

    Parameters
    ----------
    count : int
        How many there are.
    build : callable
        Returns the network of a number.
    """

    def __init__(self, count: int, build: Callable[[int], nn.Module]) -> None:
        self._count = count
        self._build = build

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    @overload
    def __getitem__(self, index: slice) -> list[nn.Module]: ...
    def __getitem__(self, index: int | slice) -> nn.Module | list[nn.Module]:
        if isinstance(index, slice):
            return [self._build(k) for k in range(*index.indices(self._count))]
        return self._build(range(self._count)[index])


def type_name(module: nn.Module) -> str:
    """Return the name of a module's class: parametrised and traced ones have a class each."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def check_same_modules(model: nn.Module, target: nn.Module) -> None:
    """Refuse networks whose layers of one name are of different types."""
    types = {name: type_name(module) for name, module in target.named_modules()}
    for name, module in model.named_modules():
        if types.get(name) != type_name(module):
            raise FusionError(f"its layer '{name}' is not of the target's type")


def check_same_function(model: nn.Module, target: nn.Module, example_inputs: Any) -> None:
    """Refuse networks of the same shapes that compute something else (heads, strides)."""
    if model is target or (model in _UNCHANGED and _UNCHANGED[model]() is target):
        return
    outputs = []
    for network in (model, assemble_model(target, detached_state(model))):
        # What is drawn in the forward pass is drawn alike.
        with evaluation_mode(network), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            output = call(network, moved_to(network, example_inputs))
        leaves = [torch.view_as_real(x) if x.is_complex() else x for x in tensors_of(output)]
        outputs.append(torch.cat([x.cpu().double().flatten() for x in leaves]))
    same = outputs[0].shape == outputs[1].shape
    if not same or float((outputs[0] - outputs[1]).norm()) > 1e-2 * float(outputs[0].norm()):
        raise FusionError(
            "with its weights the target's architecture computes something else: both have the "
            "same shapes, but differ in attention heads, strides, activations or the like"
        )


def architecture_of(model: nn.Module) -> tuple[Any, ...]:
    """Return a key that networks of one type and of equal shapes share."""
    shapes = tuple((name, tensor.shape) for name, tensor in model.state_dict().items())
    return (type_name(model), shapes)
