"""Checkpoints: whole or not used, and a resumed federation ends like one that was not stopped."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, Result
from safetensors.numpy import load_file
from torch import nn

import flwr_fusion as ff
from flwr_fusion.strategy import CLAFusion, FusionStrategy, NeuronTransplantation, OTFusion
from flwr_fusion.strategy.checkpoint import Checkpoint, CheckpointFolder, History, _hash_of
from tests.support.grid import InProcessGrid
from tests.support.kill_and_resume import trial, undisturbed_run
from tests.test_faults import client_app as mixed_app
from tests.test_faults import deep, shallow
from tests.test_replies import INPUTS, NODES, assert_same, client_app, network, record, state_in

NAN = float("nan")


def strategy(folder: Path, **options: Any) -> OTFusion:
    return OTFusion(network(), INPUTS, min_train_nodes=NODES, checkpoint_dir=folder, **options)


def run(
    folder: Path,
    rounds: int,
    grid: InProcessGrid | None = None,
    evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    **options: Any,
) -> Result:
    grid = grid or InProcessGrid(client_app(), NODES)
    start = record(network().state_dict())
    return strategy(folder, **options).start(grid, start, rounds, evaluate_fn=evaluate_fn)


def names_in(folder: Path) -> list[str]:
    """Return what is in a folder of checkpoints, but for its lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


# --- Killed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kills"), [("ot", 3), ("cla", 2)])
def test_killed_federations_end_as_if_nothing_had_happened(name: str, kills: int) -> None:
    undisturbed, seconds = undisturbed_run(name)
    draw = random.Random(1)
    for _ in range(kills):
        reached, well = trial(name, seconds, draw, undisturbed)
        assert well, reached


# --- Resumed --------------------------------------------------------------------------------------


def test_resumed_rounds_have_their_true_numbers(tmp_path: Path) -> None:
    asked: list[int] = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        asked.append(server_round)
        return MetricRecord({"x": server_round})

    expected = run(tmp_path / "whole", 4, evaluate_fn=evaluate)
    assert asked == [0, 1, 2, 3, 4]
    asked.clear()
    run(tmp_path / "halves", 2, evaluate_fn=evaluate)
    grid = InProcessGrid(client_app(), NODES)
    numbers = []

    class Subclass(OTFusion):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            numbers.append(server_round)
            return super().aggregate_train(server_round, replies)

    resumed = Subclass(
        network(), INPUTS, min_train_nodes=NODES, checkpoint_dir=tmp_path / "halves", resume=True
    )
    config = ConfigRecord()
    result = resumed.start(grid, ArrayRecord(), 4, train_config=config, evaluate_fn=evaluate)
    assert asked == [0, 1, 2, 3, 4]
    assert numbers == [3, 4]
    assert config["server-round"] == 4
    assert_same(result.arrays, state_in(expected.arrays))
    for kind in History.__dataclass_fields__:
        assert getattr(result, kind) == getattr(expected, kind), kind
    assert sorted(resumed.reports) == [3, 4]


def test_finished_federation_is_given_back_without_a_round(tmp_path: Path) -> None:
    expected = run(tmp_path, 2)
    grid = InProcessGrid(client_app(), NODES)
    result = run(tmp_path, 2, grid, resume=True)
    assert not grid.sent
    assert_same(result.arrays, state_in(expected.arrays))
    assert result.train_metrics_clientapp == expected.train_metrics_clientapp


def test_resume_without_checkpoints_begins(tmp_path: Path) -> None:
    result = run(tmp_path / "new", 1, resume=True)
    assert sorted(result.train_metrics_clientapp) == [1]


def test_checkpoints_are_not_overwritten_without_resume(tmp_path: Path) -> None:
    run(tmp_path, 2)
    with pytest.raises(ff.FusionError, match=r"rounds \[1, 2\]: set resume=True"):
        run(tmp_path, 2)


def test_rounds_without_a_good_reply_leave_a_checkpoint_of_the_last_model(tmp_path: Path) -> None:
    nothing = InProcessGrid(client_app(), NODES, failing=range(NODES))
    result = run(tmp_path, 1, nothing)
    assert_same(result.arrays, network().state_dict())
    resumed = run(tmp_path, 2, resume=True)
    fresh = run(tmp_path / "fresh", 1)
    assert_same(resumed.arrays, state_in(fresh.arrays))
    assert resumed.train_metrics_clientapp[1]["rejected-error"] == NODES


