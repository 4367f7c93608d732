"""Preparing a fusion: checked weights, comparable networks, the reference of the alignment."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flwr_fusion.errors import FusionError
from flwr_fusion.graph.groups import ChannelGraph, verified_graph
from flwr_fusion.maps import Correspondence, Selection
from flwr_fusion.matching.barycentre import Client
from flwr_fusion.matching.costs import channel_norms
from flwr_fusion.observe import call, evaluation_mode, moved_to
from flwr_fusion.rules.least_squares import RunningMean

# Networks that started apart have weights with a cosine near 0; after training from one start it
# stays far above this.
_SAME_START = 0.2
_PART = 1_000_000


def check_option(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not allowed, and say what is."""
    if value not in allowed:
        raise FusionError(f"{name} must be one of {allowed}, not {value!r}")


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
        if not isinstance(network, nn.Module):
            raise FusionError(
                f"{name}[{k}] must be a network, not {type(network).__name__}: load the values "
                "of a state dict into a network first"
            )


def shares_of(models: Sequence[nn.Module], weights: Sequence[float] | None) -> list[float]:
    """Return the clients' weights divided by their sum."""
    check_networks(models, "models")
    try:
        weights = [1.0] * len(models) if weights is None else [float(w) for w in weights]
    except (TypeError, ValueError) as error:
        raise FusionError(f"weights must be numbers, not {weights!r:.60}") from error
    if len(weights) != len(models):
        raise FusionError(f"there are {len(models)} models but {len(weights)} weights")
    for k, weight in enumerate(weights):
        if not math.isfinite(weight) or weight < 0:
            raise FusionError(f"the weight of client {k} is {weight}: it must be finite and >= 0")
    total = sum(weights)
    if total <= 0:
        raise FusionError("all weights are zero: at least one client must take part")
    return [weight / total for weight in weights]


def detached_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a network's state dict without its autograd graph."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def participants(models: Sequence[nn.Module], shares: Sequence[float]) -> list[int]:
    """Return the clients with a weight, the heaviest first, in whichever order they came.

    Raises
    ------
    FusionError
        If one of them has non-finite values.
    """
    norms = {
        k: squared_norm(detached_state(models[k]), f"client {k}")
        for k, share in enumerate(shares)
        if share > 0
    }
    return sorted(norms, key=lambda k: (-shares[k], norms[k]))


def squared_norm(state: Mapping[str, Tensor], who: str) -> float:
    """Return the sum of squares of all floating-point values; refuse non-finite ones by name."""
    total = 0.0
    for name, tensor in state.items():
        if tensor.is_floating_point():
            # In parts: the norm in double precision makes a copy of what it is given.
            parts = torch.split(tensor.detach().flatten(), _PART)
            norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
            square = float(torch.stack(norms).square().sum())
            if not math.isfinite(square):
                raise FusionError(f"{who}: tensor '{name}' has non-finite values")
            total += square
    return total


def largest(models: Sequence[nn.Module], order: Sequence[int]) -> nn.Module:
    """Return the network with the most parameters; among equals the first of `order`."""
    return models[max(order, key=lambda k: sum(p.numel() for p in models[k].parameters()))]


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


def with_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a network with other values.

    Parameters
    ----------
    model : nn.Module
        The network; not modified.
    state : mapping of str to Tensor
        Values for all keys of its state dict.

    Returns
    -------
    nn.Module
        The copy.
    """
    loaded = copy.deepcopy(model)
    # The network's own state dict carries the versions that some layers ask for.
    full = loaded.state_dict()
    full.update(state)
    loaded.load_state_dict(full)
    return loaded


def assembled(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a network of a model's architecture made of the tensors of a state dict, not copies.

    Parameters
    ----------
    model : nn.Module
        The architecture; not modified.
    state : mapping of str to Tensor
        Tensors for all keys of its state dict, which nobody else uses.

    Returns
    -------
    nn.Module
        The network that owns them.
    """
    tensors: dict[int, Any] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        value = state[name]
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, tensor.requires_grad)
        # Of tied tensors the first.
        tensors.setdefault(id(tensor), value)
    return copy.deepcopy(model, tensors)


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


def clients_of(
    models: Sequence[nn.Module],
    shares: Sequence[float],
    named: Mapping[int, str],
    target: nn.Module,
    graph: ChannelGraph,
    example_inputs: Any,
    absent: Mapping[int, frozenset[str]],
) -> list[Client]:
    """Return the named clients in their order, with their correspondence to the target.

    ``absent`` says for those that were brought to another depth which tensors they have not.
    """
    known: dict[Any, Correspondence] = {architecture_of(target): Correspondence(graph, graph)}
    device = next(target.parameters()).device
    clients = []
    for k, name in named.items():
        model = models[k]  # A strategy builds it anew at every access.
        key = architecture_of(model)
        try:
            if key not in known:
                squared_norm(detached_state(target), "the target")
                known[key] = Correspondence(graph, verified_graph(model, example_inputs))
                _check_same_modules(model, target)
            elif key == architecture_of(target):
                check_same_function(model, target, example_inputs)
        except FusionError as error:
            raise FusionError(f"{name} cannot be fused into the target: {error}") from error

        def state(k: int = k) -> dict[str, Tensor]:
            return {name: tensor.to(device) for name, tensor in detached_state(models[k]).items()}

        clients.append(Client(state, shares[k], known[key], absent.get(k)))
    return clients


