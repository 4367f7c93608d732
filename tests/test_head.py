"""The calibrated head: class moments, what is computed from them, and whole federations with it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.client import (
    CLASS_MOMENTS_RECORD,
    SAFETENSORS_KEY,
    attach_class_moments,
    declare_architecture,
)
from flwr_fusion.statistics.classes import (
    ClassMoments,
    pack_classes,
    scaled_to,
    unpack_classes,
    with_absent,
    with_shares,
)
from flwr_fusion.strategy import CLAFusion, OTFusion
from flwr_fusion.strategy.heads import Head, _implausible, _label_shares
from tests.support.grid import InProcessGrid
from tests.test_strategy import (
    DIGIT,
    IMAGES,
    LABELS,
    NODES,
    TEST,
    accuracy,
    digits_network,
    largest_difference,
    load,
    number,
    record,
    run_digits,
    train_model,
)

CLASSES, WIDTH = 4, 12
Spoil = Callable[[dict[str, Tensor]], None]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))


def data(samples: int = 400, seed: int = 0, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(CLASSES, 6, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(classes, (samples,), generator=generator)
    return means[labels] + 0.7 * torch.randn(samples, 6, generator=generator), labels


def features(model: nn.Sequential, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model[:-1](x)
    return found


def weight_of(model: nn.Sequential) -> Tensor:
    """Return the last layer's weight, without gradients."""
    head = model[2]
    assert isinstance(head, nn.Linear)
    return head.weight.detach()


# --- Class moments --------------------------------------------------------------------------------


def test_class_moments_are_the_sums() -> None:
    model, (x, y) = network(), data()
    found = ff.statistics.class_moments(model, [(x[:150], y[:150]), (x[150:], y[150:])])
    z = features(model, x)
    assert found.layer == "2"
    assert found.counts.tolist() == [int((y == c).sum()) for c in range(CLASSES)]
    for c in range(CLASSES):
        torch.testing.assert_close(found.sums[c], z[y == c].sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.second, z.T @ z, rtol=1e-4, atol=1e-3)


def test_packed_moments_come_back() -> None:
    model = network()
    found = ff.statistics.class_moments(model, [data()])
    back = unpack_classes(pack_classes(found), model, "2")
    for name in ("counts", "sums", "second"):
        torch.testing.assert_close(getattr(back, name), getattr(found, name))


def test_rare_classes_leave_no_trace() -> None:
    model, (x, y) = network(), data()
    rare = torch.cat([torch.nonzero(y != 3).flatten(), torch.nonzero(y == 3).flatten()[:1]])
    found = ff.statistics.class_moments(model, [(x[rare], y[rare])], least_count=2)
    without = ff.statistics.class_moments(model, [(x[rare[:-1]], y[rare[:-1]])])
    assert found.counts[3] == 0
    torch.testing.assert_close(found.second, without.second, rtol=1e-4, atol=1e-2)


def test_noise_is_of_the_stated_size_and_leaves_possible_moments() -> None:
    model, (x, y) = network(), data()
    options: dict[str, Any] = {"clip": 2.0, "samples": None}
    plain = ff.statistics.class_moments(model, [(x, y)], **options)
    assert float(features(model, x).norm(dim=1).max()) > 2
    assert float(plain.second.trace()) <= 4 * len(x)
    drawn = []
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        noisy = ff.statistics.class_moments(
            model, [(x, y)], noise=0.5, generator=generator, **options
        )
        unpack_classes(pack_classes(noisy), model, "2")
        drawn.append(noisy.sums - plain.sums)
    assert float(torch.stack(drawn).std()) == pytest.approx(2 * 0.5 * 2.0, rel=0.1)


