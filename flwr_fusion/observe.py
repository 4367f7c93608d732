"""Running a network on inputs and watching its layers: the only place that registers hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node, tree_leaves, tree_map

from flwr_fusion.errors import FusionError, InputError

CALIBRATION = "the calibration inputs"

Kept = TypeVar("Kept")
See = Callable[[nn.Module, Any, Any], Any]


class Inputs:
    """What a network is called with: ``model(*args, **kwargs)``.

    A tensor, a tuple of arguments or a mapping of keyword arguments need no `Inputs`; positional
    and keyword arguments together do, and so does a single argument that is a tuple or a mapping.

    Parameters
    ----------
    *args : Any
        Positional arguments.
    **kwargs : Any
        Keyword arguments.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import flwr_fusion as ff
    >>> model = nn.MultiheadAttention(4, 2)
    >>> x = torch.zeros(3, 1, 4)
    >>> graph = ff.ChannelGraph.trace(model, ff.Inputs(x, x, x, need_weights=False))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    @classmethod
    def of(cls, inputs: Any) -> Inputs:
        """Return a tensor, a tuple of arguments or a mapping of keyword arguments as `Inputs`."""
        if isinstance(inputs, cls):
            return inputs
        if isinstance(inputs, Mapping):
            return cls(**dict(inputs))
        return cls(*inputs) if isinstance(inputs, (tuple, list)) else cls(inputs)


register_pytree_node(
    Inputs,
    lambda inputs: ([inputs.args, inputs.kwargs], None),
    lambda parts, _: Inputs(*next(parts := iter(parts)), **next(parts)),
)


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a network on inputs; these are copied.

    A network whose first operation works in place must not change what belongs to the caller.
    """
    copied = copied_inputs(inputs)
    return model(*copied.args, **copied.kwargs)


def copied_inputs(inputs: Any) -> Inputs:
    """Return inputs with their tensors copied."""
    found: Inputs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, Inputs.of(inputs))
    return found


def first_of(batch: Any) -> Any:
    """Return the inputs of a data loader's batch: itself if it is a tensor, else its first part."""
    if isinstance(batch, Mapping):
        raise FusionError(
            f"a batch is a mapping with {sorted(map(str, batch))}: say by inputs= what the network "
            'is called with, for example inputs=lambda batch: batch["img"]'
        )
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def batch_size(inputs: Any) -> int:
    """Return the number of samples in a batch of inputs."""
    for leaf in tensors_of(Inputs.of(inputs)):
        if leaf.dim():
            return len(leaf)
    raise FusionError("a batch of inputs holds no tensor")


def evaluation_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Put a network into evaluation mode; every module gets its own mode back afterwards."""
    return _in_mode(model, False)


def training_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Put a network into training mode; every module gets its own mode back afterwards."""
    return _in_mode(model, True)


@contextmanager
def _in_mode(model: nn.Module, training_now: bool) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.train(training_now)
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def moved_to(model: nn.Module, inputs: Any) -> Inputs:
    """Bring inputs to a network's device and, where it has but one, floating-point type."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise FusionError(f"{type(model).__name__} has no parameters: there is nothing to fuse")
    device = parameter.device
    types = {p.dtype for p in model.parameters() if p.is_floating_point() or p.is_complex()}
    # A network of several types says itself what it wants.
    dtype = types.pop() if len(types) == 1 else torch.complex64

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x.to(device) if callable(getattr(x, "to", None)) else x
        x = x.detach().to(device)
        return x.to(dtype) if x.is_floating_point() and dtype.is_floating_point else x

    moved: Inputs = tree_map(move, Inputs.of(inputs))
    return moved


def output_of(model: nn.Module, inputs: Any, who: str, what: str) -> Any:
    """Return what a network, in its present mode, gives for inputs brought to its device and type.

    ``who`` and ``what`` name the network and the inputs where it cannot be run.
    """
    moved = moved_to(model, inputs)
    with named_failure(who, what, inputs):
        return call(model, moved)


@contextmanager
def named_failure(who: str, what: str, inputs: Any = None) -> Iterator[None]:
    """Turn whatever a network raises into one error that names the network and the inputs."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{who} cannot be run on {what}: {error}{_hint(what, inputs)}") from error


