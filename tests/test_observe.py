"""Watching layers: hooks go away, what is kept is a copy, refusals name who and what."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.maps import Correspondence
from flwr_fusion.matching.costs import activation_costs
from flwr_fusion.networks import all_finite
from flwr_fusion.observe import (
    batch_size,
    batches_of,
    call,
    check_rereadable,
    evaluation_mode,
    first_of,
    output_of,
    record,
    run,
    training_mode,
    watch,
)

INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def network(in_place: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=in_place), nn.Linear(5, 3))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def both(_layer: nn.Module, inputs: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    return inputs.clone(), output.clone()


class ByName(nn.Module):
    """A network that calls its layers with keywords, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(input=self.layer(input=x))
        return out


# --- Watching -------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False])
def test_layers_are_watched_before_or_after_they_run(before: bool) -> None:
    model, seen = network(), []

    def see(module: nn.Module, inputs: Tensor, output: Any) -> None:
        seen.append((module, inputs, output))

    with watch([model[0], model[2]], see, before=before):
        expected = model(INPUTS)
    assert [module for module, _, _ in seen] == [model[0], model[2]]
    assert seen[0][1] is INPUTS
    outputs = [output for _, _, output in seen]
    assert outputs == [None, None] if before else outputs[1] is expected
    model(INPUTS)
    assert len(seen) == 2


def test_what_is_returned_after_a_layer_takes_its_outputs_place() -> None:
    model = network()
    with watch([model[2]], lambda module, inputs, output: 2 * output):
        doubled = model(INPUTS)
    torch.testing.assert_close(doubled, 2 * model(INPUTS))
    with watch([model[2]], lambda module, inputs, output: torch.zeros(1), before=True):
        torch.testing.assert_close(model(INPUTS), doubled / 2)


@pytest.mark.parametrize("before", [True, False])
def test_hooks_are_removed_after_an_error(before: bool) -> None:
    model = network()
    own = model[0].register_forward_hook(lambda module, args, output: None)

    def see(module: nn.Module, inputs: Tensor, output: Any) -> None:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), watch(model, see, before=before):
        model(INPUTS)
    # The network's own hook stays.
    assert hooks(model) == 1
    own.remove()
    with pytest.raises(ff.FusionError), watch(model, lambda *_: None):
        output_of(model, torch.zeros(2, 7), "it", "inputs")
    assert hooks(model) == 0


def test_only_observe_registers_hooks() -> None:
    package = Path(ff.__file__).parent
    registering = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"register_\w*hook", path.read_text())
    }
    assert registering == {"observe.py"}


# --- Recording ------------------------------------------------------------------------------------


def test_record_keeps_every_call_and_leaves_the_network_alone() -> None:
    model = ByName().train()
    found = record(model, ["layer", "unused"], INPUTS, both)
    assert found["unused"] == []
    first, second = found["layer"]
    torch.testing.assert_close(first[0], INPUTS)
    torch.testing.assert_close(first[1], second[0])
    torch.testing.assert_close(second[1], model(INPUTS).detach())
    assert not any(tensor.requires_grad for tensor in (*first, *second))
    assert hooks(model) == 0
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_recorded_is_what_was_there_before_an_activation_worked_in_place() -> None:
    found = {
        in_place: record(network(in_place), ["0", "2"], INPUTS, both) for in_place in (False, True)
    }
    for name in ("0", "2"):
        for ours, theirs in zip(found[False][name][0], found[True][name][0], strict=True):
            torch.testing.assert_close(ours, theirs)
    assert (found[True]["0"][0][1] < 0).any()


def test_in_place_activations_do_not_spoil_the_costs_by_activations() -> None:
    graph = ff.ChannelGraph.trace(network(), INPUTS[:2])
    pair = Correspondence(graph, graph)
    other = network()
    with torch.no_grad():
        other.get_parameter("0.weight").mul_(-1)
    in_place = network(True), network(True)
    in_place[1].load_state_dict(other.state_dict())
    for kind in ("correlation", "euclidean"):
        expected = activation_costs(network(), other, pair, INPUTS, kind)
        found = activation_costs(*in_place, pair, INPUTS, kind)
        torch.testing.assert_close(found["0"], expected["0"])


