"""Federations of low-rank adapters: real peft networks, nodes of several ranks, bad adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from fusion_simulation import client_app
from fusion_simulation.adapters import VisionTransformer
from fusion_simulation.task import build_model
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.client import declare_architecture, load_global, shared_arrays
from flwr_fusion.strategy import CLAFusion, OTFusion
from tests.support.architectures import output, relative_error
from tests.support.grid import InProcessGrid
from tests.test_simulations import run_in_process
from tests.test_strategy import part

peft = pytest.importorskip("peft")

ADAPTERS = ("*lora_*",)
RANKS = (2, 4, 8, 4)
NODES = len(RANKS)
ALPHA = 8
X = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@cache
def base() -> VisionTransformer:
    """Return a network that all sites have."""
    torch.manual_seed(0)
    return VisionTransformer((1, 8, 8), 10)


def adapted(rank: int, seed: int = 0, trained: bool = False, **options: Any) -> nn.Module:
    """Return a peft network; a trained one's adapters do something."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        **{"r": rank, "lora_alpha": ALPHA, "target_modules": ["query", "value", "up"]} | options
    )
    model: nn.Module = peft.get_peft_model(copy.deepcopy(base()), config)
    for name, parameter in model.named_parameters():
        if trained and "lora_" in name:
            parameter.data.normal_(std=0.2)
    return model


# --- peft's networks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"lora_dropout": 0.2}, {"lora_alpha": 32}], ids=str
)
@pytest.mark.parametrize("rank", [3, 6, 12])
def test_an_adapter_has_its_function_in_another_rank(rank: int, options: dict[str, Any]) -> None:
    client, target = adapted(6, 1, True, **options).eval(), adapted(rank, 2, **options)
    fused = ff.ot_fusion([client], example_inputs=X[:2], target=target).model.eval()
    error = relative_error(output(fused, X), output(client, X))
    assert error < (1e-4 if rank >= 6 else 1.0)


def test_a_bias_that_is_scaled_with_the_product_is_refused() -> None:
    client, target = (adapted(rank, lora_bias=True) for rank in (4, 8))
    with pytest.raises(ff.FusionError, match=r"client 0 .* computes something else"):
        ff.ot_fusion([client], example_inputs=X[:2], target=target)
    same = adapted(8, lora_bias=True, lora_alpha=16)  # Twice the alpha at twice the rank.
    ff.ot_fusion([client], example_inputs=X[:2], target=same)


def test_all_of_pefts_adapters_are_linear() -> None:
    graph = ff.ChannelGraph.trace(adapted(4), X[:2])
    names = [group.name for group in graph.groups if group.linear]
    assert len(names) == 6
    assert all(name.endswith("lora_A.default") for name in names)


def test_different_scales_of_one_rank_are_refused() -> None:
    with pytest.raises(ff.FusionError, match=r"client 0 .* computes something else"):
        ff.ot_fusion([adapted(4, 1, True)], example_inputs=X[:2], target=adapted(4, lora_alpha=16))


# --- Federations ----------------------------------------------------------------------------------


Send = Callable[[nn.Module, Message], ArrayRecord]


def by_peft(model: nn.Module, message: Message) -> ArrayRecord:
    """Return what Flower's examples of fine-tuning send."""
    return ArrayRecord(peft.get_peft_model_state_dict(model))


