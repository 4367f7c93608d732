"""Statistics on the way from a ClientApp to the strategy."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load, save
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import flwr_fusion as ff
from flwr_fusion.client import (
    CLASS_MOMENTS_RECORD,
    SAFETENSORS_KEY,
    STATISTICS_RECORD,
    attach_class_moments,
    attach_statistics,
)
from flwr_fusion.statistics import unpack
from flwr_fusion.strategy import FusionStrategy, NeuronTransplantation, OTFusion
from tests.test_strategy import (
    DIGIT,
    NODES,
    digits_network,
    largest_difference,
    number,
    part,
    record,
    run_digits,
    train_model,
)
from tests.test_strategy import (
    load as load_arrays,
)

Spoil = Callable[[RecordDict], None]


def test_clients_import_no_solver() -> None:
    # A real client is a new process in every round; they would double what is added to torch.
    code = "import sys, flwr_fusion.client; print({'ot', 'scipy.optimize'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "set()"


def app_with_statistics(spoil: Spoil | None = None, without: tuple[int, ...] = ()) -> ClientApp:
    """Return an app whose replies carry statistics, except those of some clients."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        model = load_arrays(digits_network(0), message.content["arrays"])
        images, labels = part(partition)
        train_model(model, images, labels, epochs=2)
        metrics = MetricRecord({"num-examples": len(labels)})
        content = RecordDict({"arrays": record(model), "metrics": metrics})
        reply = Message(content, reply_to=message)
        if partition in without:
            return reply
        attach_statistics(reply, model, DataLoader(TensorDataset(images, labels), batch_size=50))
        if spoil is not None and partition == 0:
            spoil(reply.content)
        return reply

    return app


def strategy(**options: Any) -> OTFusion:
    return OTFusion(model=digits_network(), example_inputs=DIGIT, fraction_evaluate=0.0, **options)


def test_fedavg_accepts_replies_with_statistics() -> None:
    plain, _ = run_digits(FedAvg(fraction_evaluate=0.0), app_with_statistics(without=(0, 1, 2, 3)))
    result, _ = run_digits(FedAvg(fraction_evaluate=0.0), app_with_statistics())
    # The order of the replies is not that of the sums.
    assert largest_difference(result.arrays, plain.arrays) < 1e-6


def test_mean_ignores_statistics() -> None:
    plain, _ = run_digits(FedAvg(fraction_evaluate=0.0), app_with_statistics())
    result, _ = run_digits(strategy(combine="mean"), app_with_statistics())
    assert largest_difference(result.arrays, plain.arrays) < 1e-6


def test_least_squares_uses_them() -> None:
    fusion = strategy(combine="least-squares")
    result, models = run_digits(fusion, app_with_statistics(), rounds=2)
    assert set(fusion.reports[1].details.values()) == {"full"}
    assert number(result.train_metrics_clientapp[1], "with-statistics") == NODES
    _, means = run_digits(strategy(combine="mean"), app_with_statistics(), rounds=2)
    assert largest_difference(models[1], means[1]) > 1e-3


def test_schedule_ends_an_option() -> None:
    fusion = strategy(combine="mean", only_first_rounds={"combine": 1})
    run_digits(fusion, app_with_statistics(), rounds=2)
    assert not fusion.reports[1].details
    assert fusion.reports[2].details
    iterative = ff.Transplantation(scheme="iterative")
    transplantation = NeuronTransplantation(
        model=digits_network(),
        example_inputs=DIGIT,
        transplant_rounds=(1, 2),
        transplantation=iterative,
        only_first_rounds={"transplantation": 1},
    )
    assert transplantation.method_of_round(1).options["transplantation"] is iterative
    assert "transplantation" not in transplantation.method_of_round(2).options


@pytest.mark.parametrize(
    ("schedule", "message"),
    [({"combin": 1}, "'combin'"), ({"combine": -1}, "must be"), ({"combine": True}, "must be")],
)
def test_bad_schedules_are_refused(schedule: dict[str, int], message: str) -> None:
    with pytest.raises(ff.FusionError, match=message):
        strategy(combine="least-squares", only_first_rounds=schedule)


def _bytes(data: bytes | str) -> Spoil:
    def spoil(content: RecordDict) -> None:
        content[STATISTICS_RECORD] = ConfigRecord({SAFETENSORS_KEY: data})

    return spoil


def _scaled(factor: float) -> Spoil:
    def spoil(content: RecordDict) -> None:
        data = content.config_records[STATISTICS_RECORD][SAFETENSORS_KEY]
        assert isinstance(data, bytes)
        changed = {name: tensor * factor for name, tensor in load(data).items()}
        content[STATISTICS_RECORD] = ConfigRecord({SAFETENSORS_KEY: save(changed)})

    return spoil


def _empty(content: RecordDict) -> None:
    content[STATISTICS_RECORD] = ConfigRecord({})


