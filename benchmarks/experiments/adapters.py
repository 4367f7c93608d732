"""Low-rank adapters over one base: what is lost by fusing them, and federations of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from fusion_simulation.adapters import SCALE, TRAVELS, LowRank
from fusion_simulation.task import build_model, train
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import flwr_fusion as ff
from benchmarks.bench import SEED_STRIDE, Bench
from benchmarks.declarations import GROUP, Experiment, Scores
from benchmarks.experiments.cost import timed, with_memory
from benchmarks.federation import Client, Fuse, Round, divided, drawn, federate
from flwr_fusion.exchanged import Exchanged
from flwr_fusion.graph.groups import holding

RANKS = (4, 8, 16)
TARGETS = (4, 8, 16, 28)
PARTITION = "dirichlet-0.3"
EXCHANGED = Exchanged(only=TRAVELS)
EACH_RANK = 3

Factors = tuple[Tensor, Tensor]
"""What reads the channels of an adapter, outputs x rank, and what writes them, rank x inputs."""


def adapted(bench: Bench, rank: int, seed: int) -> nn.Module:
    """Return a network with adapters of a rank that have not been trained."""
    dataset = bench.scale.federation.dataset
    model = build_model(f"vit-lora-{rank}", dataset, seed, data_dir=bench.data_dir)
    return model.to(bench.device)


def nested(bench: Bench, ranks: Sequence[int], seed: int) -> dict[int, nn.Module]:
    """Return networks whose adapters are the first channels of the largest one's."""
    first = adapted(bench, max(ranks), seed)
    networks = {}
    for rank in sorted(set(ranks)):
        networks[rank] = adapted(bench, rank, seed)
        networks[rank].load_state_dict(cut(first.state_dict(), rank))
    return networks