def adapter_app(send: Send = shared_arrays, ranks: Iterable[int] = RANKS) -> ClientApp:
    """Return a ClientApp whose nodes train adapters of their own rank."""
    app, of_node = ClientApp(), list(ranks)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return declare_architecture(
            message, f"r{of_node[int(context.node_config['partition-id'])]}"
        )

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        model = adapted(of_node[number], number)
        load_global(model, message)
        images, labels = part(number)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
        for batch in torch.split(torch.arange(len(labels)), 32):
            loss = nn.functional.cross_entropy(
                model(images[batch].view(-1, 1, 8, 8)), labels[batch]
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        metrics = MetricRecord({"num-examples": len(labels)})
        content = RecordDict({"arrays": send(model, message), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


def strategy_of(ranks: Iterable[int] = RANKS, **options: Any) -> CLAFusion:
    networks = {f"r{rank}": adapted(rank) for rank in sorted(set(ranks))}
    given: dict[str, Any] = {"only": ADAPTERS, "fraction_evaluate": 0.0, "min_train_nodes": NODES}
    given |= options
    return CLAFusion(networks, X[:2], **given)


def products(model: nn.Module) -> list[Tensor]:
    """Return what adapters add to their layers."""
    state = model.state_dict()
    return [
        ALPHA / len(tensor) * state[name.replace("lora_A", "lora_B")] @ tensor
        for name, tensor in state.items()
        if "lora_A" in name
    ]


def test_every_node_gets_the_global_adapter_in_its_own_rank(tmp_path: Any) -> None:
    strategy = strategy_of(checkpoint_dir=tmp_path, combine="mean")
    grid = InProcessGrid(adapter_app(), NODES)
    result = strategy.start(grid, num_rounds=2)
    assert [strategy.node_architectures[n] for n in grid.node_ids] == [f"r{r}" for r in RANKS]
    assert not strategy.rejections.get(1)
    assert all("lora_" in name for name in result.arrays)
    models = strategy.global_models()
    smallest, largest = models["r2"], models["r8"]
    for small, large in zip(products(smallest), products(largest), strict=True):
        # The adapter of rank 2 is the best of its rank to that of rank 8.
        u, values, vh = torch.linalg.svd(large)
        torch.testing.assert_close(
            small, (u[:, :2] * values[:2]) @ vh[:2], rtol=1e-2, atol=1e-2 * float(values[0])
        )
    for model in models.values():
        whole = model.state_dict()
        for name, tensor in adapted(2).state_dict().items():
            assert "lora_" in name or torch.equal(whole[name], tensor)
    again = strategy_of(checkpoint_dir=tmp_path, resume=True, combine="mean")
    again.start(InProcessGrid(adapter_app(), NODES), num_rounds=2)
    assert all(
        torch.equal(a, b)
        for a, b in zip(products(again.global_models()["r8"]), products(largest), strict=True)
    )


def test_arrays_under_pefts_own_names_are_accepted() -> None:
    networks = [adapter_app(send, [4] * NODES) for send in (shared_arrays, by_peft)]
    found = []
    for app in networks:
        strategy = OTFusion(adapted(4), X[:2], only=ADAPTERS, fraction_evaluate=0.0)
        start = ArrayRecord(peft.get_peft_model_state_dict(adapted(4)))
        strategy.start(InProcessGrid(app, NODES), start, num_rounds=1)
        assert not strategy.rejections.get(1)
        found.append(products(strategy.global_models()["model"]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_peft_loads_what_the_server_sends() -> None:
    strategy = OTFusion(adapted(4, trained=True), X[:2], only=ADAPTERS)
    other = adapted(4, 3)
    peft.set_peft_model_state_dict(other, strategy.arrays["model"].to_torch_state_dict())
    assert relative_error(output(other, X), output(adapted(4, trained=True), X)) < 1e-6


def test_a_head_that_travels_beside_the_adapters() -> None:
    networks = {f"r{r}": adapted(r, modules_to_save=["head"]) for r in (2, 4)}
    strategy = CLAFusion(networks, X[:2], only=("*lora_*", "*modules_to_save*"))
    names = list(strategy.arrays["r2"])
    assert sum("modules_to_save" in name for name in names) == 2
    short = peft.get_peft_model_state_dict(networks["r4"])
    assert any(name.endswith("head.weight") for name in short)


# --- Bad input ------------------------------------------------------------------------------------


def test_a_rank_that_no_architecture_has_is_left_out() -> None:
    def send(model: nn.Module, message: Message) -> ArrayRecord:
        sent = shared_arrays(model, message)
        rows = next(iter(sent.values())).numpy().shape[0]
        return shared_arrays(adapted(5), message) if rows == 8 else sent

    strategy = strategy_of()
    strategy.start(InProcessGrid(adapter_app(send), NODES), num_rounds=1)
    (rejection,) = strategy.rejections[1]
    assert "lora_A.default.weight' has shape (5, 64), the model's has (8, 64)" in rejection.text


def test_a_node_with_a_rank_that_no_architecture_has_takes_no_part(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    app = adapter_app(ranks=(2, 4, 8, 32))
    strategy = strategy_of(min_train_nodes=3, min_available_nodes=3)
    grid = InProcessGrid(app, NODES)
    strategy.start(grid, num_rounds=1)
    assert grid.node_ids[3] not in strategy.node_architectures
    assert "r32" in flower_log.text


def test_an_adapter_with_nan_is_left_out() -> None:
    def send(model: nn.Module, message: Message) -> ArrayRecord:
        state = shared_arrays(model, message).to_torch_state_dict()
        if next(iter(state.values())).shape[0] == 8:
            next(iter(state.values()))[0, 0] = torch.nan
        return ArrayRecord(state)

    strategy = strategy_of()
    strategy.start(InProcessGrid(adapter_app(send), NODES), num_rounds=1)
    (rejection,) = strategy.rejections[1]
    assert "lora_A.default.weight' has non-finite values" in rejection.text


def test_adapters_over_two_bases_are_refused() -> None:
    other = adapted(4)
    other.get_parameter("base_model.model.patches.weight").data.add_(1)
    with pytest.raises(ff.FusionError, match="needs one base beneath it"):
        CLAFusion({"r2": adapted(2), "r4": other}, X[:2], only=ADAPTERS)


# --- The app --------------------------------------------------------------------------------------


def test_the_app_runs_adapters_of_two_ranks(tmp_path: Any) -> None:
    grid = InProcessGrid(client_app.app, 4)
    metrics = run_in_process(
        tmp_path,
        grid,
        strategy="cla",
        models="vit-lora-2,vit-lora-8",
        partition="dirichlet",
        alpha=0.5,
        num_server_rounds=2,
        calibration=0,
    )
    rounds = metrics["rounds"]
    assert len(rounds) == 3
    assert {"vit-lora-2", "vit-lora-8"} <= set(str(rounds[-1]).replace("'", " ").split())


def test_adapters_of_the_app_share_their_base() -> None:
    one, other = (build_model("vit-lora-4", "digits", seed).state_dict() for seed in (0, 1))
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different
    assert all("lora_A" in name for name in different)
    assert {"head.weight", "head.bias"} <= one.keys()


def test_an_architecture_that_nobody_runs_is_fused_from_the_largest() -> None:
    strategy = strategy_of((2, 4, 8), combine="mean")
    strategy.start(InProcessGrid(adapter_app(ranks=[4] * NODES), NODES), num_rounds=1)
    models = strategy.global_models()
    for four, eight in zip(products(models["r4"]), products(models["r8"]), strict=True):
        torch.testing.assert_close(eight, four, rtol=1e-3, atol=1e-5)
