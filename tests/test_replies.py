"""Bad replies, one at a time and all at once: the round survives, the result is the good ones'."""

from __future__ import annotations

import copy
import math
import time
import tracemalloc
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.strategy import OTFusion
from flwr_fusion.strategy.array_checks import decode_array
from flwr_fusion.strategy.reasons import Reason, RejectedReply, Rejection, shown
from tests.support.faults import Explosive, error_for, forged_header, npy_bytes, pickled
from tests.support.grid import InProcessGrid, Mutation

NODES = 4
BAD = 2
EXAMPLES = [100, 250, 70, 180]
KEY = "0.weight"
SHAPE = (4, 3)
INPUTS = torch.zeros(2, 3)

ChangeContent = Callable[[RecordDict], None]
State = dict[str, Tensor]


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def trained(state: State, partition: int) -> State:
    """Return what the client of a partition makes of a model: a shift of its own."""
    generator = torch.Generator().manual_seed(partition)
    return {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in state.items()}


def client_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        state = trained(state_in(message.content["arrays"]), partition)
        metrics = MetricRecord({"num-examples": EXAMPLES[partition], "loss": float(partition)})
        return Message(RecordDict({"arrays": record(state), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        metrics = MetricRecord({"num-examples": EXAMPLES[partition], "accuracy": 0.5})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def record(state: State) -> ArrayRecord:
    return ArrayRecord({name: Array(value.numpy()) for name, value in state.items()})


def state_in(arrays: Any) -> State:
    return {name: torch.from_numpy(array.numpy()) for name, array in arrays.items()}


def expected(partitions: list[int], state: State | None = None) -> State:
    """Return the fusion of the good clients of these partitions."""
    start = network()
    if state is not None:
        start.load_state_dict(state)
    models = []
    for partition in partitions:
        models.append(network())
        models[-1].load_state_dict(trained(start.state_dict(), partition))
    weights = [EXAMPLES[partition] for partition in partitions]
    result = ff.ot_fusion(models, weights, example_inputs=INPUTS, target=start, reference=start)
    return result.model.state_dict()


def assert_same(arrays: ArrayRecord, state: State) -> None:
    assert arrays.keys() == state.keys()
    for name, value in state.items():
        received = arrays[name].numpy()
        assert np.isfinite(received).all()
        np.testing.assert_allclose(received, value.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)


def run(grid: InProcessGrid, rounds: int = 1) -> Result:
    strategy = OTFusion(model=network(), example_inputs=INPUTS, min_train_nodes=NODES)
    return strategy.start(grid, record(network().state_dict()), num_rounds=rounds)


def from_bad_client(change: ChangeContent) -> Mutation:
    def mutate(partition: int, reply: Message) -> list[Message]:
        if partition == BAD:
            change(reply.content)
        return [reply]

    return mutate


def lines_about(log: pytest.LogCaptureFixture, node_id: int) -> str:
    return "\n".join(line for line in log.messages if str(node_id) in line)


# --- Ways to spoil a reply ------------------------------------------------------------------------


def with_array(change: Callable[[np.ndarray], np.ndarray]) -> ChangeContent:
    def spoil(content: RecordDict) -> None:
        arrays = content.array_records["arrays"]
        arrays[KEY] = Array(np.asarray(change(arrays[KEY].numpy())))

    return spoil


def with_value(value: float, dtype: str = "float32") -> ChangeContent:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(dtype)
        array[1, 2] = value
        return array

    return with_array(change)


def with_bytes(change: Callable[[bytes], bytes]) -> ChangeContent:
    def spoil(content: RecordDict) -> None:
        arrays = content.array_records["arrays"]
        arrays[KEY] = raw_array(change(arrays[KEY].data))

    return spoil


def raw_array(data: bytes) -> Array:
    return Array(dtype="float32", shape=SHAPE, stype="numpy.ndarray", data=data)


def object_array(_: bytes) -> bytes:
    return pickled(SHAPE)


def without_key(content: RecordDict) -> None:
    del content.array_records["arrays"][KEY]


def with_extra_key(content: RecordDict) -> None:
    content.array_records["arrays"]["9.weight"] = Array(np.zeros(2, dtype=np.float32))


def with_weight(value: Any) -> ChangeContent:
    def spoil(content: RecordDict) -> None:
        # Past MetricRecord's own check, as a forged message would be.
        content.metric_records["metrics"].__dict__["_data"]["num-examples"] = value

    return spoil


def without_weight(content: RecordDict) -> None:
    del content.metric_records["metrics"]["num-examples"]


def without_record(name: str) -> ChangeContent:
    def spoil(content: RecordDict) -> None:
        del content[name]

    return spoil


def with_second_metrics(content: RecordDict) -> None:
    content["more-metrics"] = MetricRecord({"num-examples": 10})


def with_two_unnamed_arrays(content: RecordDict) -> None:
    arrays = content.array_records["arrays"]
    del content["arrays"]
    content["first"] = content["second"] = arrays


def empty(content: RecordDict) -> None:
    for name in list(content):
        del content[name]


BAD_REPLIES: dict[str, tuple[ChangeContent, str]] = {
    "nan": (with_value(math.nan), "non-finite"),
    "infinity": (with_value(math.inf), "non-finite"),
    "minus infinity": (with_value(-math.inf), "non-finite"),
    "infinite in the model's dtype": (with_value(1e300, "float64"), KEY),
    "missing key": (without_key, "missing"),
    "extra key": (with_extra_key, "9.weight"),
    "transposed": (with_array(np.transpose), "shape"),
    "one row": (with_array(lambda a: a[:1]), "shape"),
    "vector": (with_array(lambda a: a[0]), "shape"),
    "scalar": (with_array(lambda a: a[0, 0]), "shape"),
    "no values": (with_array(lambda a: a[:0]), "shape"),
    "text": (with_array(lambda a: a.astype(str)), "<U"),
    "object": (with_bytes(object_array), KEY),
    "garbage bytes": (with_bytes(lambda _: b"\x00\xffgarbage" * 9), "cannot be read"),
    "no bytes": (with_bytes(lambda _: b""), "cannot be read"),
    "truncated header": (with_bytes(lambda data: data[:20]), "cannot be read"),
    "truncated data": (with_bytes(lambda data: data[:-5]), "bytes"),
    "bytes too many": (with_bytes(lambda data: data + b"0000"), "bytes"),
    "header of 373 GiB": (with_bytes(lambda _: forged_header((100_000_000_000,))), "shape"),
    "header of 373 GiB of text": (with_bytes(lambda _: forged_header(SHAPE, "<U9999999")), KEY),
    "complex": (with_array(lambda a: a.astype(np.complex64)), "complex"),
    "integers": (with_array(lambda a: a.astype(np.int64)), "int64"),
    "booleans": (with_array(lambda a: a > 0), "bool"),
    "dates": (with_array(lambda a: a.astype("int64").astype("datetime64[s]")), "datetime64"),
    "weight 0": (with_weight(0), "num-examples"),
    "negative weight": (with_weight(-5), "num-examples"),
    "nan weight": (with_weight(math.nan), "num-examples"),
    "infinite weight": (with_weight(math.inf), "num-examples"),
    "bool weight": (with_weight(True), "num-examples"),
    "text weight": (with_weight("100"), "num-examples"),
    "list weight": (with_weight([100]), "num-examples"),
    "no weight value": (with_weight(None), "num-examples"),
    "weight beyond any float": (with_weight(10**400), "num-examples"),
    "missing weight": (without_weight, "num-examples"),
    "no metric record": (without_record("metrics"), "MetricRecord"),
    "two metric records": (with_second_metrics, "MetricRecord"),
    "no array record": (without_record("arrays"), "ArrayRecord"),
    "two array records": (with_two_unnamed_arrays, "ArrayRecord"),
    "empty": (empty, "Record"),
}


# --- One bad reply among four ---------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_bad_reply_is_left_out(name: str, flower_log: pytest.LogCaptureFixture) -> None:
    spoil, reason = BAD_REPLIES[name]
    grid = InProcessGrid(client_app(), NODES, mutate=from_bad_client(spoil))
    started = time.perf_counter()
    result = run(grid)
    assert time.perf_counter() - started < 20
    assert_same(result.arrays, expected([0, 1, 3]))
    assert result.train_metrics_clientapp[1]["rejected"] == 1
    assert reason in lines_about(flower_log, grid.node_ids[BAD])
    for good in (0, 1, 3):
        assert not lines_about(flower_log, grid.node_ids[good])
    assert not Explosive.exploded


def test_metrics_are_those_of_the_good_clients() -> None:
    grid = InProcessGrid(client_app(), NODES, mutate=from_bad_client(with_value(math.nan)))
    metrics = run(grid).train_metrics_clientapp[1]
    weights, losses = [100, 250, 180], [0, 1, 3]
    assert metrics["loss"] == pytest.approx(np.average(losses, weights=weights))
    assert "num-examples" not in metrics


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.astype(np.float64),
        np.asfortranarray,
        lambda a: a.astype(">f4"),
        lambda a: a.astype(np.longdouble),
    ],
    ids=["double", "fortran order", "big-endian", "long double"],
)
def test_same_values_in_another_format_are_accepted_or_rejected(
    change: Callable[[np.ndarray], np.ndarray],
) -> None:
    grid = InProcessGrid(client_app(), NODES, mutate=from_bad_client(with_array(change)))
    result = run(grid)
    rejected = result.train_metrics_clientapp[1]["rejected"]
    assert rejected in (0, 1)
    assert_same(result.arrays, expected([0, 1, 3] if rejected else [0, 1, 2, 3]))


def test_huge_finite_values_do_not_end_the_run() -> None:
    """Finite in single precision, but not their square: nothing may become non-finite."""
    spoil = with_array(lambda a: np.full_like(a, 3e38))
    result = run(InProcessGrid(client_app(), NODES, mutate=from_bad_client(spoil)), rounds=2)
    for array in result.arrays.values():
        assert np.isfinite(array.numpy()).all()


def test_weights_whose_sum_is_infinite_do_not_end_the_run() -> None:
    def mutate(partition: int, reply: Message) -> list[Message]:
        if partition in (1, BAD):
            with_weight(1.7e308)(reply.content)
        return [reply]

    result = run(InProcessGrid(client_app(), NODES, mutate=mutate))
    assert result.train_metrics_clientapp[1]["rejected"] in (0, 1, 2)
    for array in result.arrays.values():
        assert np.isfinite(array.numpy()).all()


def test_additional_records_are_ignored() -> None:
    def add(content: RecordDict) -> None:
        content["statistics"] = ArrayRecord({"moment": Array(np.eye(3))})
        content["architecture"] = ConfigRecord({"name": "deep"})

    result = run(InProcessGrid(client_app(), NODES, mutate=from_bad_client(add)))
    assert result.train_metrics_clientapp[1]["rejected"] == 0
    assert_same(result.arrays, expected([0, 1, 2, 3]))


def test_array_record_of_another_name_is_accepted_as_by_fedavg() -> None:
    def rename(content: RecordDict) -> None:
        content["weights"] = content.array_records["arrays"]
        del content["arrays"]

    result = run(InProcessGrid(client_app(), NODES, mutate=from_bad_client(rename)))
    assert result.train_metrics_clientapp[1]["rejected"] == 0
    assert_same(result.arrays, expected([0, 1, 2, 3]))


@pytest.mark.parametrize("loss", [[1.0, 2.0], [], 10**400], ids=["list", "no values", "huge"])
def test_metrics_that_do_not_fit_together_do_not_end_the_run(loss: Any) -> None:
    def spoil(content: RecordDict) -> None:
        content.metric_records["metrics"].__dict__["_data"]["loss"] = loss

    result = run(InProcessGrid(client_app(), NODES, mutate=from_bad_client(spoil)))
    assert_same(result.arrays, expected([0, 1, 2, 3]))


@pytest.mark.parametrize(
    "loss", [math.nan, math.inf, -math.inf, 1e308, [1e308], 10**5000], ids=lambda v: str(type(v))
)
def test_one_clients_metric_does_not_become_the_rounds(loss: Any) -> None:
    def mutate(partition: int, reply: Message) -> list[Message]:
        values = reply.content.metric_records["metrics"].__dict__["_data"]
        values["loss"] = [1.0] if isinstance(loss, list) else 1.0
        if partition == BAD:
            values["loss"] = loss
        return [reply]

    result = run(InProcessGrid(client_app(), NODES, mutate=mutate))
    metrics = result.train_metrics_clientapp[1]
    assert_same(result.arrays, expected([0, 1, 2, 3]))
    assert metrics["loss"] == ([1.0] if isinstance(loss, list) else 1.0)
    assert (metrics["rejected"], metrics["rejected-metrics"]) == (0, 1)


@pytest.mark.parametrize("text", ["a\nERROR : all is lost", "\x1b[2J\r", "\ud800", "\u202e"])
def test_texts_of_clients_cannot_forge_the_log(
    text: str, flower_log: pytest.LogCaptureFixture
) -> None:
    def failing(partition: int, reply: Message) -> list[Message]:
        return [error_for(reply, 2, text)] if partition == BAD else [reply]

    def named(content: RecordDict) -> None:
        content.array_records["arrays"][text] = Array(np.zeros(2))
        content.metric_records["metrics"].__dict__["_data"][text] = text

    for mutate in (failing, from_bad_client(named)):
        flower_log.clear()
        result = run(InProcessGrid(client_app(), NODES, mutate=mutate))
        assert result.train_metrics_clientapp[1]["rejected"] == 1
        rejected = [r.getMessage() for r in flower_log.records if "rejected node" in r.message]
        assert rejected
        assert all(line.isprintable() for line in rejected)


@pytest.mark.parametrize("content", [None, MetricRecord({"num-examples": 5}), "text"])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_content_that_is_none_is_left_out(content: Any, kind: str) -> None:
    def mutate(partition: int, reply: Message) -> list[Message]:
        if partition == BAD:
            reply.__dict__["_content"] = content
        return [reply]

    grid = InProcessGrid(client_app(), NODES, mutate=mutate, mutated=kind)
    result = OTFusion(network(), INPUTS, min_train_nodes=NODES).start(
        grid, record(network().state_dict()), 1
    )
    left_out = [BAD] if kind == "train" else []
    assert_same(result.arrays, expected([k for k in range(NODES) if k not in left_out]))


def test_long_texts_are_cut_before_they_are_escaped() -> None:
    begin = time.perf_counter()
    assert len(Rejection(1, Reason.ERROR, "\n" * 10**8).text) == 500
    crash = Rejection(1, Reason.ERROR, "ClientApp: " + "in train()\n" * 999 + "ValueError: cause")
    assert crash.text.startswith("ClientApp: in train()")
    assert crash.text.endswith("ValueError: cause")
    assert len(shown("x" * 10**8)) == 100
    assert time.perf_counter() - begin < 2


# --- Replies that come twice, as errors, or not at all --------------------------------------------


def test_duplicated_reply_counts_once(flower_log: pytest.LogCaptureFixture) -> None:
    def twice(partition: int, reply: Message) -> list[Message]:
        return [reply] * (2 if partition == BAD else 1)

    grid = InProcessGrid(client_app(), NODES, mutate=twice)
    result = run(grid)
    rejected = result.train_metrics_clientapp[1]["rejected"]
    assert rejected in (1, 2)  # The second of two equal replies, or both.
    assert_same(result.arrays, expected([0, 1, 2, 3] if rejected == 1 else [0, 1, 3]))
    assert "second reply" in lines_about(flower_log, grid.node_ids[BAD])


@pytest.mark.parametrize("spoil", [with_value(3.0), with_value(math.nan)], ids=["other", "nan"])
def test_order_of_two_different_replies_of_one_node_does_not_matter(spoil: ChangeContent) -> None:
    replies: list[Message] = []

    def collect(partition: int, reply: Message) -> list[Message]:
        replies.append(reply)
        return [reply]

    run(InProcessGrid(client_app(), NODES, mutate=collect))
    other = copy.deepcopy(replies[0])
    spoil(other.content)
    strategy = OTFusion(model=network(), example_inputs=INPUTS)
    one, _ = strategy.aggregate_train(1, [*replies, other])
    two, _ = strategy.aggregate_train(1, [other, *replies])
    assert one is not None
    assert two is not None
    assert_same(one, state_in(two))


def test_failing_client_is_left_out(flower_log: pytest.LogCaptureFixture) -> None:
    grid = InProcessGrid(client_app(), NODES, failing=[BAD])
    assert_same(run(grid).arrays, expected([0, 1, 3]))
    assert "the client failed on purpose" in lines_about(flower_log, grid.node_ids[BAD])


def test_error_replies_are_counted_as_rejected() -> None:
    result = run(InProcessGrid(client_app(), NODES, failing=[BAD]))
    assert result.train_metrics_clientapp[1]["rejected"] == 1


def test_error_replies_of_the_superlink_are_left_out() -> None:
    """A SuperNode that dies is reported by the SuperLink, under its own id, once per message."""

    def dead(partition: int, reply: Message) -> list[Message]:
        if partition not in (1, BAD):
            return [reply]
        reply.metadata.__dict__["_src_node_id"] = 1
        error = Message(Error(5, "node unavailable"), reply_to=reply)
        error.metadata.__dict__["_src_node_id"] = 1
        return [error]

    assert_same(run(InProcessGrid(client_app(), NODES, mutate=dead)).arrays, expected([0, 3]))


def test_lost_reply_is_left_out() -> None:
    result = run(InProcessGrid(client_app(), NODES, lost=[BAD]))
    assert_same(result.arrays, expected([0, 1, 3]))
    assert result.train_metrics_clientapp[1]["rejected"] == 1
    assert result.train_metrics_clientapp[1]["rejected-no-reply"] == 1


def test_lost_reply_is_logged_with_its_node(flower_log: pytest.LogCaptureFixture) -> None:
    grid = InProcessGrid(client_app(), NODES, lost=[BAD])
    run(grid)
    assert lines_about(flower_log, grid.node_ids[BAD])


# --- Nothing good ---------------------------------------------------------------------------------


def test_round_without_good_replies_keeps_the_last_model() -> None:
    rounds = dict.fromkeys(range(NODES), 0)

    def all_bad_in_round_two(partition: int, reply: Message) -> list[Message]:
        rounds[partition] += 1
        if rounds[partition] == 2:
            with_value(math.nan)(reply.content)
        return [reply]

    grid = InProcessGrid(client_app(), NODES, mutate=all_bad_in_round_two)
    result = run(grid, rounds=3)
    after_one = expected([0, 1, 2, 3])
    assert result.train_metrics_clientapp[2]["rejected"] == NODES
    assert_same(result.arrays, expected([0, 1, 2, 3], after_one))


@pytest.mark.parametrize("kind", ["bad", "errors", "lost"])
def test_all_bad_gives_no_arrays(kind: str) -> None:
    everyone = range(NODES) if kind != "bad" else ()
    spoil: Mutation | None = None
    if kind == "bad":

        def spoil(partition: int, reply: Message) -> list[Message]:
            with_weight(0)(reply.content)
            return [reply]

    failing, lost = (everyone, ()) if kind == "errors" else ((), everyone)
    grid = InProcessGrid(client_app(), NODES, failing=failing, lost=lost, mutate=spoil)
    strategy = OTFusion(model=network(), example_inputs=INPUTS)
    start = record(network().state_dict())
    messages = strategy.configure_train(1, start, ConfigRecord(), grid)
    arrays, _ = strategy.aggregate_train(1, grid.send_and_receive(messages))
    assert arrays is None


# --- Evaluation -----------------------------------------------------------------------------------


def evaluated(contents: list[RecordDict]) -> MetricRecord | None:
    app = client_app()
    grid = InProcessGrid(app, len(contents))
    strategy = OTFusion(model=network(), example_inputs=INPUTS, min_evaluate_nodes=len(contents))
    messages = strategy.configure_evaluate(1, ArrayRecord(), ConfigRecord(), grid)
    replies = grid.send_and_receive(messages)
    for reply, content in zip(replies, contents, strict=True):
        reply.content = content
    return strategy.aggregate_evaluate(1, replies)


def metrics(**values: Any) -> RecordDict:
    content = RecordDict({"metrics": MetricRecord({"num-examples": 10})})
    named = {name.replace("_", "-"): value for name, value in values.items()}
    content.metric_records["metrics"].__dict__["_data"].update(named)
    return content


@pytest.mark.parametrize(
    "bad",
    [
        metrics(num_examples=0, accuracy=1.0),
        metrics(num_examples=math.nan, accuracy=1.0),
        metrics(num_examples="many", accuracy=1.0),
        metrics(num_examples=10**5000, accuracy=1.0),
        metrics(accuracy=math.nan),
        metrics(accuracy=1e300),
        RecordDict({"metrics": MetricRecord({"accuracy": 1.0})}),
        RecordDict(),
        RecordDict({"a": MetricRecord({"num-examples": 1}), "b": MetricRecord()}),
    ],
    ids=[
        "weight 0",
        "weight nan",
        "weight text",
        "weight of 5,000 digits",
        "accuracy nan",
        "accuracy huge",
        "no weight",
        "empty",
        "two records",
    ],
)
def test_bad_evaluation_reply_is_left_out(bad: RecordDict) -> None:
    result = evaluated([metrics(accuracy=0.5), bad, metrics(accuracy=0.7)])
    assert result is not None
    assert result["accuracy"] == pytest.approx(0.6)


@pytest.mark.parametrize(
    "accuracy", [[0.5, 0.7], [], "high", None], ids=["list", "no values", "text", "none"]
)
@pytest.mark.parametrize("first", [True, False])
def test_evaluation_metrics_that_do_not_fit_together_do_not_end_the_run(
    accuracy: Any, first: bool
) -> None:
    good = [metrics(accuracy=0.5), metrics(accuracy=0.7)]
    bad = metrics(accuracy=accuracy)
    evaluated([bad, *good] if first else [*good, bad])


def test_no_good_evaluation_reply_gives_no_metrics_but_the_rejections() -> None:
    assert evaluated([RecordDict(), RecordDict()]) == {"rejected": 2, "rejected-records": 2}
    strategy = OTFusion(model=network(), example_inputs=INPUTS)
    assert strategy.aggregate_evaluate(1, []) is None


# --- The decoder ----------------------------------------------------------------------------------


def decoded(data: bytes, shape: tuple[int, ...] = SHAPE) -> np.ndarray | None:
    """Decode; None where it is rejected. Anything else than a rejection is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return decode_array(KEY, raw_array(data), shape)
        except RejectedReply:
            return None


def assert_rejected_or_right(data: bytes, shape: tuple[int, ...] = SHAPE) -> None:
    array = decoded(data, shape)
    if array is not None:
        assert array.shape == shape
        assert array.dtype.kind in "fiub"
        assert array.nbytes <= len(data)


DTYPES = st.sampled_from(["<f4", "<f8", ">f4", "<f2", "<i8", "|u1", "|b1"])
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(SHAPES, DTYPES, st.booleans(), st.integers(0, 2**32 - 1))
def test_decoder_reads_what_numpy_writes(
    shape: tuple[int, ...], dtype: str, fortran: bool, seed: int
) -> None:
    array = np.random.default_rng(seed).integers(0, 2, shape).astype(dtype)
    array = np.asfortranarray(array) if fortran and array.ndim else array
    result = decoded(npy_bytes(array), shape)
    assert result is not None
    assert result.dtype == array.dtype
    np.testing.assert_array_equal(result, array)


@given(st.binary(max_size=300))
def test_decoder_refuses_arbitrary_bytes(data: bytes) -> None:
    assert_rejected_or_right(data)


@given(st.binary(max_size=300), st.sampled_from([(1, 0), (2, 0), (3, 0), (9, 9)]))
def test_decoder_refuses_arbitrary_headers(header: bytes, version: tuple[int, int]) -> None:
    length = len(header).to_bytes(2 if version == (1, 0) else 4, "little")
    assert_rejected_or_right(b"\x93NUMPY" + bytes(version) + length + header + bytes(48))


HEADER_TEXT = st.text("{}()[],:'\"0123456789 <>|fiuUOVTrueFalsdecrptono_hL-\\\n", max_size=200)


@given(HEADER_TEXT, st.booleans())
def test_decoder_refuses_header_like_text(text: str, as_value: bool) -> None:
    if as_value:
        text = f"{{'descr': {text}, 'fortran_order': False, 'shape': (4, 3), }}"
    header = text.encode()
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(48)
    assert_rejected_or_right(data)


@given(st.data(), DTYPES)
def test_decoder_survives_mutated_arrays(draw: st.DataObject, dtype: str) -> None:
    data = bytearray(npy_bytes(np.arange(12).reshape(SHAPE).astype(dtype)))
    for _ in range(draw.draw(st.integers(1, 6))):
        position = draw.draw(st.integers(0, len(data) - 1))
        data[position] = draw.draw(st.integers(0, 255))
    cut = draw.draw(st.integers(0, len(data)))
    assert_rejected_or_right(bytes(data))
    assert_rejected_or_right(bytes(data[:cut]))


@given(
    st.lists(st.integers(-(2**70), 2**70), max_size=4).map(tuple),
    st.sampled_from(
        ["<f4", "<f8", "<U99999999", "|S99999999", "|V99999999", "|O", "<c16", "<M8[s]"]
    ),
)
def test_decoder_survives_forged_headers(shape: tuple[int, ...], descr: str) -> None:
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(48)
    assert_rejected_or_right(data)


@pytest.mark.parametrize(
    "data",
    [
        forged_header((100_000_000_000,)),
        forged_header((100_000, 1_000_000)),
        forged_header(SHAPE, "<U9999999"),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(48),
    ],
    ids=["vector of 373 GiB", "matrix of 373 GiB", "huge text", "header of 4 GiB"],
)
def test_decoder_allocates_nothing_that_was_not_received(data: bytes) -> None:
    tracemalloc.start()
    started = time.perf_counter()
    try:
        assert decoded(data) is None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started < 5
    assert peak < 2**20


def test_decoder_unpickles_nothing() -> None:
    assert decoded(object_array(b"")) is None
    assert not Explosive.exploded


def test_decoder_does_not_copy() -> None:
    array = np.zeros((1000, 1000), dtype=np.float32)
    data = npy_bytes(array)
    tracemalloc.start()
    try:
        result = decode_array(KEY, raw_array(data), array.shape)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.shape == array.shape
    assert peak < array.nbytes / 4
