"""Checking that permuted groups, and mixed linear ones, leave what a network computes."""

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

from flwr_fusion.errors import FusionError
from flwr_fusion.graph.linear import invertible, linear_candidates
from flwr_fusion.graph.outputs import (
    in_precision,
    outputs_both_ways,
    random_inputs,
    random_state,
)
from flwr_fusion.observe import Inputs, tensors_of
from flwr_fusion.precision import numbers, widened, widest_for

if TYPE_CHECKING:
    from flwr_fusion.graph.groups import ChannelGraph, ChannelGroup

# A change of the output is rounding up to so many times the precision; beyond, where it is no
# larger than so many times the change by weights that differ in their last digits; and a network
# that enlarges these by more than that gives noise.
_TIMES_PRECISION, _TIMES_ROUNDING, _NOISE, _LARGEST_ROUNDING = 1e4, 1e3, 1e-3, 1e-4
# Runs of a network that the search for wrong groups may take: of small ones more.
_FEWEST_RUNS, _MOST_RUNS, _MOST_WORK = 12, 200, 2_000_000_000
# Values of a network that are not copied in double precision.
_LARGE = 10_000_000
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
        # An output may be a view of a value, which is permuted in its place.
        self._expected = [tensor.clone() for tensor in self.outputs(self.state)]
        precisions = {t.dtype for t in self._expected if t.is_floating_point()}
        self._eps = max((torch.finfo(p).eps for p in precisions), default=0.0)

    def outputs(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """Return what the network gives with other values, also where it takes training's way."""
        return outputs_both_ways(self._graph.model, state, self.inputs, self._graph)

    def change(self, state: Mapping[str, Tensor]) -> float:
        """Return how much other values change the output; infinity if they give none."""
        try:
            return _difference(self.outputs(state), self._expected)
        except FusionError:
            return math.inf

    def is_rounding(self, change: float) -> bool:
        """Whether a change of the output is no larger than rounding may be."""
        if change == math.inf:
            return False
        small = change <= _TIMES_PRECISION * self._eps or change <= _TIMES_ROUNDING * self._rounding
        # Of tensors in double precision, too, a part of the network may be computed in single.
        return small or (change <= _LARGEST_ROUNDING and change <= _TIMES_ROUNDING * self._half)

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
            return own.clone()
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
        precise = widest_for(graph.model.parameters())
        dtypes = (None,) if size > _LARGE else (precise, None)
        states = _Drawn(graph.model, seed)
        self._runs = [_first_of(graph, states, values, (drawn, given), dtypes)]
        are_drawn = any(t.is_floating_point() for t in tensors_of(Inputs.of(given)))
        if are_drawn or size <= _LARGE:  # Otherwise it is the same run again.
            with suppress(FusionError):
                self._runs.append(_first_of(graph, states, values, (given,), (None,)))

    def changes(self, groups: Sequence[ChannelGroup], moves: Mapping[str, Tensor]) -> bool:
        """Whether permuting some groups, or mixing them by matrices, changes the output."""
        self.runs_left -= 1
        chosen = {group.name: moves[group.name] for group in groups}
        graph = replace(self._graph, groups=tuple(groups))
        with _moved([run.state for run in self._runs], graph, chosen) as states:
            changes = [run.change(state) for run, state in zip(self._runs, states, strict=True)]
        # Rounding is measured at the values that were not moved.
        changed = not all(map(_Run.is_rounding, self._runs, changes))
        if self._runs[0].is_noise:
            raise FusionError(
                f"rounding alone changes the output of {type(self._graph.model).__name__} at "
                "random weights: what is done to its channels cannot be checked"
            )
        return changed

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
            total = sum((widened(t).square().sum().cpu() for t in found), torch.zeros(()))
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


@contextmanager
def _moved(
    states: Sequence[Mapping[str, Tensor]], graph: ChannelGraph, moves: Mapping[str, Tensor]
) -> Iterator[Sequence[Mapping[str, Tensor]]]:
    """Permute, or mix, the groups of some states for a while."""
    if all(matrix.dim() == 2 for matrix in moves.values()):
        yield [graph.mix(state, moves) for state in states]
        return
    # In their own memory: a copy of a large network would be the most that a trace needs.
    with graph.permuted(states, moves):
        yield states


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
    candidates = linear_candidates(graph)
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
    matrices = {g.name: invertible(g.size, generator) for g in right}
    wrong = {group.name for group in failing(check, right, matrices)}
    return _Found(because, [group.name for group in right if group.name not in wrong])


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


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest change of an output, relative to its length."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    changes = [
        change / max(length, 1e-30)
        for a, b in zip(found, expected, strict=True)
        for change, length in [numbers([widened(a - b).norm(), widened(b).norm()])]
    ]
    return max(changes, default=0.0)
