"""Tracing: a network runs once on its inputs, and every operation says what it does to channels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

# These two register what they know.
from flwr_fusion.graph import computing, moving  # noqa: F401
from flwr_fusion.graph.groups import ChannelGroup, Place
from flwr_fusion.graph.labels import CONSTANT, PLACED, Channels, Factor, Labels, Resolved, constant
from flwr_fusion.graph.operations import (
    OPERATIONS,
    Operation,
    Operations,
    pointwise,
    unknown,
)
from flwr_fusion.graph.outputs import written_for_training
from flwr_fusion.networks import key_of, module_of, owner_of
from flwr_fusion.observe import call, tensors_of, watch

INPUT, OUTPUT = "input of the network", "output of the network"
UNREACHED = "the example inputs do not reach them"
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
# Of a layer's weight; the others are positions of a kernel.
_CHANNEL_AXES = 2
# What PyTorch does not tag as computed position by position.
_POINTWISE = frozenset(
    (
        "_conj",
        "_prelu_kernel",
        "_standard_gamma",
        "absolute",
        "alpha_dropout",
        "bernoulli",
        "bucketize",
        "complex",
        "conj",
        "dropout",
        "fix",
        "hardswish",
        "imag",
        "log_sigmoid_forward",
        "masked_fill",
        "negative",
        "poisson",
        "prelu",
        "real",
        "rsub",
        "where",
    )
)


# In at most one of their operands that is no number; beside operations that move positions.
_LINEAR = frozenset(("mul", "div", "neg", "negative"))
_SUMS = frozenset(("add", "sub", "rsub", "sum", "mean"))
_PRODUCTS = frozenset(
    (
        "addmm",
        "baddbmm",
        "bmm",
        "conv1d",
        "conv2d",
        "conv3d",
        "convolution",
        "dot",
        "embedding",
        "linear",
        "matmul",
        "mm",
        "mv",
    )
)
_AVERAGES = frozenset(("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d"))


def _is_linear(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether an operation is linear in every channel that goes into it, as far as is known."""
    if name in _LINEAR:
        return sum(tensor.dim() > 0 for tensor in tensors_of(arguments)) == 1
    moves = name in OPERATIONS and OPERATIONS[name].__module__ == moving.__name__
    return moves or name in _SUMS | _PRODUCTS | _AVERAGES


@dataclass(frozen=True)
class Traced:
    """What a run of a network tells.

    Parameters
    ----------
    groups : tuple of ChannelGroup
        Its channel groups in forward order, not yet checked; those are called linear through
        which nothing but products, sums and moves of positions goes.
    called_layers : frozenset of str
        The layers that are called.
    idle_layers : tuple of str
        The layers whose parameters nothing reads.
    trained_branches : bool
        Whether there are layers that run in training only.
    work : int
        Numbers that a run computes or reads, as a measure of what it costs.
    batch_normalised : dict of str to str
        BatchNorm layers, and the layer whose outputs each of them normalises.
    """

    groups: tuple[ChannelGroup, ...]
    called_layers: frozenset[str]
    idle_layers: tuple[str, ...]
    trained_branches: bool
    work: int
    batch_normalised: dict[str, str]


def traced(model: nn.Module, inputs: Any) -> Traced:
    """Return what a run of a network, in evaluation mode, tells of its channels.

    Whatever the network raises is not caught.
    """
    try:
        return _traced(model, inputs)
    except Exception as error:
        with torch.no_grad():
            call(model, inputs)  # Where the network itself fails, this is what there is to say.
        return _untraced(model, f"the network cannot be followed: {error!r:.100}")


def _untraced(model: nn.Module, because: str) -> Traced:
    """Return a network's layers as fixed groups."""
    groups = []
    for name, layer in _layers_of(model).items():
        rows = torch.arange(len(layer.weight))[:, None]  # type: ignore[arg-type]
        place = Place(key_of(name, "weight"), 0, rows, writes=True)
        groups.append(ChannelGroup(name, len(rows), (place,), because))
    return Traced(tuple(groups), frozenset(), (), False, 0, {})


def _layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, _LAYERS)}


def _traced(model: nn.Module, inputs: Any) -> Traced:
    order = _Order(model)
    trace = _Trace(model, order)
    trace.mark_inputs(inputs)
    trace.run(inputs)
    called = frozenset(order.numbers)
    idle = trace.idle_layers()
    if idle:
        # Heads that only training needs read channels as well.
        with suppress(Exception), written_for_training(model):
            trace.run(inputs)
    never = trace.idle_layers()
    layers = _layers_of(model).keys()
    groups = _groups(trace, layers, order.numbers)
    # A number of a weight is read several times, and drawn and permuted for a check.
    work = trace.values + 10 * sum(parameter.numel() for parameter in model.parameters())
    trained = len(never) < len(idle)
    return Traced(tuple(groups), called & layers, never, trained, work, order.batch_normalised())


