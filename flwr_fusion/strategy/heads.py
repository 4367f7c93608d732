"""The calibrated head of a federation: from the class moments of a round's evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from logging import INFO, WARNING
from statistics import median
from typing import Any, Literal

import torch
from flwr.app import ArrayRecord
from flwr.common import log
from torch import nn

from flwr_fusion.after.head import calibrated_head
from flwr_fusion.errors import FusionError, check_option
from flwr_fusion.networks import key_of
from flwr_fusion.rules import Rule
from flwr_fusion.statistics.classes import (
    ClassMoments,
    last_layer,
    pack_classes,
    scaled_to,
    unpack_classes,
    with_absent,
)
from flwr_fusion.strategy.array_checks import arrays_of, state_of
from flwr_fusion.strategy.checkpoint import Checkpoint
from flwr_fusion.strategy.global_models import GlobalModels, usable_arrays
from flwr_fusion.strategy.reasons import Reason, RejectedReply, Rejection
from flwr_fusion.strategy.replies import Answer, Update, read_class_moments

Head = Literal["serve", "send"]
HEADS = ("serve", "send")
SERVED = "served"
CLASS_MOMENTS = "class-moments"
# Clients train best from a head that is near the fused one.
RIDGES = {"serve": 0.01, "send": 0.1}
# Of the median number of examples: a client counts as having at most so many ...
_LARGEST_SHARE = 10
# ... and one that claims so many is not believed, where there are three.
_IMPLAUSIBLE_SHARE = 100


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
        check_option("head", use, HEADS)
        if rule is not None and rule.few_cannot_decide:
            raise FusionError(
                f"head={use!r} and {rule} do not go together: one client can move class moments"
            )
        self.use = use
        self._models = models
        self._layers = {
            name: last_layer(model, example_inputs)[0]
            for name, model in models.architectures.items()
        }
        self._moments: dict[str, ClassMoments] = {}
        self._norms: dict[str, float] = {}
        self.served: dict[str, ArrayRecord] = {}

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
        self.served = {}
        if not gathered:
            text = "round %s: no class moments came, the fused head stays; see flwr_fusion.client"
            log(WARNING, text, server_round)
        for name, parts in gathered.items():
            try:
                self._calibrate(name, parts)
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

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from what `kept` has kept; from none, where the run had no calibrated head."""
        self.served = dict(checkpoint.beside.get(SERVED, {}))
        self._moments = {}
        for name, arrays in checkpoint.beside.get(CLASS_MOMENTS, {}).items():
            packed = {key: torch.from_numpy(array.numpy()) for key, array in arrays.items()}
            network = self._models.architectures[name]
            self._moments[name] = unpack_classes(packed, network, self._layers[name])

    def _gathered(
        self,
        answers: Sequence[Answer],
        weights: Mapping[int, float],
        name_of: Callable[[int], str],
    ) -> tuple[dict[str, list[tuple[float, ClassMoments]]], list[Rejection]]:
        """Return weights and class moments by architecture, and why others are left out."""
        usual = median(weights.values()) if weights else 0.0
        gathered: dict[str, list[tuple[float, ClassMoments]]] = {}
        rejections = []
        for answer in answers:
            name, weight = name_of(answer.node_id), weights[answer.node_id]
            network = self._models.architectures[name]
            try:
                moments = read_class_moments(answer.content, network, self._layers[name])
                if moments is not None:
                    _check_weight(weight, usual, len(weights))
                    limited = min(weight, _LARGEST_SHARE * usual)
                    gathered.setdefault(name, []).append((limited, moments))
            except RejectedReply as reason:
                rejections.append(Rejection(answer.node_id, reason.reason, str(reason)))
        return gathered, rejections

    def _calibrate(self, name: str, parts: Sequence[tuple[float, ClassMoments]]) -> None:
        moments = scaled_to([m for _, m in parts], [weight for weight, _ in parts])
        if name in self._moments:
            moments = with_absent(moments, self._moments[name])
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
        arrays = usable_arrays(model, self._models.architectures[name])
        self._moments[name] = moments
        if sent:
            self._models.put(name, arrays)
        else:
            self.served[name] = arrays
        log(INFO, "calibrated head of '%s' from %d clients", name, len(parts))


def _check_weight(weight: float, usual: float, clients: int) -> None:
    if clients > 2 and weight > _IMPLAUSIBLE_SHARE * usual:
        raise RejectedReply(
            Reason.CLASS_MOMENTS,
            f"its class moments are left out: it claims {weight:g} examples, {weight / usual:.0f} "
            "times as many as the median client",
        )
