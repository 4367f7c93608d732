"""What the experiments work with: data, cached training, fine-tuning, distillation, scores."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from fusion_simulation.data import LabelledImages, MixedImages, load_split
from fusion_simulation.task import (
    DISTILLATION_BATCH,
    DISTILLATION_OPTIMIZER,
    DISTILLATION_TEMPERATURE,
    accuracy,
    build_model,
    class_probabilities,
    ensemble_probabilities,
    train,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import flwr_fusion as ff
from benchmarks.compared_methods import ENSEMBLE, moments
from benchmarks.declarations import Scale, Scores, Task, after
from flwr_fusion.statistics import Statistics

# Seeds of one repetition are kept apart from those of the next by this factor.
SEED_STRIDE = 1000


@dataclass(frozen=True)
class Bench:
    """One repetition of an experiment.

    Parameters
    ----------
    scale : Scale
        How much is run.
    seed : int
        Number of the repetition.
    data_dir : str
        Folder that torchvision reads.
    cache : Path
        Folder of trained networks.
    device : str
        Where networks are trained and fused.
    """

    scale: Scale
    seed: int
    data_dir: str
    cache: Path
    device: str = "cpu"

    def task(self, name: str) -> Task:
        """Return the task of a name in the scale."""
        task: Task = getattr(self.scale, name)
        return task

    def model(self, name: str) -> str:
        """Return the network of a name in the scale; other names are networks themselves."""
        return str(getattr(self.scale, name, name))

    def images(self, task: Task) -> LabelledImages:
        """Return a task's training images, the server's left out; the same for every seed."""
        data, order = self._split(task)
        return data.subset(np.sort(order[self._held_back(data) :][: task.images]))

    def unlabelled(self, task: Task) -> Tensor:
        """Return the server's images, which no network is trained on."""
        return self._server_images(task).images

    def best(self, models: Sequence[nn.Module], task: Task) -> nn.Module:
        """Return the network that is best on the server's images, whose labels only this uses."""
        own = self._server_images(task)
        return max(models, key=lambda m: accuracy(class_probabilities(m, own.images), own.labels))

    def _server_images(self, task: Task) -> LabelledImages:
        data, order = self._split(task)
        return data.subset(order[: self._held_back(data)])

    def test(self, task: Task) -> LabelledImages:
        """Return the test images."""
        return self._loaded(task, False)

    def everything(self, task: Task) -> LabelledImages:
        """Return all training images of a task's data set."""
        return self._loaded(task, True)

    def network(
        self,
        task: Task,
        model: str,
        member: int,
        part: tuple[str, np.ndarray] | None = None,
        bias: bool = True,
    ) -> nn.Module:
        """Return a trained network, from the cache if it is there.

        Parameters
        ----------
        task : Task
            Data and training.
        model : str
            Name of the architecture.
        member : int
            Which of the repetition's networks; every one has its own start.
        part : tuple of (str, array), optional
            A name for the images that it is trained on, and their indices. Default: all.
        bias : bool
            Whether its layers have biases.

        Returns
        -------
        nn.Module
            The network, in evaluation mode.
        """
        own_seed = SEED_STRIDE * self.seed + member + 1
        network = build_model(model, task.dataset, own_seed, bias).to(self.device)
        name = "all" if part is None else part[0]
        path = self._cached(task, model, bias) / f"{name}_{own_seed}.safetensors"
        if path.is_file():
            network.load_state_dict(load_file(path, device=self.device))
            return network.eval()
        data = self.images(task)
        train(network, data if part is None else data.subset(part[1]), task.recipe, own_seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may be training the same network.
        whole = path.with_suffix(f".{os.getpid()}")
        save_file(network.state_dict(), whole)
        whole.replace(path)
        return network.eval()

    def _cached(self, task: Task, model: str, bias: bool) -> Path:
        """Return a folder of networks; everything that their training depends on is in its name."""
        data, recipe = self.everything(task), task.recipe
        images = f"{task.images}of{len(data)}without{self._held_back(data)}"
        trained = (
            f"epochs{recipe.epochs}_lr{recipe.learning_rate}_momentum{recipe.momentum}"
            f"_batch{recipe.batch_size}_{self.device}"
        )
        network = f"{model}_{'bias' if bias else 'nobias'}"
        return self.cache / f"{task.dataset}_{images}_{network}_{trained}"

    def score(self, model: nn.Module, task: Task) -> float:
        """Return test accuracy in %."""
        test = self.test(task)
        return 100 * accuracy(class_probabilities(model, test.images), test.labels)

    def ensemble_score(
        self, models: Sequence[nn.Module], task: Task, weights: Sequence[float] | None = None
    ) -> float:
        """Return the test accuracy of the mean of the networks' probabilities, in %."""
        test = self.test(task)
        answers = [class_probabilities(model, test.images) for model in models]
        weights = [1.0] * len(models) if weights is None else weights
        return 100 * accuracy(ensemble_probabilities(answers, weights), test.labels)

    def rows(
        self,
        networks: Mapping[str, nn.Module],
        task: Task,
        ensemble: Sequence[nn.Module] = (),
        tune: bool = True,
    ) -> Scores:
        """Return the scores of networks by name, and of the ensemble of some others.

        Parameters
        ----------
        networks : mapping of str to nn.Module
            The networks.
        task : Task
            Data and fine-tuning.
        ensemble : sequence of nn.Module
            Networks that answer together; none: no such row.
        tune : bool
            Whether to fine-tune the networks.

        Returns
        -------
        Scores
            Test accuracy in % at once and, if they are fine-tuned, after that.
        """
        scores: Scores = {
            name: self.tuned(model, task) if tune else {after(0): self.score(model, task)}
            for name, model in networks.items()
        }
        if ensemble:
            scores[ENSEMBLE] = {after(0): self.ensemble_score(ensemble, task)}
        return scores

    def tuned(self, model: nn.Module, task: Task) -> dict[str, float]:
        """Return test accuracy at once and after fine-tuning on all images, by column."""
        return {
            after(epochs): self.score(network, task)
            for epochs, network in self.tuned_networks(model, task)
        }

    def tuned_networks(self, model: nn.Module, task: Task) -> Iterator[tuple[int, nn.Module]]:
        """Yield a network at once and after fine-tuning on all images, with the epochs."""
        recipe, done = task.recipe, 0
        optimizer = partial(torch.optim.SGD, lr=task.tuning_rate, momentum=recipe.momentum)
        loader = Shuffled(self.images(task), recipe.batch_size, self.seed)
        for epochs in self.scale.checkpoints:
            if epochs > done:
                training = ff.Training(epochs - done, optimizer, anneal=False)
                model = ff.fine_tune(model, loader, training=training).model
                done = epochs
            yield epochs, model

    def distilled(self, student: nn.Module, teachers: Sequence[nn.Module], task: Task) -> nn.Module:
        """Return a network after distillation on the server's unlabelled images.

        They are moved and mixed with each other, and the temperature is 2: a thousand images as
        they are do not tell enough of the teachers.
        """
        large = task.dataset == "cifar10"
        epochs = self.scale.cifar_distillation_epochs if large else self.scale.distillation_epochs
        return ff.distill(
            student,
            teachers,
            MixedImages(self.unlabelled(task), DISTILLATION_BATCH, self.seed),
            temperature=DISTILLATION_TEMPERATURE,
            training=ff.Training(epochs, DISTILLATION_OPTIMIZER),
        ).model

    def calibration(self, task: Task) -> Tensor:
        """Return 400 unlabelled images, to match and to repair with."""
        return self.unlabelled(task)[:400]

    def moments(self, model: nn.Module, task: Task, part: np.ndarray | None = None) -> Statistics:
        """Return the input moments of a network on the images that it was trained on."""
        data = self.images(task)
        own = data if part is None else data.subset(part)
        return moments(model, own.images)

    def _held_back(self, data: LabelledImages) -> int:
        return min(self.scale.unlabelled, len(data) // 10)

    def _split(self, task: Task) -> tuple[LabelledImages, np.ndarray]:
        data = self.everything(task)
        return data, np.random.default_rng(0).permutation(len(data))

    def _loaded(self, task: Task, train: bool) -> LabelledImages:
        if (task.dataset, train) not in self._data:
            data = load_split(task.dataset, train=train, data_dir=self.data_dir)
            moved = LabelledImages(data.images.to(self.device), data.labels.to(self.device))
            self._data[task.dataset, train] = moved
        return self._data[task.dataset, train]

    @cached_property
    def _data(self) -> dict[tuple[str, bool], LabelledImages]:
        return {}


class Shuffled:
    """Labelled batches, in another order in every epoch."""

    def __init__(self, data: LabelledImages, batch_size: int, seed: int) -> None:
        self._data, self._batch_size = data, batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self._data), generator=self._generator)
        for batch in torch.split(order, self._batch_size):
            if len(batch) > 1:  # BatchNorm cannot normalise a single sample.
                yield self._data.images[batch], self._data.labels[batch]
