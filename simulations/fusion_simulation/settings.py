"""The run configuration of the app, read and checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

CHOICES: dict[str, tuple[str, ...]] = {
    "dataset": ("digits", "mnist", "fashion-mnist", "cifar10"),
    "repair": ("auto", "none"),
    "partition": ("label-skill", "dirichlet", "iid", "own"),
    "head": ("", "serve", "send"),
}
FLOWERS_STRATEGIES = ("fedavg", "fedprox")
FUSION_STRATEGIES = ("ot", "cla")
"""Those with a rule."""
BASELINE = "baseline"
"""Key of the train config by which clients know that FedAvg's own federation runs."""
LABELS = 10
ADAPTED = "vit-lora"
"""Kind of the model that is a base with adapters."""
MLP_WIDTHS = (400, 200, 100, 50, 25)
MLP_DEPTH = 3
# Channels of a residual network's first stage, and how many groups its GroupNorms have.
RESNET_WIDTH = 16
RESNET_NORM_GROUPS = 4


@dataclass(frozen=True)
class Settings:
    """The run configuration; each field is the key of the same name with hyphens."""

    strategy: str
    combine: str
    combine_rounds: int
    statistics: bool
    head: str
    repair: str
    proximal_mu: float
    dataset: str
    data_dir: str
    download: bool
    partition: str
    alpha: float
    special_label: int
    shared_start: bool
    models: str
    calibration: int
    distill_rounds: int
    local_epochs: int
    learning_rate: float
    momentum: float
    batch_size: int
    num_server_rounds: int
    baseline: bool
    repetitions: int
    seed: int
    output_dir: str
    checkpoint_dir: str
    resume: bool

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any]) -> Settings:
        """Read and check a Flower run configuration.

        Parameters
        ----------
        run_config : Mapping[str, Any]
            The run configuration of a Flower context; every key of the app's
            ``pyproject.toml`` must be there.

        Returns
        -------
        Settings
            The checked settings.

        Raises
        ------
        ValueError
            If a key is unknown or a value is not allowed.
        """
        keys = {field.name.replace("_", "-"): str(field.type) for field in fields(cls)}
        unknown = sorted(set(run_config) - set(keys))
        if unknown:
            raise ValueError(
                f"unknown run-config keys: {', '.join(unknown)}; allowed: {', '.join(keys)}"
            )
        values = {
            key.replace("-", "_"): _typed(key, run_config[key], kind) for key, kind in keys.items()
        }
        settings = cls(**values)
        settings._check()
        return settings

    @property
    def sends_statistics(self) -> bool:
        """Whether clients send the moments of what their layers see."""
        takes_them = self.combine == "least-squares" or (
            # Of layers that do not travel nobody needs the moments.
            self.combine == "auto" and not self.exchanges_adapters
        )
        return self.statistics and self.strategy in FUSION_STRATEGIES and takes_them

    @property
    def exchanges_adapters(self) -> bool:
        """Whether clients train adapters over a base that does not travel."""
        return architecture(self.architectures[0])[0] == ADAPTED

    @property
    def runs_baseline(self) -> bool:
        """Whether FedAvg's own federation is run after the strategy's."""
        several_rounds = self.num_server_rounds > 1 and len(self.architectures) == 1
        return self.baseline and several_rounds and self.strategy not in FLOWERS_STRATEGIES

    @property
    def further_seeds(self) -> range:
        """Seeds with which the server repeats the comparison, where that costs seconds."""
        is_small = self.dataset == "digits" and architecture(self.architectures[0])[0] == "mlp"
        is_once = self.num_server_rounds == 1 and len(self.architectures) == 1
        is_fusion_alone = not self.distill_rounds and not self.head and not self.resume
        if self.partition == "label-skill" and is_small and is_once and is_fusion_alone:
            return range(self.seed + 1, self.seed + self.repetitions)
        return range(0)

    @property
    def architectures(self) -> list[str]:
        """The different models of the clients."""
        return list(dict.fromkeys(self.models.split(",")))

    def model_of(self, partition_id: int) -> str:
        """Return the model of a client: those that ``models`` lists, in turn."""
        listed = self.models.split(",")
        return listed[partition_id % len(listed)]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings under their run-config keys."""
        return {field.name.replace("_", "-"): getattr(self, field.name) for field in fields(self)}

    def _check(self) -> None:
        for key, allowed in CHOICES.items():
            check_choice(key, getattr(self, key), allowed)
        for model in self.architectures:
            architecture(model)
        adapted = {architecture(model)[0] == ADAPTED for model in self.architectures}
        if len(adapted) > 1:
            raise ValueError(f"models={self.models!r}: adapters go together with adapters alone")
        if len(self.architectures) > 1 and self.strategy != "cla":
            raise ValueError(
                f"models={self.models!r} names several models, which strategy={self.strategy!r} "
                "cannot put together; use strategy='cla', or one model"
            )
        check_choice("special-label", str(self.special_label), [str(n) for n in range(LABELS)])
        self._check_numbers()
        self._check_folders()
        self._check_strategy()

    def _check_numbers(self) -> None:
        for key in (
            "alpha",
            "learning_rate",
            "local_epochs",
            "batch_size",
            "num_server_rounds",
            "repetitions",
        ):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key.replace('_', '-')} must be greater than 0")
        for key in ("combine_rounds", "proximal_mu", "calibration", "distill_rounds"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key.replace('_', '-')} must not be negative")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    def _check_folders(self) -> None:
        for key in ("data-dir", "output-dir", "checkpoint-dir"):
            folder = getattr(self, key.replace("-", "_"))
            if folder and not Path(folder).expanduser().is_absolute():
                raise ValueError(
                    f"{key} must be an absolute path, got {folder!r}: "
                    "a Flower run does not work in the folder it is started from"
                )
        if self.resume and not self.checkpoint_dir:
            raise ValueError("resume=true needs checkpoint-dir, the folder to go on from")

    def _check_strategy(self) -> None:
        if self.strategy in FLOWERS_STRATEGIES:
            if self.distill_rounds:
                raise ValueError(f"strategy={self.strategy!r} is Flower's: it distils nothing")
            if self.checkpoint_dir:
                raise ValueError(
                    f"strategy={self.strategy!r} is Flower's: it writes no checkpoints"
                )
        if self.distill_rounds and not self.calibration:
            raise ValueError("distill-rounds needs calibration: the server's images to distil on")
        if self.strategy in FUSION_STRATEGIES:
            if self.combine == "least-squares" and not self.statistics:
                raise ValueError(
                    "combine='least-squares' needs the moments that clients send with "
                    "statistics=true; without them use combine='auto'"
                )
        elif self.head:
            raise ValueError(
                f"head={self.head!r} is for strategies ot and cla, not {self.strategy!r}"
            )


def check_choice(key: str, value: str, allowed: tuple[str, ...] | list[str]) -> None:
    """Raise a ValueError that lists what is allowed, unless ``value`` is allowed."""
    if value not in allowed:
        raise ValueError(f"{key}={value!r} is not known; allowed: {', '.join(allowed)}")


def architecture(models: str) -> tuple[str, tuple[int, ...]]:
    """Read the kind and the sizes of a model from its name.

    Parameters
    ----------
    models : str
        ``mlp``, or ``mlp-N`` with N from 1 to 5 of the hidden widths 400, 200, 100, 50, 25;
        hidden widths such as ``mlp-64-32``; ``lenet``; the depth (11 or 13) and the first width
        of a VGG, such as ``vgg-11-64``; the depth and the width factor of a residual network of
        three stages, such as ``resnet-8`` or ``resnet-20-4``; the depth and the first width of
        one with GroupNorm, such as ``gn-resnet-8`` or ``gn-resnet-14-8``; ``resnet-18`` or
        ``resnet-34``; or the rank of adapters over a vision transformer, such as ``vit-lora-8``.

    Returns
    -------
    tuple of (str, tuple of int)
        ``("mlp", hidden widths)``, ``("lenet", ())``, ``("vgg", (depth, first width))``,
        ``("resnet", (depth, width factor))``, ``("gn-resnet", (depth, first width))`` or
        ``("vit-lora", (rank,))``.
    """
    rank = models.removeprefix(f"{ADAPTED}-")
    if rank != models and rank.isdecimal() and int(rank) > 0:
        return ADAPTED, (int(rank),)
    kind, *parts = models.removeprefix("gn-").split("-")
    sizes = tuple(int(part) for part in parts if part.isdecimal() and int(part) > 0)
    residual = kind == "resnet" and len(sizes) in (1, 2) and sizes[0] % 6 == 2 and sizes[0] > 2
    if models.startswith("gn-"):
        width = sizes[1] if len(sizes) > 1 else RESNET_WIDTH
        if residual and len(sizes) == len(parts) and width % RESNET_NORM_GROUPS == 0:
            return f"gn-{kind}", (sizes[0], width)
    elif len(sizes) == len(parts):
        if kind == "mlp":
            depth = sizes or (MLP_DEPTH,)
            if len(depth) == 1 and depth[0] <= len(MLP_WIDTHS):
                return kind, MLP_WIDTHS[: depth[0]]
            return kind, sizes
        if kind == "lenet" and not sizes:
            return kind, sizes
        if residual:
            return kind, (sizes[0], *(sizes[1:] or (1,)))
        if kind == "resnet" and sizes in ((18,), (34,)):
            return kind, (*sizes, 1)
        if kind == "vgg" and len(sizes) in (1, 2) and sizes[0] in (11, 13):
            return kind, (sizes[0], *(sizes[1:] or (64,)))
    raise ValueError(
        f"models={models!r} is not known; allowed: mlp, lenet, mlp with a number of hidden layers "
        "up to 5, such as mlp-4, or with its hidden widths, such as mlp-64-32, vgg with its depth "
        "(11 or 13) and first width, such as vgg-11-64, or resnet with its depth (18, 34, or 8, "
        "14, 20, ... and a width factor, such as resnet-20-4), gn-resnet with its depth and "
        "first width, such as gn-resnet-8-16, or vit-lora with the adapters' rank: vit-lora-8"
    )


def _typed(key: str, value: Any, kind: str) -> Any:
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value).__name__ != kind:
        raise ValueError(f"{key} must be a value of type {kind}, got {value!r}")
    return value