def test_cut_off_evaluation_is_made_up_for(tmp_path: Path) -> None:
    def killed(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round == 2:
            raise KeyboardInterrupt
        return MetricRecord({"x": server_round})

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 3, evaluate_fn=killed)
    result = run(tmp_path, 3, evaluate_fn=lambda r, a: MetricRecord({"x": r}), resume=True)
    assert result.evaluate_metrics_serverapp == {r: {"x": r} for r in range(4)}


def test_folder_serves_one_run_at_a_time(tmp_path: Path) -> None:
    def start_another(server_round: int, arrays: ArrayRecord) -> None:
        with pytest.raises(ff.FusionError, match=r"another run .* to .*: wait until"):
            run(tmp_path, 3, resume=True)

    run(tmp_path, 1, evaluate_fn=start_another)
    assert sorted(run(tmp_path, 2, resume=True).train_metrics_clientapp) == [1, 2]


def test_other_network_is_refused(tmp_path: Path) -> None:
    run(tmp_path, 1)
    wider = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    other = OTFusion(wider, INPUTS, checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(ff.FusionError, match=r"round 1 is of another network: array '0\.weight'"):
        other.start(InProcessGrid(client_app(), NODES), ArrayRecord(), 2)
    several = CLAFusion({"a": shallow(), "b": deep()}, INPUTS, checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(ff.FusionError, match=r"architectures \['model'\]"):
        several.start(InProcessGrid(client_app(), NODES), num_rounds=2)


def test_transplantation_is_not_repeated(tmp_path: Path) -> None:
    start = record(network().state_dict())
    options: dict[str, Any] = {"min_train_nodes": NODES, "checkpoint_dir": tmp_path}
    first = NeuronTransplantation(network(), INPUTS, **options)
    first.start(InProcessGrid(client_app(), NODES), start, 1)
    second = NeuronTransplantation(network(), INPUTS, resume=True, **options)
    second.start(InProcessGrid(client_app(), NODES), start, 2)
    assert first.reports[1].method == "neuron_transplantation"
    assert second.reports[2].method == "average"


# --- What is in a checkpoint ----------------------------------------------------------------------


def test_content_of_a_checkpoint(tmp_path: Path) -> None:
    def spoil(partition: int, reply: Message) -> list[Message]:
        if partition == 1:
            reply.content.array_records["arrays"]["0.weight"] = Array(np.zeros(3, np.float32))
        return [reply]

    grid = InProcessGrid(client_app(), NODES, mutate=spoil)
    result = run(tmp_path, 1, grid)
    folder = tmp_path / "round-00001"
    assert sorted(path.name for path in folder.iterdir()) == [
        "0-model.safetensors",
        "checkpoint.json",
    ]
    for name, array in load_file(folder / "0-model.safetensors").items():
        np.testing.assert_array_equal(array, result.arrays[name].numpy())
    content = json.loads((folder / "checkpoint.json").read_text())
    assert content["round"] == 1
    (rejected,) = content["details"]["rejected"]
    assert rejected["node"] == grid.node_ids[1]
    assert rejected["reason"] == "shape"
    assert "0.weight" in rejected["text"]
    assert content["details"]["method"] == "ot_fusion"
    assert content["details"]["reports"]["model"]["reference"] == "the given reference"


def test_every_architecture_has_a_file(tmp_path: Path) -> None:
    architectures = {"../a": shallow(), "b/c": deep(), "\u5b57" * 60: shallow()}
    strategy = CLAFusion(architectures, INPUTS, checkpoint_dir=tmp_path)
    folder = CheckpointFolder(tmp_path)
    arrays = strategy.global_arrays(strategy.arrays["../a"])
    folder.write(Checkpoint(1, arrays, History(), {}))
    assert sorted(path.name for path in (tmp_path / "round-00001").iterdir()) == [
        "0-___a.safetensors",
        "1-b_c.safetensors",
        f"2-{'_' * 40}.safetensors",
        "checkpoint.json",
    ]
    latest = folder.latest()
    assert latest is not None
    assert latest.arrays.keys() == arrays.keys()


def test_names_of_any_kind_come_back(tmp_path: Path) -> None:
    odd = ["0", "x" * 120, "\ud800", "served", "a\nb", "../..", ".", "NUL"]
    arrays = {name: ArrayRecord({"w": Array(np.full(2, k))}) for k, name in enumerate(odd)}
    metrics = MetricRecord({"\ud800 loss": 1.0})
    history = History(train_metrics_clientapp={1: metrics})
    folder = CheckpointFolder(tmp_path)
    folder.write(Checkpoint(1, arrays, history, {"text": "\ud800"}, {"served": arrays}))
    latest = folder.latest()
    assert latest is not None
    assert latest.history.train_metrics_clientapp[1] == metrics
    for found in (latest.arrays, latest.beside["served"]):
        assert {n: int(a["w"].numpy()[0]) for n, a in found.items()} == {
            name: k for k, name in enumerate(odd)
        }


def test_architectures_are_taken_over_from_a_checkpoint(tmp_path: Path) -> None:
    def federation(rounds: int, **options: Any) -> CLAFusion:
        architectures = {"shallow": shallow(), "deep": deep()}
        strategy = CLAFusion(architectures, INPUTS, min_train_nodes=NODES, **options)
        strategy.start(InProcessGrid(mixed_app(True), NODES), num_rounds=rounds)
        return strategy

    whole = federation(2)
    federation(1, checkpoint_dir=tmp_path)
    resumed = federation(2, checkpoint_dir=tmp_path, resume=True)
    for name, arrays in whole.arrays.items():
        assert_same(resumed.arrays[name], state_in(arrays))


def test_metrics_of_every_kind_come_back(tmp_path: Path) -> None:
    metrics = MetricRecord({"a": 1, "b": 1.0, "c": [1, 2], "d": [0.5, math.inf], "e": 2**62})
    history = History({1: metrics}, {}, {0: MetricRecord({"nan": NAN, "minus": -math.inf})})
    folder = CheckpointFolder(tmp_path)
    folder.write(Checkpoint(1, {"model": record(network().state_dict())}, history, {"nan": NAN}))
    text = (tmp_path / "round-00001" / "checkpoint.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    latest = folder.latest()
    assert latest is not None
    assert latest.history.train_metrics_clientapp[1] == metrics
    assert type(latest.history.train_metrics_clientapp[1]["b"]) is float
    back = latest.history.evaluate_metrics_serverapp[0]
    assert math.isnan(back["nan"])  # type: ignore[arg-type]
    assert back["minus"] == -math.inf


def test_types_and_empty_arrays_come_back(tmp_path: Path) -> None:
    values: list[Any] = [np.float16(1.5), np.int64(3), np.zeros((0, 2)), np.array([True])]
    # Not in the order that they are written in.
    cube = np.arange(24.0).reshape(2, 3, 4)
    values += [cube.T, np.asfortranarray(cube), cube[::-1, ::2], cube.astype(">f8").T]
    arrays = ArrayRecord({str(k): Array(np.asarray(v)) for k, v in enumerate(values)})
    folder = CheckpointFolder(tmp_path)
    folder.write(Checkpoint(1, {"model": arrays}, History(), {}))
    latest = folder.latest()
    assert latest is not None
    for name, array in arrays.items():
        back = latest.arrays["model"][name].numpy()
        assert back.dtype == array.numpy().dtype.newbyteorder("=")
        np.testing.assert_array_equal(back, array.numpy())


# --- Damage ---------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def other_metrics(path: Path) -> None:
    content = json.loads(path.read_text())
    content["history"]["train_metrics_clientapp"]["1"]["loss"] = 0.0
    path.write_text(json.dumps(content))


def other_arrays(path: Path) -> None:
    """Change a file together with all hashes, as a bug in a writer would."""
    path.write_bytes(b"no safetensors")
    description = path.parent / "checkpoint.json"
    content = json.loads(description.read_text())
    content["arrays"]["model"]["sha256"] = hashlib.sha256(b"no safetensors").hexdigest()
    del content["sha256"]
    description.write_text(json.dumps(content | {"sha256": _hash_of(content)}))


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "cut weights": ("0-model.safetensors", cut),
    "changed weights": ("0-model.safetensors", flip),
    "no weights": ("0-model.safetensors", Path.unlink),
    "cut description": ("checkpoint.json", cut),
    "changed metrics": ("checkpoint.json", other_metrics),
    "no description": ("checkpoint.json", Path.unlink),
    "empty description": ("checkpoint.json", lambda path: path.write_bytes(b"")),  # type: ignore[dict-item]
    "list for description": ("checkpoint.json", lambda path: path.write_text("[]")),  # type: ignore[dict-item]
    "deeply nested description": (
        "checkpoint.json",
        lambda path: path.write_text("[" * 100_000),  # type: ignore[dict-item]
    ),
    "safetensors that are none": ("0-model.safetensors", other_arrays),
    "description of nothing": ("checkpoint.json", lambda path: path.write_text("{}")),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(
    kind: str, tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    expected = run(tmp_path, 3)
    name, damage = DAMAGE[kind]
    damage(tmp_path / "round-00003" / name)
    flower_log.clear()
    result = run(tmp_path, 3, resume=True)
    assert "round-00003 is damaged" in flower_log.text
    assert "after round 2 of 3" in flower_log.text
    assert_same(result.arrays, state_in(expected.arrays))
    # The damaged one has been replaced.
    assert CheckpointFolder(tmp_path).latest().server_round == 3  # type: ignore[union-attr]


def test_random_damage_is_told_or_harmless(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run(whole, 2)
    expected = CheckpointFolder(whole).latest()
    assert expected is not None
    draw = random.Random(0)
    for k in range(150):
        folder = tmp_path / str(k)
        shutil.copytree(whole, folder)
        path = draw.choice(sorted((folder / "round-00002").iterdir()))
        data = bytearray(path.read_bytes())
        kind = draw.choice(["flip", "cut", "insert", "zeros", "remove", "swap"])
        place = draw.randrange(len(data))
        if kind == "flip":
            data[place] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del data[place:]
        elif kind == "insert":
            data[place:place] = draw.randbytes(draw.randrange(1, 20))
        elif kind == "zeros":
            data[place:] = bytes(len(data) - place)
        elif kind == "swap":
            data = bytearray((folder / "round-00001" / path.name).read_bytes())
        path.write_bytes(data)
        if kind == "remove":
            path.unlink()
        try:
            latest = CheckpointFolder(folder).latest()
        except ff.FusionError as error:  # A digit of the format.
            if "is of format" not in str(error):
                raise
            continue
        assert latest is not None
        assert latest.server_round == 1 or latest == expected


def test_nothing_but_damaged_checkpoints_is_an_error(tmp_path: Path) -> None:
    run(tmp_path, 2)
    for path in tmp_path.glob("*/0-model.safetensors"):
        cut(path)
    with pytest.raises(ff.FusionError, match=r"all checkpoints in .* are damaged \(\[1, 2\]\)"):
        run(tmp_path, 3, resume=True)


def test_checkpoint_under_another_rounds_name_is_not_used(tmp_path: Path) -> None:
    run(tmp_path, 1)
    shutil.copytree(tmp_path / "round-00001", tmp_path / "round-00007")
    latest = CheckpointFolder(tmp_path).latest()
    assert latest is not None
    assert latest.server_round == 1


# --- The folder -----------------------------------------------------------------------------------


def test_number_of_checkpoints_is_bounded(tmp_path: Path) -> None:
    left = tmp_path / ".unfinished-killed"
    left.mkdir()
    (left / "0-model.safetensors").write_bytes(b"half")
    run(tmp_path, 5, keep_checkpoints=2)
    assert names_in(tmp_path) == ["round-00004", "round-00005"]
    # All metrics are in the last one.
    result = run(tmp_path, 5, resume=True)
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3, 4, 5]


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "round-old").mkdir()
    run(tmp_path, 2, keep_checkpoints=1)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert names_in(tmp_path) == ["notes.txt", "round-00002", "round-old"]


def test_damaged_later_rounds_do_not_push_whole_ones_out(tmp_path: Path) -> None:
    run(tmp_path, 5, keep_checkpoints=5)
    for number in (4, 5):
        cut(tmp_path / f"round-{number:05d}" / "0-model.safetensors")
    grid = InProcessGrid(client_app(), NODES)

    def stop(server_round: int, arrays: ArrayRecord) -> None:
        if server_round == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 6, grid, evaluate_fn=stop, resume=True, keep_checkpoints=1)
    assert CheckpointFolder(tmp_path).rounds() == [4]
    assert sorted(run(tmp_path, 6, resume=True).train_metrics_clientapp) == [1, 2, 3, 4, 5, 6]


def test_odd_names_in_the_folder_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "round-7").mkdir()
    (tmp_path / "round-00009").write_text("a file")
    (tmp_path / ".unfinished-file").write_text("a file")
    (tmp_path / "round-00008").symlink_to(tmp_path / "round-7")
    run(tmp_path, 2, keep_checkpoints=1)
    assert CheckpointFolder(tmp_path).rounds() == [2]


def test_folder_that_cannot_be_made_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    grid = InProcessGrid(client_app(), NODES)
    with pytest.raises(ff.FusionError, match="cannot be written"):
        run(tmp_path / "file", 1, grid)
    assert not grid.sent


def test_checkpoints_of_another_format_are_refused_and_kept(tmp_path: Path) -> None:
    run(tmp_path, 3)
    description = tmp_path / "round-00003" / "checkpoint.json"
    description.write_text(json.dumps({"format": 2, "anything": [1]}))
    with pytest.raises(ff.FusionError, match="format 2, this version of flwr_fusion reads format"):
        run(tmp_path, 5, resume=True)
    assert CheckpointFolder(tmp_path).rounds() == [1, 2, 3]


def test_another_strategys_checkpoint_is_told(
    tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, 1)
    assert "goes on with" not in flower_log.text
    strategy = FusionStrategy(ff.average, network(), INPUTS, checkpoint_dir=tmp_path, resume=True)
    strategy.start(InProcessGrid(client_app(), NODES), record(network().state_dict()), 2)
    assert "was fused by ot_fusion, this strategy goes on with average" in flower_log.text


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, "{}", "\x00"])
def test_a_description_that_is_overwritten_does_not_end_the_run(text: str, tmp_path: Path) -> None:
    def overwrite(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        for path in tmp_path.glob("*/checkpoint.json"):
            path.write_text(text)
        return MetricRecord({"round": server_round})

    result = run(tmp_path, 2, evaluate_fn=overwrite)
    assert sorted(result.train_metrics_clientapp) == [1, 2]


def test_a_path_that_no_system_has_is_refused() -> None:
    with pytest.raises(ff.FusionError, match="cannot be written"):
        run(Path("a\0b"), 1)


def test_folder_that_is_removed_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"

    def remove(server_round: int, arrays: ArrayRecord) -> None:
        if server_round == 1:
            shutil.rmtree(folder)

    run(folder, 3, evaluate_fn=remove)
    assert CheckpointFolder(folder).rounds() == [2, 3]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a disk of 64 kB, of which a checkpoint takes about 8."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk needs root: {error}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_oldest_checkpoints_make_place_on_a_full_disk(
    small_disk: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    whole = run(small_disk.parent / "whole", 8)
    run(small_disk, 4, keep_checkpoints=100)
    written = CheckpointFolder(small_disk).rounds()
    assert written == [1, 2, 3, 4]
    # Nothing else is left of the disk.
    free = shutil.disk_usage(small_disk).free
    (small_disk / "other").write_bytes(bytes(max(0, free - 4096)))
    run(small_disk, 6, resume=True, keep_checkpoints=100)
    assert "makes place for that of round 5" in flower_log.text
    assert CheckpointFolder(small_disk).rounds()[-1] == 6
    resumed = run(small_disk, 8, resume=True, keep_checkpoints=100)
    assert_same(resumed.arrays, state_in(whole.arrays))
    assert not list(small_disk.glob(".unfinished-*"))


def test_a_disk_without_any_place_is_an_error_in_the_log_only(
    small_disk: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    run(small_disk, 1)
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    result = run(small_disk, 4, resume=True)
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3, 4]
    assert "no checkpoint of round 4: [Errno 28]" in flower_log.text
    # The one that there is stays, and nothing unfinished beside it.
    assert CheckpointFolder(small_disk).rounds() == [1]
    assert not list(small_disk.glob(".unfinished-*"))
    (small_disk / "other").unlink()
    assert_same(run(small_disk, 4, resume=True).arrays, state_in(result.arrays))


def test_full_disk_does_not_end_the_federation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flower_log: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CheckpointFolder, "write", full)
    result = run(tmp_path, 2)
    assert sorted(result.train_metrics_clientapp) == [1, 2]
    assert "no checkpoint of round 2: [Errno 28]" in flower_log.text


