"""Checking what a network computes: permuted groups, which layers run, outputs at any weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from flwr_fusion.errors import FusionError
from flwr_fusion.observe import arguments, call, moved_to, output_of, watch

if TYPE_CHECKING:
    from flwr_fusion.graph.groups import ChannelGraph

# Relative to the output's length; single precision through many layers.
_ROUNDING = 1e-4
# Change of the output, relative to its length, by which a wrong group is told from rounding.
_CHANGED = 1e-3
# Of long lists in messages.
_LISTED = 4


def check_groups(graph: ChannelGraph, seed: int) -> None:
    """Check that permuting the free groups does not change the network."""
    generator = torch.Generator().manual_seed(seed)
    state = random_state(graph.model, generator)
    free = [group for group in graph.groups if not group.fixed]
    permutations = {g.name: torch.randperm(g.size, generator=generator) for g in free}
    expected = output_vector(graph.model, state, graph.example_inputs)

    def changes(chosen: Mapping[str, Tensor]) -> bool:
        output = output_vector(graph.model, graph.permute(state, chosen), graph.example_inputs)
        return not float((output - expected).norm()) <= _CHANGED * float(expected.norm())

    if not changes(permutations):
        _check_idle_layers(graph, state, permutations)
        return
    wrong = [g for g in free if changes({g.name: permutations[g.name]})]
    listed = "; ".join(
        f"group '{g.name}' ({_shortened(sorted({p.tensor for p in g.places}))})"
        for g in (wrong or free)[:_LISTED]
    )
    more = f" and {len(wrong) - _LISTED} more groups" if len(wrong) > _LISTED else ""
    raise FusionError(
        f"the traced channel groups of {type(graph.model).__name__} are wrong: permuting "
        f"{listed}{more} changes its output. The network uses these channels in a way that "
        "cannot be traced (for example a channel shuffle, a flatten after a transpose, or a "
        "concatenation with the network's own inputs before them)."
    )


def _check_idle_layers(
    graph: ChannelGraph, state: Mapping[str, Tensor], permutations: Mapping[str, Tensor]
) -> None:
    """Refuse layers that run in training only and read channels; warn of those that never run.

    The trace sees what runs in evaluation mode.
    """
    model, inputs = graph.model, graph.example_inputs
    never = idle = idle_layers(model, inputs)
    if not idle:
        return
    with _written_for_training(model):
        try:
            never = idle_layers(model, inputs)
            same = never == idle or is_close(
                output_vector(model, graph.permute(state, permutations), inputs),
                output_vector(model, state, inputs),
            )
        except FusionError:  # It needs more than the inputs, such as labels.
            never, same = idle, True
    if not same:
        trained = sorted(set(idle) - set(never))
        raise FusionError(
            f"layers of {type(model).__name__} run in training only ({_shortened(trained)}) "
            "and read channels of the others: what they read cannot be traced. Take them out "
            "of the networks that are fused, or let them run in evaluation as well"
        )
    if never:
        warnings.warn(
            f"layers of {type(model).__name__} do not run on the example inputs "
            f"({_shortened(never)}): they are averaged by index, which is wrong if they read "
            "channels of the others",
            stacklevel=2,
        )


@contextmanager
def _written_for_training(model: nn.Module) -> Iterator[None]:
    """Let a network in evaluation mode take its own branches for training.

    PyTorch's modules stay in evaluation: dropout draws other masks for permuted channels.
    """
    custom = [m for m in model.modules() if not type(m).__module__.startswith("torch.nn.")]
    for module in custom:
        module.training = True
    try:
        yield
    finally:
        for module in custom:
            module.training = False


def _shortened(names: list[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


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

    def note(module: nn.Module, _inputs: Any, _output: Any) -> None:
        order.setdefault(names[module], len(order))

    with watch(names, note, before=True), torch.no_grad():
        output_of(model, inputs, type(model).__name__, "the example inputs")
    return order


def idle_layers(model: nn.Module, inputs: Any) -> list[str]:
    """Return the layers whose parameters play no part in what a network computes on inputs."""
    called = call_order(model, inputs)
    silent = {
        name: parameters
        for name, module in model.named_modules()
        if name not in called and (parameters := list(module.parameters(recurse=False)))
    }
    if not silent:
        return []
    with torch.enable_grad():
        leaves = [t for t in tree_leaves(call(model, inputs)) if isinstance(t, Tensor)]
        total = sum((t.abs().sum() for t in leaves if t.requires_grad), torch.zeros(()))
    owned = [p for parameters in silent.values() for p in parameters if p.requires_grad]
    if not total.requires_grad or not owned:
        return list(silent)
    gradients = torch.autograd.grad(total, owned, allow_unused=True)
    read = {id(p) for p, g in zip(owned, gradients, strict=True) if g is not None}
    return [n for n, parameters in silent.items() if not any(id(p) in read for p in parameters)]


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
                # He et al. 2015: variance 2 / fan-in keeps activations of one size through layers.
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