def test_clients_count_by_their_weight_and_classes_are_kept() -> None:
    model = network()
    first, second = (ff.statistics.class_moments(model, [data(100, seed)]) for seed in (1, 2))
    both = scaled_to([first, second], [300, 100])
    torch.testing.assert_close(both.counts, 1.5 * first.counts + 0.5 * second.counts)
    assert both.samples == pytest.approx(200)
    fewer = ff.statistics.class_moments(model, [data(300, 3, classes=2)])
    kept = with_absent(fewer, first)
    torch.testing.assert_close(kept.sums[2:], first.sums[2:])
    torch.testing.assert_close(kept.sums[:2], fewer.sums[:2])
    torch.testing.assert_close(
        kept.within() / kept.samples, fewer.within() / fewer.samples, rtol=1e-3, atol=1e-4
    )


# --- Heads ----------------------------------------------------------------------------------------


def test_labels_count_as_all_clients_have_them() -> None:
    model, (x, y) = network(), data()
    # Of the last class hardly anything, of the first nothing.
    few = torch.cat([(y == c).nonzero().flatten()[:most] for c, most in enumerate((0, 90, 60, 3))])
    rare = ff.statistics.class_moments(model, [(x[few], y[few])])
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4])
    moments = with_shares(rare, shares)
    torch.testing.assert_close(moments.counts, 153 * torch.tensor([0, 2, 3, 4]) / 9)
    torch.testing.assert_close(moments.means(), rare.means())
    torch.testing.assert_close(moments.within(), rare.within(), rtol=1e-3, atol=1e-3)

    def rate(used: ff.statistics.ClassMoments) -> float:
        """Return how often the rare class is the answer to its samples."""
        answers = ff.calibrated_head(model, used, "soft")(x[y == 3]).argmax(1)
        return float((answers == 3).float().mean())

    assert rate(moments) > rate(rare) + 0.1


def test_no_client_alone_in_its_architecture_decides_the_shares() -> None:
    honest = ff.statistics.class_moments(network(), [data()])
    liar = replace(honest, counts=torch.tensor([997.0, 1.0, 1.0, 1.0]))
    shares = _label_shares([(300.0, honest), (300.0, honest), (1e9, liar)])
    usual = _label_shares([(300.0, honest)] * 2 + [(3000.0, liar)])
    torch.testing.assert_close(shares, usual)


def test_a_class_of_one_huge_sample_is_not_believed() -> None:
    moments = [ff.statistics.class_moments(network(), [data(300, seed, 3)]) for seed in range(3)]
    sample = 4 * moments[0].means().norm(dim=1).max() * torch.eye(WIDTH)[0]
    counts, sums = moments[2].counts.clone(), moments[2].sums.clone()
    counts[3], sums[3] = 1, sample
    second = moments[2].second + torch.outer(sample, sample)
    moments[2] = ClassMoments(counts, sums, second, moments[2].layer)
    odd = _implausible(dict(enumerate(moments)), dict.fromkeys(range(3), 300.0))
    assert list(odd) == [2]
    assert "square of the mean of a class" in odd[2]


def test_lda_is_scikit_learns() -> None:
    model, (x, y) = network(), data()
    z = features(model, x)
    head = ff.calibrated_head(model, ff.statistics.class_moments(model, [(x, y)])).get_submodule(
        "2"
    )
    assert isinstance(head, nn.Linear)
    # S + 0.1 m I is 1.1 times scikit-learn's (1 - s) S + s m I with s = 0.1 / 1.1.
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1 / 1.1).fit(z.numpy(), y.numpy())
    prior = np.log(lda.priors_)
    expected = (lda.decision_function(z.numpy()) - prior) / 1.1 + prior
    found = head(z).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_soft_head_is_the_minimum_of_its_bound() -> None:
    model, (x, y) = network(), data()
    moments = ff.statistics.class_moments(model, [(x, y)])
    head = ff.calibrated_head(model, moments, "soft", ridge=0.05).get_submodule("2")
    before = weight_of(model)
    assert isinstance(head, nn.Linear)
    z = features(model, x).double()
    means = torch.stack([z[y == c].mean(0) for c in range(CLASSES)])
    shares = torch.bincount(y) / len(y)
    gaps = z - means[y]
    within = gaps.T @ gaps / len(y)
    covariance = within + 0.1 * within.diagonal().mean() * torch.eye(WIDTH)
    spread_of_means = (means - shares.double() @ means).square().sum(1)
    pull = 0.05 * float((shares * spread_of_means).sum()) / WIDTH

    def written_out(w: Tensor, b: Tensor) -> Tensor:
        total = pull * (w - before.double()).square().sum()
        for c in range(CLASSES):
            gap = w - w[c]
            spread = torch.einsum("jd,de,je->j", gap, covariance, gap)
            total = total + shares[c] * (gap @ means[c] + b - b[c] + spread / 2).logsumexp(0)
        return total

    w = head.weight.detach().double().requires_grad_()
    b = head.bias.detach().double().requires_grad_()
    slopes = torch.autograd.grad(written_out(w, b), [w, b])
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-4