@pytest.mark.parametrize(
    "spoil",
    [_bytes(b"\xff" * 100), _bytes(b""), _bytes("text"), _empty, _scaled(-1.0), _scaled(1e30)],
    ids=["garbage", "nothing", "text", "no key", "negative", "huge"],
)
def test_bad_statistics_are_dropped_and_the_update_is_kept(
    spoil: Spoil, caplog: pytest.LogCaptureFixture
) -> None:
    flwr_log = logging.getLogger("flwr")
    flwr_log.propagate = True
    fusion = strategy(combine="least-squares")
    with caplog.at_level(logging.WARNING, logger="flwr"):
        result, _ = run_digits(fusion, app_with_statistics(spoil), rounds=1)
    metrics = result.train_metrics_clientapp[1]
    assert number(metrics, "with-statistics") == NODES - 1
    assert number(metrics, "rejected") == 0
    assert set(fusion.reports[1].details.values()) == {"full"}
    assert "its statistics" in caplog.text


def test_without_statistics_least_squares_is_fedavg_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger("flwr").propagate = True
    everyone = tuple(range(NODES))
    with caplog.at_level(logging.WARNING, logger="flwr"):
        result, _ = run_digits(
            strategy(combine="least-squares"), app_with_statistics(without=everyone), rounds=1
        )
    plain, _ = run_digits(FedAvg(fraction_evaluate=0.0), app_with_statistics(), rounds=1)
    assert largest_difference(result.arrays, plain.arrays) < 1e-6
    assert "4 of 4 replies have no usable statistics" in caplog.text


def test_own_method_may_take_statistics() -> None:
    seen = []

    def method(models: Any, weights: Any, *, statistics: Any) -> ff.FusionResult:
        seen.append([own is not None for own in statistics])
        return ff.average(models, weights)

    fusion = FusionStrategy(method, digits_network(), DIGIT, fraction_evaluate=0.0)
    run_digits(fusion, app_with_statistics(without=(2,)), rounds=1)
    assert sorted(seen[-1]) == [False, True, True, True]


# --- Batches of any kind --------------------------------------------------------------------------


def reply_to_nothing() -> Message:
    return Message(RecordDict(), dst_node_id=1, message_type="train")


class Stream(IterableDataset[torch.Tensor]):
    """A data set without a length."""

    def __iter__(self) -> Any:
        return iter(torch.randn(40, 64))


@pytest.mark.parametrize(
    ("loader", "inputs"),
    [
        (DataLoader(TensorDataset(torch.randn(40, 64), torch.zeros(40)), batch_size=8), None),
        (DataLoader(Stream(), batch_size=8), None),
        ([torch.randn(8, 64)], None),
        ([{"img": torch.randn(8, 64), "label": torch.zeros(8)}], lambda batch: batch["img"]),
    ],
    ids=["pairs", "stream", "tensors", "dicts"],
)
def test_batches_of_any_kind(loader: Any, inputs: Any) -> None:
    reply = attach_statistics(reply_to_nothing(), digits_network(), loader, inputs=inputs)
    data = reply.content.config_records[STATISTICS_RECORD][SAFETENSORS_KEY]
    assert isinstance(data, bytes)
    statistics = unpack(load(data), digits_network())
    assert statistics["0"].detail == "full"


def test_a_mapping_needs_to_be_told_apart() -> None:
    with pytest.raises(ff.FusionError, match="say by inputs="):
        attach_statistics(reply_to_nothing(), digits_network(), [{"img": torch.randn(8, 64)}])


def test_less_can_be_sent() -> None:
    loader = [torch.randn(30, 64)]
    sizes = [
        len(attach_statistics(reply_to_nothing(), digits_network(), loader, **options)  # type: ignore[arg-type]
            .content.config_records[STATISTICS_RECORD][SAFETENSORS_KEY])
        for options in ({}, {"detail": "diagonal"})
    ]  # fmt: skip
    assert sizes[1] < sizes[0] / 5


def test_moments_of_too_few_samples_are_not_sent(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("flwr").propagate = True
    one = [torch.randn(1, 64)]
    with caplog.at_level(logging.WARNING, logger="flwr"):
        assert (
            STATISTICS_RECORD
            not in attach_statistics(reply_to_nothing(), digits_network(), one).content
        )
        reply = attach_statistics(reply_to_nothing(), digits_network(), one * 9, least_samples=10)
        assert STATISTICS_RECORD not in reply.content
        labelled = [(torch.randn(5, 64), torch.arange(5))]
        reply = attach_class_moments(reply_to_nothing(), digits_network(), labelled, least_count=2)
        assert CLASS_MOMENTS_RECORD not in reply.content
    assert "9 samples, least_samples=10" in caplog.text
    assert "no class has 2 samples" in caplog.text
    enough = attach_statistics(reply_to_nothing(), digits_network(), one * 9, least_samples=9)
    assert STATISTICS_RECORD in enough.content