def cut(state: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return a state dict with the first channels of its adapters, zeros where it has fewer."""

    def sized(name: str, tensor: Tensor) -> Tensor:
        if ".lora_" not in name:
            return tensor
        axis = 0 if "lora_A" in name else 1
        part = tensor.narrow(axis, 0, min(rank, tensor.shape[axis]))
        missing = rank - part.shape[axis]
        return nn.functional.pad(part, (0, 0, 0, missing) if axis == 0 else (0, missing))

    return {name: sized(name, tensor) for name, tensor in state.items()}


def factors(model: nn.Module) -> dict[str, Factors]:
    """Return the factors of every adapter of a network."""
    return {
        name: (module.lora_B.weight.detach(), module.lora_A.weight.detach())
        for name, module in model.named_modules()
        if isinstance(module, LowRank)
    }


def fused(
    models: Sequence[nn.Module], weights: Sequence[float], target: nn.Module, combine: str
) -> nn.Module:
    """Return what the fusion makes of networks, in the target's rank; only what travels."""
    with holding(lambda name: not EXCHANGED.takes(name)):
        result = ff.ot_fusion(
            models,
            weights,
            example_inputs=example_inputs(target),
            target=target,
            reference=target,
            combine=combine,
        )
    model = copy.deepcopy(target)
    found = EXCHANGED.part_of(result.model.state_dict())
    model.load_state_dict(model.state_dict() | found)
    return model


def example_inputs(model: nn.Module) -> Tensor:
    """Return images of a network's size."""
    weight = model.get_parameter("patches.weight")
    side = 4 * weight.shape[-1]
    return torch.zeros(2, weight.shape[1], side, side, device=weight.device)


# What is lost by fusing.


@dataclass(frozen=True)
class Adapters:
    """The clients' ranks, and whether they start with the same adapters."""

    ranks: tuple[int, ...]
    common: bool


def adapter_errors(bench: Bench, clients: Adapters) -> Scores:
    """Train clients for a round; measure how far fused adapters are from the mean product."""
    task, seed = bench.scale.federation, SEED_STRIDE * bench.seed
    generator = np.random.default_rng(bench.seed)
    images, _ = drawn(bench.everything(task), task.images, generator)
    shares = divided(images, PARTITION, len(clients.ranks), generator)
    trained = []
    for k, (rank, own) in enumerate(zip(clients.ranks, shares, strict=True)):
        start = nested(bench, clients.ranks, seed if clients.common else seed + 1 + k)
        trained.append(start[rank])
        train(trained[-1], own, task.recipe, seed + k)
    weights = [len(own) / len(images) for own in shares]
    start_of = "one start" if clients.common else "own starts"
    scores: Scores = {}
    ranks = "/".join(map(str, clients.ranks))
    for rank in TARGETS:
        whole = fused(trained, weights, adapted(bench, rank, seed), "mean")
        errors = [
            _errors([factors(model)[name] for model in trained], weights, rank, product)
            for name, product in factors(whole).items()
        ]
        scores[f"{ranks}, {start_of}{GROUP}into rank {rank}"] = {
            way: float(np.mean([each[way] for each in errors])) for way in errors[0]
        }
    return scores


def _errors(
    adapters: Sequence[Factors], weights: Sequence[float], rank: int, whole: Factors
) -> dict[str, float]:
    """Return how far products are from the clients' mean product, relative to its length."""
    mean = sum((w * b @ a for w, (b, a) in zip(weights, adapters, strict=True)), torch.zeros(()))
    found = {
        "truncated SVD": _truncated(mean, rank),
        "fusion": whole[0] @ whole[1],
        "channels matched": _matched(adapters, weights, rank),
        "factors averaged": _averaged(adapters, weights, rank),
    }
    return {way: float((p - mean).norm() / mean.norm()) for way, p in found.items()}


def _truncated(product: Tensor, rank: int) -> Tensor:
    u, values, vh = torch.linalg.svd(product.double(), full_matrices=False)
    best: Tensor = (u[:, :rank] * values[:rank]) @ vh[:rank]
    return best.float()


def _averaged(adapters: Sequence[Factors], weights: Sequence[float], rank: int) -> Tensor:
    """Return the product of the mean factors, the first channels of them."""
    most = max(a.shape[0] for _, a in adapters)
    pairs = zip(weights, adapters, strict=True)
    rows = sum(w * torch.cat([_padded(b.T, most), _padded(a, most)], 1) for w, (b, a) in pairs)
    assert isinstance(rows, Tensor)
    outputs = len(adapters[0][0])
    return rows[:rank, :outputs].T @ rows[:rank, outputs:]


def _padded(rows: Tensor, count: int) -> Tensor:
    return nn.functional.pad(rows, (0, 0, 0, count - len(rows)))


def _matched(adapters: Sequence[Factors], weights: Sequence[float], rank: int) -> Tensor:
    """Return the product of the mean factors after matching channels to the largest client's."""
    largest = max(range(len(adapters)), key=lambda k: adapters[k][1].shape[0])
    rows = [torch.cat([b.T, a], 1) for b, a in adapters]
    moved = []
    for own, (b, _) in zip(rows, adapters, strict=True):
        ours, theirs = linear_sum_assignment(-(rows[largest] @ own.T).numpy())
        placed = torch.zeros_like(rows[largest])
        placed[ours] = own[theirs]
        moved.append((placed[:, : len(b)].T, placed[:, len(b) :]))
    return _averaged(moved, weights, rank)


# What it costs.


RANK, CLIENTS = 16, (2, 10, 50)


def adapter_cost(bench: Bench) -> Scores:
    """Fuse adapters of a wide layer, whose product would have 64 MiB at the usual scales."""
    scores: Scores = {}
    width = max(2 * RANK, *bench.scale.timed_widths)
    for count in CLIENTS:
        models = [_wide_adapter(width, SEED_STRIDE * bench.seed + k) for k in range(count)]
        fuse = partial(ff.ot_fusion, models, example_inputs=torch.zeros(2, width), combine="mean")
        average = partial(ff.average, models)
        fuse()  # The trace is found again.
        average()
        (_, seconds), mebibytes = with_memory(partial(timed, fuse, 3))
        (_, plain), _ = with_memory(partial(timed, average, 3))
        scores[f"{count} clients"] = {
            "fusion, s": seconds,
            "average of factors, s": plain,
            "fusion, MiB beyond the clients": mebibytes,
        }
    return scores


def _wide_adapter(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, RANK, bias=False), nn.Linear(RANK, width, bias=False))


# Federations.


def fuse_as(combine: str, ended: Round, name: str) -> nn.Module:
    """Fuse all clients' adapters into one rank."""
    return fused(ended.trained, ended.weights, ended.sent[name], combine)


def pad_with_zeros(ended: Round, name: str) -> nn.Module:
    """Average factors of equal index, zeros where clients have none, and cut them to one rank."""
    most = max(RANKS)
    shares = [weight / sum(ended.weights) for weight in ended.weights]
    states = [cut(EXCHANGED.part_of(model.state_dict()), most) for model in ended.trained]
    mean = {
        key: torch.stack([s * state[key] for s, state in zip(shares, states, strict=True)]).sum(0)
        for key in states[0]
    }
    return _with_part(ended.sent[name], cut(mean, int(name)))