def _hint(what: str, inputs: Any) -> str:
    """Return what may be wrong with inputs."""
    if what == CALIBRATION and isinstance(inputs, Tensor) and inputs.dim() < 2:
        return (
            f". Is the batch of shape {tuple(inputs.shape)} one of labels? Calibration is a tensor "
            "of inputs, or batches of inputs: (images, labels) are two batches"
        )
    if isinstance(inputs, Tensor):
        return f". The inputs have the shape {tuple(inputs.shape)}: the first axis is the batch's"
    if hasattr(inputs, "__array_interface__"):
        return ". The inputs are a NumPy array: give torch.from_numpy(...)"
    if what == CALIBRATION and isinstance(inputs, (tuple, list, Mapping)):
        return (
            ". Calibration needs what the network is called with, and no labels: a tensor, (x,) or "
            f"flwr_fusion.Inputs(...), not a whole {type(inputs).__name__} of a data loader"
        )
    if isinstance(inputs, (tuple, list)) and inputs and all(isinstance(x, int) for x in inputs):
        return f". Is {tuple(inputs)} a shape? Give a tensor of that shape"
    if isinstance(inputs, (tuple, list, Mapping)):
        kind = "keyword arguments" if isinstance(inputs, Mapping) else "several arguments"
        return (
            f". A {type(inputs).__name__} is taken for {kind}: if the network takes it as one "
            "argument, give (x,) or flwr_fusion.Inputs(x)"
        )
    return ""


def batches_of(inputs: Any, what: str = CALIBRATION) -> Iterator[Any]:
    """Yield batches of inputs; a tensor is one batch. Refuse to end without any."""
    empty = True
    for batch in [inputs] if isinstance(inputs, Tensor) else inputs:
        empty = False
        yield batch
    if empty:
        raise FusionError(f"there are no batches of {what}: give a batch, or batches, of real ones")


def check_rereadable(calibration: Any) -> None:
    """Refuse calibration inputs that can be read only once."""
    if calibration is not None and not hasattr(calibration, "__iter__"):
        raise FusionError(f"calibration must be a tensor or batches, not {calibration!r:.60}")
    if isinstance(calibration, Iterator):
        raise FusionError(
            "calibration is read once for every client: give a tensor, a list of batches or a "
            "data loader, not a generator"
        )


def tensors_of(values: Any) -> list[Tensor]:
    """Return all tensors in what a network takes or gives, also in dataclasses and the like."""
    found: list[Tensor] = []
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += tensors_of(dict(leaf))
        elif is_dataclass(leaf) or isinstance(leaf, torch.distributions.Distribution):
            found += tensors_of(dict(vars(leaf)))
    return found


@contextmanager
def watch(modules: Iterable[nn.Module], see: See, *, before: bool = False) -> Iterator[None]:
    """Watch some modules while they run.

    Parameters
    ----------
    modules : iterable of nn.Module
        The modules.
    see : callable
        Called with a module, its first argument and its output; a tensor that it returns takes the
        output's place.
    before : bool
        Call ``see`` before the module runs, with None as the output; what it returns is not used.
    """

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(module, _first(args, kwargs), None)

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        return see(module, _first(args, kwargs), out)

    handles = [
        module.register_forward_pre_hook(enter, with_kwargs=True)
        if before
        else module.register_forward_hook(leave, with_kwargs=True)
        for module in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return next(iter((*args, *kwargs.values())), None)


def record(
    model: nn.Module,
    names: Iterable[str],
    batch: Any,
    keep: Callable[[nn.Module, Tensor, Tensor], Kept],
    who: str = "the network",
) -> dict[str, list[Kept]]:
    """Run a network on a batch, in evaluation mode, and keep what some of its layers read or give.

    Parameters
    ----------
    model : nn.Module
        The network; not modified.
    names : iterable of str
        The layers.
    batch : Tensor, tuple or dict
        What the network is called with.
    keep : callable
        Returns what to keep of a layer, its input and its output. It must copy what it keeps: an
        activation that works in place overwrites them.
    who : str
        What to call the network in the refusal.

    Returns
    -------
    dict of str to list
        By the layer's name what was kept of each of its calls; layers that were not called have
        none.
    """
    layers = {model.get_submodule(name): name for name in names}
    kept: dict[str, list[Kept]] = {name: [] for name in layers.values()}

    def see(module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        kept[layers[module]].append(keep(module, inputs.detach(), output.detach()))

    with watch(layers, see), evaluation_mode(model), torch.no_grad():
        output_of(model, batch, who, CALIBRATION)
    return kept


def run(model: nn.Module, batches: Iterable[Any], who: str, what: str = CALIBRATION) -> int:
    """Run a network on every batch, in evaluation mode; return the number of samples."""
    seen = 0
    with evaluation_mode(model), torch.no_grad():
        for batch in batches_of(batches, what):
            output_of(model, batch, who, what)
            seen += batch_size(batch)
    return seen