def test_heads_bring_back_what_a_spoilt_last_layer_has_lost() -> None:
    model, (x, y) = network(), data()
    train_model(model, x, y, epochs=3)
    with torch.no_grad():
        weight_of(model).add_(torch.randn(CLASSES, WIDTH))
    moments = ff.statistics.class_moments(model, [(x, y)])
    test = data(1000, 5)
    spoilt = accuracy(model, *test)
    assert spoilt < 0.7
    for kind in ("lda", "soft"):
        calibrated = ff.calibrated_head(model, moments, kind)
        assert accuracy(calibrated, *test) > spoilt + 0.15
        for name, tensor in calibrated.state_dict().items():
            assert name.startswith("2.") or torch.equal(tensor, model.state_dict()[name])


def test_classes_without_samples_are_not_answered_by_lda_and_kept_by_the_soft_head() -> None:
    model, (x, y) = network(), data(classes=2)
    moments = ff.statistics.class_moments(model, [(x, y)])
    calibrated = ff.calibrated_head(model, moments, "lda")
    assert set(calibrated(data()[0]).argmax(1).tolist()) <= {0, 1}
    soft = ff.calibrated_head(model, moments, "soft").state_dict()
    for name in ("2.weight", "2.bias"):
        assert torch.equal(soft[name][2:], model.state_dict()[name][2:])
        assert not torch.equal(soft[name][:2], model.state_dict()[name][:2])


def test_largest_norm_scales_both() -> None:
    model = network()
    moments = ff.statistics.class_moments(model, [data()])
    free, bounded = (
        ff.calibrated_head(model, moments, largest_norm=limit).get_submodule("2")
        for limit in (None, 0.5)
    )
    assert isinstance(free, nn.Linear)
    assert isinstance(bounded, nn.Linear)
    assert float(bounded.weight.detach().norm()) == pytest.approx(0.5, rel=1e-5)
    torch.testing.assert_close(bounded.bias / bounded.weight.norm(), free.bias / free.weight.norm())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vit_b_16"])
def test_public_architectures_have_heads(name: str) -> None:
    if name == "vit_b_16":
        model: nn.Module = torchvision.models.VisionTransformer(
            32, 16, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
        )
    else:
        model = torchvision.models.get_model(name, num_classes=5)
    batch = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    moments = ff.statistics.class_moments(model, [batch])
    assert moments.counts.tolist() == [2, 2, 2, 1, 1]
    scaled = moments.scaled(1000)
    calibrated = ff.calibrated_head(model, scaled, "soft")
    before, after = (
        float(nn.functional.cross_entropy(m.eval()(batch[0]), batch[1]).detach())
        for m in (model, calibrated)
    )
    assert after < before


