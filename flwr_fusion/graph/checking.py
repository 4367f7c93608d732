"""Checking what a network computes: permuted groups, outputs at any weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from flwr_fusion.errors import FusionError
from flwr_fusion.networks import owner_of, tied_tensors
from flwr_fusion.observe import copied_inputs, moved_to, tensors_of

if TYPE_CHECKING:
    from flwr_fusion.graph.groups import ChannelGraph, ChannelGroup

# Relative to the output's length; single precision through many layers.
_ROUNDING = 1e-4
# A change of the output is rounding up to so many times the precision; beyond, where it is no
# larger than so many times the change by weights that differ in their last digits; and a network
# that enlarges these by more than that gives noise.
_TIMES_PRECISION, _TIMES_ROUNDING, _NOISE, _LARGEST_ROUNDING = 1e4, 1e3, 1e-3, 1e-4
# Runs of a network that the search for wrong groups may take: of small ones more.
_FEWEST_RUNS, _MOST_RUNS, _MOST_WORK = 12, 200, 2_000_000_000
# Values of a network that are not copied in double precision.
_LARGE = 10_000_000
# Products of so many channels are no low-rank ones.
_LARGEST_RANK = 512
# Of long lists in messages.
_LISTED = 4

Found = TypeVar("Found")
FAILED = "permuting them changes the network's output"
UNCHECKED = "the network's output does not show whether they can be permuted"


class _Run:
    """What a network gives at random weights for one kind of inputs, in one precision."""

    def __init__(
        self,
        graph: ChannelGraph,
        drawn: Mapping[str, Tensor],
        inputs: Any,
        dtype: torch.dtype | None,
    ) -> None:
        self._graph = graph
        self.is_noise = False
        self.state = drawn if dtype is None else in_precision(dict(drawn), dtype)
        self.inputs = in_precision(inputs, dtype)
        self._expected = self.outputs(self.state)
        precisions = {t.dtype for t in self._expected if t.is_floating_point()}
        self._eps = max((torch.finfo(p).eps for p in precisions), default=0.0)

    def outputs(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """Return what the network gives with other values, also where it takes training's way."""
        return outputs_both_ways(self._graph.model, state, self.inputs, self._graph)

    def changes(self, state: Mapping[str, Tensor]) -> bool:
        """Whether other values change the output by more than rounding."""
        try:
            change = _difference(self.outputs(state), self._expected)
        except FusionError:
            return True
        small = change <= _TIMES_PRECISION * self._eps or change <= _TIMES_ROUNDING * self._rounding
        # Of tensors in double precision, too, a part of the network may be computed in single.
        return not (
            small or (change <= _LARGEST_ROUNDING and change <= _TIMES_ROUNDING * self._half)
        )

    @cached_property
    def _rounding(self) -> float:
        """How much values change the output that differ in their last digit."""
        change = self._changed_by(4 * self._eps)
        self.is_noise = change > _NOISE
        return math.inf if self.is_noise else change

    @cached_property
    def _half(self) -> float:
        """The same, of values that differ in digits that single precision lacks."""
        return self._changed_by(1e-9)

    def _changed_by(self, size: float) -> float:
        generator = torch.Generator().manual_seed(0)

        def rounded(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            return tensor * (1 + size * noise)

        state = {name: rounded(tensor) for name, tensor in self.state.items()}
        return _difference(self.outputs(state), self._expected)


class _Drawn:
    """A network's values to check it at, by how far they are drawn at random; each drawn once."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self._model, self._seed = model, seed
        self._found: dict[str, dict[str, Tensor]] = {}

    def __getitem__(self, how: str) -> dict[str, Tensor]:
        if how not in self._found:
            generator = torch.Generator().manual_seed(self._seed)
            drawn = random_state(self._model, generator, buffers=how == "with buffers")
            self._found[how] = _nearby(self._model, drawn) if how == "nearby" else drawn
        return self._found[how]


_VALUES = ("with buffers", "parameters", "nearby")


def _nearby(model: nn.Module, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a network's own values with some noise: at others its output may be noise."""

    def between(own: Tensor, other: Tensor) -> Tensor:
        if not own.is_floating_point() or torch.equal(own, other):
            return own
        spread = own.std() if own.numel() > 1 else own.abs()
        return own + 0.3 * (spread + 1e-3) * other / other.std().clamp(min=1e-3)

    state = model.state_dict()
    return {name: between(own.detach(), drawn[name]).to(own) for name, own in state.items()}


def _first_of(
    graph: ChannelGraph,
    states: _Drawn,
    values: Sequence[str],
    inputs: Sequence[Any],
    dtypes: Sequence[Any],
) -> _Run:
    """Return the first run that works."""
    problem = FusionError("")
    for how, given, dtype in product(values, inputs, dtypes):
        try:
            return _Run(graph, states[how], given, dtype)
        except FusionError as error:
            problem = error
    raise problem


class Check:
    """Whether a network computes the same with permuted groups, at random weights.

    Parameters
    ----------
    graph : ChannelGraph
        The network and its example inputs.
    seed : int
        Of everything that is drawn.
    values : sequence of str
        At which values of the network, the first that work: all drawn at random with floating-point
        buffers, without these, or its own with some noise.

    Raises
    ------
    FusionError
        If the network's output is not finite, in no precision.
    """

    def __init__(self, graph: ChannelGraph, seed: int, values: Sequence[str] = _VALUES) -> None:
        self._graph = graph
        generator = torch.Generator().manual_seed(seed)
        drawn = random_inputs(graph.example_inputs, generator, scales=True)
        given = graph.example_inputs
        self.runs_left = max(_FEWEST_RUNS, min(_MOST_RUNS, _MOST_WORK // max(graph.work, 1)))
        # Double precision tells a wrong group from rounding, and random inputs more than zeros do;
        # but a network may make tensors in single precision by itself, not bear random buffers, or
        # not take any number. What works is used.
        # A large network computes in its own precision, as its values in double need much memory.
        size = sum(math.prod(shape) for shape in graph.shapes.values())
        dtypes = (None,) if size > _LARGE else (torch.float64, None)
        states = _Drawn(graph.model, seed)
        self._runs = [_first_of(graph, states, values, (drawn, given), dtypes)]
        with suppress(FusionError):
            self._runs.append(_first_of(graph, states, values, (given,), (None,)))

    def changes(self, groups: Sequence[ChannelGroup], moves: Mapping[str, Tensor]) -> bool:
        """Whether permuting some groups, or mixing them by matrices, changes the output."""
        self.runs_left -= 1
        chosen = {group.name: moves[group.name] for group in groups}
        graph = replace(self._graph, groups=tuple(groups))
        changes = any(run.changes(state) for run, state in _with_moved(self._runs, graph, chosen))
        if self._runs[0].is_noise:
            raise FusionError(
                f"rounding alone changes the output of {type(self._graph.model).__name__} at "
                "random weights: what is done to its channels cannot be checked"
            )
        return changes

    def seen(self, groups: Sequence[ChannelGroup], choose: Any) -> set[str]:
        """Return the groups that the output depends on, as its gradient by one tensor tells.

        ``choose`` is `min` or `max`: which tensor of a group, by its size.
        """
        run = self._runs[0]
        places = {
            g.name: choose(g.places, key=lambda p: run.state[p.tensor].numel()) for g in groups
        }
        leaves = {
            name: run.state[name].detach().clone().requires_grad_()
            for name in {place.tensor for place in places.values()}
            if run.state[name].is_floating_point()
        }
        with torch.enable_grad():
            found = [t for t in run.outputs({**run.state, **leaves}) if t.requires_grad]
            total = sum((t.double().square().sum().cpu() for t in found), torch.zeros(()))
        if not found or not leaves:
            return set()
        values = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        gradients = dict(zip(leaves, values, strict=True))
        return {
            name
            for name, place in places.items()
            if (gradient := gradients.get(place.tensor)) is not None
            and bool(gradient.movedim(place.axis, 0)[place.positions].any())
        }

    def shows(self, group: ChannelGroup, permutations: Mapping[str, Tensor]) -> bool:
        """Whether the output depends on where the channels of a group stand."""
        if group.size == 1:
            return True
        if self.runs_left <= 0:
            return False
        # Along one axis of one tensor alone: that must not go unnoticed.
        alone = (replace(group, places=(place,)) for place in group.places)
        return any(self.changes([one], permutations) for one in alone)


def _with_moved(
    runs: Sequence[_Run], graph: ChannelGraph, moves: Mapping[str, Tensor]
) -> Iterator[tuple[_Run, dict[str, Tensor]]]:
    """Yield runs with their values moved; those that have the same values share the copy."""
    move = graph.mix if all(m.dim() == 2 for m in moves.values()) else graph.permute
    of: Mapping[str, Tensor] | None = None
    moved: dict[str, Tensor] = {}
    for run in runs:
        if run.state is not of:
            of, moved = run.state, move(run.state, moves)
        yield run, moved


def failing(
    check: Check, groups: Sequence[ChannelGroup], moves: Mapping[str, Tensor]
) -> list[ChannelGroup]:
    """Return the groups whose permutation (or mixing) changes the output, found by halving.

    Where that takes too many runs of the network, all groups that are not known to be right.
    """
    if not groups or not check.changes(groups, moves):
        return []
    if len(groups) == 1 or check.runs_left <= 0:
        return list(groups)
    half = len(groups) // 2
    found = [
        group for part in (groups[:half], groups[half:]) for group in failing(check, part, moves)
    ]
    # Each half by itself may pass.
    return found or list(groups)


def checked_groups(graph: ChannelGraph, seed: int = 0) -> tuple[ChannelGroup, ...]:
    """Return a graph's groups as a check finds them.

    Those are fixed, with the reason, that cannot be permuted or checked; of those that are called
    linear, those stay so that are low-rank factors and bear any invertible matrix.
    """
    free = [group for group in graph.groups if not group.fixed]
    if not free:
        return tuple(replace(group, linear=False) for group in graph.groups)
    candidates = _candidates(graph)
    try:
        found = _with_usable_values(graph, seed, partial(_found, free, candidates, seed))
    except FusionError as error:
        found = _Found({group.name: str(error) for group in free})
    return tuple(
        replace(
            group, fixed_because=found.because.get(group.name, group.fixed_because), linear=linear
        )
        for group in graph.groups
        for linear in [group.name in found.linear]
    )


@dataclass(frozen=True)
class _Found:
    """Why groups must be fixed, and which are linear."""

    because: Mapping[str, str]
    linear: Collection[str] = ()


def _found(
    free: Sequence[ChannelGroup], candidates: Sequence[ChannelGroup], seed: int, check: Check
) -> _Found:
    because = _reasons(free, seed, check)
    right = [group for group in candidates if group.name not in because]
    generator = torch.Generator().manual_seed(seed + 2)
    matrices = {g.name: _invertible(g.size, generator) for g in right}
    wrong = {group.name for group in failing(check, right, matrices)}
    return _Found(because, [group.name for group in right if group.name not in wrong])


def _invertible(size: int, generator: torch.Generator) -> Tensor:
    """Return a random matrix with singular values from 1/2 to 2, which no scale or sign is."""
    left, right = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    values = torch.exp2(2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1)
    matrix: Tensor = -(left * values) @ right
    return matrix


def _candidates(graph: ChannelGraph) -> list[ChannelGroup]:
    """Return the groups that may be linear, no two with a common tensor, the first ones first.

    One layer writes them or one reads them, so that every product of a reader and a writer is in
    the network. Every other free group keeps a weight that writes it and is no factor: by these its
    channels are matched. And they are fewer than the rows and the columns of the product, or, at
    any number, beside a weight that reads what they read and writes what they write, as adapters
    are: elsewhere the mean of the factors, which is FedAvg's, is all that a product could keep.
    """
    tied = tied_tensors(graph.model)
    weights = {
        g.name: {p.tensor for p in g.places if p.writes and len(graph.shapes[p.tensor]) > 1}
        for g in graph.groups
    }
    fixed = {group.name for group in graph.groups if group.fixed}
    ends = _ends(graph)
    taken: set[str] = set()
    chosen = []
    for group in graph.groups:
        tensors = {place.tensor for place in group.places}
        apart = len(tensors) == len(group.places) and not tensors & (taken | tied)
        possible = group.linear and not group.fixed and group.size <= _LARGEST_RANK
        if not possible or not apart or not _is_one_product(group, graph.shapes):
            continue
        alone = {
            name
            for name, own in weights.items()
            if name != group.name and own & tensors and not own - taken - tensors
        }
        if alone <= fixed and (_is_adapter(group, ends) or _is_bottleneck(group, graph.shapes)):
            chosen.append(group)
            taken |= tensors
            del weights[group.name]
    return chosen


def _ends(graph: ChannelGraph) -> dict[str, tuple[set[str], set[str]]]:
    """Return for every tensor the groups that it reads and those that it writes.

    The network's inputs are one, however many layers read them.
    """
    ends: dict[str, tuple[set[str], set[str]]] = {}
    for group in graph.groups:
        name = group.fixed_because if group.name.startswith("input of ") else group.name
        for place in group.places:
            ends.setdefault(place.tensor, (set(), set()))[place.writes].add(name)
    return ends


def _is_adapter(group: ChannelGroup, ends: Mapping[str, tuple[set[str], set[str]]]) -> bool:
    """Whether a weight leads from what the group is written from to what it is read into."""
    own = {place.tensor for place in group.places}
    inputs = set().union(*(ends[p.tensor][False] for p in group.places if p.writes))
    outputs = set().union(*(ends[p.tensor][True] for p in group.places if not p.writes))
    return any(
        reads & inputs and writes & outputs
        for tensor, (reads, writes) in ends.items()
        if tensor not in own
    )


def _is_one_product(group: ChannelGroup, shapes: Mapping[str, torch.Size]) -> bool:
    """Whether the group fills its axes, and every reader reads every writer."""
    if any(p.positions.numel() != shapes[p.tensor][p.axis] for p in group.places):
        return False
    owners = {(p.writes, owner_of(p.tensor)) for p in group.places}
    counts = [sum(writes is kind for writes, _ in owners) for kind in (True, False)]
    return min(counts) == 1


def _is_bottleneck(group: ChannelGroup, shapes: Mapping[str, torch.Size]) -> bool:
    sizes = {True: 0, False: 0}
    for place in group.places:
        sizes[place.writes] += shapes[place.tensor].numel() // group.size
    return group.size < min(sizes.values())


def _with_usable_values(graph: ChannelGraph, seed: int, use: Callable[[Check], Found]) -> Found:
    """Return what a check finds, of the network's own values where random ones make only noise."""
    try:
        return use(Check(graph, seed))
    except FusionError:
        return use(Check(graph, seed, ("nearby",)))


def _reasons(free: Sequence[ChannelGroup], seed: int, check: Check) -> dict[str, str]:
    """Return why groups cannot be free."""
    permutations = _permutations(free, seed)
    because = {group.name: FAILED for group in failing(check, free, permutations)}
    right = [group for group in free if group.name not in because]
    return because | {g.name: UNCHECKED for g in _not_shown(check, right, permutations)}


def _permutations(free: Sequence[ChannelGroup], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    return {g.name: _derangement(g.size, generator) for g in free}


def _derangement(size: int, generator: torch.Generator) -> Tensor:
    """Return a random permutation that leaves nothing in its place."""
    order = torch.randperm(size, generator=generator)
    moved = torch.empty_like(order)
    moved[order] = order.roll(1)
    return moved


def _not_shown(
    check: Check, free: Sequence[ChannelGroup], permutations: Mapping[str, Tensor]
) -> list[ChannelGroup]:
    """Return the groups of which the output shows nothing."""
    # A gradient is cheaper than one run for every group. That of small tensors needs less memory,
    # but says nothing of what has no influence by itself, such as the bias of attention's keys.
    left = list(free)
    for choose in (min, max):
        seen = check.seen(left, choose) if left else set()
        left = [group for group in left if group.name not in seen]
    return [group for group in left if not check.shows(group, permutations)]


def check_groups(graph: ChannelGraph, seed: int) -> None:
    """Refuse a graph of which free groups cannot be permuted, by their names."""
    free = [group for group in graph.groups if not group.fixed]
    permutations = _permutations(free, seed)
    wrong = _with_usable_values(graph, seed, lambda check: failing(check, free, permutations))
    if not wrong:
        return
    listed = "; ".join(
        f"group '{g.name}' ({_shortened(sorted({p.tensor for p in g.places}))})"
        for g in wrong[:_LISTED]
    )
    more = f" and {len(wrong) - _LISTED} more groups" if len(wrong) > _LISTED else ""
    raise FusionError(
        f"the channel groups of {type(graph.model).__name__} are wrong: permuting "
        f"{listed}{more} changes its output"
    )


def _shortened(names: list[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def warn_of_idle_layers(model: nn.Module, idle: Sequence[str]) -> None:
    """Warn of layers that the example inputs do not reach."""
    if idle:
        warnings.warn(
            f"layers of {type(model).__name__} do not run on the example inputs "
            f"({_shortened(list(idle))}): they are averaged by index, which is wrong if they read "
            "channels of the others",
            stacklevel=2,
        )


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
            return x.to(torch.complex128)
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
    for tensor in floating:
        if not bool(torch.isfinite(tensor).all()):
            raise FusionError(
                f"{type(model).__name__} gives non-finite outputs at random weights: "
                "what is done to its channels and layers cannot be checked"
            )
    if not real:
        raise FusionError(f"the output of {type(model).__name__} has no tensors")
    return floating or [t.double() for t in real]


def outputs_both_ways(
    model: nn.Module, state: Mapping[str, Tensor], inputs: Any, graph: ChannelGraph
) -> list[Tensor]:
    """Return what a network gives, also where it takes training's way if its graph has one."""
    found = outputs(model, state, inputs)
    if graph.trained_branches:
        with written_for_training(model):
            found += outputs(model, state, inputs)
    return found


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest change of an output, relative to its length."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    changes = [
        float((a - b).double().norm()) / max(float(b.double().norm()), 1e-30)
        for a, b in zip(found, expected, strict=True)
    ]
    return max(changes, default=0.0)


def output_vector(model: nn.Module, state: Mapping[str, Tensor], inputs: Any) -> Tensor:
    """Return all floating-point outputs of a network with other values, in one vector.

    Computed in double precision where the network bears it: deep networks at random weights
    enlarge rounding errors.
    """
    try:
        precise = in_precision(dict(state), torch.float64)
        found = outputs(model, precise, in_precision(moved_to(model, inputs), torch.float64))
    except FusionError:
        found = outputs(model, state, moved_to(model, inputs))
    return torch.cat([t.detach().flatten().double().cpu() for t in found])


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
