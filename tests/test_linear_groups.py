"""Linear groups: adapters and other factors with nothing between, of any rank."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import permutations, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import flwr_fusion as ff
from flwr_fusion.graph.groups import holding
from flwr_fusion.maps import Maps
from flwr_fusion.products import Factors, SpannedDirections, balanced
from flwr_fusion.statistics import input_moments
from tests.support.architectures import LowRank, output, relative_error, with_adapters

INPUTS = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
TINY = 1e-5


def adapter(
    rank: int, seed: int, scale: float = 1.0, inputs: int = 20, outputs: int = 30
) -> nn.Module:
    """Return one layer with an adapter, over a base that is the same for every seed."""
    torch.manual_seed(0)
    base = nn.Linear(inputs, outputs)
    torch.manual_seed(100 + seed)
    layer = LowRank(inputs, outputs, rank, scale)
    layer.base = base
    return nn.Sequential(layer)


def product_of(model: nn.Module) -> Tensor:
    """Return what an adapter adds to its layer, in double precision."""
    (layer,) = model.children()
    assert isinstance(layer, LowRank)
    reads, writes = (m.weight.detach().double() for m in (layer.lora_B, layer.lora_A))
    found: Tensor = reads @ writes * layer.scale
    return found


def best_of_rank(matrix: Tensor, rank: int) -> Tensor:
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    best: Tensor = (u[:, :rank] * values[:rank]) @ vh[:rank]
    return best


def fuse(
    models: Sequence[nn.Module], weights: Sequence[float] | None = None, **options: object
) -> nn.Module:
    given = {"example_inputs": INPUTS[:2], "combine": "mean"} | options
    return ff.ot_fusion(models, weights, **given).model  # type: ignore[arg-type]


def linear_groups(model: nn.Module, inputs: Tensor = INPUTS) -> list[str]:
    return [g.name for g in ff.ChannelGraph.trace(model, inputs[:2]).groups if g.linear]


# --- Which groups are linear ----------------------------------------------------------------------


class Between(nn.Module):
    """A bottleneck with something in it."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(20, 16), nn.Linear(20, 4), nn.Linear(4, 16)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.between(self.down(x)))
        return out