def _check_same_modules(model: nn.Module, target: nn.Module) -> None:
    """Refuse networks whose layers of one name are of different types."""
    types = {name: type(module) for name, module in target.named_modules()}
    for name, module in model.named_modules():
        if types.get(name) is not type(module):
            raise FusionError(f"its layer '{name}' is not of the target's type")


def check_same_function(model: nn.Module, target: nn.Module, example_inputs: Any) -> None:
    """Refuse networks of the same shapes that compute something else (heads, strides)."""
    if model is target:
        return
    outputs = []
    for network in (model, assembled(target, detached_state(model))):
        with evaluation_mode(network), torch.no_grad():
            output = call(network, moved_to(network, example_inputs))
        leaves = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        outputs.append(torch.cat([x.double().cpu().flatten() for x in leaves]))
    same = outputs[0].shape == outputs[1].shape
    if not same or float((outputs[0] - outputs[1]).norm()) > 1e-2 * float(outputs[0].norm()):
        raise FusionError(
            "with its weights the target's architecture computes something else: both have the "
            "same shapes, but differ in attention heads, strides, activations or the like"
        )


def architecture_of(model: nn.Module) -> tuple[Any, ...]:
    """Return a key that networks of one type and of equal shapes share."""
    shapes = tuple((name, tensor.shape) for name, tensor in model.state_dict().items())
    return (type(model), shapes)


def reference_of(
    clients: Sequence[Client],
    order: Sequence[int],
    target: nn.Module,
    reference: nn.Module | None,
    choose: Callable[[Sequence[Client]], int] | None = None,
) -> tuple[dict[str, Tensor], str, int | None]:
    """Return the state dict to align to, its name, and which client it is as it stands.

    A given reference is used if at least half of the clients resemble it. Otherwise it is one of
    the clients: of those that are equally fit the heaviest, or the one that ``choose`` picks.
    """
    device = next(target.parameters()).device
    target_state = {name: tensor.to(device) for name, tensor in detached_state(target).items()}
    if reference is not None:
        given = {name: tensor.to(device) for name, tensor in detached_state(reference).items()}
        check_same_tensors(given, target_state, "the reference", "the target")
        squared_norm(given, "the reference")
        if _most_resemble(clients, given):
            return given, "the given reference", None
    shapes = {name: tensor.shape for name, tensor in target_state.items()}
    # Other widths are the worst to align to; layers that do nothing, or were merged, come next.
    ranks = [
        (client.correspondence.client.shapes != shapes, client.absent is not None)
        for client in clients
    ]
    fittest = [n for n, rank in enumerate(ranks) if rank == min(ranks)]
    of_other_widths, _ = min(ranks)
    chosen = fittest[0]
    if choose is not None and not of_other_widths:
        chosen = fittest[choose([clients[n] for n in fittest])]
    client, name = clients[chosen], f"client {order[chosen]}"
    if of_other_widths:
        return _placed(client, target_state), name, None
    lacking = {key: target_state[key] for key in client.absent or ()}
    return dict(client.state()) | lacking, name, chosen


def _most_resemble(clients: Sequence[Client], reference: Mapping[str, Tensor]) -> bool:
    """Whether at least half of the clients come from the reference: no single one can decide."""
    yes = no = 0
    for client in clients:
        resembles = _resembles(client.state(), reference)
        yes, no = yes + resembles, no + (not resembles)
        if 2 * yes >= len(clients) or 2 * no > len(clients):
            break
    return 2 * yes >= len(clients)


def _resembles(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> bool:
    """Whether two networks still have the same start; unequal shapes cannot tell otherwise."""
    products = torch.zeros(3, dtype=torch.float64)
    for name, ours in reference.items():
        if ours.dim() < 2 or not ours.is_floating_point():
            continue
        if ours.shape != state[name].shape:
            return True
        x, y = ours.double().flatten(), state[name].double().flatten()
        products += torch.stack([x @ y, x @ x, y @ y]).cpu()
    scale = float((products[1] * products[2]).sqrt())
    return float(products[0]) > _SAME_START * scale


def _placed(client: Client, target_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put a network of another width into the target's channels: its strongest, in order."""
    state = client.state()
    maps = client.correspondence.identity()
    for group in client.correspondence.free_groups:
        if group.client_size > group.fused_size:
            norms = channel_norms(group.name, state, client.correspondence, fused=False)
            strongest = norms.topk(group.fused_size).indices.sort().values.cpu()
            maps[group.name] = Selection(strongest, group.client_size)
    mean = RunningMean(target_state)
    client.join(mean, maps)
    return mean.mean(uncovered=target_state)
