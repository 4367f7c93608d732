"""What the clients' channels are aligned to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

from flwr_fusion.fusion import Client
from flwr_fusion.maps import Selection
from flwr_fusion.matching.certificate import IdentityCertificate
from flwr_fusion.matching.costs import channel_norms, matched_tensors
from flwr_fusion.matching.matching import Matching
from flwr_fusion.matching.sweeps import align_by_weights
from flwr_fusion.networks import check_same_tensors, detached_state, squared_norm
from flwr_fusion.precision import numbers, widened
from flwr_fusion.rules.mean import RunningMean

# Networks that started apart have weights with a cosine near 0; after training from one start it
# stays far above this.
_SAME_START = 0.2


@dataclass(frozen=True)
class Reference:
    """What the clients are aligned to.

    Parameters
    ----------
    state : mapping of str to Tensor
        In the fused network's channels, where the target lives.
    name : str
        What reports call it.
    client : int or None
        Place in the list of clients of the one that it is, as it stands.
    given : bool
        Whether it is the given reference, which the clients resemble.
    """

    state: Mapping[str, Tensor]
    name: str
    client: int | None = None
    given: bool = False


def choose_reference(
    clients: Sequence[Client],
    target: nn.Module,
    given: nn.Module | None,
    central_by: Matching | None = None,
) -> Reference:
    """Choose what clients are aligned to."""
    device = next(target.parameters()).device
    target_state = {name: tensor.to(device) for name, tensor in detached_state(target).items()}
    if given is not None:
        state = {name: tensor.to(device) for name, tensor in detached_state(given).items()}
        check_same_tensors(state, target_state, "the reference", "the target")
        squared_norm(state, "the reference")
        if _most_resemble(clients, state):
            return Reference(state, "the given reference", given=True)
    shapes = {name: tensor.shape for name, tensor in target_state.items()}
    # Other widths are the worst to align to; layers that do nothing, or were merged, come next.
    ranks = [(c.correspondence.client.shapes != shapes, c.depth_aligned) for c in clients]
    fittest = [n for n, rank in enumerate(ranks) if rank == min(ranks)]
    of_other_widths, _ = min(ranks)
    chosen = fittest[0]
    if central_by is not None and not of_other_widths:
        chosen = fittest[most_central([clients[n] for n in fittest], central_by)]
    client = clients[chosen]
    if of_other_widths:
        return Reference(_placed(client, target_state), client.name)
    # In the target's types: what is fused has them.
    own = {n: t.to(target_state[n].dtype) for n, t in client.state().items() if n in target_state}
    lacking = {key: target_state[key] for key in client.absent}
    return Reference(own | lacking, client.name, chosen)


def _most_resemble(clients: Sequence[Client], reference: Mapping[str, Tensor]) -> bool:
    """Whether at least half of the clients come from the reference: no single one can decide."""
    yes = no = 0
    for client in clients:
        compared = reference.keys() - client.correspondence.factors
        resembles = _resembles(client.state(), {name: reference[name] for name in compared})
        yes, no = yes + resembles, no + (not resembles)
        if 2 * yes >= len(clients) or 2 * no > len(clients):
            break
    return 2 * yes >= len(clients)


def _resembles(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> bool:
    """Whether two networks still have the same start; unequal shapes cannot tell otherwise."""
    products = []
    for name, ours in reference.items():
        if ours.dim() < 2 or not ours.is_floating_point():
            continue
        if ours.shape != state[name].shape:
            return True
        precise = torch.promote_types(ours.dtype, torch.float32)
        x, y = ours.flatten().to(precise), state[name].flatten().to(precise)
        products.append(widened(torch.stack([x @ y, x @ x, y @ y])))
    if not products:
        return False
    # Cosine of all weights: <x, y> > c |x| |y|.
    product, squares, their_squares = numbers(torch.stack(products).sum(0))
    return bool(product > _SAME_START * (squares * their_squares) ** 0.5)


def _placed(client: Client, target_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put a network of another width into the target's channels: its strongest, in order."""
    state = client.state()
    maps = client.correspondence.identity()
    for group in client.correspondence.free_groups:
        if group.client_size > group.fused_size:
            norms = channel_norms(group.name, state, client.correspondence, fused=False)
            strongest = norms.topk(group.fused_size).indices.sort().values.cpu()
            maps[group.name] = Selection(strongest, group.client_size)
    factors = client.correspondence.factors
    mean = RunningMean({n: t for n, t in target_state.items() if n not in factors})
    mean.add(client, maps, state=state)
    return {**target_state, **mean.finish(uncovered=target_state)}


def most_central(clients: Sequence[Client], matching: Matching) -> int:
    """Return the client to which half of the others can be aligned at the least cost.

    A client that has nothing in common with the others, whatever its weights, is never chosen
    while most of the others have. Clients that come from one start are compared as they stand.
    """
    if len(clients) == 1:
        return 0
    as_they_stand = _distances(clients)
    # A distance of 2 (1 - cosine) on average over the tensors.
    near = (as_they_stand < 2 * (1 - _SAME_START)).sum(1) >= len(clients) / 2
    if bool(near.any()):
        return int(as_they_stand.nanmedian(1).values.masked_fill(~near, torch.inf).argmin())
    costs = torch.full((len(clients), len(clients)), torch.nan)
    for n, reference in enumerate(clients):
        state = reference.state()
        certificate = IdentityCertificate(state)
        for k, client in enumerate(clients):
            if k != n:
                found = align_by_weights(
                    state, client.state(), client.correspondence, matching, certificate=certificate
                )
                costs[n, k] = fmean(found.costs.values()) if found.costs else 0.0
    return int(costs.nanmedian(1).values.argmin())


def _distances(clients: Sequence[Client]) -> Tensor:
    """Return the mean squared distances of the clients' normalised tensors; NaN to themselves."""
    states = [client.state() for client in clients]
    total = torch.zeros(len(clients), len(clients), dtype=torch.float64)
    names = matched_tensors(clients[0].correspondence, states[0])
    for name in names:
        rows = torch.stack([state[name].detach().flatten().float() for state in states])
        rows /= rows.norm(dim=1, keepdim=True).clamp(min=1e-15)
        # |x - y|^2 = 2 (1 - <x, y>) of unit vectors.
        total += 2 * (1 - (rows @ rows.T).cpu().double())
    return (total / max(1, len(names))).fill_diagonal_(torch.nan)
