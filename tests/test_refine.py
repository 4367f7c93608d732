"""Fine-tuning and distillation, as functions and as a step of the strategies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import flwr_fusion as ff
from flwr_fusion.networks import BuiltOnAccess
from flwr_fusion.strategy import Distillation, FineTuning, OTFusion, every
from tests.support.grid import InProcessGrid
from tests.test_cla_strategy import OF_PARTITION, cla_strategy, mixed_app
from tests.test_strategy import (
    DIGIT,
    IMAGES,
    LABELS,
    NODES,
    TEST,
    accuracy,
    digits_app,
    digits_network,
    record,
    run_digits,
    train_model,
)

SERVER = slice(1200, 1500)
UNLABELLED = torch.split(IMAGES[SERVER], 50)
LABELLED = list(zip(UNLABELLED, torch.split(LABELS[SERVER], 50), strict=True))
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def trained(seed: int, rows: slice = slice(0, 1200)) -> nn.Sequential:
    model = digits_network(seed)
    train_model(model, IMAGES[rows], LABELS[rows], 3)
    return model.train()


def test_accuracy(model: nn.Module) -> float:
    return accuracy(model, IMAGES[TEST], LABELS[TEST])


test_accuracy.__test__ = False  # type: ignore[attr-defined]


def ensemble_accuracy(models: Sequence[nn.Module]) -> float:
    with torch.no_grad():
        answers = sum(model(IMAGES[TEST]).softmax(1) for model in models)
    assert isinstance(answers, Tensor)
    return (answers.argmax(1) == LABELS[TEST]).double().mean().item()


# --- Fine-tuning ----------------------------------------------------------------------------------


def test_fine_tuning_recovers_a_plain_average_and_leaves_it_as_it_was() -> None:
    average = ff.average([trained(0), trained(1)]).model.eval()
    before = copy.deepcopy(average.state_dict())
    result = ff.fine_tune(average, LABELLED, training=ff.Training(epochs=5, optimizer=SGD))
    assert test_accuracy(result.model) > test_accuracy(average) + 0.2
    assert all(torch.equal(before[name], t) for name, t in average.state_dict().items())
    assert not result.model.training
    assert len(result.report.losses) == result.report.best_epoch == 5
    assert all(parameter.grad is None for parameter in result.model.parameters())


def test_it_is_the_descent_that_one_would_write_by_hand() -> None:
    model = digits_network()
    expected = copy.deepcopy(model)
    optimizer = SGD(expected.parameters())
    for images, labels in LABELLED:
        optimizer.zero_grad()
        nn.functional.cross_entropy(expected(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    refined = ff.fine_tune(model, LABELLED, training=ff.Training(optimizer=SGD)).model
    for name, tensor in refined.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name])


def test_the_best_network_on_held_out_data_is_returned_and_patience_ends_the_training() -> None:
    model = trained(0)
    ruinous = partial(torch.optim.SGD, lr=30.0)
    held_out = [(IMAGES[TEST], LABELS[TEST])]
    training = ff.Training(epochs=9, optimizer=ruinous, held_out=held_out, patience=2)
    result = ff.fine_tune(model, LABELLED, training=training)
    assert result.report.best_epoch == 0
    assert len(result.report.losses) == 2
    assert len(result.report.held_out_losses) == 3
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_any_loss_and_any_batches() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(a + b).squeeze(1)  # type: ignore[no-any-return]

    batch = {"a": torch.randn(20, 3), "b": torch.zeros(20, 3), "y": torch.ones(20)}
    result = ff.fine_tune(
        Named(),
        [batch],
        loss=nn.functional.mse_loss,
        training=ff.Training(
            epochs=50,
            optimizer=partial(torch.optim.Adam, lr=0.1),
            inputs=lambda own: {"a": own["a"], "b": own["b"]},
            labels=lambda own: own["y"],
        ),
    )
    assert result.report.losses[-1] < 0.1 * result.report.losses[0]


def test_batchnorm_learns_its_statistics_and_the_modules_keep_their_modes() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10)).eval()
    model[3].train()
    refined = ff.fine_tune(model, LABELLED).model
    assert isinstance(refined, nn.Sequential)
    assert int(refined[1].num_batches_tracked) == len(LABELLED)  # type: ignore[arg-type]
    assert [m.training for m in refined.modules()] == [m.training for m in model.modules()]


# --- Distillation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ensemble", ["probabilities", "logits"])
def test_distillation_brings_a_plain_average_near_the_ensemble(ensemble: Any) -> None:
    teachers = [trained(0), trained(1), trained(2)]
    average = ff.average(teachers).model
    result = ff.distill(
        average, teachers, UNLABELLED, ensemble=ensemble, training=ff.Training(epochs=60)
    )
    assert test_accuracy(average) < 0.6
    assert test_accuracy(result.model) > ensemble_accuracy(teachers) - 0.05


def test_teachers_may_be_of_other_architectures_and_are_left_alone() -> None:
    torch.manual_seed(0)
    deep = nn.Sequential(
        nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 10)
    )
    before = copy.deepcopy(deep.state_dict())
    student = digits_network()
    result = ff.distill(student, [deep, trained(0)], UNLABELLED)
    assert deep.training
    assert all(torch.equal(before[name], t) for name, t in deep.state_dict().items())
    assert result.model.state_dict().keys() == student.state_dict().keys()


@pytest.mark.parametrize("ensemble", ["probabilities", "logits"])
def test_the_loss_is_the_formula_of_the_documentation(ensemble: Any) -> None:
    temperature, hard, weights = 3.0, 0.25, (1.0, 3.0)
    student, teachers = trained(4), [trained(0), trained(1)]
    images, labels = LABELLED[0]
    with torch.no_grad():
        logits = [teacher(images) / temperature for teacher in teachers]
        s = student(images)
    if ensemble == "probabilities":
        q = (logits[0].softmax(1) + 3 * logits[1].softmax(1)) / 4
    else:
        q = ((logits[0] + 3 * logits[1]) / 4).softmax(1)
    divergence = (q * (q.log() - (s / temperature).log_softmax(1))).sum(1).mean()
    expected = (1 - hard) * temperature**2 * divergence
    expected += hard * nn.functional.cross_entropy(s, labels)
    result = ff.distill(
        student,
        teachers,
        [(images, labels)],
        weights=weights,
        ensemble=ensemble,
        temperature=temperature,
        hard_weight=hard,
    )
    assert result.report.losses == pytest.approx([expected.item()], rel=1e-4)


def test_a_student_that_is_its_own_teacher_has_nothing_to_learn() -> None:
    model = trained(0)
    result = ff.distill(model, [model], UNLABELLED, training=ff.Training(optimizer=SGD))
    assert abs(result.report.losses[0]) < 1e-6
    for name, tensor in result.model.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=1e-4, rtol=1e-4)


def test_a_teacher_of_weight_zero_takes_no_part_and_a_list_is_shown_once() -> None:
    calls: list[int] = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return x[:, :10]

    teacher = nn.Sequential(Counting(), nn.Linear(10, 10))
    thrice = ff.Training(epochs=3)
    ff.distill(trained(0), [teacher, trained(1)], UNLABELLED, weights=[0, 1], training=thrice)
    assert not calls
    ff.distill(trained(0), [teacher], UNLABELLED, training=thrice)
    assert len(calls) == len(UNLABELLED)
    loader = DataLoader(TensorDataset(IMAGES[SERVER]), batch_size=50, shuffle=True)
    ff.distill(trained(0), [teacher], loader, training=thrice)
    assert len(calls) == 4 * len(UNLABELLED)


# --- Refusals -------------------------------------------------------------------------------------


def spoilt(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    return network


Act = Callable[[], Any]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: ff.fine_tune(trained(0), []), "no batches"),
        (lambda: ff.fine_tune(trained(0), UNLABELLED), "no labels"),
        (lambda: ff.Training(epochs=0), "epochs must be a whole number"),
        (lambda: ff.Training(patience=1), "needs held_out"),
        (lambda: ff.fine_tune(spoilt(trained(0)), LABELLED), "loss is nan in epoch 1"),
        (lambda: ff.fine_tune(trained(0), [({"img": 1}, 2)]), "cannot be run on a batch"),
        (lambda: ff.fine_tune(trained(0), [{"img": 1}]), "inputs="),
        (
            lambda: ff.fine_tune(trained(0), (b for b in LABELLED), training=ff.Training(epochs=2)),
            "generator",
        ),
        (lambda: ff.Training(held_out=iter(LABELLED)), "read in every epoch"),
        (lambda: ff.distill(trained(0), [], UNLABELLED), "no teachers"),
        (lambda: ff.distill(trained(0), [trained(1)], IMAGES), r"torch.split\(inputs, 64\)"),
        (lambda: ff.distill(trained(0), [trained(1)], UNLABELLED, weights=[0]), "weights are zero"),
        (lambda: ff.distill(trained(0), [spoilt(trained(1))], UNLABELLED), "teacher 0 .* finite"),
        (
            lambda: ff.distill(trained(0), [trained(1), nn.Linear(64, 5)], UNLABELLED),
            r"teacher 1 has outputs of shape \(50, 5\)",
        ),
        (lambda: ff.distill(trained(0), [nn.Linear(64, 5)], UNLABELLED), "the student's"),
        (lambda: ff.distill(trained(0), [nn.Linear(3, 10)], UNLABELLED), "teacher 0 cannot be run"),
        (lambda: ff.distill(trained(0), [nn.Flatten(0)], UNLABELLED), "no parameters"),
        (lambda: ff.distill(trained(0), [trained(1)], UNLABELLED, temperature=0), "temperature"),
        (lambda: ff.distill(trained(0), [trained(1)], UNLABELLED, hard_weight=2), "hard_weight"),
        (lambda: ff.distill(trained(0), [trained(1)], UNLABELLED, hard_weight=0.5), "no labels"),
        (
            lambda: ff.distill(trained(0), [trained(1)], UNLABELLED, ensemble="mean"),  # type: ignore[arg-type]
            "ensemble must be one of",
        ),
        (lambda: Distillation(UNLABELLED, rounds=0), "rounds must be"),
        (lambda: Distillation(iter(UNLABELLED)), "read in every epoch"),
        (lambda: Distillation(UNLABELLED, rounds=[]), "names no round"),
        (lambda: Distillation(UNLABELLED, rounds=[0, 1]), "every one of rounds must be"),
        (lambda: Distillation(UNLABELLED, rounds="12"), "every one of rounds must be"),  # type: ignore[arg-type]
        (lambda: ff.distill(trained(0), trained(1), UNLABELLED), "not a single one"),  # type: ignore[arg-type]
        (
            lambda: ff.fine_tune(
                trained(0), LABELLED, training=ff.Training(optimizer=partial(SGD, lr=1e38))
            ),
            "the loss is|the network after fine_tune: tensor '.*' has non-finite values",
        ),
        (
            lambda: ff.fine_tune(
                trained(0),
                LABELLED,
                training=ff.Training(held_out=[(DIGIT * torch.nan, LABELS[:2])]),
            ),
            "held_out is not a number",
        ),
        (
            lambda: OTFusion(
                digits_network(),
                DIGIT,
                refine=FineTuning(LABELLED, training=ff.Training(held_out=UNLABELLED)),
            ),
            "no labels",
        ),
        (
            lambda: OTFusion(
                digits_network(), DIGIT, combine="median", refine=Distillation(UNLABELLED)
            ),
            "a single teacher can spoil the ensemble",
        ),
        (lambda: Distillation(IMAGES), "torch.split"),
        (lambda: every(0), "every must be"),
        (
            lambda: OTFusion(digits_network(), DIGIT, refine=Distillation([torch.zeros(2, 3)])),
            "cannot be run on a batch",
        ),
        (lambda: OTFusion(digits_network(), DIGIT, refine=FineTuning([])), "no batches"),
        (lambda: OTFusion(digits_network(), DIGIT, refine="distil"), "refine must be FineTuning"),  # type: ignore[arg-type]
    ],
)
def test_what_does_not_fit_is_refused(act: Act, message: str) -> None:
    with pytest.raises(ff.FusionError, match=message):
        act()


# --- As a step of the strategies ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "due"),
    [(1, [1]), (2, [1, 2]), (range(2, 4), [2, 3]), (every(2), [2, 4]), ({3}, [3])],
)
def test_a_schedule_says_which_rounds_end_with_a_refinement(rounds: Any, due: list[int]) -> None:
    strategy = OTFusion(digits_network(), DIGIT, refine=Distillation(UNLABELLED, rounds=rounds))
    result, _ = run_digits(strategy, digits_app(), rounds=4)
    refined = [n for n, report in strategy.reports.items() if report.refinement is not None]
    assert refined == due
    with_loss = [n for n, m in result.train_metrics_clientapp.items() if "refinement-loss" in m]
    assert with_loss == due


def test_a_strategy_distils_its_clients_as_the_functions_do() -> None:
    twice = ff.Training(epochs=2)
    options: dict[str, Any] = {"training": twice, "temperature": 2.0, "weighted": True}
    seen: list[tuple[nn.Module, list[nn.Module], list[float]]] = []

    class Watching(Distillation):
        def refined(
            self, model: nn.Module, clients: Sequence[nn.Module], weights: Sequence[float]
        ) -> ff.RefinementResult:
            seen.append((model, list(clients), list(weights)))
            return super().refined(model, clients, weights)

    strategy = OTFusion(digits_network(), DIGIT, refine=Watching(UNLABELLED, **options))
    result, _ = run_digits(strategy, digits_app(), rounds=1)
    ((fused, clients, weights),) = seen
    assert sorted(weights) == [250, 300, 450, 500]
    expected = ff.distill(
        fused,
        clients,
        UNLABELLED,
        temperature=2.0,
        weights=weights,
        training=twice,
    )
    for name, tensor in expected.model.state_dict().items():
        torch.testing.assert_close(torch.from_numpy(result.arrays[name].numpy()), tensor)


def test_the_fused_network_may_be_a_teacher_too() -> None:
    fused, clients = trained(0), [trained(1), trained(2)]
    for weighted, weights in ((False, [1, 1, 1]), (True, [1, 3, 2])):
        step = Distillation(UNLABELLED, weighted=weighted, fused_teaches=True)
        found = step.refined(fused, clients, [1.0, 3.0]).report
        expected = ff.distill(fused, [*clients, fused], UNLABELLED, weights=weights).report
        assert found.losses == expected.losses


def test_clients_of_several_architectures_teach_every_architecture() -> None:
    strategy = cla_strategy(refine=Distillation(UNLABELLED, training=ff.Training(epochs=3)))
    strategy.start(InProcessGrid(mixed_app(), NODES), num_rounds=1)
    reports = strategy.architecture_reports[1]
    assert reports.keys() == set(OF_PARTITION)
    for report in reports.values():
        assert report.refinement is not None
        assert report.refinement.losses[-1] < report.refinement.losses[0]


def test_an_architecture_whose_outputs_do_not_fit_is_named_before_the_first_round() -> None:
    with pytest.raises(ff.FusionError, match=r"architecture 'deep': .* cannot be run on a batch"):
        cla_strategy(refine=Distillation([torch.zeros(2, 3)]))


Refine = Callable[[nn.Module], Any]


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters()).zero_()
    raise ff.FusionError("on purpose")


def result_of(model: nn.Module) -> ff.RefinementResult:
    return ff.RefinementResult(model, ff.RefinementReport("own", (), (), 0, 0.0))


def test_tensors_in_a_report_do_not_end_the_run(tmp_path: Path) -> None:
    class Own:
        rounds = (1, 2)
        clients_teach = False

        def refined(self, model: nn.Module, clients: Any, weights: Any) -> ff.RefinementResult:
            loss: Any = torch.tensor(0.5)
            report = ff.RefinementReport("own", (loss,), (loss,), loss, loss)
            return ff.RefinementResult(model, report)

        def try_out(self, model: nn.Module) -> None:
            pass

    strategy = OTFusion(digits_network(), DIGIT, refine=Own(), checkpoint_dir=tmp_path)
    result, _ = run_digits(strategy, digits_app(), rounds=2)
    assert result.train_metrics_clientapp[2]["refinement-loss"] == 0.5
    assert len(list(tmp_path.glob("round-*/checkpoint.json"))) == 2


@pytest.mark.parametrize(
    ("refine", "message"),
    [
        (in_place, "on purpose"),
        (lambda model: 1 / 0, "ZeroDivisionError"),
        (lambda model: None, "AttributeError"),
        (lambda model: result_of(spoilt(model)), "cannot be used"),
        (lambda model: result_of(nn.Linear(64, 10)), "RuntimeError"),
    ],
)
def test_a_refinement_that_fails_leaves_the_fused_model(
    refine: Refine, message: str, flower_log: pytest.LogCaptureFixture
) -> None:
    class Own:
        rounds = (1,)
        clients_teach = False

        def refined(self, model: nn.Module, clients: Any, weights: Any) -> Any:
            return refine(model)

        def try_out(self, model: nn.Module) -> None:
            pass

    plain, _ = run_digits(OTFusion(digits_network(), DIGIT), digits_app(), rounds=1)
    strategy = OTFusion(digits_network(), DIGIT, refine=Own())
    kept, _ = run_digits(strategy, digits_app(), rounds=1)
    assert strategy.reports[1].refinement is None
    assert "round 1: the fused model is not refined" in flower_log.text
    assert message in flower_log.text
    assert f"(clients {dict(enumerate(strategy.fused_nodes[1]))})" in flower_log.text
    for name, array in kept.arrays.items():
        torch.testing.assert_close(
            torch.from_numpy(array.numpy()), torch.from_numpy(plain.arrays[name].numpy())
        )


def test_the_clients_networks_are_not_built_for_fine_tuning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    class Watching(FineTuning):
        def refined(self, model: nn.Module, clients: Any, weights: Any) -> ff.RefinementResult:
            seen.append(clients)
            return super().refined(model, clients, weights)

    run_digits(OTFusion(digits_network(), DIGIT, refine=Watching(LABELLED)), digits_app(), rounds=1)
    assert isinstance(seen[0], BuiltOnAccess)


def test_under_a_wrapper_it_is_refused() -> None:
    strategy = OTFusion(digits_network(), DIGIT, refine=FineTuning(LABELLED))
    grid: Any = InProcessGrid(digits_app(), NODES)
    with pytest.raises(ff.FusionError, match="refine= works in rounds that"):
        strategy.configure_train(1, record(digits_network()), ConfigRecord(), grid)