def stack(fresh: Mapping[str, nn.Module], ended: Round, name: str) -> nn.Module:
    """Add the mean product to the base, and begin new adapters: exact, and as large as the base."""
    model = _with_part(ended.sent[name], pad_with_zeros(ended, name).state_dict())
    model = _with_part(model, {k: t for k, t in fresh[name].state_dict().items() if "lora_" in k})
    shares = [weight / sum(ended.weights) for weight in ended.weights]
    trained = [factors(client) for client in ended.trained]
    for layer, module in model.named_modules():
        if isinstance(module, LowRank):
            for share, own in zip(shares, trained, strict=True):
                reads, writes = own[layer]
                module.base.weight.data += share * SCALE * reads @ writes
    return model


def alone(ended: Round, name: str) -> nn.Module:
    """Fuse the adapters of one rank's own clients."""
    own = [k for k, client in enumerate(ended.clients) if client.architecture == name]
    return fused(
        [ended.trained[k] for k in own], [ended.weights[k] for k in own], ended.sent[name], "mean"
    )


def _with_part(model: nn.Module, part: Mapping[str, Tensor]) -> nn.Module:
    found = copy.deepcopy(model)
    travels = {name: tensor for name, tensor in part.items() if EXCHANGED.takes(name)}
    found.load_state_dict(found.state_dict() | travels)
    return found


METHODS = (
    "products fused, auto",
    "products fused, mean",
    "factors padded with zeros",
    "stacked into the base",
    "each rank alone",
)


@dataclass(frozen=True)
class Setting:
    """How the adapters of a round become one."""

    method: str


def adapter_federation(bench: Bench, setting: Setting) -> Scores:
    """Run a federation of three ranks; score the network of every rank after every round."""
    task, stride = bench.scale.federation, SEED_STRIDE
    generator = np.random.default_rng(bench.seed)
    images, _ = drawn(bench.everything(task), task.images, generator)
    shares = divided(images, PARTITION, EACH_RANK * len(RANKS), generator)
    start = {str(r): m for r, m in nested(bench, RANKS, stride * bench.seed).items()}
    methods: dict[str, Fuse] = dict(
        zip(
            METHODS,
            (
                partial(fuse_as, "auto"),
                partial(fuse_as, "mean"),
                pad_with_zeros,
                partial(stack, start),
                alone,
            ),
            strict=True,
        )
    )
    names = [str(RANKS[k % len(RANKS)]) for k in range(len(shares))]
    networks = federate(
        [Client(own, name) for own, name in zip(shares, names, strict=True)],
        start,
        task.recipe,
        lambda number, k: stride * (stride * bench.seed + number + 1) + k,
        [methods[setting.method]] * bench.scale.rounds,
    )
    scores: Scores = {f"rank {name}{GROUP}{setting.method}": {} for name in start}
    for number, models in enumerate(networks, start=1):
        for name, model in models.items():
            row = f"rank {name}{GROUP}{setting.method}"
            scores[row][str(number)] = bench.score(model, task)
    return scores


EXPERIMENTS = (
    Experiment(
        "adapter-errors",
        "Distance of fused adapters from the mean of the clients' products",
        adapter_errors,
        "fused by",
        "one round of three clients, Dirichlet 0.3, mean over eight adapters",
        cases=[
            Adapters(ranks, common) for ranks in ((8, 8, 8), (4, 8, 16)) for common in (False, True)
        ],
        data="federation",
        rows=GROUP.join(("ranks and starts", "into")),
        unit="relative error",
        decimals=4,
        deviation=False,
    ),
    Experiment(
        "adapter-cost",
        "Fusing adapters of rank 16 of a layer of 4096 x 4096",
        adapter_cost,
        "what is measured",
        "the product alone would have 64 MiB",
        data="",
        unit="seconds, MiB",
        alone=True,
        deviation=False,
    ),
    Experiment(
        "adapters",
        "Nine clients with adapters of three ranks over a base that has seen half of the labels",
        adapter_federation,
        "round",
        "Dirichlet 0.3, one local epoch a round",
        cases=[Setting(method) for method in METHODS],
        data="federation",
        rows=GROUP.join(("rank", "method")),
        curve=True,
        in_table=("1", "2", "5", "10"),
        baseline="factors padded with zeros",
    ),
)