class Twice(nn.Module):
    """Gives a class for every position."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x.unsqueeze(1).expand(-1, 3, -1))
        return logits


NOTHING_LAST = (
    "of this one, something follows its last linear layer, or it is called with more than a vector "
    "for each sample"
)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Linear(6, CLASSES), nn.Softmax(1)), NOTHING_LAST),
        (nn.Sequential(nn.Linear(6, CLASSES, bias=False)), "has no bias"),
        (Twice(), NOTHING_LAST),
        (nn.Sequential(nn.Linear(6, CLASSES), nn.ReLU(inplace=True)), NOTHING_LAST),
    ],
)
def test_other_last_layers_are_refused(model: nn.Module, reason: str) -> None:
    with pytest.raises(ff.FusionError, match=reason):
        ff.statistics.class_moments(model, [data()])


def test_bad_labels_and_batches_are_refused() -> None:
    x, y = data(10)
    for batches, reason in (
        ([x], "pairs"),
        ([(x, y.float())], "whole numbers"),
        ([(x, y + CLASSES)], "from 0 to 3"),
        ([], "no labelled batches"),
    ):
        with pytest.raises(ff.FusionError, match=reason):
            ff.statistics.class_moments(network(), batches)


def test_too_few_samples_and_other_networks_are_refused() -> None:
    moments = ff.statistics.class_moments(network(), [data(20)])
    with pytest.raises(ff.FusionError, match="20 samples are too few for 12 features"):
        ff.calibrated_head(network(), moments)
    other = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, CLASSES))
    with pytest.raises(ff.FusionError, match="which the network does not have"):
        ff.calibrated_head(other, moments.scaled(10))


# --- Federations ----------------------------------------------------------------------------------


def skewed(partition: int) -> tuple[Tensor, Tensor]:
    """Return a client's images: of its own labels many, of the others few."""
    images, labels = IMAGES[:1500], LABELS[:1500]
    own = labels % NODES == partition
    few = torch.zeros_like(own)
    few[partition::40] = True
    return images[own | few], labels[own | few]