@pytest.mark.parametrize("keep", [0, -1, 1.5, True])
def test_bad_number_to_keep_is_refused(keep: Any, tmp_path: Path) -> None:
    with pytest.raises(ff.FusionError, match="keep_checkpoints"):
        strategy(tmp_path, keep_checkpoints=keep)


def test_resume_needs_a_folder() -> None:
    with pytest.raises(ff.FusionError, match="checkpoint_dir"):
        OTFusion(network(), INPUTS, resume=True)


# --- Wrappers -------------------------------------------------------------------------------------


def test_checkpoints_before_the_noise_are_refused(tmp_path: Path) -> None:
    private = DifferentialPrivacyServerSideFixedClipping(strategy(tmp_path), 1.0, 1.0, NODES)
    with pytest.raises(ff.FusionError, match="before its noise is added"):
        private.start(
            InProcessGrid(client_app(), NODES), record(network().state_dict()), num_rounds=1
        )
    assert not list(tmp_path.iterdir())


def test_several_architectures_under_a_wrapper_are_refused() -> None:
    inner: FusionStrategy = CLAFusion({"a": shallow(), "b": deep()}, torch.zeros(2, 3))
    private = DifferentialPrivacyServerSideFixedClipping(inner, 1.0, 1.0, NODES)
    with pytest.raises(ff.FusionError, match="several architectures works in rounds that"):
        private.start(
            InProcessGrid(mixed_app(True), NODES), record(shallow().state_dict()), num_rounds=1
        )
