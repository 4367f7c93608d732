"""A network with BatchNorm over rounds: its running statistics fused, or measured on the server."""

from __future__ import annotations

import copy

from benchmarks.bench import Bench
from benchmarks.declarations import GROUP, Experiment, Scores
from benchmarks.experiments.rounds import AUTO, FEDAVG, OVER_ROUNDS, Setting, networks_of
from flwr_fusion.after.repair import recompute_batchnorm


def over_rounds(bench: Bench, setting: Setting) -> Scores:
    """Run one federation; score its network as it is and with statistics of 400 images.

    Training normalises by its own batches, so that the federation is the same for both.
    """
    task, method = bench.task(setting.data), setting.method
    example_inputs = bench.test(task).images[:2]
    row = f"{setting.partition}{GROUP}{method.name}"
    scores: Scores = {row: {}, f"{row}, 400 images": {}}
    as_it_is, measured = scores.values()
    networks = networks_of(
        bench, setting, lambda ended, name: method.fuse(ended, name, example_inputs)
    )
    for number, models in enumerate(networks, start=1):
        network = copy.deepcopy(models[""])
        as_it_is[str(number)] = bench.score(network, task)
        recompute_batchnorm(network, [bench.calibration(task)])
        measured[str(number)] = bench.score(network, task)
    return scores


EXPERIMENTS = (
    Experiment(
        "batchnorm",
        "A residual network with BatchNorm, CIFAR-10, shared start",
        over_rounds,
        "round",
        "running means that go with the weights, or statistics of 400 unlabelled images",
        cases=[
            Setting("shallow_resnet", "cifar_federation", partition, "shared", method)
            for partition in ("dirichlet-0.1", "dirichlet-0.5", "iid", "label-skill")
            for method in (FEDAVG, AUTO)
        ],
        data="cifar_federation",
        rows=GROUP.join(("partition", "method")),
        baseline=FEDAVG.name,
        many_seeds=False,
        **OVER_ROUNDS,
    ),
)
