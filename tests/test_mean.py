"""The running mean against the mean written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.maps import Correspondence, Unaligned, map_tensor
from flwr_fusion.rules.mean import RunningMean
from tests.support.architectures import named, output, randomised, relative_error
from tests.test_maps import correspondence_of, random_maps, random_selection

weights_of_three = st.lists(st.floats(0.01, 100), min_size=3, max_size=3)


def states(dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "weight": torch.randn(4, 3, generator=generator).to(dtype),
            "bias": torch.randn(4, generator=generator).to(dtype),
            "counter": torch.tensor(k * 3),
        }
        for k in range(3)
    ]


def client_of(weight: float, correspondence: Correspondence | None = None) -> ff.Client:
    """Return a client whose state is given where it is added."""
    channels = Unaligned() if correspondence is None else correspondence
    return ff.Client(0, nn.Identity, weight, torch.device("cpu"), channels)


def mean_of(clients: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    mean = RunningMean(clients[0])
    for client, weight in zip(clients, weights, strict=True):
        mean.add(client_of(weight), {}, state=client)
    return mean.mean(uncovered=clients[0])


@given(weights_of_three)
def test_mean_is_the_weighted_mean(weights: list[float]) -> None:
    clients = states()
    fused = mean_of(clients, weights)
    for name in ("weight", "bias"):
        stacked = torch.stack([c[name].double() for c in clients])
        share = torch.tensor(weights).double() / sum(weights)
        expected = torch.tensordot(share, stacked, dims=1)
        torch.testing.assert_close(fused[name].double(), expected, rtol=1e-5, atol=1e-6)


@given(weights_of_three, st.integers(0, 2))
def test_negative_sign_takes_a_client_out(weights: list[float], out: int) -> None:
    clients = states(torch.float64)
    mean = RunningMean(clients[0])
    for client, weight in zip(clients, weights, strict=True):
        mean.add(client_of(weight), {}, state=client)
    mean.add(client_of(weights[out]), {}, sign=-1, state=clients[out])
    rest = [k for k in range(3) if k != out]
    expected = mean_of([clients[k] for k in rest], [weights[k] for k in rest])
    fused = mean.mean(uncovered=clients[0])
    for name in ("weight", "bias"):
        torch.testing.assert_close(fused[name], expected[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    clients = states(dtype)
    fused = mean_of(clients, [1.0, 1.0, 1.0])
    assert fused["weight"].dtype == dtype
    assert fused["counter"].dtype == torch.int64
    assert int(fused["counter"]) == 3


def test_half_precision_is_summed_in_single() -> None:
    # 1000 small steps next to a large value vanish in bfloat16.
    one = {"w": torch.ones(1, dtype=torch.bfloat16)}
    mean = RunningMean(one)
    for _ in range(1000):
        mean.add(client_of(0.001), {}, state=one)
    assert float(mean.mean(uncovered=one)["w"]) == 1.0


def test_clients_are_not_modified_and_not_aliased() -> None:
    clients = states()
    before = [{n: t.clone() for n, t in c.items()} for c in clients]
    fused = mean_of(clients[:1], [1.0])
    fused["weight"].zero_()
    mean_of(clients, [1.0, 2.0, 3.0])
    for client, state in zip(clients, before, strict=True):
        assert all(torch.equal(client[n], t) for n, t in state.items())


@pytest.mark.parametrize(
    ("tables", "weights", "kept"),
    [
        ([[0, 1, 2], [0, 1, 3]], [2.0, 1.0], 0),
        ([[0, 1, 2], [0, 1, 3], [0, 1, 3]], [2.0, 1.5, 1.5], 1),
        ([[True, True], [True, False]], [1.0, 1.0], 0),
    ],
)
def test_of_tables_that_differ_that_of_most_of_the_weight_is_kept(
    tables: list[list[int]], weights: list[float], kept: int
) -> None:
    clients = [{"index": torch.tensor(table)} for table in tables]
    with pytest.warns(UserWarning, match="'index'.*differ between the clients"):
        fused = mean_of(clients, weights)
    assert torch.equal(fused["index"], clients[kept]["index"])


def test_a_flag_in_a_vector_of_one_is_a_counter() -> None:
    clients = [{"n": torch.tensor([k])} for k in (1, 4)]
    assert mean_of(clients, [1.0, 1.0])["n"].tolist() == [2]


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, 0.1], [1e-3, 1e3]])
def test_integer_tables_that_agree_are_kept(weights: list[float]) -> None:
    table = torch.tensor([5, 2**40 + 1, -7])
    fused = mean_of([{"index": table.clone()} for _ in weights], weights)
    assert torch.equal(fused["index"], table)
    assert fused["index"].dtype == table.dtype


def test_channels_without_a_client_take_the_given_values() -> None:
    pair = correspondence_of("mlp", 2, 1)
    maps = pair.identity()
    wide = {name: torch.full(shape, 7.0) for name, shape in pair.fused.shapes.items()}
    client = {name: torch.randn(shape) for name, shape in pair.client.shapes.items()}
    mean = RunningMean(wide)
    mean.add(client_of(2.0, pair), maps, state=client)
    fused = mean.mean(uncovered=wide)
    assert torch.equal(fused["0.weight"][:20], client["0.weight"])
    assert (fused["0.weight"][20:] == 7).all()
    assert torch.equal(fused["2.weight"][:16, :20], client["2.weight"])
    assert (fused["2.weight"][:16, 20:] == 0).all()


@given(st.integers(0, 10_000), st.floats(0.1, 10))
def test_channels_are_the_mean_over_those_who_have_them(seed: int, weight: float) -> None:
    pair = correspondence_of("lenet-flatten", 2, 1)
    same = correspondence_of("lenet-flatten", 2, 2)
    maps = random_maps(pair, random_selection, seed)
    narrow = {name: torch.randn(shape).double() for name, shape in pair.client.shapes.items()}
    wide = {name: torch.randn(shape).double() for name, shape in pair.fused.shapes.items()}
    mean = RunningMean(wide)
    mean.add(client_of(weight, pair), maps, state=narrow)
    mean.add(client_of(1.0, same), same.identity(), state=wide)
    fused = mean.mean(uncovered=wide)
    for name in ("conv1.weight", "fc1.weight", "fc2.bias"):
        mapped = map_tensor(narrow[name], name, pair, maps)
        group = name.split(".")[0]
        has = maps[group].coverage().bool()
        both = (weight * mapped + wide[name]) / (weight + 1)
        torch.testing.assert_close(fused[name][has], both[has], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fused[name][~has], wide[name][~has], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "lenet", "small-vgg", "concat-and-sum"])
def test_large_tensors_are_mapped_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of any size give the same sums, for permutations, selections and transport plans."""
    architecture = named(name)
    assert architecture.wider is not None
    models = [architecture.model(seed) for seed in (0, 1)]
    models.append(randomised(architecture.wider(), 2))
    inputs = architecture.inputs(2)

    def fused() -> list[torch.Tensor]:
        targets = (models[0], models[2])
        results = [
            ff.ot_fusion(models, (1, 2, 3), example_inputs=inputs, target=target).model
            for target in targets
        ]
        results.append(ff.neuron_transplantation(models, example_inputs=inputs).model)
        results.append(ff.average(models[:2]).model)
        return [output(model.eval(), inputs) for model in results]

    whole = fused()
    for size in (1, 50, 700):
        monkeypatch.setattr("flwr_fusion.maps._BLOCK", size)
        for ours, expected in zip(fused(), whole, strict=True):
            assert relative_error(ours, expected) < 1e-6


def test_a_fused_network_shares_no_memory_with_the_clients() -> None:
    models = [named("small-vgg").model(seed) for seed in (0, 0)]
    inputs = named("small-vgg").inputs(2)
    theirs = {t.data_ptr() for model in models for t in model.state_dict().values()}
    for model in (
        ff.average(models).model,
        ff.average(models[:1]).model,
        ff.ot_fusion(models, (1, 0), example_inputs=inputs).model,
        ff.neuron_transplantation(models, example_inputs=inputs).model,
        ff.cla_fusion(models, example_inputs=inputs).model,
    ):
        assert not theirs & {t.data_ptr() for t in model.state_dict().values()}
        assert all(p.requires_grad for p in model.parameters())
