"""Federations of networks that were refused, or broke: a real strategy and a real ClientApp."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from flwr_fusion.observe import tensors_of
from flwr_fusion.strategy import NeuronTransplantation, OTFusion
from tests.corpus.case import Case
from tests.corpus.modules import quantisation_aware, variational
from tests.corpus.recurrent import own_state
from tests.corpus.tables import masked_language_model, queue
from tests.support.grid import InProcessGrid

NODES = 3
FEDERATIONS = {
    "VAE": Case("VAE", variational, lambda: torch.randn(2, 6), 0),
    "LSTM with its own state": Case("LSTM", own_state, lambda: torch.randn(2, 4, 5), 0),
    "masked language model": Case(
        "MLM", masked_language_model, lambda: torch.randint(11, (2, 5)), 0
    ),
    "queue of keys": Case("queue", queue, lambda: torch.randn(2, 6), 0),
    "quantisation-aware": Case("QAT", quantisation_aware, lambda: torch.randn(2, 6), 0),
}


def unet() -> nn.Module:
    """MONAI's U-Net, of the optional extra."""
    from monai.networks.nets import UNet

    steps = {"channels": (4, 8, 16), "strides": (2, 2)}
    model: nn.Module = UNet(2, 1, 2, **steps, num_res_units=1, norm="batch")
    return model


if find_spec("monai"):
    FEDERATIONS["MONAI's U-Net"] = Case("U-Net", unet, lambda: torch.randn(2, 1, 16, 16), 0)
Send = Callable[[nn.Module, ArrayRecord], ArrayRecord]


def whole(model: nn.Module, _received: ArrayRecord) -> ArrayRecord:
    return ArrayRecord(model.state_dict())


def app_of(case: Case, send: Send = whole) -> ClientApp:
    """Return a ClientApp that trains for a few steps; clients leave different integers behind."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        received = message.content.array_records["arrays"]
        model = case.build()
        model.load_state_dict(received.to_torch_state_dict())
        torch.manual_seed(partition)
        inputs = case.inputs()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(3):
            output = tensors_of(model(inputs))[0]
            optimizer.zero_grad()
            output.square().mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if "pointer" in dict(model.named_buffers()):
            model.get_buffer("pointer").fill_(partition)
        metrics = MetricRecord({"num-examples": 10 + partition})
        content = RecordDict({"arrays": send(model, received), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


def run(
    case: Case,
    strategy: type[OTFusion | NeuronTransplantation],
    send: Send = whole,
    rounds: int = 2,
) -> tuple[Any, nn.Module]:
    torch.manual_seed(0)
    model = case.build()
    chosen = strategy(model=model, example_inputs=case.inputs(), fraction_evaluate=0.0)
    grid = InProcessGrid(app_of(case, send), NODES)
    result = chosen.start(grid, ArrayRecord(model.state_dict()), num_rounds=rounds)
    model.load_state_dict(result.arrays.to_torch_state_dict())
    return result, model


@pytest.mark.parametrize("name", FEDERATIONS)
@pytest.mark.parametrize("strategy", [OTFusion, NeuronTransplantation])
@pytest.mark.filterwarnings("ignore")
def test_every_round_is_fused(name: str, strategy: type[OTFusion | NeuronTransplantation]) -> None:
    case = FEDERATIONS[name]
    result, model = run(case, strategy)
    rejected = {metrics["rejected"] for metrics in result.train_metrics_clientapp.values()}
    assert rejected == {0}
    inputs = case.inputs()
    outputs: list[Tensor] = tensors_of(model.eval()(inputs))
    assert all(bool(t.isfinite().all()) for t in outputs)
    if name == "queue of keys":
        # (10 * 0 + 11 * 1 + 12 * 2) / 33, rounded.
        assert model.get_buffer("pointer").tolist() == [1]


def simple() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


SIMPLE = Case("MLP", simple, lambda: torch.randn(8, 6), 0)


def as_list(model: nn.Module, _received: ArrayRecord) -> ArrayRecord:
    """What clients written for `NumPyClient` send."""
    return ArrayRecord([t.detach().numpy() for t in model.state_dict().values()])


def test_arrays_in_a_plain_list_are_the_state_dict_in_its_order() -> None:
    listed, named = run(SIMPLE, OTFusion, as_list)[1], run(SIMPLE, OTFusion)[1]
    for name, tensor in named.state_dict().items():
        assert torch.equal(tensor, listed.state_dict()[name])


def parameters_only(model: nn.Module, _received: ArrayRecord) -> ArrayRecord:
    return ArrayRecord([p.detach().numpy() for p in model.parameters()])


def with_prefix(prefix: str) -> Send:
    def send(model: nn.Module, _received: ArrayRecord) -> ArrayRecord:
        return ArrayRecord({f"{prefix}{name}": t for name, t in model.state_dict().items()})

    return send


@pytest.mark.parametrize(
    ("send", "remedy"),
    [
        (parameters_only, r"6 arrays came as a list, and the model has 9.*buffers included"),
        (with_prefix("module."), r"'module\.': send the state dict of model\.module"),
        (with_prefix("_orig_mod."), r"state dict of model\._orig_mod"),
        (with_prefix("_module."), r"state dict of model\._module"),
    ],
)
def test_a_run_of_which_nothing_was_fused_ends_with_an_error_and_the_remedy(
    send: Send, remedy: str, flower_log: pytest.LogCaptureFixture
) -> None:
    with flower_log.at_level(logging.ERROR, logger="flwr"):
        run(SIMPLE, OTFusion, send)
    errors = [r.getMessage() for r in flower_log.records if r.levelno == logging.ERROR]
    assert errors[-1].startswith("None of the rounds 1 to 2 was fused")
    assert re.search(remedy, errors[-1])


def test_a_run_that_fuses_ends_without_an_error(flower_log: pytest.LogCaptureFixture) -> None:
    run(SIMPLE, OTFusion)
    assert not [r for r in flower_log.records if r.levelno >= logging.ERROR]
