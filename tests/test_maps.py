"""Channel maps: indices must do what the dense matrices say."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flwr_fusion import ChannelGraph, FusionError
from flwr_fusion.graph.groups import verified_graph
from flwr_fusion.maps import (
    ChannelMap,
    Correspondence,
    Plan,
    Segment,
    Selection,
    coverage_along,
    map_tensor,
)
from tests.support.architectures import (
    BareParameter,
    ConcatAndSum,
    LayerNormMLP,
    LeNet,
    SmallVGG,
    named,
    output,
    randomised,
    relative_error,
    sequential_mlp,
)

seeds = st.integers(0, 10_000)
Kind = Callable[[int, int, torch.Generator], ChannelMap]


def random_selection(fused: int, client: int, generator: torch.Generator) -> Selection:
    """Return an injection in one direction, as the solvers and placements make them."""
    size = max(fused, client)
    order = torch.randperm(size, generator=generator)[:fused]
    return Selection(torch.where(order < client, order, -1), client)


def random_copies(fused: int, client: int, generator: torch.Generator) -> Selection:
    """Return a selection that may take a client channel several times, or leave one out."""
    return Selection(torch.randint(-1, client, (fused,), generator=generator), client)


def random_plan(fused: int, client: int, generator: torch.Generator) -> Plan:
    mass = 0.01 + torch.rand(fused, client, generator=generator).double()
    return Plan(mass / mass.sum())


KINDS: list[Kind] = [random_selection, random_copies, random_plan]


# Single maps.


@given(st.integers(1, 6), st.integers(1, 6), seeds)
def test_selection_matrices(fused: int, client: int, seed: int) -> None:
    chosen = random_copies(fused, client, torch.Generator().manual_seed(seed))
    merge, unmerge = chosen.merge(), chosen.unmerge()
    assert merge.shape == (fused, client)
    assert unmerge.shape == (client, fused)
    for row, source in enumerate(chosen.index.tolist()):
        expected = [float(column == source) for column in range(client)]
        assert merge[row].tolist() == expected
    # Copies of one channel share what it sends on, so that sums agree.
    taken = merge.sum(0) > 0
    torch.testing.assert_close(unmerge.sum(1), taken.float())
    torch.testing.assert_close((unmerge @ merge).diagonal(), taken.float())


@given(st.integers(1, 6), seeds)
def test_permutation_matrices_are_inverse(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    chosen = Selection(torch.randperm(size, generator=generator), size)
    assert torch.equal(chosen.merge() @ chosen.unmerge(), torch.eye(size))
    moved = int((chosen.index != torch.arange(size)).sum())
    assert chosen.share_moved == pytest.approx(moved / size)
    assert chosen.is_identity == (moved == 0)


@pytest.mark.parametrize(("fused", "client"), [(3, 3), (5, 3), (3, 5)])
def test_identity_reaches_as_far_as_both_sizes(fused: int, client: int) -> None:
    chosen = Selection.identity(fused, client)
    assert torch.equal(chosen.merge(), torch.eye(fused, client))
    assert chosen.is_identity == (fused == client)
    assert chosen.coverage().tolist() == [float(row < client) for row in range(fused)]


@given(st.integers(1, 6), st.integers(1, 6), seeds)
def test_plan_matrices_are_normalised(fused: int, client: int, seed: int) -> None:
    plan = random_plan(fused, client, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(plan.merge().sum(1), torch.ones(fused).double())
    torch.testing.assert_close(plan.unmerge().sum(1), torch.ones(client).double())
    torch.testing.assert_close(plan.merge(), plan.mass / plan.mass.sum(1, keepdim=True))
    torch.testing.assert_close(plan.unmerge(), (plan.mass / plan.mass.sum(0)).T)
    assert plan.client_size == client
    assert 0 <= plan.share_moved <= 1


def test_plan_that_is_a_permutation_is_that_selection() -> None:
    chosen = Selection(torch.tensor([2, 0, 1]), 3)
    plan = Plan(chosen.merge().double() / 3)
    torch.testing.assert_close(plan.merge(), chosen.merge().double())
    torch.testing.assert_close(plan.unmerge(), chosen.unmerge().double())
    assert plan.share_moved == pytest.approx(chosen.share_moved)


def test_plan_without_mass_in_a_row_maps_to_zero() -> None:
    plan = Plan(torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
    assert plan.merge().tolist() == [[0.5, 0.5], [0.0, 0.0]]
    assert plan.unmerge().isfinite().all()
    assert plan.coverage().tolist() == [1.0, 0.0]


# Tensors of whole networks, against merge @ W @ unmerge along every axis.

NETWORKS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda w: sequential_mlp(16 + 4 * w), (20,)),
    "lenet-flatten": (lambda w: LeNet(w), (1, 16, 16)),
    "vgg-flatten-batchnorm": (lambda w: SmallVGG(4 * w), (3, 8, 8)),
    "concat": (lambda w: ConcatAndSum(3 + w), (2, 5, 5)),
    "bare-parameter": (lambda w: BareParameter(5 + w), (5,)),
}


@cache
def correspondence_of(name: str, fused: int, client: int) -> Correspondence:
    build, shape = NETWORKS[name]
    inputs = torch.randn(2, *shape)
    graphs = [ChannelGraph.trace(build(width), inputs) for width in (fused, client)]
    return Correspondence(*graphs)


def random_maps(pair: Correspondence, kind: Kind, seed: int) -> dict[str, ChannelMap]:
    generator = torch.Generator().manual_seed(seed)
    return {g.name: kind(g.fused_size, g.client_size, generator) for g in pair.free_groups}


def dense_axis_matrix(
    segments: list[Segment], fused: int, client: int, maps: dict[str, ChannelMap]
) -> Tensor:
    """Return the (fused, client) matrix of one tensor axis, written out entry by entry."""
    matrix = torch.zeros(fused, client).double()
    fused_free, client_free = set(range(fused)), set(range(client))
    for segment in segments:
        channel_map = maps[segment.group]
        channels = channel_map.merge() if segment.writes else channel_map.unmerge().T
        for i, ours in enumerate(segment.fused_positions.tolist()):
            for j, theirs in enumerate(segment.client_positions.tolist()):
                for p, q in zip(ours, theirs, strict=True):
                    matrix[p, q] = channels[i, j]
        fused_free -= set(segment.fused_positions.flatten().tolist())
        client_free -= set(segment.client_positions.flatten().tolist())
    for p, q in zip(sorted(fused_free), sorted(client_free), strict=True):
        matrix[p, q] = 1.0
    return matrix


def dense_formula(
    tensor: Tensor,
    name: str,
    pair: Correspondence,
    maps: dict[str, ChannelMap],
    keep_axis: int | None = None,
) -> Tensor:
    result = tensor.double()
    for axis in range(tensor.dim()):
        segments = pair.segments[name][axis] if axis in pair.segments.get(name, {}) else []
        if axis == keep_axis or not segments:
            continue
        matrix = dense_axis_matrix(
            segments, pair.fused.shapes[name][axis], tensor.shape[axis], maps
        )
        result = torch.tensordot(matrix, result, dims=([1], [axis])).movedim(0, axis)
    return result


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 2)], ids=["equal", "wider", "narrower"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("name", NETWORKS)
def test_mapped_tensors_are_the_dense_product(
    name: str, kind: Kind, sizes: tuple[int, int]
) -> None:
    pair = correspondence_of(name, *sizes)
    for seed in range(2):
        maps = random_maps(pair, kind, seed)
        for tensor_name, shape in pair.client.shapes.items():
            tensor = torch.randn(shape).double()
            mapped = map_tensor(tensor, tensor_name, pair, maps)
            expected = dense_formula(tensor, tensor_name, pair, maps)
            assert mapped.shape == pair.fused.shapes[tensor_name]
            torch.testing.assert_close(mapped, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("axis", [0, 1])
def test_kept_axis_stays_in_the_clients_channels(kind: Kind, axis: int) -> None:
    pair = correspondence_of("lenet-flatten", 2, 1)
    maps = random_maps(pair, kind, 3)
    tensor = torch.randn(pair.client.shapes["fc1.weight"]).double()
    mapped = map_tensor(tensor, "fc1.weight", pair, maps, keep_axis=axis)
    assert mapped.shape[axis] == tensor.shape[axis]
    expected = dense_formula(tensor, "fc1.weight", pair, maps, keep_axis=axis)
    torch.testing.assert_close(mapped, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_mapping_does_not_modify_the_tensor(kind: Kind) -> None:
    pair = correspondence_of("concat", 1, 1)
    maps = random_maps(pair, kind, 0)
    for name, shape in pair.client.shapes.items():
        tensor = torch.randn(shape)
        before = tensor.clone()
        map_tensor(tensor, name, pair, maps)
        assert torch.equal(tensor, before)


def test_one_group_mapped_by_a_plan_and_one_by_a_selection() -> None:
    pair = correspondence_of("concat", 2, 1)
    generator = torch.Generator().manual_seed(5)
    kinds: list[Kind] = [random_plan, random_selection]
    maps: dict[str, ChannelMap] = {
        g.name: kind(g.fused_size, g.client_size, generator)
        for kind, g in zip(kinds, pair.free_groups, strict=True)
    }
    for name in ("norm.weight", "norm.running_var", "head.weight"):
        tensor = torch.randn(pair.client.shapes[name]).double()
        expected = dense_formula(tensor, name, pair, maps)
        torch.testing.assert_close(
            map_tensor(tensor, name, pair, maps), expected, rtol=1e-6, atol=1e-6
        )


@given(seeds)
def test_permutation_maps_agree_with_the_graphs_permute(seed: int) -> None:
    pair = correspondence_of("vgg-flatten-batchnorm", 1, 1)
    generator = torch.Generator().manual_seed(seed)
    orders = {g.name: torch.randperm(g.fused_size, generator=generator) for g in pair.free_groups}
    maps = {name: Selection(order, len(order)) for name, order in orders.items()}
    state = {name: torch.randn(shape) for name, shape in pair.client.shapes.items()}
    permuted = pair.client.permute(state, orders)
    for name, tensor in state.items():
        assert torch.equal(map_tensor(tensor, name, pair, maps), permuted[name])


def test_coverage_of_written_axes() -> None:
    pair = correspondence_of("concat", 2, 1)
    maps = pair.identity()
    assert coverage_along("head.weight", pair, maps) is None
    assert coverage_along("head.bias", pair, maps) is None
    covered = coverage_along("norm.weight", pair, maps)
    assert covered is not None
    axis, coverage = covered
    # Groups of 4 and 6 channels in groups of 5 and 7.
    assert axis == 0
    assert coverage.tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0]


# Networks that do not correspond.


def graph_of(model: nn.Module, *shape: int) -> ChannelGraph:
    return verified_graph(model, torch.randn(2, *shape))


def test_other_depth_is_refused() -> None:
    graphs = [graph_of(sequential_mlp(depth=depth), 20) for depth in (3, 2)]
    with pytest.raises(FusionError, match="depth"):
        Correspondence(*graphs)


def test_other_input_size_is_refused() -> None:
    shapes = [(20, 20), (19, 19)]
    graphs = [
        graph_of(nn.Sequential(nn.Linear(n, 8), nn.ReLU(), nn.Linear(8, 3)), n) for n, _ in shapes
    ]
    with pytest.raises(FusionError, match=r"'0\.weight'.*\(8, 19\).*\(8, 20\)"):
        Correspondence(*graphs)


def test_other_kernel_size_is_refused() -> None:
    graphs = [
        graph_of(
            nn.Sequential(
                nn.Conv2d(2, 4, k, padding=k // 2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
            ),
            2,
            4,
            4,
        )
        for k in (3, 1)
    ]
    with pytest.raises(FusionError, match=r"'0\.weight'"):
        Correspondence(*graphs)


def test_other_flatten_is_refused() -> None:
    graphs = [
        graph_of(nn.Sequential(nn.Conv2d(2, 4, 1), nn.Flatten(), nn.Linear(4 * n * n, 3)), 2, n, n)
        for n in (4, 3)
    ]
    with pytest.raises(FusionError, match="group '0'"):
        Correspondence(*graphs)


def test_layernorm_of_other_width_is_said_to_be_rough() -> None:
    graphs = [graph_of(LayerNormMLP(width), 20) for width in (16, 20)]
    with pytest.warns(UserWarning, match=r"'fc1'.*LayerNorm.*only roughly"):
        Correspondence(*graphs)


def test_recurrent_layers_of_other_width_correspond_gate_by_gate() -> None:
    class Narrow(type(named("lstm").build())):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(nn.LSTM)
            self.rnn = nn.LSTM(7, 5, batch_first=True)
            self.fc = nn.Linear(5, 8)

    wide, narrow = named("lstm").model(), randomised(Narrow())
    correspondence = Correspondence(*(graph_of(model, 4, 5) for model in (wide, narrow)))
    maps, state = correspondence.identity(), narrow.state_dict()
    mapped = {name: map_tensor(state[name], name, correspondence, maps) for name in state}
    wide.load_state_dict(mapped)
    inputs = torch.randn(3, 4, 5)
    assert relative_error(output(wide, inputs), output(narrow, inputs)) < 1e-5