@contextmanager
def _without_fast_paths(model: nn.Module) -> Iterator[None]:
    """Run layers as the operations that they consist of."""
    fast, one_dnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    # oneDNN runs a whole recurrent layer as one operation.
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        torch._C._set_mkldnn_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(bool(one_dnn))


class _Order:
    """Which modules are called, in which order, and which one is running."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.numbers: dict[str, int] = {}
        self.running: list[str] = []
        # Outputs of layers, with the number of times that they had been written into.
        self._outputs = WeakTensorKeyDictionary()
        self._sources: dict[str, set[str]] = defaultdict(set)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the modules while they run."""
        with (
            watch(self.names, self._enter, before=True),
            watch(self.names, self._leave),
        ):
            yield

    def batch_normalised(self) -> dict[str, str]:
        """Return the BatchNorm layers that normalise what one layer gives, as it is; and which."""
        return {
            name: source
            for name, sources in self._sources.items()
            if len(sources) == 1 and (source := next(iter(sources)))
        }

    def _enter(self, module: nn.Module, inputs: Any, _output: Any) -> None:
        self.numbers.setdefault(self.names[module], len(self.numbers))
        self.running.append(self.names[module])
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            source, version = self._outputs.get(inputs, ("", -1))  # type: ignore[no-untyped-call]
            unchanged = source and inputs._version == version
            self._sources[self.names[module]].add(source if unchanged else "")

    def _leave(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        self.running.pop()
        if isinstance(output, Tensor) and _gives_channels_second(module, output):
            self._outputs[output] = (self.names[module], output._version)


def _gives_channels_second(layer: nn.Module, output: Tensor) -> bool:
    """Whether a layer's outputs stand along the axis that BatchNorm normalises, and are counted."""
    if output.is_inference():  # Nobody counts how often these are written into.
        return False
    if isinstance(layer, nn.Linear):
        return output.dim() == 2
    return isinstance(layer, nn.modules.conv._ConvNd) and output.dim() == layer.weight.dim()


@dataclass(frozen=True)
class _Axis:
    """One axis of one tensor of the state dict, and the number of its first channel."""

    tensors: tuple[str, ...]
    axis: int
    first: int
    size: int


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the channels through every operation."""

    def __init__(self, model: nn.Module, order: _Order) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.channels = Channels()
        self.operations = Operations(self.channels, self.labels_of)
        self.axes: list[_Axis] = []
        self._model, self._order = model, order
        self._read: set[int] = set()
        self.values = 0
        # The channels of what goes into operations that are not linear.
        self.bent: list[NDArray[np.int64]] = []
        # What has been written into in place: views of it from before carry other channels now.
        self._writes, self._written = 0, dict[int, int]()
        self._elements: dict[int, NDArray[np.int64]] = {}
        # Kept, so that nothing else comes to lie in the same memory.
        self._written_tensors: list[Tensor] = []
        self._labels = WeakTensorKeyDictionary()
        self.embeds = {
            key_of(name, "weight")
            for name, module in model.named_modules()
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        }
        self._layers = {n for n, m in model.named_modules() if isinstance(m, (*_LAYERS, *_NORMS))}
        keys: dict[int, list[str]] = defaultdict(list)
        tensors: dict[int, Tensor] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            keys[id(tensor)].append(name)
            tensors[id(tensor)] = tensor
        for number, tensor in tensors.items():
            self._set(tensor, self._own(tensor, tuple(keys[number])))

    def _own(self, tensor: Tensor, names: tuple[str, ...]) -> Labels:
        """Return the labels of a parameter or buffer: channels of its own along every axis."""
        if tensor.is_complex():
            return Labels(tuple(tensor.shape), (), True, "it meets complex weights")
        factors = []
        # A layer of one channel has this as others have theirs; elsewhere one position is none.
        layer = any(module_of(name) in self._layers for name in names)
        for axis, size in enumerate(tensor.shape):
            if size == 1 and not (layer and axis < _CHANNEL_AXES):
                continue
            self.axes.append(_Axis(names, axis, self.channels.count, size))
            factors.append(Factor((axis,), self.channels.new(size)))
        return Labels(tuple(tensor.shape), tuple(factors), weight=True)

    def _set(self, tensor: Tensor, labels: Labels) -> None:
        self._labels[tensor] = (self._writes, labels)

    def labels_of(self, tensor: Tensor) -> Labels:
        """Return a tensor's labels."""
        known: tuple[int, Labels] | None
        known = self._labels.get(tensor)  # type: ignore[no-untyped-call]
        since, labels = known or (-1, Labels(tuple(tensor.shape)))
        if since < 0 and _memory(tensor) not in self._elements:
            return self._by_value(tensor)
        if self._written and self._written.get(_memory(tensor), 0) > since:
            elements = self._elements.get(_memory(tensor))
            seen = None if elements is None else _seen_by(tensor, elements)
            if seen is not None:
                return _labels_of_elements(seen, labels.because)
            return Labels(tuple(tensor.shape), (), labels.weight, "it is written into in place")
        return labels

    def _by_value(self, tensor: Tensor) -> Labels:
        """Return the labels of a tensor made in the forward pass: where it is constant, or not."""
        factors = [
            Factor.constant(axis, size)
            for axis, size in enumerate(tensor.shape)
            if size > 1 and bool((tensor == tensor.narrow(axis, 0, 1)).all())
        ]
        return Labels(tuple(tensor.shape), tuple(factors), False, "it is a constant of the network")

    def run(self, inputs: Any) -> None:
        """Run the network, and fix the channels of its output."""
        with self._order.watched(), _without_fast_paths(self._model):
            with self:
                output = call(self._model, inputs)
            self.operations.fix_all([self.labels_of(t) for t in tensors_of(output)], OUTPUT)

    def idle_layers(self) -> tuple[str, ...]:
        """Return the layers whose own parameters no operation has read."""
        return tuple(
            name
            for name, module in self._model.named_modules()
            if (own := list(module.parameters(recurse=False)))
            and not any(id(parameter) in self._read for parameter in own)
        )

    def mark_inputs(self, inputs: Any) -> None:
        """Label a network's inputs: their positions must not move."""
        for tensor in tensors_of(inputs):
            self._set(tensor, Labels(tuple(tensor.shape), (), False, INPUT))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and label what it returns."""
        kwargs = kwargs or {}
        names = (argument.name for argument in func._schema.arguments)
        named = dict(zip(names, args, strict=False)) | kwargs
        # Of what is written into in place, the labels before that.
        given = {id(tensor): self.labels_of(tensor) for tensor in tensors_of(named)}
        self._read.update(given)
        self.operations.labels_of = lambda tensor: given[id(tensor)]
        written = [
            (tensor, self._elements_of(tensor))
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tensors_of(named.get(argument.name))
        ]
        output = func(*args, **kwargs)
        outputs = tensors_of(output)
        self.values += sum(tensor.numel() for tensor in outputs)
        found = self._labelled(func, named, [tuple(tensor.shape) for tensor in outputs])
        for (tensor, elements), labels in zip(written, found, strict=False):
            self._note_written(tensor, elements, given[id(tensor)], labels)
        for tensor, labels in zip(outputs, found, strict=bool(found)):
            self._set(tensor, labels)
        return output

    def _elements_of(self, tensor: Tensor) -> NDArray[np.int64] | None:
        """Return the channel of every element of a tensor's memory, if it is known."""
        known = self._elements.get(_memory(tensor))
        if known is not None:
            return known
        base = tensor if tensor._base is None else tensor._base
        if not base.is_contiguous():
            return None
        return _element_codes(self.labels_of(base)).reshape(-1).copy()

    def _note_written(
        self,
        tensor: Tensor,
        elements: NDArray[np.int64] | None,
        before: Labels,
        after: Labels,
    ) -> None:
        """Remember what has been written into a tensor, unless it carries what it carried.

        Other tensors in the same memory carry it now as well.
        """
        axes = {axis for f in before.factors if (f.codes >= 0).any() for axis in f.axes}
        if not {axis for f in after.factors for axis in f.axes} - axes and before.factors:
            return
        self._writes += 1
        self._written[_memory(tensor)] = self._writes
        self._written_tensors.append(tensor)
        if elements is not None:
            view = _seen_by(tensor, elements)
            if view is not None:
                view[...] = _element_codes(after)
                self._elements[_memory(tensor)] = elements

    def _labelled(
        self, func: Any, named: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]
    ) -> Sequence[Labels]:
        namespace, _, name = func._schema.name.partition("::")
        operations = self.operations
        operations.name = name if namespace == "aten" else func._schema.name
        operations.where = self._order.running[-1] if self._order.running else ""
        if not tensors_of(
            named
        ):  # Made of nothing: noise is alike for all channels, the rest shows itself.
            alike = torch.Tag.nondeterministic_seeded in func.tags or name.startswith("empty")
            return [constant(shape) for shape in shapes] if alike else []
        if not shapes:  # Asks for a number.
            return []
        if not _is_linear(operations.name.rstrip("_"), named):
            labels = [self.labels_of(tensor) for tensor in tensors_of(named)]
            self.bent += [factor.codes.ravel() for own in labels for factor in own.factors]
        try:
            found = self._rule(func, operations.name)(operations, named, shapes)
        except Exception:  # Of arguments that a rule does not foresee nothing is known.
            return list(unknown(operations, named, shapes))
        found = [found] if isinstance(found, Labels) else list(found)
        if len(found) != len(shapes) or not all(map(_fits, found, shapes)):
            return list(unknown(operations, named, shapes))
        return [replace(own, shape=shape) for own, shape in zip(found, shapes, strict=True)]

    @staticmethod
    def _rule(func: Any, name: str) -> Operation:
        """Return what says what an operation does; in place it does the same."""
        plain = name.rstrip("_")
        for known in (name, plain):
            if known in OPERATIONS:
                return OPERATIONS[known]
        is_pointwise = torch.Tag.pointwise in func.tags or plain in _POINTWISE
        return pointwise if is_pointwise else unknown