class Plus(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value


@pytest.mark.parametrize(
    ("between", "linear"),
    [
        (nn.Identity(), True),
        (nn.Dropout(0.5), True),
        (nn.Flatten(), True),
        (nn.ReLU(), False),
        (nn.Tanh(), False),
        (nn.LeakyReLU(0.99), False),
        (nn.LayerNorm(4), False),
        (nn.BatchNorm1d(4), False),
        (Plus(0.1), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_stands_between_decides(between: nn.Module, linear: bool) -> None:
    assert linear_groups(Between(between)) == (["down"] if linear else [])


@pytest.mark.parametrize("rank", [4, 16, 40])
def test_an_adapter_may_have_any_rank(rank: int) -> None:
    assert linear_groups(adapter(rank, 0, outputs=10)) == ["0.lora_A"]


def test_a_group_that_is_linear_in_some_networks_alone_is_matched_by_its_channels() -> None:
    def factorised(rank: int) -> nn.Module:
        return nn.Sequential(nn.Linear(20, rank), nn.Linear(rank, 10))

    assert (linear_groups(factorised(8)), linear_groups(factorised(16))) == (["0"], [])
    result = ff.ot_fusion([factorised(8), factorised(16)], example_inputs=INPUTS[:2])
    assert [group.name for group in result.report.groups] == ["0"]


def test_a_hidden_layer_that_is_no_bottleneck_is_matched_by_its_channels() -> None:
    wide = nn.Sequential(nn.Linear(20, 40), nn.Linear(40, 30))
    assert linear_groups(wide) == []


def test_a_group_keeps_a_weight_to_be_matched_by() -> None:
    # What the factors alone write would have nothing to be compared by.
    factorised = nn.Sequential(nn.Linear(20, 4), nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 5))
    assert linear_groups(factorised) == []


def test_no_tensor_is_a_factor_of_two_products() -> None:
    chain = nn.Sequential(nn.Linear(20, 6), nn.Linear(6, 5), nn.Linear(5, 10))
    assert linear_groups(chain) == ["1"]


def test_convolutions_that_read_each_other_are_linear() -> None:
    class Convolved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Conv2d(3, 12, 3, padding=1)
            self.lora_a, self.lora_b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 12, 1)
            self.head = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.base(x) + self.lora_b(self.lora_a(x)))
            out: Tensor = self.head(x.mean((2, 3)))
            return out

    torch.manual_seed(0)
    model, images = Convolved(), torch.randn(4, 3, 8, 8)
    graph = ff.ChannelGraph.trace(model, images[:2])
    assert [g.name for g in graph.groups if g.linear] == ["lora_a"]
    other = copy.deepcopy(model)
    other.load_state_dict(graph.mix(model.state_dict(), {"lora_a": torch.randn(4, 4)}))
    fused = ff.ot_fusion([model, other], example_inputs=images[:2]).model
    assert relative_error(output(fused, images), output(model, images)) < TINY


def test_the_summary_says_which_groups_are_linear() -> None:
    graph = ff.ChannelGraph.trace(with_adapters(), INPUTS[:2])
    assert sum("free, linear" in line for line in str(graph).splitlines()) == 3


def test_mixing_a_linear_group_leaves_the_function() -> None:
    model = with_adapters()
    graph = ff.ChannelGraph.trace(model, INPUTS[:2])
    generator = torch.Generator().manual_seed(1)
    matrices = {g.name: torch.randn(3, 3, generator=generator) for g in graph.groups if g.linear}
    mixed = copy.deepcopy(model)
    mixed.load_state_dict(graph.mix(model.state_dict(), matrices))
    assert relative_error(output(mixed, INPUTS), output(model, INPUTS)) < TINY
    for method in (ff.ot_fusion, ff.cla_fusion, ff.neuron_transplantation):
        fused = method([model, mixed], example_inputs=INPUTS[:2]).model
        assert relative_error(output(fused, INPUTS), output(model, INPUTS)) < TINY


def test_what_stays_at_the_clients_is_not_linear() -> None:
    with holding(lambda name: name.endswith("lora_A.weight")):
        fused = fuse([adapter(3, 1), adapter(3, 2)])
    expected = ff.average([adapter(3, 1), adapter(3, 2)]).model
    torch.testing.assert_close(fused.state_dict(), expected.state_dict())


# --- The fused product ----------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(8, 8, 8), (4, 8, 16)], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 8, 16])
def test_the_fused_product_is_the_best_of_its_rank(ranks: tuple[int, ...], rank: int) -> None:
    models = [adapter(r, seed) for seed, r in enumerate(ranks)]
    mean = sum(
        (w * product_of(m) for w, m in zip((0.5, 0.3, 0.2), models, strict=True)), torch.zeros(())
    )
    fused = product_of(fuse(models, [50, 30, 20], target=adapter(rank, 9)))
    torch.testing.assert_close(fused, best_of_rank(mean, rank), rtol=1e-4, atol=1e-6)


def test_the_singular_values_are_split_evenly() -> None:
    state = fuse([adapter(4, 1), adapter(8, 2)], target=adapter(6, 3)).state_dict()
    reads, writes = state["0.lora_B.weight"], state["0.lora_A.weight"]
    torch.testing.assert_close(reads.T @ reads, writes @ writes.T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [4, 7, 20])
def test_a_client_of_all_the_weight_is_given_back(rank: int) -> None:
    alone = adapter(4, 1)
    fused = fuse([alone, adapter(9, 2)], [1, 0], target=adapter(rank, 3))
    assert relative_error(output(fused, INPUTS), output(alone, INPUTS)) < TINY


def test_the_order_of_clients_does_not_matter() -> None:
    models = [adapter(r, seed) for seed, r in enumerate((3, 5, 8))]
    found = [
        fuse(
            [models[k] for k in order], [order[0] + 1, order[1] + 1, order[2] + 1], target=models[1]
        )
        for order in permutations(range(3))
    ]
    for model in found[1:]:
        torch.testing.assert_close(model.state_dict(), found[0].state_dict(), rtol=1e-4, atol=1e-5)


def test_channels_that_the_product_does_not_need_can_still_be_trained() -> None:
    target = adapter(6, 3)
    nn.init.zeros_(target.get_parameter("0.lora_B.weight"))
    fused = fuse([target, copy.deepcopy(target)])
    # An adapter that has learnt nothing stays LoRA's start: B = 0, A as it was.
    torch.testing.assert_close(fused.state_dict(), target.state_dict())
    wider = fuse([adapter(2, 1)], target=target).get_parameter("0.lora_A.weight")
    assert bool((wider.norm(dim=1) > 0.1).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    models = [adapter(r, seed).to(dtype) for seed, r in enumerate((3, 5))]
    fused = ff.ot_fusion(models, example_inputs=INPUTS[:2].to(dtype), target=models[0]).model
    assert {t.dtype for t in fused.state_dict().values()} == {dtype}


def test_an_output_counts_by_the_clients_that_have_it() -> None:
    torch.manual_seed(0)
    narrow, wide = with_adapters(3, 16), with_adapters(3, 20)
    fused = ff.ot_fusion([narrow, wide], [1, 0], example_inputs=INPUTS[:2], target=wide).model
    assert relative_error(output(fused, INPUTS), output(narrow, INPUTS)) < TINY
    both = ff.ot_fusion(
        [narrow, wide], [1, 1], example_inputs=INPUTS[:2], target=wide, combine="mean"
    )
    state, own = both.model.state_dict(), wide.state_dict()
    base = state["0.base.weight"]
    kept = [k for k in range(20) if torch.equal(base[k], own["0.base.weight"][k])]
    assert len(kept) == 4  # Those that the wide client alone has.
    fused_rows = state["0.lora_B.weight"][kept] @ state["0.lora_A.weight"]
    own_rows = own["0.lora_B.weight"][kept] @ own["0.lora_A.weight"]
    assert relative_error(fused_rows, own_rows) < 0.5


def test_the_report_says_what_the_rank_leaves_out() -> None:
    result = ff.ot_fusion([adapter(4, 1), adapter(8, 2)], example_inputs=INPUTS[:2], combine="mean")
    (text,) = result.report.details.values()
    assert text.startswith("rank 8 of 12: ")


# --- Scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "scale"), [(4, 2.0), (8, 1.0), (8, 0.5), (5, 4.0)])
def test_what_networks_multiply_the_product_by_is_part_of_it(rank: int, scale: float) -> None:
    client = with_adapters(3, 18, 2.0)
    target = with_adapters(rank, 18, scale)
    fused = ff.ot_fusion([client], example_inputs=INPUTS[:2], target=target).model
    assert relative_error(output(fused, INPUTS), output(client, INPUTS)) < TINY


def test_networks_of_one_shape_that_multiply_differently_are_refused() -> None:
    with pytest.raises(ff.FusionError, match="computes something else"):
        fuse([adapter(4, 1, scale=2.0)], target=adapter(4, 2, scale=1.0))


# --- Rules ----------------------------------------------------------------------------------------


RULES = ["auto", "mean", "median", "trimmed-mean", "krum", ff.LeastSquares(moments="updates")]


def near(start: nn.Module, seed: int, noise: float = 0.1) -> nn.Module:
    torch.manual_seed(seed)
    model = copy.deepcopy(start)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data.add_(noise * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_rule_acts_on_the_product(rule: str | ff.Rule) -> None:
    start = with_adapters()
    graph = ff.ChannelGraph.trace(start, INPUTS[:2])
    clients = [near(start, seed) for seed in range(5)]
    generator = torch.Generator().manual_seed(1)
    mixed = []
    for client in clients:
        matrices = {
            g.name: torch.randn(3, 3, generator=generator) for g in graph.groups if g.linear
        }
        mixed.append(copy.deepcopy(client))
        mixed[-1].load_state_dict(graph.mix(client.state_dict(), matrices))
    one, other = (
        ff.ot_fusion(models, example_inputs=INPUTS[:2], reference=start, combine=rule).model
        for models in (clients, mixed)
    )
    # Whatever the factors are: the result depends on the products alone.
    assert relative_error(output(other, INPUTS), output(one, INPUTS)) < 1e-3


def test_least_squares_by_the_clients_moments_acts_on_the_product() -> None:
    torch.manual_seed(0)
    models = [adapter(4, 1), adapter(4, 2)]
    # Each client sees its own half of the inputs.
    data = [INPUTS.clone(), INPUTS.clone()]
    data[0][:, 10:], data[1][:, :10] = 0, 0
    statistics = [input_moments(m, [x]) for m, x in zip(models, data, strict=True)]
    options = ff.LeastSquares(shrinkage=1.0, ridge=1e-4, bound=None, weight_exponent=1.0)
    fused, mean = (
        fuse(models, statistics=statistics, combine=rule, target=adapter(8, 3))
        for rule in (options, "mean")
    )
    errors = [
        sum(relative_error(output(f, x), output(m, x)) for m, x in zip(models, data, strict=True))
        for f in (fused, mean)
    ]
    assert errors[0] < 0.3 * errors[1]


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "krum"])
def test_one_client_cannot_decide_a_product(rule: str) -> None:
    start = with_adapters()
    honest = [near(start, seed) for seed in range(6)]
    bad = near(start, 9, noise=30.0)
    with_it, without = (
        ff.ot_fusion(models, example_inputs=INPUTS[:2], reference=start, combine=rule).model
        for models in ([*honest, bad], honest)
    )
    assert relative_error(output(with_it, INPUTS), output(without, INPUTS)) < 0.3


def test_a_rule_of_ones_own_sees_products() -> None:
    seen: list[str] = []

    class Looking(ff.Mean):
        def combine(self, fusion: ff.Fusion, maps: Sequence[Maps]) -> dict[str, Tensor]:
            seen.extend(fusion.target)
            assert all(client.state().keys() == fusion.target.keys() for client in fusion.clients)
            return super().combine(fusion, maps)

    fuse([adapter(3, 1), adapter(5, 2)], combine=Looking())
    assert "product of 0.lora_A.weight" in seen
    assert not any("lora_B" in name for name in seen)


# --- The mathematics ------------------------------------------------------------------------------


def test_directions_beyond_the_limit_are_the_weakest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flwr_fusion.products._MOST_DIRECTIONS", 12)
    generator = torch.Generator().manual_seed(0)
    common = [torch.randn(shape, generator=generator) for shape in ((40, 3), (3, 30))]
    span = SpannedDirections()
    total = torch.zeros(40, 30)
    for _ in range(20):
        noise = [0.1 * torch.randn(shape, generator=generator) for shape in ((40, 4), (4, 30))]
        factors = Factors(torch.cat([common[0], noise[0]], 1), torch.cat([common[1], noise[1]]))
        span.add(factors, 1 / 20)
        total += factors.reads @ factors.writes / 20
    left, right = span.bases()
    assert left.shape == (40, 12)
    core = left.T @ total @ right
    factors, _ = balanced(left, core, right, 3, torch.zeros(3, 30))
    best = best_of_rank(total, 3)
    lost, least = (
        float((m - total).norm() / total.norm()) for m in (factors.reads @ factors.writes, best)
    )
    assert lost < 1.01 * least


def test_the_product_is_never_made() -> None:
    width, rank = 3000, 4
    models = [
        nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False))
        for _ in range(6)
    ]
    largest = 0

    class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor):
                largest = max(largest, found.numel())
            return found

    ff.ot_fusion(models, example_inputs=torch.zeros(2, width), combine="mean")
    with Watching():  # type: ignore[no-untyped-call]
        fused = ff.ot_fusion(models, example_inputs=torch.zeros(2, width), combine="mean").model
    assert largest < width * width / 20
    assert sum(p.numel() for p in fused.parameters()) == 2 * width * rank


