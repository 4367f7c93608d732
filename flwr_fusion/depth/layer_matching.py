"""Cross-layer alignment: which units of two networks of different depth correspond."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from flwr_fusion.depth.merging import MERGES
from flwr_fusion.depth.structure import DepthStructure, Stage, Unit
from flwr_fusion.errors import FusionError, check_option
from flwr_fusion.networks import module_of
from flwr_fusion.observe import batches_of, record
from flwr_fusion.precision import widened
from flwr_fusion.report import StageMatch

BALANCES = ("add", "merge")
LAYER_COSTS = ("auto", "cka", "width", "wasserstein")
LayerCost = Callable[
    [nn.Module, Sequence[str], nn.Module, Sequence[str]], Tensor | Sequence[Sequence[float]]
]


def match_layers(
    cost: Tensor | Sequence[Sequence[float]],
    *,
    first_to_first: bool = True,
    last_to_last: bool = True,
) -> tuple[int, ...]:
    """Match every layer of a shallow network to one of a deep network at the least total cost.

    A dynamic program in O(m n): with ``F[i, j]`` the least cost of matching the shallow network's
    first j layers within the deep network's first i,
    ``F[i, j] = min(F[i - 1, j], F[i - 1, j - 1] + C[i, j])``. The matching is strictly increasing.
    (Nguyen et al., section 3.1, algorithm 1.)

    Parameters
    ----------
    cost : Tensor or nested sequence
        Shape (m, n), m >= n: cost of matching row i, a layer of the deep network, and column j, a
        layer of the shallow one. Infinite where they must not be matched.
    first_to_first, last_to_last : bool
        Whether the first layers must be matched to each other, and the last ones.

    Returns
    -------
    tuple of int
        For each column its row, from 0; strictly increasing. Among equal costs the earliest rows.

    Raises
    ------
    FusionError
        If the cost is not such a matrix, has a NaN, or no matching keeps the constraints.

    Examples
    --------
    >>> import flwr_fusion as ff
    >>> deep, shallow = (5, 4, 3, 1), (3, 2, 1)
    >>> ff.match_layers([[(a - b) ** 2 for b in shallow] for a in deep])
    (0, 2, 3)
    """
    try:
        matrix = torch.as_tensor(cost, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FusionError(f"the layers' cost is no matrix of numbers: {error}") from error
    if matrix.dim() != 2 or 0 in matrix.shape or matrix.shape[0] < matrix.shape[1]:
        raise FusionError(
            f"the layers' cost has shape {tuple(matrix.shape)}: it must be (m, n), m >= n, "
            "with a row for every layer of the deeper network"
        )
    if bool(torch.isnan(matrix).any()) or bool((matrix == -math.inf).any()):
        raise FusionError("the layers' cost has NaN or minus infinity: check the networks' weights")
    allowed = matrix.clone()
    if first_to_first:
        allowed[1:, 0] = math.inf
    if last_to_last:
        allowed[:-1, -1] = math.inf
    return _cheapest_increasing(allowed.tolist())


def _cheapest_increasing(cost: list[list[float]]) -> tuple[int, ...]:
    rows, columns = len(cost), len(cost[0])
    # For column j, row i: least cost of columns 0..j with j at a row <= i, and that row.
    best: list[list[tuple[float, int]]] = []
    for j in range(columns):
        column: list[tuple[float, int]] = []
        for i in range(rows):
            before = 0.0 if j == 0 else (best[j - 1][i - 1][0] if i else math.inf)
            here = (before + cost[i][j], i)
            column.append(min(column[-1], here, key=lambda found: found[0]) if column else here)
        best.append(column)
    if math.isinf(best[-1][-1][0]):
        raise FusionError(
            f"{columns} layers cannot be matched to {rows} in strictly increasing order within the "
            "constraints (first to first, last to last, layers of one kind): lift a constraint"
        )
    chosen: list[int] = []
    limit = rows - 1
    for column in reversed(best):
        chosen.append(column[limit][1])
        limit = chosen[-1] - 1
    return tuple(reversed(chosen))


@dataclass(frozen=True)
class LayerMatching:
    """How layers of networks of different depth are matched, added and merged.

    Parameters
    ----------
    cost : {"auto", "cka", "width", "wasserstein"} or callable
        Cost of matching two layers: 1 - linear CKA of their pre-activations on the calibration
        inputs (Kornblith et al. 2019), the squared difference of their widths relative to the
        widest layer, or the 1-Wasserstein distance between their channels' pre-activations.
        "auto": CKA where there are calibration inputs, else width. A function
        ``(client, its_layers, target, target_layers)`` of two networks and the names of their
        layers (or blocks) in a stage returns its own costs, a row for each of the client's.
    balance : {"add", "merge"}
        Without a target: fuse into the layers of the deepest network, each as wide as the widest
        client's, or into the shallowest network (among equals the largest).
    merge : {"auto", "least-squares", "sum", "majority", "average", "linear"}
        What takes the place of two layers: the linear layer nearest to them on the calibration
        inputs, or ``W_2 D W_1`` with the diagonal D 1 for channels whose pre-activations there have
        a positive sum, for those that are positive more often than not, the share of positive
        ones, or 1 for all. "auto": least squares with calibration inputs, else "linear".
    first_to_first, last_to_last : bool
        Whether first layers (and last ones) of a stage must be matched to each other.
    structure : callable, optional
        Returns the `DepthStructure` of a network. Default: `DepthStructure.trace`.
    """

    cost: str | LayerCost = "auto"
    balance: Literal["add", "merge"] = "add"
    merge: Literal["auto", "least-squares", "sum", "majority", "average", "linear"] = "auto"
    first_to_first: bool = True
    last_to_last: bool = True
    structure: Callable[[nn.Module], DepthStructure] | None = None

    def __post_init__(self) -> None:
        if not callable(self.cost):
            check_option("cost", self.cost, LAYER_COSTS)
        check_option("balance", self.balance, BALANCES)
        check_option("merge", self.merge, MERGES)
        if self.structure is not None and not callable(self.structure):
            raise FusionError(f"structure must be a function of a network, not {self.structure!r}")


@dataclass(frozen=True)
class StructuredNetwork:
    """A network with its depth structure and its name in messages."""

    model: nn.Module
    structure: DepthStructure
    name: str

    @property
    def title(self) -> str:
        """Name, type and depths, for messages."""
        depths = ", ".join(str(len(stage.units)) for stage in self.structure.stages)
        return f"{self.name} ({type(self.model).__name__} with stages of {depths} units)"


def match_stages(
    client: StructuredNetwork,
    target: StructuredNetwork,
    layers: LayerMatching,
    calibration: Any,
) -> tuple[StageMatch, ...]:
    """Match the units of two networks stage by stage.

    Parameters
    ----------
    client, target : StructuredNetwork
        The two networks, of any depths.
    layers : LayerMatching
        Its cost sees every stage whose depths differ, its constraints hold within every stage. The
        only unit of a stage is matched to the first of a deeper one, but a client's layers are
        merged into their last.
    calibration : Tensor or iterable of inputs, optional
        A few hundred inputs.

    Returns
    -------
    tuple of StageMatch
        One for each stage.

    Raises
    ------
    FusionError
        If the networks have other stages, or a stage cannot be matched; it names both networks
        and the stage.
    """
    _check_comparable(client, target)
    cost: str | LayerCost = layers.cost
    if cost == "auto":
        cost = "width" if calibration is None else "cka"
    if isinstance(cost, str) and cost != "width" and calibration is None:
        raise FusionError(f"LayerMatching(cost={cost!r}) needs calibration=")
    kept = {"first_to_first": layers.first_to_first, "last_to_last": layers.last_to_last}
    stages = zip(client.structure.stages, target.structure.stages, strict=True)
    matches = []
    for number, (ours, theirs) in enumerate(stages):
        try:
            found = _stage_cost(ours, theirs, client.model, target.model, cost, calibration)
            matches.append(_match_stage(ours, theirs, found, kept))
        except FusionError as error:
            raise FusionError(
                f"{client.title} and {target.title} cannot be matched in stage {number + 1} "
                f"({ours.name} and {theirs.name}): {error}"
            ) from error
    return tuple(matches)


def _match_stage(client: Stage, target: Stage, cost: Tensor, kept: dict[str, bool]) -> StageMatch:
    """Match one stage; cost has a row for each client unit, a column for each target unit."""
    ours = tuple(unit.name for unit in client.units)
    theirs = tuple(unit.name for unit in target.units)
    client_is_deeper = len(ours) > len(theirs)
    deep_first = cost if client_is_deeper else cost.T
    if min(cost.shape) == 1 < max(cost.shape):
        # Layers are added behind the one that is there, and merged into the last one; of blocks
        # the first may change the shape.
        merged = client_is_deeper and not client.units[0].is_block
        kept = {"first_to_first": not merged, "last_to_last": merged}
    rows = match_layers(deep_first, **kept)
    pairs = tuple((row, n) if client_is_deeper else (n, row) for n, row in enumerate(rows))
    shown = tuple(map(tuple, deep_first.tolist())) if len(ours) != len(theirs) else ()
    return StageMatch(ours, theirs, pairs, shown)


def _check_comparable(client: StructuredNetwork, target: StructuredNetwork) -> None:
    pair = f"{client.title} and {target.title} do not have the same stages"
    ours, theirs = client.structure, target.structure
    for number, (a, b) in enumerate(zip(ours.stages, theirs.stages, strict=False)):
        if a.units[0].kind != b.units[0].kind:
            raise FusionError(
                f"{pair}: stage {number + 1} of the first ({a.name}) has units of type "
                f"{a.units[0].kind}, of the second ({b.name}) {b.units[0].kind}"
            )
    if len(ours.stages) != len(theirs.stages):
        more = max(ours.stages, theirs.stages, key=len)
        missing = more[min(len(ours.stages), len(theirs.stages))]
        raise FusionError(f"{pair}: stage {missing.name} has no counterpart")
    if len(ours.rest) != len(theirs.rest):
        outside = [
            {key for key in network.model.state_dict() if module_of(key) in network.structure.rest}
            for network in (client, target)
        ]
        raise FusionError(
            f"{client.title} and {target.title} cannot be matched: outside the stages the first "
            f"has the tensors {sorted(outside[0])[:10]}, the second {sorted(outside[1])[:10]}"
        )


def _stage_cost(
    client: Stage,
    target: Stage,
    client_model: nn.Module,
    target_model: nn.Module,
    layer_cost: str | LayerCost,
    calibration: Any,
) -> Tensor:
    """Return the cost of matching each client unit with each target unit of a stage."""
    forms = [
        [_Form.of(unit, model.state_dict()) for unit in stage.units]
        for stage, model in ((client, client_model), (target, target_model))
    ]
    if len(client.units) == len(target.units):
        for ours, theirs in zip(*forms, strict=True):
            _check_same_form(ours, theirs)
        cost = 1.0 - torch.eye(len(client.units), dtype=torch.float64)
    elif not isinstance(layer_cost, str):
        names = [[unit.name for unit in stage.units] for stage in (client, target)]
        try:
            found = layer_cost(client_model, names[0], target_model, names[1])
            cost = torch.as_tensor(found).double()
        except Exception as error:
            raise FusionError(f"the layer cost failed: {type(error).__name__}: {error}") from error
        expected = (len(client.units), len(target.units))
        if cost.shape != expected or bool(cost.isnan().any()):
            raise FusionError(
                f"the layer cost must return numbers of shape {expected}, not {tuple(cost.shape)}"
                + (" with NaN" if cost.shape == expected else "")
            )
    elif layer_cost == "width":
        widths = [
            torch.tensor([float(width_of(unit, model)) for unit in stage.units]).double()
            for stage, model in ((client, client_model), (target, target_model))
        ]
        # Relative to the widest, so that the same network at half the width is as close.
        widths = [w / w.max() for w in widths]
        cost = (widths[0][:, None] - widths[1][None, :]).square()
    else:
        represent, distance = _COMPARISONS[layer_cost]
        batch = _joined(calibration)
        shown = _representations(client_model, client.units, batch, represent)
        compared = _representations(target_model, target.units, batch, represent)
        rows = [[distance(a, b) for b in compared] for a in shown]
        cost = torch.tensor(rows, dtype=torch.float64)
        if not bool(torch.isfinite(cost).all()):
            raise FusionError("the pre-activations on the calibration inputs are not finite")
    return torch.where(_possible(*forms), cost, math.inf)


def _possible(ours: Sequence[_Form], theirs: Sequence[_Form]) -> Tensor:
    return torch.tensor([[a.tensors == b.tensors for b in theirs] for a in ours])


@dataclass(frozen=True)
class _Form:
    """What must agree between corresponding units: tensors, their axes, kernel sizes."""

    tensors: dict[str, tuple[int, ...]]
    keys: dict[str, str]

    @classmethod
    def of(cls, unit: Unit, state: dict[str, Tensor]) -> _Form:
        """Return the form of a unit."""
        keys = unit.tensors(state)
        shapes = {name: state[key].shape for name, key in keys.items()}
        return cls({name: (len(shape), *shape[2:]) for name, shape in shapes.items()}, keys)


def _check_same_form(ours: _Form, theirs: _Form) -> None:
    """Refuse units that can only correspond to each other, and do not."""
    names = sorted(ours.keys.keys() | theirs.keys.keys())
    keys = theirs.keys | ours.keys
    differing = [keys[n] for n in names if ours.tensors.get(n) != theirs.tensors.get(n)]
    if differing:
        raise FusionError(
            f"only one has the tensors {differing[:5]}, or their kernels are of another size"
        )


def width_of(unit: Unit, model: nn.Module) -> int:
    """Return how many channels a unit writes."""
    layer = model.get_submodule(unit.layer)
    width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return int(width)  # type: ignore[arg-type]


def _representations(
    model: nn.Module, units: Sequence[Unit], batch: Any, represent: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Return what represents each unit: a function of its layer's output on a batch."""

    def keep(layer: nn.Module, _inputs: Tensor, output: Tensor) -> Tensor:
        axis = 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1
        # A copy also where it is as precise already: what follows may write into it.
        return represent(widened(output.movedim(axis, 1)).clone())

    found = record(model, [unit.layer for unit in units], batch, keep, "a network")
    return [found[unit.layer][-1].cpu() for unit in units]