def _memory(tensor: Tensor) -> int:
    return 0 if tensor.is_sparse else tensor.untyped_storage().data_ptr()


def _fits(labels: Labels, shape: tuple[int, ...]) -> bool:
    """Whether labels are those of a tensor of some shape."""
    return all(
        max(f.axes) < len(shape) and f.codes.shape == tuple(shape[axis] for axis in f.axes)
        for f in labels.factors
    )


def _element_codes(labels: Labels) -> NDArray[np.int64]:
    """Return the channel of every element of a tensor."""
    varying = [f for f in labels.factors if not f.is_constant]
    if len(varying) != 1:
        alike = not varying and len(labels.factors) == sum(size > 1 for size in labels.shape)
        return np.full(labels.shape, CONSTANT if alike else PLACED)
    (factor,) = varying
    shape = [size if a in factor.axes else 1 for a, size in enumerate(labels.shape)]
    return np.broadcast_to(factor.codes.reshape(shape), labels.shape)


def _seen_by(tensor: Tensor, elements: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Return the elements of a memory that a tensor consists of: a view."""
    last = tensor.storage_offset() + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    if last >= len(elements):
        return None
    strides = [stride * elements.itemsize for stride in tensor.stride()]
    return np.lib.stride_tricks.as_strided(
        elements[tensor.storage_offset() :], tuple(tensor.shape), strides
    )


def _labels_of_elements(codes: NDArray[np.int64], because: str) -> Labels:
    """Return the labels of a tensor of whose elements the channels are known."""
    if (codes == CONSTANT).all():
        return constant(codes.shape)
    axes = [a for a in range(codes.ndim) if not (codes == codes.take([0], axis=a)).all()]
    chosen = tuple(slice(None) if a in axes else 0 for a in range(codes.ndim))
    kept = codes[chosen].copy()
    factors = (Factor(tuple(axes), kept),) if axes and (kept >= 0).any() else ()
    return Labels(codes.shape, factors, False, because or "it is written into in place")


def _groups(trace: _Trace, layers: Collection[str], order: Mapping[str, int]) -> list[ChannelGroup]:
    """Return the groups that a trace has found, in forward order."""
    resolved = trace.channels.resolved()
    for number in np.flatnonzero(~resolved.touched).tolist():
        resolved.because.setdefault(int(resolved.root[number]), UNREACHED)
    axes = [a for a in trace.axes if resolved.touched[a.first : a.first + a.size].any()]
    if not axes:
        return []
    writers = _writers(trace, axes)
    normalised = _roots_of(trace.operations.normalised, resolved)
    bent = _roots_of(trace.bent, resolved)
    groups = []
    for roots, rows in _classes(axes, resolved):
        if (rows[0, :, 0] < 0).all():  # Marked, but of no tensor here.
            continue
        group = replace(
            _group(roots, rows, axes, writers, order),
            fixed_because=resolved.because.get(roots[0], ""),
            normalised=not normalised.isdisjoint(roots),
            linear=bent.isdisjoint(roots),
        )
        groups += [] if _is_of_no_interest(group, layers) else [group]
    groups.sort(key=lambda group: _position_in_forward(group, order))
    return _with_own_names(groups)


def _roots_of(codes: Sequence[NDArray[np.int64]], resolved: Resolved) -> set[int]:
    whole = np.concatenate([np.zeros(0, dtype=np.int64), *(c.ravel() for c in codes)])
    return set(np.unique(resolved.root[whole[whole >= 0]]).tolist())


def _writers(trace: _Trace, axes: Sequence[_Axis]) -> list[frozenset[str]]:
    """Return for each axis the names under which its tensor writes the channels."""
    reads, writes = np.zeros((2, trace.channels.count), dtype=bool)
    for roles, noted in ((reads, trace.operations.reads), (writes, trace.operations.writes)):
        for codes in noted:
            roles[codes[codes >= 0]] = True
    result = []
    for axis in axes:
        here = slice(axis.first, axis.first + axis.size)
        names = frozenset(axis.tensors)
        if not reads[here].any():
            result.append(names)
        elif len(names) == 1:  # A matrix that is read transposed as well writes first.
            result.append(names if writes[here].any() else frozenset())
        else:
            result.append(names & trace.embeds)
    return result


def _classes(
    axes: Sequence[_Axis], resolved: Resolved
) -> Iterator[tuple[list[int], NDArray[np.int64]]]:
    """Yield channels that stand at the same places, and their rows (axis, position)."""
    columns = [
        (np.full(a.size, n), np.arange(a.size), np.arange(a.first, a.first + a.size))
        for n, a in enumerate(axes)
    ]
    number, position, channel = (np.concatenate(c) for c in zip(*columns, strict=True))
    root = resolved.root[channel]
    marked, marks = resolved.marks
    # Marks stand among the places, as axes of their own.
    number = np.concatenate([number, -1 - marks])
    position = np.concatenate([position, np.zeros_like(marks)])
    root = np.concatenate([root, marked])
    order = np.lexsort((position, number, root))
    rows = np.stack([number, position], axis=1)[order]
    root = root[order]
    starts = np.flatnonzero(np.diff(root, prepend=-1))
    ends = np.append(starts[1:], len(root))
    alike: dict[bytes, list[tuple[int, int, int]]] = defaultdict(list)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        key = rows[start:end, 0].tobytes() + resolved.because.get(int(root[start]), "").encode()
        alike[key].append((int(root[start]), start, end))
    for members in alike.values():
        yield [r for r, _, _ in members], np.stack([rows[s:e] for _, s, e in members])


def _group(
    roots: Sequence[int],
    rows: NDArray[np.int64],
    axes: Sequence[_Axis],
    writers: Sequence[frozenset[str]],
    order: Mapping[str, int],
) -> ChannelGroup:
    """Return the group of channels that stand at the same places; it has still no reason."""
    places = []
    for number in np.unique(rows[0, :, 0]):
        if number >= 0:
            positions = torch.from_numpy(rows[:, rows[0, :, 0] == number, 1].copy())
            places += [
                Place(name, axes[number].axis, positions, name in writers[number])
                for name in axes[number].tensors
            ]
    named = [p for p in places if p.writes] or places
    first = min(named, key=lambda p: _number_of(p, order))
    chosen = first.positions[:, 0].argsort()
    ordered = tuple(replace(p, positions=p.positions[chosen]) for p in places)
    name = layer_of(first.tensor)
    return ChannelGroup(name if first.writes else f"input of {name}", len(roots), ordered)


def layer_of(tensor: str) -> str:
    """Return the layer that a tensor belongs to, also where it is parametrised."""
    return owner_of(tensor).partition(".parametrizations.")[0]


def _number_of(place: Place, order: Mapping[str, int]) -> int:
    """Return when a place's layer is called, or what contains it."""
    layer = layer_of(place.tensor)
    while layer and layer not in order:
        layer = layer.rpartition(".")[0]
    return order[layer] if layer else len(order)


def _is_of_no_interest(group: ChannelGroup, layers: Collection[str]) -> bool:
    """Whether a group is but the positions of a table, such as a positional encoding's."""
    return (
        (group.size == 1 or group.fixed_because not in ("", OUTPUT))
        and all(p.writes for p in group.places)
        and not any(layer_of(p.tensor) in layers for p in group.places)
    )


def _with_own_names(groups: Iterable[ChannelGroup]) -> list[ChannelGroup]:
    names: dict[str, int] = defaultdict(int)
    result = []
    for group in groups:
        names[group.name] += 1
        number = names[group.name]
        result.append(replace(group, name=f"{group.name}#{number}") if number > 1 else group)
    return result


def _position_in_forward(group: ChannelGroup, order: Mapping[str, int]) -> tuple[int, bool, bool]:
    places = [p for p in group.places if p.writes] or list(group.places)
    reads = not any(p.writes for p in group.places)
    return min(_number_of(p, order) for p in places), not reads, group.fixed
