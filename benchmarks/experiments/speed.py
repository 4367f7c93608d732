"""Time and memory: of fusing real networks, and of a round of a strategy.

Every fusion is measured in a process of its own with one thread, beside the plain average of the
same networks, so that the ratio of both does not depend on the machine. The first call traces the
network; later ones find the trace again. The memory is the peak beyond what the process held
before the call, the fused model included.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from unittest.mock import Mock

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from fusion_simulation.task import MLP
from torch import Tensor, nn

import flwr_fusion as ff
from benchmarks.bench import Bench
from benchmarks.declarations import GROUP, Experiment, Scores
from benchmarks.experiments.cost import printed_in_process, timed, with_memory
from flwr_fusion.strategy import OTFusion

REPEATS = 3
STARTS = ("one start", "own starts")
# Of the size of every weight: what networks of one start differ by.
NOISE = 0.02


def network_of(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network with its present random start, and an example of its inputs."""
    if name.startswith("mlp-"):
        sizes = [int(size) for size in name.split("-")[1:]]
        return MLP((784, *sizes, 10)), torch.randn(2, 1, 28, 28)
    import torchvision

    # Torchvision's VGG and ViT have one size of images.
    size, samples = (224, 1) if name.startswith(("vgg", "vit")) else (64, 2)
    model = getattr(torchvision.models, name)(num_classes=10)
    return model, torch.randn(samples, 3, size, size)


def clients_of(name: str, count: int, starts: str) -> tuple[nn.Module, list[nn.Module], Tensor]:
    """Return the model that was sent out, clients' networks, and an example of their inputs."""
    torch.manual_seed(0)
    sent, inputs = network_of(name)
    clients = []
    for k in range(count):
        torch.manual_seed(0 if starts == "one start" else k)
        client, _ = network_of(name)
        torch.manual_seed(count + k)
        with torch.no_grad():
            for parameter in client.parameters():
                parameter.add_(torch.randn_like(parameter) * parameter.abs().mean() * NOISE)
        clients.append(client)
    return sent, clients, inputs


def of_fusion(bench: Bench) -> Scores:
    """Measure the fusion of several networks by the mean, from one start and from own starts."""
    return {
        f"{starts}{GROUP}{count} x {name}": measured("print_fusion", name, count, starts)
        for name, count in bench.scale.timed_networks
        for starts in STARTS
    }


def of_round(bench: Bench) -> Scores:
    """Measure a round's aggregation beside FedAvg's."""
    return {
        f"{combine}{GROUP}{count} x {name}": measured("print_round", name, count, combine)
        for name, count, combine in bench.scale.timed_rounds
    }


def of_first_calls(bench: Bench) -> Scores:
    """Measure the first trace of a network, and transplantations of two."""
    return {
        f"{call}{GROUP}{name}": measured("print_first_call", name, call)
        for name in bench.scale.first_calls
        for call in ("trace", "transplantation")
    }


def measured(function: str, *arguments: object) -> dict[str, float]:
    """Return what a function of this module measures: seconds and memory, each in a process."""
    scores: dict[str, float] = {}
    for quantity in ("seconds", "mebibytes"):
        call = f"speed.{function}{(quantity, *arguments)!r}"
        scores |= printed_in_process(f"from benchmarks.experiments import speed; {call}", quantity)
    return scores


def print_fusion(quantity: str, name: str, count: int, starts: str) -> None:
    """Measure `ot_fusion` of some networks in this process, and print the figures as JSON."""
    torch.set_num_threads(1)
    sent, clients, inputs = clients_of(name, count, starts)
    reference = sent if starts == "one start" else None
    fuse = partial(
        ff.ot_fusion, clients, example_inputs=inputs, reference=reference, combine="mean"
    )
    print(json.dumps(_figures(quantity, fuse, partial(ff.average, clients), "average")))


def print_first_call(quantity: str, name: str, call: str) -> None:
    """Measure the first call in this process, and print the figures as JSON."""
    torch.set_num_threads(1)
    sent, clients, inputs = clients_of(name, 2, "own starts")
    if call == "trace":
        seconds, mebibytes = _seconds_and_memory(partial(ff.ChannelGraph.trace, sent, inputs))
        first = {"seconds": {"first call, s": seconds}, "mebibytes": {"first call, MiB": mebibytes}}
        found = first[quantity]
    else:
        transplant = partial(ff.neuron_transplantation, clients, example_inputs=inputs)
        found = _figures(quantity, transplant, partial(ff.average, clients), "average")
    if quantity == "mebibytes":
        found["network, MiB"] = sum(p.numel() * p.element_size() for p in sent.parameters()) / 2**20
    print(json.dumps(found))


def print_round(quantity: str, name: str, count: int, combine: str) -> None:
    """Measure `aggregate_train` of replies from one start, and print the figures as JSON."""
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    sent, clients, inputs = clients_of(name, count, "one start")
    replies = [_reply(client, 100 + k) for k, client in enumerate(clients)]
    del clients
    strategy = OTFusion(model=sent, example_inputs=inputs, combine=combine)
    started = ArrayRecord(sent.state_dict())

    def ours() -> object:
        strategy._models.set_chosen(started, "the arrays to send")
        strategy._runs_itself = True  # As in the strategy's own start().
        return strategy.aggregate_train(1, replies)[0]

    plain = partial(FedAvg().aggregate_train, 1, replies)
    print(json.dumps(_figures(quantity, ours, plain, "FedAvg")))


def _reply(model: nn.Module, examples: int) -> Message:
    reply = Mock(spec=Message)
    reply.has_error.return_value, reply.has_content.return_value = False, True
    metrics = MetricRecord({"num-examples": examples})
    reply.content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return reply


def _figures(
    quantity: str, ours: Callable[[], object], plain: Callable[[], object], name: str
) -> dict[str, float]:
    """Return seconds or memory of the first call and of later ones, beside another's."""
    first, first_memory = _seconds_and_memory(ours)
    if quantity == "mebibytes":
        return {"first call, MiB": first_memory, "later, MiB": _seconds_and_memory(ours)[1]}
    _, later = timed(ours, REPEATS)
    _, compared = timed(plain, REPEATS)
    return {
        "first call, s": first,
        "later, s": later,
        f"{name}, s": compared,
        f"later / {name}": later / compared,
    }


def _seconds_and_memory(call: Callable[[], object]) -> tuple[float, float]:
    """Return the time of a call, and the peak of the memory beyond what was held before it."""
    (result, seconds), mebibytes = with_memory(partial(timed, call, 1))
    if result is None:
        raise RuntimeError("nothing was fused")
    return seconds, mebibytes


_speed = partial(
    Experiment,
    columns="",
    source="this repository",
    data="",
    unit="seconds, MiB and their ratios",
    many_seeds=False,
    alone=True,
    deviation=False,
)
EXPERIMENTS = (
    _speed(
        "speed",
        "Time and memory of fusing real networks, on one core",
        of_fusion,
        rows=f"starts{GROUP}networks",
        in_figure=("later / average",),
    ),
    _speed(
        "speed-of-first-calls",
        "Time and memory of the first call in a process: the trace, and a transplantation",
        of_first_calls,
        rows=f"call{GROUP}network",
        in_figure=("first call, s",),
    ),
    _speed(
        "speed-of-rounds",
        "Time and memory of a round's aggregation beside FedAvg's, from one start",
        of_round,
        rows=f"combine{GROUP}replies",
        in_figure=("later / FedAvg",),
    ),
)