@pytest.mark.parametrize(("inputs", "outputs"), product((20, 6), (30, 6)))
def test_ranks_up_to_the_layers_own(inputs: int, outputs: int) -> None:
    models = [adapter(6, seed, 1.0, inputs, outputs) for seed in range(3)]
    x = INPUTS[:, :inputs]
    fused = ff.ot_fusion(models, example_inputs=x[:2], combine="mean").model
    mean = sum((product_of(m) / 3 for m in models), torch.zeros(()))
    torch.testing.assert_close(product_of(fused), best_of_rank(mean, 6), rtol=1e-3, atol=1e-5)


# --- What must not happen -------------------------------------------------------------------------


class Residual(nn.Module):
    """A residual block of two layers with nothing between them, as wide as its stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(20, width), nn.Linear(width, 5)
        self.down, self.up = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        out: Tensor = self.head(torch.relu(x + self.up(self.down(x))))
        return out


def test_layers_as_wide_as_their_stream_are_no_factors() -> None:
    start = Residual(16)
    assert linear_groups(start) == []
    clients = [near_everywhere(start, seed) for seed in range(3)]
    fused = ff.ot_fusion(clients, example_inputs=INPUTS[:2], reference=start, combine="mean").model
    expected = ff.average(clients).model
    torch.testing.assert_close(fused.state_dict(), expected.state_dict(), atol=1e-6, rtol=1e-5)


def near_everywhere(start: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = copy.deepcopy(start)
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model


def test_large_ranks_are_no_low_ranks() -> None:
    assert linear_groups(adapter(600, 1, outputs=700)) == []
    assert linear_groups(adapter(500, 1, outputs=700)) == ["0.lora_A"]


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "krum"])
def test_no_client_erases_the_others_by_its_size(rule: str) -> None:
    start = with_adapters()
    honest = [near(start, seed) for seed in range(6)]
    bad = near(start, 9, noise=1e3)
    off = copy.deepcopy(start)
    for name, parameter in off.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    with_it, without = (
        ff.ot_fusion(models, example_inputs=INPUTS[:2], reference=start, combine=rule).model
        for models in ([*honest, bad], honest)
    )
    expected = output(without, INPUTS)
    assert relative_error(output(with_it, INPUTS), expected) < 0.3
    assert relative_error(output(off, INPUTS), expected) > 0.7


def test_other_widths_with_other_scales() -> None:
    client, target = with_adapters(3, 18, 2.0), with_adapters(3, 22, 1.0)
    fused = ff.ot_fusion([client], example_inputs=INPUTS[:2], target=target).model
    assert relative_error(output(fused, INPUTS), output(client, INPUTS)) < TINY


@pytest.mark.parametrize("rule", ["auto", "mean", "median", "trimmed-mean"])
def test_what_a_client_could_not_hold_is_not_unlearnt(rule: str) -> None:
    sent = adapter(8, 1)
    narrow = fuse([sent], target=adapter(2, 2))
    # Nobody trains: every client returns what it was sent in its own rank.
    fused = fuse([narrow, narrow, narrow, sent], target=sent, reference=sent, combine=rule)
    torch.testing.assert_close(product_of(fused), product_of(sent), rtol=1e-4, atol=1e-5)


def test_robust_rules_refuse_factors_of_clients_of_several_widths() -> None:
    models = [with_adapters(3, 16), with_adapters(3, 20), with_adapters(3, 20)]
    with pytest.raises(ff.FusionError, match="clients of several widths"):
        ff.ot_fusion(models, example_inputs=INPUTS[:2], combine="median")
    ff.ot_fusion(models, example_inputs=INPUTS[:2], combine="mean")


def test_precisions_may_differ() -> None:
    models = [with_adapters(3), with_adapters(3).double()]
    for target in models:
        fused = ff.ot_fusion(models, example_inputs=INPUTS[:2], target=target).model
        dtypes = {t.dtype for t in fused.state_dict().values()}
        assert dtypes == {t.dtype for t in target.state_dict().values()}


def test_factors_that_are_out_of_range_are_refused() -> None:
    model = adapter(3, 1)
    for parameter in model.parameters():
        parameter.data.mul_(1e25)
    with pytest.raises(ff.FusionError):
        fuse([model, adapter(3, 2)])


def test_an_adapter_that_is_added_to_a_weight_has_one_rank() -> None:
    class AddedToWeight(nn.Module):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(10, 20))
            self.b, self.a = (
                nn.Parameter(torch.randn(10, rank)),
                nn.Parameter(torch.randn(rank, 20)),
            )

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight + self.b @ self.a).T

    with pytest.raises(ff.FusionError, match="inside of a product of weights"):
        ff.ot_fusion([AddedToWeight(4)], example_inputs=INPUTS[:2], target=AddedToWeight(7))
