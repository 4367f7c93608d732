"""The calibrated head of a federation: from the class moments of a round's evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import INFO, WARNING
from statistics import median
from typing import Any, Literal

import torch
from flwr.app import ArrayRecord
from flwr.common import log
from torch import Tensor, nn

from flwr_fusion.after.head import calibrated_head
from flwr_fusion.errors import FusionError
from flwr_fusion.networks import key_of
from flwr_fusion.rules import Rule
from flwr_fusion.statistics.classes import (
    ClassMoments,
    last_layer,
    pack_classes,
    scaled_to,
    unpack_classes,
    with_absent,
    with_shares,
)
from flwr_fusion.strategy.array_checks import arrays_of, state_of
from flwr_fusion.strategy.checkpoint import Checkpoint
from flwr_fusion.strategy.global_models import GlobalModels, checked_arrays
from flwr_fusion.strategy.reasons import Reason, RejectedReply, Rejection
from flwr_fusion.strategy.received_statistics import read_class_moments
from flwr_fusion.strategy.replies import Answer, Update

Head = Literal["serve", "send"]
HEADS = ("serve", "send")
SERVED = "served"
CLASS_MOMENTS = "class-moments"
NORMS = "head_norms"
# Clients train best from a head that is near the fused one.
RIDGES = {"serve": 0.03, "send": 0.3}
# A client counts as having at most so many times the examples of the median client.
_LARGEST_SHARE = 10
_FEWEST_COMPARED = 3
# Where there are three clients, one is not believed whose number of examples or of samples is so
# many times the median, or whose features are so many times as large: all ran the same network.
_IMPLAUSIBLE = {
    "examples": 100.0,
    "samples": 100.0,
    "mean square of its features": 10.0,
    "square of the mean of a class": 10.0,
}


class CalibratedHeads:
    """Makes the last layers of a federation's global models from class moments.

    Parameters
    ----------
    use : {"serve", "send"}
        What becomes of the model with the new head: it is evaluated, returned and saved while
        clients train from the fused head ("serve"), or takes the fused model's place ("send").
    models : GlobalModels
        The global model by architecture.
    example_inputs : Any
        What all networks are called with.
    rule : Rule, optional
        The rule of combination.

    Raises
    ------
    FusionError
        If an architecture has no single last layer, or a few clients must not decide.
    """

    def __init__(
        self, use: Head, models: GlobalModels, example_inputs: Any, rule: Rule | None
    ) -> None:
        if use not in HEADS:
            raise FusionError(f"head must be one of {HEADS} or None, not {use!r}")
        if rule is not None and rule.few_cannot_decide:
            raise FusionError(
                f"head={use!r} and {rule} do not go together: one client can move class moments"
            )
        self.use = use
        self._models = models
        self._layers = {
            name: _last_layer(name, model, example_inputs)
            for name, model in models.architectures.items()
        }
        for layer in self._layers.values():
            if not models.exchanged.takes(key_of(layer, "weight")):
                raise FusionError(f"head={use!r}: the last layer '{layer}' stays at the clients")
        self._moments: dict[str, ClassMoments] = {}
        self._norms: dict[str, float] = {}
        self.served: dict[str, ArrayRecord] = {}

    def forget(self) -> None:
        """Begin again: nothing is known of the features of other initial arrays."""
        self.served, self._moments, self._norms = {}, {}, {}

    def replaced(self, names: Iterable[str]) -> None:
        """Serve no earlier head of models that have been fused anew."""
        self.served = {n: arrays for n, arrays in self.served.items() if n not in set(names)}

    def note_norms(self, updates: Sequence[Update], name_of: Callable[[int], str]) -> None:
        """Remember the clients' mean norm of their last layers, which the next must not exceed."""
        by_name: dict[str, list[Update]] = {}
        for update in updates:
            by_name.setdefault(name_of(update.node_id), []).append(update)
        for name, those in by_name.items():
            key = key_of(self._layers[name], "weight")
            template = {key: self._models.architectures[name].state_dict()[key]}
            norms = [
                float(state_of(ArrayRecord({key: u.arrays[key]}), template)[key].norm())
                for u in those
            ]
            total = sum(u.weight for u in those)
            self._norms[name] = sum(
                u.weight * norm / total for u, norm in zip(those, norms, strict=True)
            )

    def calibrate(
        self,
        server_round: int,
        answers: Sequence[Answer],
        weights: Mapping[int, float],
        name_of: Callable[[int], str],
    ) -> tuple[int, list[Rejection]]:
        """Make the head of every architecture whose clients sent class moments.

        Returns
        -------
        tuple of (int, list of Rejection)
            How many clients' class moments were used, and why others were not.
        """
        gathered, rejections = self._gathered(answers, weights, name_of)
        if not gathered:
            text = (
                "round %s: no class moments came, the fused head stays: clients send them by "
                "attach_class_moments in @app.evaluate()"
            )
            log(WARNING, text, server_round)
            return 0, rejections
        shares = _label_shares([part for parts in gathered.values() for part in parts])
        for name, parts in gathered.items():
            try:
                self._calibrate(name, parts, shares)
            except FusionError as error:
                text = "round %s: the fused head of '%s' stays: %s"
                log(WARNING, text, server_round, name, error)
        return sum(len(parts) for parts in gathered.values()), rejections

    def kept(self) -> dict[str, dict[str, ArrayRecord]]:
        """Return what a checkpoint needs to go on, by kind and architecture."""
        moments = {
            name: arrays_of(pack_classes(moments)) for name, moments in self._moments.items()
        }
        return {SERVED: dict(self.served), CLASS_MOMENTS: moments}

    def norms(self) -> dict[str, float]:
        """Return the clients' mean norms of their last layers, by architecture."""
        return dict(self._norms)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from what `kept` and `norms` have kept; from none, if there was no head before."""
        self.forget()
        for name, arrays in checkpoint.beside.get(SERVED, {}).items():
            self._known(checkpoint, name)
            self.served[name] = checked_arrays(
                arrays, self._models.template(name), checkpoint.server_round
            )
        for name, arrays in checkpoint.beside.get(CLASS_MOMENTS, {}).items():
            network, layer = self._known(checkpoint, name), self._layers[name]
            packed = {key: torch.from_numpy(array.numpy()) for key, array in arrays.items()}
            self._moments[name] = unpack_classes(packed, network, layer)
        norms = checkpoint.details.get(NORMS, {})
        self._norms = {name: float(norms[name]) for name in norms if name in self._layers}

    def _known(self, checkpoint: Checkpoint, name: str) -> nn.Module:
        if name not in self._models.architectures:
            raise FusionError(
                f"the checkpoint of round {checkpoint.server_round} has a head of architecture "
                f"{name!r}: it is of another strategy"
            )
        return self._models.architectures[name]

    def _gathered(
        self,
        answers: Sequence[Answer],
        weights: Mapping[int, float],
        name_of: Callable[[int], str],
    ) -> tuple[dict[str, list[tuple[float, ClassMoments]]], list[Rejection]]:
        """Return weights and class moments by architecture, and why others are left out."""
        read: dict[str, dict[int, ClassMoments]] = {}
        rejections = []
        for answer in answers:
            name = name_of(answer.node_id)
            network = self._models.architectures[name]
            try:
                moments = read_class_moments(answer.content, network, self._layers[name])
            except RejectedReply as reason:
                rejections.append(Rejection(answer.node_id, reason.reason, str(reason)))
                continue
            if moments is not None:
                read.setdefault(name, {})[answer.node_id] = moments
        gathered = {}
        for name, by_node in read.items():
            odd = _implausible(by_node, weights)
            rejections += [Rejection(n, Reason.CLASS_MOMENTS, text) for n, text in odd.items()]
            believed = {node: m for node, m in by_node.items() if node not in odd}
            if not believed:
                continue
            gathered[name] = _capped([(weights[node], m) for node, m in believed.items()])
        return gathered, rejections

    def _calibrate(
        self, name: str, parts: Sequence[tuple[float, ClassMoments]], shares: Tensor
    ) -> None:
        moments = scaled_to([m for _, m in parts], [weight for weight, _ in parts])
        if name in self._moments:
            moments = with_absent(moments, self._moments[name])
        if len(self._layers) > 1:
            # An architecture's few clients may hold hardly any of a label that all others have.
            moments = with_shares(moments, shares)
            lacking = ((moments.counts == 0) & (shares > 0)).nonzero().flatten().tolist()
            if lacking:
                text = "no client of '%s' has told of labels %s: its head will hardly answer them"
                log(WARNING, text, name, lacking)
        fused = self._models.network(name)
        head = fused.get_submodule(self._layers[name])
        assert isinstance(head, nn.Linear)
        largest = max(self._norms.get(name, 0.0), float(head.weight.detach().norm()))
        sent = self.use == "send"
        model = calibrated_head(
            fused,
            moments,
            "soft",
            ridge=RIDGES[self.use],
            largest_norm=largest if sent else None,
        )
        arrays = self._models.usable_arrays(name, model)
        self._moments[name] = moments
        if sent:
            self._models.put(name, arrays)
        else:
            self.served[name] = arrays
        log(INFO, "calibrated head of '%s' from %d clients", name, len(parts))


def _label_shares(parts: Sequence[tuple[float, ClassMoments]]) -> Tensor:
    """Return how much of the weight of all clients each label has.

    A client alone in its architecture is capped by the others, too.
    """
    return torch.stack([weight * m.counts / m.samples for weight, m in _capped(parts)]).sum(0)


def _capped(parts: Sequence[tuple[float, ClassMoments]]) -> list[tuple[float, ClassMoments]]:
    """Return class moments with weights that are no more than some times the median one."""
    most = _LARGEST_SHARE * median(weight for weight, _ in parts)
    return [(min(weight, most), moments) for weight, moments in parts]


def _last_layer(name: str, model: nn.Module, example_inputs: Any) -> str:
    try:
        return last_layer(model, example_inputs)[0]
    except FusionError as error:
        raise FusionError(f"architecture {name!r}: {error}") from error


def _implausible(
    by_node: Mapping[int, ClassMoments], weights: Mapping[int, float]
) -> dict[int, str]:
    """Return why the class moments of some nodes are not believed, among three nodes or more."""
    figures = {
        "examples": {node: weights[node] for node in by_node},
        "samples": {node: moments.samples for node, moments in by_node.items()},
        "mean square of its features": {
            node: float(m.second.diagonal().sum()) / m.samples for node, m in by_node.items()
        },
        "square of the mean of a class": {
            node: float(m.means().square().sum(1).max()) for node, m in by_node.items()
        },
    }
    odd: dict[int, str] = {}
    for what, of_all in figures.items():
        # Those who are not believed are no measure of the others.
        by_figure = {node: figure for node, figure in of_all.items() if node not in odd}
        if len(by_figure) < _FEWEST_COMPARED:
            break
        usual = median(by_figure.values())
        for node, figure in by_figure.items():
            if figure > _IMPLAUSIBLE[what] * usual:
                odd[node] = (
                    f"its class moments are left out: {what} {figure:.3g}, the median client has "
                    f"{usual:.3g}"
                )
    return odd
