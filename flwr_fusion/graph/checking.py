"""Probing what a network computes: copies to trace, which layers run, outputs at any weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from flwr_fusion.errors import FusionError
from flwr_fusion.observe import arguments, call, moved_to

# Relative to the output's length; single precision through many layers.
_ROUNDING = 1e-4


def prepared_copy(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode and at least float32 whose parameters take gradients."""
    traced = copy.deepcopy(model).eval()
    if not any(p.dtype == torch.float64 for p in traced.parameters()):
        traced = traced.float()
    for parameter in traced.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return traced


def call_order(model: nn.Module, inputs: Any) -> dict[str, int]:
    """Return for every module that is called the number of its first call."""
    order: dict[str, int] = {}
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, _args: Any) -> None:
        order.setdefault(names[module], len(order))

    handles = [module.register_forward_pre_hook(note) for module in names]
    try:
        with torch.no_grad():
            call(model, inputs)
    except Exception as error:
        raise FusionError(
            f"{type(model).__name__} cannot be run on the example inputs: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return order


def idle_layers(model: nn.Module, inputs: Any) -> list[str]:
    """Return the layers whose parameters play no part in what a network computes on inputs.

    Parameters
    ----------
    model : nn.Module
        The network, all of whose parameters take gradients.
    inputs : Tensor, tuple or dict
        What it is called with.

    Returns
    -------
    list of str
        Layers that are not called and get no gradient; some are read without a call.
    """
    called = call_order(model, inputs)
    silent = {
        name: own
        for name, module in model.named_modules()
        if name not in called and (own := list(module.parameters(recurse=False)))
    }
    if not silent:
        return []
    with torch.enable_grad():
        leaves = [t for t in tree_leaves(call(model, inputs)) if isinstance(t, Tensor)]
        total = sum((t.abs().sum() for t in leaves if t.requires_grad), torch.zeros(()))
    owned = [p for own in silent.values() for p in own if p.requires_grad]
    if not total.requires_grad or not owned:
        return list(silent)
    gradients = torch.autograd.grad(total, owned, allow_unused=True)
    read = {id(p) for p, g in zip(owned, gradients, strict=True) if g is not None}
    return [name for name, own in silent.items() if not any(id(p) in read for p in own)]


def random_state(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Return a state dict with generic values of a sensible scale everywhere."""

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    def around_one(tensor: Tensor) -> Tensor:
        return 0.5 + torch.rand(tensor.shape, generator=generator)

    state = model.state_dict(keep_vars=True)
    drawn: dict[int, Tensor] = {}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    result = {}
    for name, tensor in state.items():
        scale = name in parameters and name.endswith("weight") and tensor.dim() <= 1
        draw: Callable[[Tensor], Tensor] | None = None
        if scale or name.endswith("running_var"):
            draw = around_one
        elif name in parameters or name.endswith("running_mean"):
            draw = normal
        if id(tensor) in drawn:  # Tied tensors stay equal.
            result[name] = drawn[id(tensor)]
            continue
        value = tensor.detach().clone()
        if draw is not None and tensor.is_floating_point():
            value = draw(tensor).to(tensor)
            if tensor.dim() > 1:
                value *= (2 / max(1, tensor[0].numel())) ** 0.5
        result[name] = drawn[id(tensor)] = value
    return result


def output_vector(model: nn.Module, state: Mapping[str, Tensor], inputs: Any) -> Tensor:
    """Return all floating-point outputs of a network with other values, in one vector.

    Computed in double precision: deep networks at random weights enlarge rounding errors.
    """
    double = copy.deepcopy(model).double()
    values = {k: t.double() if t.is_floating_point() else t for k, t in state.items()}
    args, kwargs = arguments(moved_to(double, inputs))
    try:
        with torch.no_grad():
            output = torch.func.functional_call(double, values, args, kwargs, tie_weights=False)
    except Exception as error:
        raise FusionError(
            f"{type(model).__name__} cannot be run with tensors of other sizes: {error}"
        ) from error
    tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    vector = torch.cat([t.flatten().double().cpu() for t in tensors])
    if not torch.isfinite(vector).all():
        raise FusionError(
            f"{type(model).__name__} gives non-finite outputs at random weights: "
            "what is done to its channels and layers cannot be checked"
        )
    return vector


def random_inputs(model: nn.Module, example_inputs: Any, generator: torch.Generator) -> Any:
    """Return normal variables in the shape of the example inputs; integers stay as they are."""

    def draw(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return torch.randn(x.shape, generator=generator).to(x)

    return tree_map(draw, moved_to(model, example_inputs))


def is_close(ours: Tensor, expected: Tensor) -> bool:
    """Whether two outputs agree up to rounding."""
    same = ours.shape == expected.shape
    return same and float((ours - expected).norm()) <= _ROUNDING * float(expected.norm())
