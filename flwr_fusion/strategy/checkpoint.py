"""Checkpoints of a federation: one folder for each round, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import WARNING
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from flwr.app import Array, ArrayRecord, MetricRecord
from flwr.common import log
from numpy.typing import NDArray
from safetensors.numpy import load, save

from flwr_fusion.errors import FusionError

_FORMAT = 1
_DESCRIPTION = "checkpoint.json"
_ROUND = "round-"
_UNFINISHED = ".unfinished-"
_LOCK = ".lock"

Metrics = dict[int, MetricRecord]


@dataclass(frozen=True)
class History:
    """Metrics of all rounds so far, as in Flower's ``Result``."""

    train_metrics_clientapp: Metrics = field(default_factory=dict)
    evaluate_metrics_clientapp: Metrics = field(default_factory=dict)
    evaluate_metrics_serverapp: Metrics = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A federation after a round.

    Parameters
    ----------
    server_round : int
        The round that is finished.
    arrays : dict of str to ArrayRecord
        The global model by architecture.
    history : History
        Metrics of all rounds up to this one.
    details : mapping
        What else is worth keeping, ready for JSON: what was rejected, the fusion's report.
    beside : mapping of str to (mapping of str to ArrayRecord)
        Arrays beside the global model that clients train from, by kind and architecture:
        "served", the model with the calibrated head, and the "class-moments" that it is made of.
    """

    server_round: int
    arrays: dict[str, ArrayRecord]
    history: History
    details: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Mapping[str, ArrayRecord]] = field(default_factory=dict)


class CheckpointFolder:
    """A folder of checkpoints.

    Every round has a folder of its own: a safetensors file for each architecture, and
    ``checkpoint.json`` with the round, the metrics, what was rejected, the fusion's report and the
    SHA-256 of every file and of itself. It is written under another name, flushed to the disk and
    then renamed, so that a process that is killed leaves a whole checkpoint or none.

    Parameters
    ----------
    path : str or Path
        The folder; made if it is not there.
    keep : int
        How many of the latest checkpoints are kept.

    Raises
    ------
    FusionError
        If `keep` is below 1.
    """

    def __init__(self, path: str | Path, keep: int = 3) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise FusionError(f"keep_checkpoints must be at least 1, not {keep!r}")
        self.path = Path(path).expanduser().absolute()
        self._keep = keep

    def rounds(self) -> list[int]:
        """Return the rounds that have a checkpoint, whole or not, in ascending order."""
        if not self.path.is_dir():
            return []
        names = (
            (entry.name, entry.name.removeprefix(_ROUND))
            for entry in self.path.glob(f"{_ROUND}*")
            if entry.is_dir() and not entry.is_symlink()
        )
        found = [(name, int(number)) for name, number in names if number.isdecimal()]
        return sorted(number for name, number in found if self._folder(number).name == name)

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Make the folder and keep it for one run; refuse it if that cannot be had.

        The system ends the reservation of a process that is killed.
        """
        lock = FileLock(self.path / _LOCK, timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=self.path).cleanup()
            lock.acquire()
        except Timeout as error:
            raise FusionError(
                f"another run writes its checkpoints to {self.path}: wait until it has ended, or "
                "choose another checkpoint_dir"
            ) from error
        except (OSError, ValueError) as error:  # A path can have characters that none can have.
            text = f"checkpoint_dir {str(self.path)!r} cannot be written: {error}"
            raise FusionError(text) from error
        try:
            yield
        finally:
            lock.release()

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint and delete those that are too old.

        On a full disk the oldest ones make place for it; the latest before it is kept.

        Raises
        ------
        OSError
            If it cannot be written even so; nothing unfinished is left.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()
        number = checkpoint.server_round
        # Later ones, and one of this round, are damaged: the run would have gone on from them.
        damaged = [other for other in self.rounds() if other >= number]
        oldest = [other for other in self.rounds() if other < number][:-1]
        for other in [*damaged, *oldest]:
            try:
                return self._write_whole(checkpoint)
            except OSError as error:
                self._remove_unfinished()
                text = "the checkpoint of round %s makes place for that of round %s: %s"
                log(WARNING, text, other, number, error)
                shutil.rmtree(self._folder(other), ignore_errors=True)
        try:
            return self._write_whole(checkpoint)
        except OSError:
            self._remove_unfinished()
            raise

    def _write_whole(self, checkpoint: Checkpoint) -> None:
        unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.path))
        files = {
            "arrays": _write_arrays(unfinished, checkpoint.arrays),
            "beside": {
                kind: _write_arrays(unfinished, arrays, f"{kind}-")
                for kind, arrays in checkpoint.beside.items()
            },
        }
        _write(unfinished / _DESCRIPTION, _described(checkpoint, files))
        _flush_folder(unfinished)
        folder = self._folder(checkpoint.server_round)
        if folder.exists():  # One that was found broken.
            shutil.rmtree(folder)
        unfinished.rename(folder)
        _flush_folder(self.path)
        self._tidy(checkpoint.server_round)

    def update(self, checkpoint: Checkpoint) -> None:
        """Replace what is said of a round that has been written, such as its metrics."""
        folder = self._folder(checkpoint.server_round)
        written = json.loads((folder / _DESCRIPTION).read_bytes())
        files = {kind: written[kind] for kind in ("arrays", "beside")}
        unfinished = folder / f"{_UNFINISHED}{_DESCRIPTION}"
        _write(unfinished, _described(checkpoint, files))
        unfinished.replace(folder / _DESCRIPTION)
        _flush_folder(folder)

    def latest(self) -> Checkpoint | None:
        """Return the latest whole checkpoint, or None if there is no checkpoint at all.

        Raises
        ------
        FusionError
            If there are checkpoints, but all of them are damaged, or one is of another format.
        """
        rounds = self.rounds()
        for server_round in reversed(rounds):
            try:
                return self._read(server_round)
            except _DamagedError as reason:
                folder = self._folder(server_round)
                log(WARNING, "checkpoint %s is damaged and not used: %s", folder, reason)
        if rounds:
            raise FusionError(
                f"all checkpoints in {self.path} are damaged ({rounds}): restore one of them, or "
                "choose an empty checkpoint_dir to begin again"
            )
        return None

    def _folder(self, server_round: int) -> Path:
        return self.path / f"{_ROUND}{server_round:05d}"

    def _read(self, server_round: int) -> Checkpoint:
        folder = self._folder(server_round)
        try:
            described = json.loads((folder / _DESCRIPTION).read_bytes())
            if described["format"] != _FORMAT:
                raise FusionError(
                    f"checkpoint {folder} is of format {described['format']!r:.20}, this version "
                    f"of flwr_fusion reads format {_FORMAT}: go on with the version that wrote it, "
                    "or choose an empty checkpoint_dir"
                )
            if described.pop("sha256", None) != _hash_of(described):
                raise _DamagedError(f"{_DESCRIPTION} does not have the content it was written with")
            if described["round"] != server_round:
                raise _DamagedError(f"{_DESCRIPTION} is of another round")
            arrays = {name: _arrays(folder, known) for name, known in described["arrays"].items()}
            history = {
                kind: {int(r): _metrics_from_json(values) for r, values in rounds.items()}
                for kind, rounds in described["history"].items()
            }
            beside = {
                kind: {name: _arrays(folder, known) for name, known in by_name.items()}
                for kind, by_name in described.get("beside", {}).items()
            }
            return Checkpoint(
                server_round, arrays, History(**history), described["details"], beside
            )
        except (FusionError, _DamagedError):
            raise
        except Exception as error:  # Whatever its bytes make JSON or safetensors raise.
            raise _DamagedError(f"it cannot be read: {error!r:.300}") from error

    def _tidy(self, written: int) -> None:
        """Delete checkpoints that are too old, and later ones, which are damaged."""
        later = [number for number in self.rounds() if number > written]
        earlier = [number for number in self.rounds() if number <= written]
        for number in [*later, *earlier[: -self._keep]]:
            shutil.rmtree(self._folder(number), ignore_errors=True)
        self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        """Remove what killed processes and failed writes left."""
        for path in self.path.glob(f"{_UNFINISHED}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


class _DamagedError(Exception):
    """A checkpoint that is torn or was changed."""


def _described(checkpoint: Checkpoint, files: Mapping[str, Any]) -> bytes:
    history = {
        kind: {str(r): _json_of_metrics(m) for r, m in getattr(checkpoint.history, kind).items()}
        for kind in History.__dataclass_fields__
    }
    content = {
        "format": _FORMAT,
        "round": checkpoint.server_round,
        **files,
        "history": history,
        "details": _finite(checkpoint.details),
    }
    return json.dumps(content | {"sha256": _hash_of(content)}, indent=1, allow_nan=False).encode()


def _hash_of(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _write_arrays(
    folder: Path, by_name: Mapping[str, ArrayRecord], prefix: str = ""
) -> dict[str, dict[str, str]]:
    """Write a file for each architecture; return their names and hashes."""
    files = {}
    for number, (name, arrays) in enumerate(by_name.items()):
        data = save({key: _in_order(array) for key, array in arrays.items()})
        # A name can be anything: what tells the files apart is the number.
        readable = re.sub(r"[^A-Za-z0-9_]", "_", name)[:40]
        file = f"{prefix}{number}-{readable}.safetensors"
        _write(folder / file, data)
        files[name] = {"file": file, "sha256": hashlib.sha256(data).hexdigest()}
    return files


def _arrays(folder: Path, known: Mapping[str, str]) -> ArrayRecord:
    data = (folder / Path(known["file"]).name).read_bytes()
    if hashlib.sha256(data).hexdigest() != known["sha256"]:
        raise _DamagedError(f"{known['file']} does not have the content it was written with")
    return ArrayRecord({name: Array(value) for name, value in load(data).items()})


def _in_order(array: Array) -> NDArray[Any]:
    """Return an array as safetensors takes it for granted: native, row after row."""
    values: NDArray[Any] = array.numpy()
    return np.array(values, dtype=values.dtype.newbyteorder("="), order="C")


def _json_of_metrics(metrics: MetricRecord) -> dict[str, Any]:
    return {name: _finite(value) for name, value in metrics.items()}


def _metrics_from_json(values: Mapping[str, Any]) -> MetricRecord:
    def number(value: Any) -> Any:
        return float(value) if isinstance(value, str) else value

    return MetricRecord(
        {
            name: [number(v) for v in value] if isinstance(value, list) else number(value)
            for name, value in values.items()
        }
    )


def _finite(value: Any) -> Any:
    """Return a value as JSON has them: NaN, infinity and what it does not know are text."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    known = value is None or isinstance(value, (str, int, float))
    if not known or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    return value


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    # Windows cannot open folders, and needs no flush of their entries.
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