def head_app(
    spoil: Callable[[int, RecordDict], None] | None = None,
    without: tuple[int, ...] = (),
    seen: list[dict[str, Tensor]] | None = None,
    build: Callable[[int], nn.Module] = digits_network,
    least_count: int = 1,
) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        model = load(build(partition), message.content["arrays"])
        if seen is not None:
            seen.append({n: t.clone() for n, t in model.state_dict().items()})
        train_model(model, *skewed(partition), epochs=2)
        metrics = MetricRecord({"num-examples": len(skewed(partition)[1])})
        return Message(RecordDict({"arrays": record(model), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        model = load(build(partition), message.content["arrays"])
        images, labels = skewed(partition)
        metrics = MetricRecord(
            {"num-examples": len(labels), "accuracy": accuracy(model, images, labels)}
        )
        reply = Message(RecordDict({"metrics": metrics}), reply_to=message)
        if partition not in without:
            order = torch.split(torch.arange(len(labels)), 50)
            batches = [(images[batch], labels[batch]) for batch in order]
            attach_class_moments(reply, model, batches, least_count=least_count)
        if spoil is not None:
            spoil(partition, reply.content)
        return reply

    @app.query()
    def query(message: Message, context: Context) -> Message:
        name = "wide" if int(context.node_config["partition-id"]) % 2 else "narrow"
        return declare_architecture(message, name)

    return app


def test_served_heads_are_evaluated_and_returned_but_not_trained_from() -> None:
    seen: list[dict[str, Tensor]] = []
    strategy = OTFusion(digits_network(), DIGIT, head="serve")
    result, models = run_digits(strategy, head_app(seen=seen))
    plain: list[dict[str, Tensor]] = []
    without, _ = run_digits(OTFusion(digits_network(), DIGIT), head_app(seen=plain))
    # Training is the same as without a head.
    for one, two in zip(seen, plain, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert largest_difference(result.arrays, models[3]) == 0
    assert largest_difference(result.arrays, without.arrays) > 0.01
    body = [name for name in result.arrays if not name.startswith("4.")]
    for name in body:
        assert np.array_equal(result.arrays[name].numpy(), without.arrays[name].numpy())
    for k in (1, 2, 3):
        ours = number(result.evaluate_metrics_serverapp[k], "accuracy")
        assert ours > number(without.evaluate_metrics_serverapp[k], "accuracy")
        assert result.evaluate_metrics_clientapp[k]["with-class-moments"] == NODES
    served = strategy.global_models()["model"]
    assert accuracy(served, IMAGES[TEST], LABELS[TEST]) == pytest.approx(ours)


def test_sent_heads_are_trained_from() -> None:
    seen: list[dict[str, Tensor]] = []
    strategy = OTFusion(digits_network(), DIGIT, head="send")
    result, models = run_digits(strategy, head_app(seen=seen))
    for k in (1, 2):
        sent = models[k]
        for state in seen[NODES * k : NODES * (k + 1)]:
            assert all(np.array_equal(state[n].numpy(), sent[n].numpy()) for n in sent)
    assert largest_difference(result.arrays, models[3]) == 0
    averaged, _ = run_digits(FedAvg(), head_app())
    for k in (1, 2, 3):
        ours, theirs = (
            number(r.evaluate_metrics_serverapp[k], "accuracy") for r in (result, averaged)
        )
        assert ours > theirs


class OwnLoop(OTFusion):
    """Runs its rounds itself, as many a strategy does; the replies of some rounds are lost."""

    lost: tuple[int, ...] = ()

    def start(self, grid: Grid, initial_arrays: ArrayRecord, num_rounds: int) -> Result:  # type: ignore[override]
        arrays, config = initial_arrays, ConfigRecord({"server-round": 2})
        for k in range(1, num_rounds + 1):
            sent = self.configure_train(k, arrays, config, grid)
            replies = list(grid.send_and_receive(sent))
            fused, _ = self.aggregate_train(k, [] if k in self.lost else replies)
            arrays = arrays if fused is None else fused
            sent = self.configure_evaluate(k, arrays, config, grid)
            self.aggregate_evaluate(k, grid.send_and_receive(sent))
        result = Result()
        result.arrays = arrays
        return result


def test_in_a_loop_of_a_subclass_heads_are_sent_and_what_is_returned_lacks_them(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    seen: list[dict[str, Tensor]] = []
    strategy = OwnLoop(digits_network(), DIGIT, head="send")
    grid = InProcessGrid(head_app(seen=seen), NODES)
    result = strategy.start(grid, record(digits_network()), 2)
    plain: list[dict[str, Tensor]] = []
    run_digits(OTFusion(digits_network(), DIGIT, head="send"), head_app(seen=plain))
    for one, two in zip(seen, plain, strict=False):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert "OwnLoop runs its rounds itself" in flower_log.text
    with_head = strategy.global_models()["model"]
    without = load(digits_network(), result.arrays)
    assert accuracy(with_head, IMAGES[TEST], LABELS[TEST]) > accuracy(
        without, IMAGES[TEST], LABELS[TEST]
    )


def test_in_a_loop_of_a_subclass_a_lost_round_keeps_the_sent_head() -> None:
    seen: list[dict[str, Tensor]] = []
    strategy = OwnLoop(digits_network(), DIGIT, head="send")
    strategy.lost = (2,)
    strategy.start(InProcessGrid(head_app(seen=seen), NODES), record(digits_network()), 3)
    second, third = seen[NODES], seen[2 * NODES]
    body = [name for name in second if not name.startswith("4.")]
    assert all(torch.equal(second[name], third[name]) for name in body)
    accuracies = []
    for state in (second, third):
        model = digits_network()
        model.load_state_dict(state)
        accuracies.append(accuracy(model, IMAGES[TEST], LABELS[TEST]))
    # Calibrated again, on the same features.
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.02)


def test_without_class_moments_the_fused_head_stays_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    strategy = OTFusion(digits_network(), DIGIT, head="serve")
    result, _ = run_digits(strategy, head_app(without=(0, 1, 2, 3)), rounds=2)
    plain, _ = run_digits(OTFusion(digits_network(), DIGIT), head_app(), rounds=2)
    assert largest_difference(result.arrays, plain.arrays) == 0
    said = [r.message for r in caplog.records if "no class moments came" in r.message]
    assert len(said) == 2


def changed(content: RecordDict, change: Spoil) -> None:
    data = content.config_records[CLASS_MOMENTS_RECORD][SAFETENSORS_KEY]
    assert isinstance(data, bytes)
    tensors = load_tensors(data)
    change(tensors)
    content[CLASS_MOMENTS_RECORD] = ConfigRecord({SAFETENSORS_KEY: save(tensors)})


def multiplied(kind: str, factor: float) -> Callable[[RecordDict], None]:
    def spoil(content: RecordDict) -> None:
        changed(content, lambda tensors: tensors.update({kind: factor * tensors[kind]}))

    return spoil


def replaced(values: dict[str, Any]) -> Callable[[RecordDict], None]:
    return lambda content: content.update({CLASS_MOMENTS_RECORD: ConfigRecord(values)})


BAD: dict[str, Callable[[RecordDict], None]] = {
    "NaN": multiplied("4.sums", float("nan")),
    "negative": multiplied("4.counts", -1),
    "contradiction": multiplied("4.sums", 100),
    "indefinite": multiplied("4.second", -1),
    "missing": lambda content: changed(content, lambda tensors: tensors.popitem() and None),
    "no bytes": replaced({"x": 1}),
    "garbage": replaced({SAFETENSORS_KEY: b"garbage"}),
    "a billion samples": lambda content: changed(
        content,
        lambda tensors: tensors.update({name: 1e6 * t for name, t in tensors.items()}),
    ),
    "large features": lambda content: changed(
        content,
        lambda tensors: tensors.update(
            {"4.sums": 100 * tensors["4.sums"], "4.second": 1e4 * tensors["4.second"]}
        ),
    ),
    "hardly a sample": multiplied("4.counts", 1e-6),
    "a billion examples": lambda c: c.metric_records["metrics"].update({"num-examples": 10**9}),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("head", ["serve", "send"])
def test_bad_class_moments_are_named_and_left_out(name: str, head: Any) -> None:
    def spoil(partition: int, content: RecordDict) -> None:
        if partition == 2:
            BAD[name](content)

    strategy = OTFusion(digits_network(), DIGIT, head=head)
    result, models = run_digits(strategy, head_app(spoil), rounds=1)
    good = OTFusion(digits_network(), DIGIT, head=head)
    _, expected = run_digits(good, head_app(without=(2,)), rounds=1)
    metrics = result.evaluate_metrics_clientapp[1]
    assert metrics["rejected-class-moments"] == 1
    assert metrics["with-class-moments"] == NODES - 1
    assert metrics["rejected"] == 0
    assert largest_difference(models[1], expected[1]) < 1e-5


@pytest.mark.parametrize("head", ["serve", "send"])
def test_two_liars_among_three_cannot_end_the_run(head: Any) -> None:
    def scaled(content: RecordDict, counts: float, examples: int) -> None:
        def change(tensors: dict[str, Tensor]) -> None:
            for name in tensors:
                tensors[name] = (counts if name.endswith("counts") else 1e-9) * tensors[name]

        changed(content, change)
        content.metric_records["metrics"]["num-examples"] = examples

    def spoil(partition: int, content: RecordDict) -> None:
        if partition < 2:
            scaled(content, [1.0, 1e5][partition], [10**6, 60][partition])

    strategy = OTFusion(digits_network(), DIGIT, head=head)
    result, _ = run_digits(strategy, head_app(spoil, without=(3,)), rounds=1)
    # Who is not believed is no measure of the others.
    assert result.evaluate_metrics_clientapp[1]["with-class-moments"] in (1, 2)


def test_a_class_is_kept_whose_client_is_silent_for_a_round() -> None:
    def keeps_the_fused_rows(since: int) -> bool:
        """Return whether the classes of a client that falls silent have the fused head's rows."""
        replies = [0]

        def spoil(partition: int, content: RecordDict) -> None:
            replies[0] += 1
            if partition == 2 and replies[0] > NODES * since:
                del content[CLASS_MOMENTS_RECORD]

        strategy = OTFusion(digits_network(), DIGIT, head="serve")
        # Of the labels of others clients have hardly any, and do not tell of them.
        result, _ = run_digits(strategy, head_app(spoil, least_count=30), rounds=2)
        assert result.evaluate_metrics_clientapp[2]["with-class-moments"] == NODES - 1
        served, fused = (
            arrays["4.bias"].numpy()[[2, 6]] for arrays in (result.arrays, strategy.arrays["model"])
        )
        return np.array_equal(served, fused)

    assert keeps_the_fused_rows(since=0)
    assert not keeps_the_fused_rows(since=1)


@pytest.mark.parametrize("head", ["serve", "send"])
def test_resumed_federations_have_the_same_heads(head: Any, tmp_path: Path) -> None:
    def strategy(folder: str, resume: bool = False) -> OTFusion:
        return OTFusion(
            digits_network(),
            DIGIT,
            head=head,
            checkpoint_dir=tmp_path / folder,
            resume=resume,
        )

    whole, _ = run_digits(strategy("whole"), head_app(), rounds=3)
    run_digits(strategy("halves"), head_app(), rounds=2)
    resumed, models = run_digits(strategy("halves", resume=True), head_app(), rounds=3)
    assert largest_difference(whole.arrays, resumed.arrays) == 0
    assert len(models) == 1
    files = {path.name for path in (tmp_path / "whole" / "round-00003").iterdir()}
    assert "0-model.safetensors" in files
    assert ("served-0-model.safetensors" in files) == (head == "serve")


def test_every_architecture_has_its_head() -> None:
    def build(partition: int) -> nn.Module:
        torch.manual_seed(partition)
        width = 48 if partition % 2 else 24
        return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    networks = {"narrow": build(0), "wide": build(1)}

    def after_rounds(head: Head | None) -> CLAFusion:
        strategy = CLAFusion(networks, DIGIT, head=head)
        strategy.start(InProcessGrid(head_app(build=build), NODES), num_rounds=2)
        return strategy

    plain, served, sent = (after_rounds(head) for head in (None, "serve", "send"))
    for name, model in plain.global_models().items():
        fused = accuracy(model, IMAGES[TEST], LABELS[TEST])
        assert accuracy(served.global_models()[name], IMAGES[TEST], LABELS[TEST]) > fused
        assert largest_difference(served.arrays[name], plain.arrays[name]) == 0
        assert largest_difference(sent.arrays[name], plain.arrays[name]) > 0.01


def test_labels_that_an_architecture_lacks_are_said(caplog: pytest.LogCaptureFixture) -> None:
    def build(partition: int) -> nn.Module:
        return digits_network(0)

    def forget(tensors: dict[str, Tensor]) -> None:
        for kind in ("counts", "sums"):
            tensors[f"4.{kind}"][3] = 0

    def spoil(partition: int, content: RecordDict) -> None:
        if partition % 2 == 0:  # The clients of "narrow".
            changed(content, forget)

    networks = {"narrow": build(0), "wide": build(1)}
    strategy = CLAFusion(networks, DIGIT, head="serve")
    with caplog.at_level(logging.WARNING):
        strategy.start(InProcessGrid(head_app(spoil, build=build), NODES), num_rounds=1)
    assert "no client of 'narrow' has told of labels [3]" in caplog.text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"head": "both"}, "head must be one of"),
        ({"head": "serve", "combine": "median"}, "one client can move class moments"),
        ({"head": "send", "fraction_evaluate": 0.0}, "needs fraction_evaluate above 0"),
    ],
)
def test_what_a_head_does_not_go_with_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ff.FusionError, match=reason):
        OTFusion(digits_network(), DIGIT, **options)