def test_inputs_are_not_modified_by_a_first_operation_in_place() -> None:
    model, before = nn.Sequential(nn.ReLU(inplace=True), network()), INPUTS.clone()
    record(model, ["1.0"], INPUTS, both)
    run(model, [INPUTS, INPUTS], "it")
    output_of(model, {"input": INPUTS}, "it", "inputs")
    assert torch.equal(before, INPUTS)


# --- Running --------------------------------------------------------------------------------------


def test_run_counts_the_samples_in_evaluation_mode() -> None:
    model, modes = network().train(), []
    with watch([model[0]], lambda module, inputs, output: modes.append(module.training)):
        assert run(model, [INPUTS, INPUTS[:2]], "it") == 8
        assert run(model, INPUTS, "it") == 6
    assert modes == [False] * 3
    assert model.training


def test_inputs_are_brought_to_the_networks_type() -> None:
    assert output_of(network().double(), INPUTS, "it", "inputs").dtype == torch.float64


@pytest.mark.parametrize("inputs", [INPUTS, (INPUTS,), [INPUTS], {"input": INPUTS}], ids=type)
def test_inputs_may_be_a_tensor_arguments_or_keywords(inputs: Any) -> None:
    model = network()
    torch.testing.assert_close(call(model, inputs), model(INPUTS))


@pytest.mark.parametrize(("mode", "value"), [(evaluation_mode, False), (training_mode, True)])
def test_every_module_gets_its_own_mode_back_after_an_error(mode: Any, value: bool) -> None:
    model = network().eval()
    model[0].train()
    modes: list[bool] = []

    def fail() -> None:
        modes.extend(module.training for module in model.modules())
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), mode(model):
        fail()
    assert modes == [value] * 4
    assert [module.training for module in model.modules()] == [False, True, False, False]


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: output_of(network(), torch.zeros(2, 7), "client 3", "the example inputs"),
            "^client 3 cannot be run on the example inputs: mat1 and mat2",
        ),
        (
            lambda: record(network(), ["0"], torch.zeros(2, 7), both, "client 3"),
            "^client 3 cannot be run on the calibration inputs: mat1 and mat2",
        ),
        (
            lambda: run(network(), [INPUTS, {"x": 1}], "client 3", "its data"),
            "^client 3 cannot be run on its data: ",
        ),
        (lambda: run(network(), [], "client 3"), "^there are no batches of the calibration inputs"),
        (lambda: run(network(), [], "it", "its data"), "^there are no batches of its data"),
        (lambda: list(batches_of(iter(()))), "^there are no batches of the calibration inputs"),
        (lambda: output_of(nn.ReLU(), INPUTS, "it", "inputs"), "ReLU has no parameters"),
        (lambda: check_rereadable(iter([INPUTS])), "calibration is read once .* not a generator"),
        (lambda: first_of({"img": INPUTS}), r"a mapping with \['img'\]: say by inputs="),
        (lambda: batch_size({"k": 3}), "holds no tensor"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(act: Callable[[], Any], message: str) -> None:
    with pytest.raises(ff.FusionError, match=message):
        act()


def test_what_can_be_read_again_is_no_generator() -> None:
    loader: Any = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(INPUTS))
    for given in (None, INPUTS, [INPUTS], loader):
        check_rereadable(given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_a_value_that_is_not_finite_is_found(dtype: torch.dtype) -> None:
    values = torch.arange(6).reshape(2, 3).to(dtype)
    assert all_finite(values)
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoilt = values.clone()
        spoilt[1, 1] = bad
        assert not all_finite(spoilt)


def test_what_has_no_values_or_whole_numbers_is_finite() -> None:
    assert all_finite(torch.empty(0, 3))
    assert all_finite(torch.tensor([1, 2**62]))