def _joined(calibration: Any) -> Any:
    """Return all calibration inputs as one batch: CKA compares samples with each other."""
    batches = list(batches_of(calibration))
    return tree_map(lambda *parts: torch.cat(parts), batches[0], *batches[1:])


def _gram(activations: Tensor) -> Tensor:
    """Return centred inner products between samples, shape (samples, samples), of norm 1."""
    if len(activations) < 2:
        raise FusionError("CKA compares samples with each other: calibration needs at least two")
    rows = activations.flatten(1)
    rows = rows - rows.mean(0)
    # Linear CKA is <K, L> / (|K| |L|) of the centred Gram matrices K = X X^T, L = Y Y^T.
    gram = rows @ rows.T
    norm = gram.norm().clamp(min=1e-300)
    return torch.div(gram, norm)


def _cka_distance(ours: Tensor, theirs: Tensor) -> float:
    """Return 1 - linear CKA (Kornblith et al. 2019, section 3) of two normed Gram matrices."""
    return 1.0 - float((ours * theirs).sum())


def _channels(activations: Tensor) -> Tensor:
    """Return the channels as points: (channels, samples * positions)."""
    return activations.movedim(1, 0).flatten(1)


def _wasserstein_distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the 1-Wasserstein distance of two sets of channels, root mean square per sample."""
    import ot

    if ours.shape[1] != theirs.shape[1]:
        raise FusionError(
            f"their outputs have {ours.shape[1]} and {theirs.shape[1]} positions on the calibration"
        )
    distances = torch.cdist(ours, theirs) / math.sqrt(ours.shape[1])
    # Empty masses are uniform ones.
    return float(ot.emd2([], [], distances.numpy(), numItermax=10_000_000))


_COMPARISONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], float]]] = {
    "cka": (_gram, _cka_distance),
    "wasserstein": (_channels, _wasserstein_distance),
}