def test_networks_without_a_last_layer_are_refused_before_training() -> None:
    model = nn.Sequential(nn.Linear(64, 10), nn.Softmax(1))
    with pytest.raises(ff.FusionError, match="ends with one linear layer"):
        OTFusion(model, DIGIT, head="serve")


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_round_that_is_kept_keeps_the_sent_head(evaluated: bool) -> None:
    """Nobody's training arrives in round 2, and perhaps nobody evaluates either."""
    models: list[ArrayRecord] = []
    app = head_app()

    def lost(partition: int, reply: Message) -> list[Message]:
        return [] if models[1:] else [reply]

    def spoil(partition: int, content: RecordDict) -> None:
        if models[1:] and not evaluated:
            raise RuntimeError("no evaluation")

    def keep(server_round: int, arrays: ArrayRecord) -> None:
        models.append(arrays)

    strategy = OTFusion(digits_network(), DIGIT, head="send")
    grid = InProcessGrid(head_app(spoil) if not evaluated else app, NODES, mutate=lost)
    result = strategy.start(
        grid,
        record(digits_network()),
        num_rounds=2,
        evaluate_fn=keep,
    )
    body = [name for name in result.arrays if not name.startswith("4.")]
    for name in body:
        assert np.array_equal(models[2][name].numpy(), models[1][name].numpy())
    difference = largest_difference(models[2], models[1])
    assert difference < (0.5 if evaluated else 1e-9)
    averaged = accuracy(load(digits_network(), models[2]), IMAGES[TEST], LABELS[TEST])
    before = accuracy(load(digits_network(), models[1]), IMAGES[TEST], LABELS[TEST])
    assert averaged >= before - 0.05


