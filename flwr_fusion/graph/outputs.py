"""What a network gives at other values, drawn at random, and without noise of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from flwr_fusion.errors import FusionError
from flwr_fusion.networks import all_finite
from flwr_fusion.observe import copied_inputs, moved_to, tensors_of
from flwr_fusion.precision import widened, widest_for

if TYPE_CHECKING:
    from flwr_fusion.graph.groups import ChannelGraph

# Relative to the output's length; single precision through many layers.
_ROUNDING = 1e-4


@contextmanager
def written_for_training(model: nn.Module) -> Iterator[None]:
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


class WithoutNoise(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives every position the same draw: noise that is alike for all channels tells none apart."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation; replace what it draws."""
        name = func._schema.name.partition("::")[2].rstrip("_")
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        output = func(*args, **(kwargs or {}))
        if name in _DRAWS:
            for tensor in tensors_of(output):
                tensor.fill_(_DRAWS[name])
        return output


_DRAWS = {
    "rand": 0.5,
    "rand_like": 0.5,
    "uniform": 0.5,
    "randn": 0.5,
    "randn_like": 0.5,
    "normal": 0.5,
    "exponential": 1.0,
    "bernoulli": 1.0,
}


def random_state(
    model: nn.Module, generator: torch.Generator, *, buffers: bool = False
) -> dict[str, Tensor]:
    """Return a state dict with generic values of a sensible scale everywhere.

    Parameters
    ----------
    model : nn.Module
        The network.
    generator : torch.Generator
        What draws.
    buffers : bool
        Whether to draw floating-point buffers as well, beside running statistics.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    drawn: dict[int, Tensor] = {}
    result = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in drawn:  # Tied tensors stay equal.
            is_parameter = name in parameters
            drawn[id(tensor)] = _drawn(name, tensor.detach(), is_parameter, buffers, generator)
        result[name] = drawn[id(tensor)]
    return result


def _drawn(
    name: str, tensor: Tensor, is_parameter: bool, buffers: bool, generator: torch.Generator
) -> Tensor:
    running = name.endswith(("running_mean", "running_var"))
    drawn = is_parameter or running or buffers
    if not drawn or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.clone()
    around_one = name.endswith("running_var")
    if is_parameter:
        around_one = name.endswith("weight") and tensor.dim() <= 1
    elif not running:
        # What is nowhere negative may be a variance or a scale.
        around_one = not bool((tensor < 0).any()) if tensor.is_floating_point() else False
    if around_one:
        return (0.5 + torch.rand(tensor.shape, generator=generator)).to(tensor)
    value = torch.randn(tensor.shape, generator=generator).to(tensor)
    if tensor.dim() > 1:
        # He et al. 2015: variance 2 / fan-in keeps activations of one size through layers.
        value *= (2 / max(1, tensor[0].numel())) ** 0.5
    return value


def in_precision(values: Any, dtype: torch.dtype | None) -> Any:
    """Return all floating-point tensors in another type; complex ones in as many digits."""

    def cast(x: Any) -> Any:
        if dtype is None or not isinstance(x, Tensor):
            return x
        if x.is_complex():
            return x.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
        return x.to(dtype) if x.is_floating_point() else x

    return tree_map(cast, values)


def outputs(model: nn.Module, state: Mapping[str, Tensor], inputs: Any) -> list[Tensor]:
    """Return what a network gives with other values: its floating-point tensors, or else all.

    Raises
    ------
    FusionError
        If it cannot be run with them, or gives values that are not finite.
    """
    copied = copied_inputs(inputs)
    try:
        with torch.random.fork_rng(devices=[]), WithoutNoise():  # type: ignore[no-untyped-call]
            torch.manual_seed(0)
            output = torch.func.functional_call(
                model, dict(state), copied.args, copied.kwargs, tie_weights=False
            )
    except Exception as error:
        raise FusionError(
            f"{type(model).__name__} cannot be run at random weights: {error}"
        ) from error
    tensors = tensors_of(output)
    real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    floating = [t for t in real if t.is_floating_point()]
    if not all(map(all_finite, floating)):
        raise FusionError(
            f"{type(model).__name__} gives non-finite outputs at random weights: "
            "what is done to its channels and layers cannot be checked"
        )
    if not real:
        raise FusionError(f"the output of {type(model).__name__} has no tensors")
    return floating or [widened(t) for t in real]


def outputs_both_ways(
    model: nn.Module, state: Mapping[str, Tensor], inputs: Any, graph: ChannelGraph
) -> list[Tensor]:
    """Return what a network gives, also where it takes training's way if its graph has one."""
    found = outputs(model, state, inputs)
    if graph.trained_branches:
        with written_for_training(model):
            found += outputs(model, state, inputs)
    return found


def output_vector(model: nn.Module, state: Mapping[str, Tensor], inputs: Any) -> Tensor:
    """Return all floating-point outputs of a network with other values, in one vector.

    Computed in double precision where the network bears it: deep networks at random weights
    enlarge rounding errors.
    """
    try:
        moved = moved_to(model, inputs)
        widest = widest_for(state.values())
        found = outputs(model, in_precision(dict(state), widest), in_precision(moved, widest))
    except FusionError:
        found = outputs(model, state, moved_to(model, inputs))
    return torch.cat([t.detach().flatten().cpu().double() for t in found])


def random_inputs(example_inputs: Any, generator: torch.Generator, *, scales: bool = False) -> Any:
    """Return normal variables in the shape of example inputs; integers stay as they are.

    Parameters
    ----------
    example_inputs : Any
        What a network is called with.
    generator : torch.Generator
        What draws.
    scales : bool
        Whether values differ in size, by a factor of fifty or so.
    """

    def draw(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        value = torch.randn(x.shape, generator=generator)
        if scales:
            value *= torch.exp(4 * torch.rand(x.shape, generator=generator) - 2)
        return value.to(x)

    return tree_map(draw, example_inputs)


def is_close(ours: Tensor, expected: Tensor) -> bool:
    """Whether two outputs agree up to rounding."""
    same = ours.shape == expected.shape
    return same and float((ours - expected).norm()) <= _ROUNDING * float(expected.norm())
