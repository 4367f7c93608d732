"""All experiments by name; every module declares its own in ``EXPERIMENTS``."""

from benchmarks.experiments import (
    adapters,
    architectures,
    baselines,
    batchnorm,
    cost,
    depth,
    heads,
    local_parts,
    mixed_federation,
    one_round,
    one_shot,
    passes,
    pruning,
    robust,
    rounds,
    skill_transfer,
    speed,
    transplantation,
)

EXPERIMENTS = {
    own.name: own
    for module in (
        skill_transfer,
        one_shot,
        pruning,
        depth,
        transplantation,
        rounds,
        heads,
        batchnorm,
        local_parts,
        adapters,
        one_round,
        baselines,
        mixed_federation,
        robust,
        cost,
        passes,
        speed,
        architectures,
    )
    for own in module.EXPERIMENTS
}