def test_other_initial_arrays_begin_without_a_head() -> None:
    strategy = OTFusion(digits_network(), DIGIT, head="serve")
    run_digits(strategy, head_app(), rounds=1)
    _, models = run_digits(strategy, head_app(), rounds=1)
    assert largest_difference(models[0], record(digits_network())) == 0


def test_served_arrays_keep_their_order_when_resumed(tmp_path: Path) -> None:
    def strategy(resume: bool) -> OTFusion:
        return OTFusion(
            digits_network(), DIGIT, head="serve", checkpoint_dir=tmp_path, resume=resume
        )

    before, _ = run_digits(strategy(False), head_app(), rounds=1)
    after, _ = run_digits(strategy(True), head_app(), rounds=1)
    assert list(before.arrays) == list(after.arrays)
    assert largest_difference(before.arrays, after.arrays) == 0


def test_noise_hides_which_classes_there_are() -> None:
    model, (x, y) = network(), data(classes=2)
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"clip": 1.0, "noise": 20.0, "generator": generator}
    noisy = [ff.statistics.class_moments(model, [(x, y)], **options) for _ in range(20)]
    assert 3 < sum(bool(moments.counts[3] > 0) for moments in noisy) < 17


def test_samples_are_taken_from_all_batches() -> None:
    model, (x, y) = network(), data(400)
    order = y.argsort()
    batches = [(x[batch], y[batch]) for batch in torch.split(order, 20)]
    found = ff.statistics.class_moments(model, batches, samples=240)
    assert found.samples == 240
    assert bool((found.counts > 30).all())


def test_arrays_are_not_shared_between_what_is_served_and_sent() -> None:
    strategy = OTFusion(digits_network(), DIGIT, head="serve")
    run_digits(strategy, head_app(), rounds=1)
    sent = strategy.arrays["model"]
    assert isinstance(sent, ArrayRecord)
    served = ArrayRecord(strategy.global_models()["model"].state_dict())
    assert largest_difference(sent, served) > 0
