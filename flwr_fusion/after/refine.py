"""After the fusion: fine-tuning on labelled data, distillation of the clients' ensemble."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from flwr_fusion.errors import FusionError, check_count, check_number, check_option, check_positive
from flwr_fusion.fusion import shares_of
from flwr_fusion.networks import check_networks, copied, detached_state, squared_norm
from flwr_fusion.observe import (
    batch_size,
    evaluation_mode,
    first_of,
    output_of,
    training_mode,
)
from flwr_fusion.report import RefinementReport

ENSEMBLES = ("probabilities", "logits")
Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Loss = Callable[[Tensor, Tensor], Tensor]
Part = Callable[[Any], Any]

ADAM: Optimizer = partial(torch.optim.Adam, lr=1e-3)


@dataclass(frozen=True)
class RefinementResult:
    """A refined network and how it came about.

    Parameters
    ----------
    model : nn.Module
        A new network; the one that was given is not modified.
    report : RefinementReport
        Losses by epoch, and time.
    """

    model: nn.Module
    report: RefinementReport


@dataclass(frozen=True)
class Training:
    """How a network is refined.

    Parameters
    ----------
    epochs : int
        Passes over the data, at least 1.
    optimizer : callable
        Takes the parameters to train and returns a ``torch.optim.Optimizer``, for example
        ``functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)``; any that needs no closure.
        Default: Adam, 0.001.
    anneal : bool
        Lower the learning rate from epoch to epoch, along half a cosine; otherwise it stays.
    held_out : iterable of batches, optional
        Data like those trained on. The network of the epoch with the lowest loss on it is returned,
        the unrefined one included.
    patience : int, optional
        Stop after this many epochs without a lower loss on `held_out`.
    inputs, labels : callable, optional
        Return what the network is called with, and the labels, from a batch. Default: its first
        and its second element; a batch that is a tensor is the inputs itself.
    progress : bool
        Show a progress bar.

    Raises
    ------
    FusionError
        If a number is not positive, or `held_out` cannot be read more than once.
    """

    epochs: int = 1
    optimizer: Optimizer = ADAM
    anneal: bool = True
    held_out: Iterable[Any] | None = None
    patience: int | None = None
    inputs: Part | None = None
    labels: Part | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs)
        if self.patience is not None:
            check_count("patience", self.patience)
            if self.held_out is None:
                raise FusionError("patience= needs held_out=: the data whose loss is watched")
        if self.held_out is not None:
            rereadable(self.held_out)

    def inputs_of(self, batch: Any) -> Any:
        """Return what the network is called with from a batch."""
        return (self.inputs or first_of)(batch)

    def labels_of(self, batch: Any) -> Any:
        """Return the labels of a batch."""
        return (self.labels or _second_of)(batch)


DEFAULT_TRAINING = Training()


def check_training(training: Any) -> None:
    """Refuse what is no `Training`."""
    if not isinstance(training, Training):
        raise FusionError(f"training must be a Training(...), not {training!r:.60}")


def fine_tune(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss = nn.functional.cross_entropy,
    training: Training = DEFAULT_TRAINING,
) -> RefinementResult:
    """Train a network further on labelled data.

    Parameters
    ----------
    model : nn.Module
        The network, on any device. Not modified.
    batches : iterable of batches
        Labelled data, read once per epoch: a data loader or a list of batches.
    loss : callable
        ``loss(outputs, labels)``, the mean over a batch.
    training : Training
        How long, with which optimizer, and when to stop.

    Returns
    -------
    RefinementResult
        A new network on the device and in the mode of `model`.

    Raises
    ------
    FusionError
        If there are no batches, the network cannot be run on one, or the loss is not finite.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import flwr_fusion as ff
    >>> batch = torch.randn(32, 4), torch.randint(0, 2, (32,))
    >>> result = ff.fine_tune(nn.Linear(4, 2), [batch], training=ff.Training(epochs=3))
    >>> len(result.report.losses)
    3
    """
    check_batches(batches)
    check_training(training)

    def loss_of(network: nn.Module, batch: Any) -> tuple[Tensor, int]:
        inputs, labels = training.inputs_of(batch), training.labels_of(batch)
        outputs = _outputs(network, inputs, "the network")
        return loss(outputs, _moved_labels(network, labels)), batch_size(inputs)

    return _Descent(training, loss_of).run("fine_tune", model, batches, training.held_out)


def distill(
    student: nn.Module,
    teachers: Sequence[nn.Module],
    batches: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
    ensemble: Literal["probabilities", "logits"] = "probabilities",
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    training: Training = DEFAULT_TRAINING,
) -> RefinementResult:
    """Train a network to answer as an ensemble of others does, on unlabelled data.

    With ``T`` the temperature, ``h`` the hard weight, ``s`` the student's logits and ``q`` the
    ensemble's probabilities, the loss is ``(1 - h) T^2 KL(q || softmax(s / T)) + h CE(s, label)``.

    Parameters
    ----------
    student : nn.Module
        The network to refine, which gives logits of shape (samples, classes, ...). Not modified.
    teachers : sequence of nn.Module
        Networks of any architectures with outputs of the student's shape. Not modified.
    batches : iterable of batches
        Inputs, with labels only where `hard_weight` is positive. A list of batches is shown to the
        teachers once, a data loader in every epoch, so that it may shuffle and augment.
    weights : sequence of float, optional
        Relative weights of the teachers. Default: equal.
    ensemble : {"probabilities", "logits"}
        What is averaged over the teachers: ``q = sum_k w_k softmax(z_k / T)``, or
        ``q = softmax(sum_k w_k z_k / T)``.
    temperature : float
        Positive; above 1 it softens both distributions.
    hard_weight : float
        Share of the loss on the labels, from 0 to 1.
    training : Training
        As for `fine_tune`; the held-out data need labels only where `batches` do.

    Returns
    -------
    RefinementResult
        A new network on the device and in the mode of `student`.

    Raises
    ------
    FusionError
        If an option is bad, there are no batches, a network cannot be run on one, or its outputs
        do not fit the others'; it names the teacher.

    References
    ----------
    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 2; Lin et al.,
    "Ensemble Distillation for Robust Model Fusion in Federated Learning" (FedDF), NeurIPS 2020,
    algorithm 1 (which averages logits).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import flwr_fusion as ff
    >>> a, b = nn.Linear(4, 2), nn.Linear(4, 2)
    >>> fused = ff.average([a, b]).model
    >>> result = ff.distill(fused, [a, b], torch.split(torch.randn(64, 4), 16))
    >>> len(result.report.losses)
    1
    """
    check_networks(teachers, "teachers")
    check_option("ensemble", ensemble, ENSEMBLES)
    check_positive("temperature", temperature)
    check_number("hard_weight", hard_weight, 0, 1)
    check_training(training)
    faculty = _Teachers(teachers, shares_of(teachers, weights), ensemble, temperature)

    def loss_of(network: nn.Module, taught: tuple[Any, Tensor]) -> tuple[Tensor, int]:
        batch, expected = taught
        logits = _logits(network, training.inputs_of(batch), "the student").float()
        if logits.shape != expected.shape:
            raise FusionError(
                f"the teachers' outputs have shape {tuple(expected.shape)}, the student's "
                f"{tuple(logits.shape)}"
            )
        value = (1 - hard_weight) * _divergence(logits, expected.to(logits.device), temperature)
        if hard_weight:
            labels = _moved_labels(network, training.labels_of(batch))
            value = value + hard_weight * nn.functional.cross_entropy(logits, labels)
        return value, len(logits)

    held_out = training.held_out
    shown = None if held_out is None else _Taught(held_out, training.inputs_of, faculty)
    taught = _Taught(batches, training.inputs_of, faculty)
    return _Descent(training, loss_of).run("distill", student, taught, shown)


@dataclass(frozen=True)
class _Descent:
    """Gradient descent with early stopping; ``loss_of`` returns a batch's mean loss and size."""

    training: Training
    loss_of: Callable[[nn.Module, Any], tuple[Tensor, int]]

    def run(
        self, name: str, model: nn.Module, batches: Iterable[Any], held_out: Iterable[Any] | None
    ) -> RefinementResult:
        """Return a trained copy of a network."""
        started = time.perf_counter()
        training = self.training
        refined = copied(model)
        best = _Best(None if held_out is None else partial(self._held_out_loss, held_out))
        losses: list[float] = []
        try:
            optimizer = training.optimizer(refined.parameters())
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.epochs)
            best.add(refined, 0)
            for epoch in self._shown(name):
                losses.append(self._epoch(refined, batches, optimizer, epoch))
                if training.anneal:
                    scheduler.step()
                best.add(refined, epoch)
                if training.patience is not None and epoch - best.epoch >= training.patience:
                    break
        except FusionError:
            raise
        except Exception as error:
            raise FusionError(f"{name}: {type(error).__name__}: {error}") from error
        best.restore(refined)
        squared_norm(detached_state(refined), f"the network after {name}")
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        report = RefinementReport(name, tuple(losses), tuple(best.losses), best.epoch, seconds)
        return RefinementResult(refined, report)

    def _shown(self, name: str) -> Iterable[int]:
        epochs = range(1, self.training.epochs + 1)
        shown = self.training.progress
        return track(epochs, description=name, transient=True) if shown else epochs

    def _epoch(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        epoch: int,
    ) -> float:
        total, seen = 0.0, 0
        with training_mode(model), torch.enable_grad():
            for batch in batches:
                loss, size = self.loss_of(model, batch)
                value = loss.item()
                if not math.isfinite(value):
                    raise FusionError(
                        f"the loss is {value} in epoch {epoch}: lower the learning rate, or "
                        "check the data"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total, seen = total + value * size, seen + size
        return _mean(total, seen, f"epoch {epoch}: the data")

    def _held_out_loss(self, held_out: Iterable[Any], model: nn.Module) -> float:
        total, seen = 0.0, 0
        with evaluation_mode(model), torch.no_grad():
            for batch in held_out:
                loss, size = self.loss_of(model, batch)
                total, seen = total + loss.item() * size, seen + size
        return _mean(total, seen, "held_out")


class _Best:
    """The network to return: the one with the lowest held-out loss, or the last one."""

    def __init__(self, held_out_loss: Callable[[nn.Module], float] | None) -> None:
        self.losses: list[float] = []
        self.epoch = 0
        self._held_out_loss = held_out_loss
        self._state: dict[str, Any] | None = None

    def add(self, model: nn.Module, epoch: int) -> None:
        """Remember the network of an epoch if it is the best so far."""
        if self._held_out_loss is None:
            self.epoch = epoch
            return
        self.losses.append(self._held_out_loss(model))
        if math.isnan(self.losses[0]):
            raise FusionError("the loss on held_out is not a number: check the data")
        if epoch == 0 or self.losses[-1] < self.losses[self.epoch]:  # A NaN is never lower.
            self.epoch = epoch
            self._state = copy.deepcopy(model.state_dict())

    def restore(self, model: nn.Module) -> None:
        """Give a network the values of the best one."""
        if self._state is not None:
            model.load_state_dict(self._state)


@dataclass(frozen=True)
class _Teachers:
    """An ensemble of networks."""

    networks: Sequence[nn.Module]
    shares: Sequence[float]
    ensemble: str
    temperature: float

    def probabilities(self, inputs: Any) -> Tensor:
        """Return the ensemble's probabilities of a batch, at the temperature."""
        total: Tensor | None = None
        for k, (network, share) in enumerate(zip(self.networks, self.shares, strict=True)):
            if share == 0:
                continue
            with evaluation_mode(network), torch.no_grad():
                logits = _logits(network, inputs, f"teacher {k}").float()
            if not bool(torch.isfinite(logits).all()):
                raise FusionError(
                    f"teacher {k} has outputs that are not finite: check it, and the inputs"
                )
            answer = (logits - logits.mean(dim=1, keepdim=True)) / self.temperature
            if self.ensemble == "probabilities":
                answer = answer.softmax(dim=1)
            if total is not None and answer.shape != total.shape:
                raise FusionError(
                    f"teacher {k} has outputs of shape {tuple(answer.shape)}, those before it of "
                    f"{tuple(total.shape)}"
                )
            total = share * answer if total is None else total + share * answer.to(total)
        assert total is not None  # Not all shares are zero.
        return total if self.ensemble == "probabilities" else total.softmax(dim=1)


class _Taught:
    """Batches, each with the ensemble's probabilities."""

    def __init__(self, loader: Iterable[Any], take: Part, teachers: _Teachers) -> None:
        check_batches(loader)
        self._loader, self._take, self._teachers = loader, take, teachers
        self._answers: list[tuple[Any, Tensor]] | None = None

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        # What cannot change from epoch to epoch is asked for once.
        if self._answers is None and isinstance(self._loader, Sequence):
            self._answers = list(self._answered(self._loader))
        return iter(self._answers) if self._answers is not None else self._answered(self._loader)

    def _answered(self, batches: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
        for batch in batches:
            yield batch, self._teachers.probabilities(self._take(batch))


def _divergence(logits: Tensor, expected: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(expected || softmax(logits / T)), the mean over samples and positions."""
    # Centred, so that little is lost where the temperature is high.
    centred = logits - logits.mean(dim=1, keepdim=True)
    log_ours = (centred / temperature).log_softmax(dim=1)
    # KL(q || p) = sum q (log q - log p); T^2 keeps the gradients' size (Hinton et al. 2015).
    divergence = nn.functional.kl_div(log_ours, expected, reduction="none").sum(dim=1)
    return temperature**2 * divergence.mean()


def _outputs(network: nn.Module, inputs: Any, who: str) -> Any:
    return output_of(network, inputs, who, "a batch (inputs= says which part it is called with)")


def _logits(network: nn.Module, inputs: Any, who: str) -> Tensor:
    outputs = _outputs(network, inputs, who)
    if not isinstance(outputs, Tensor) or outputs.dim() < 2:
        raise FusionError(
            f"{who} must give one tensor of shape (samples, classes, ...), not "
            f"{tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__}"
        )
    return outputs


def _second_of(batch: Any) -> Any:
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[1]
    raise FusionError(
        "a batch has no labels: give a data loader or a list of pairs, such as [(inputs, labels)], "
        "or say by labels= where they are"
    )


def _moved_labels(network: nn.Module, labels: Any) -> Any:
    device = next(network.parameters()).device
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, labels)


def _mean(total: float, seen: int, what: str) -> float:
    if not seen:
        raise FusionError(f"{what} has no batches; a generator can be read only once")
    return total / seen


def check_batches(batches: Any) -> None:
    """Refuse a tensor, whose rows are no batches."""
    if isinstance(batches, Tensor):
        raise FusionError(
            "the data must be an iterable of batches, not one tensor: torch.split(inputs, 64) is"
        )


def rereadable(batches: Iterable[Any]) -> Iterable[Any]:
    """Return batches; refuse what can be read only once or gives no batches."""
    check_batches(batches)
    if isinstance(batches, Iterator) or not hasattr(batches, "__iter__"):
        raise FusionError(
            "the data of a refinement are read in every epoch: give a list of batches or a data "
            "loader"
        )
    return batches
