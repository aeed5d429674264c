"""Crashes: at every call that touches the disk, by a loss of power, by SIGKILL, by a full disk."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from failing_disk import FailingDisk, PowerLoss
from torch import Tensor

from rwft.checkpoint import CheckpointStore, RunLock, verify, write_atomic
from rwft.errors import CheckpointError, SaveError, UserError

STEPS = (10, 20, 30)  # the third save deletes the first checkpoint
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def quick_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process has written outlives it, flushed or not; only a loss of power tells, and PowerLoss models that."""
    monkeypatch.setattr(os, "fsync", os.fstat)


def groups(step: int, size: int = 64) -> dict[str, dict[str, Tensor]]:
    """Tensors that tell their step."""
    return {
        "model": {"weight": torch.arange(size, dtype=torch.float32) + step},
        "optimizer": {"exp_avg": torch.full((size,), 0.5 * step)},
    }


def save_all(
    store: CheckpointStore,
    acknowledge: Callable[[int], object],
    steps: Iterator[int] | tuple[int, ...] = STEPS,
    size: int = 64,
) -> None:
    for step in steps:
        store.save(step, groups(step, size), {"step": step}, {"data": "d"})
        acknowledge(step)


def require_valid(folder: Path, at_least: int | None, size: int = 64) -> CheckpointStore:
    """A new process finds a checkpoint no older than the last acknowledged one, and whole."""
    store = CheckpointStore(folder)
    found = store.load()
    if found is None:
        assert at_least is None
        return store
    checkpoint, tensors, state = found
    assert checkpoint.step >= (at_least or 0)
    assert state == {"step": checkpoint.step}
    expected = groups(checkpoint.step, size)
    assert all(torch.equal(tensors[name][key], t) for name, group in expected.items() for key, t in group.items())
    assert store.warnings == []
    return store


def require_recovery(folder: Path, acknowledged: int | None, size: int = 64) -> None:
    """And it can go on: the leftovers go away, the next save succeeds."""
    store = require_valid(folder, acknowledged, size)
    store.sweep()
    following = (store.steps() or [0])[-1] + 10
    save_all(store, lambda step: None, (following,), size)
    require_valid(folder, following, size)
    assert not [name for name in os.listdir(folder) if name.startswith(".")]
    assert len(store.steps()) <= store.keep


def acknowledged_by(child: Callable[[Callable[[int], object]], None], kill: Callable[[int, int], None]) -> int | None:
    """Run `child` in a process of its own that tells what it acknowledges; the last thing it told.

    `kill(process, pipe)` may end it early; it must end by itself or be ended.
    """
    write = os.write
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            child(lambda step: write(writer, struct.pack("<q", step)))
        finally:
            os._exit(0)
    os.close(writer)
    kill(process, reader)
    os.waitpid(process, 0)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    assert len(told) % 8 == 0
    return struct.unpack("<q", told[-8:])[0] if told else None


# -- the n-th call


def calls_of(folder: Path) -> list[str]:
    with FailingDisk(0, lambda: None)() as disk:
        save_all(CheckpointStore(folder), lambda step: None)
    return disk.calls


def test_the_enumeration_sees_every_kind_of_call(tmp_path: Path) -> None:
    calls = calls_of(tmp_path / "run" / "checkpoints")
    expected = {"open", "write", "fsync", "close", "rename", "replace", "mkdir", "unlink", "rmdir", "chmod", "listdir"}
    assert set(calls) == expected | {"save_file", "sha256", "disk_usage"}
    assert calls.count("rename") == len(STEPS) + 1  # three commits, and an old one on its way out
    assert len(calls) > 120


def test_a_death_at_any_call_costs_nothing_acknowledged(tmp_path: Path) -> None:
    total = len(calls_of(tmp_path / "dry" / "checkpoints"))
    died = 0
    for nth in range(1, total + 1):
        folder = tmp_path / str(nth) / "checkpoints"

        def child(acknowledge: Callable[[int], object], nth: int = nth, folder: Path = folder) -> None:
            with FailingDisk(nth, lambda: os._exit(9))():
                save_all(CheckpointStore(folder), acknowledge)

        acknowledged = acknowledged_by(child, lambda process, pipe: None)
        died += acknowledged != STEPS[-1]
        require_recovery(folder, acknowledged)
    assert died > 0.7 * total


def save_what_can_be_saved(folder: Path, disk: FailingDisk) -> tuple[int | None, list[str]]:
    """The last step that was acknowledged, and the errors of the steps that were not."""
    done, errors = [], []
    store = CheckpointStore(folder)
    with disk():
        for step in STEPS:
            try:
                save_all(store, done.append, (step,))
            except SaveError as error:
                errors.append(str(error))
    return (done or [None])[-1], errors


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("from_then_on", [False, True])
def test_an_error_at_any_call_costs_nothing_acknowledged(tmp_path: Path, code: int, from_then_on: bool) -> None:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    total = len(calls_of(tmp_path / "dry" / "checkpoints"))
    failed = 0
    for nth in range(1, total + 1):
        folder = tmp_path / str(nth) / "checkpoints"
        acknowledged, errors = save_what_can_be_saved(folder, FailingDisk(nth, fail, from_then_on))
        failed += bool(errors)
        for error in errors:
            assert str(folder) in error
            assert os.strerror(code) in error
            assert "bytes are needed" in error
            assert "\n" not in error
        if not from_then_on:
            assert len(errors) <= 1
            assert acknowledged == (20 if errors and "step_00000030" in errors[0] else 30)
        require_recovery(folder, acknowledged)
    assert failed > 0.5 * total


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("dry", "checkpoints"):
        save_all(CheckpointStore(tmp_path / name), lambda step: None, (10,))
    before = sorted(os.listdir(tmp_path / "checkpoints"))
    with FailingDisk(0, fail)() as dry:
        save_all(CheckpointStore(tmp_path / "dry"), lambda step: None, (20,))
    committed = dry.calls.index("rename") + 1
    assert committed > 20
    for nth in range(1, committed + 1):
        with pytest.raises(SaveError, match="No space left on device"), FailingDisk(nth, fail)():
            save_all(CheckpointStore(tmp_path / "checkpoints"), lambda step: None, (20,))
        assert sorted(os.listdir(tmp_path / "checkpoints")) == before


def test_a_death_while_sweeping_costs_nothing(tmp_path: Path) -> None:
    for nth in range(1, 12):
        folder = tmp_path / str(nth) / "checkpoints"
        save_all(CheckpointStore(folder), lambda step: None, (10,))
        for name in (".tmp-step_00000020", ".trash-step_00000005"):
            (folder / name).mkdir()
            (folder / name / "model.safetensors").write_bytes(b"half")

        def child(acknowledge: Callable[[int], object], nth: int = nth, folder: Path = folder) -> None:
            with FailingDisk(nth, lambda: os._exit(9))():
                CheckpointStore(folder).sweep()

        acknowledged_by(child, lambda process, pipe: None)
        require_recovery(folder, 10)


# -- loss of power


def survives(root: Path, disks: Path, drop: int | None) -> tuple[bool, list[str], int]:
    """Whether every disk that a loss of power could leave is fine; the flushes that were made; how many disks."""
    root.mkdir(parents=True)
    power = PowerLoss(root, drop)
    with power():
        save_all(CheckpointStore(root / "run" / "checkpoints"), power.acknowledge, STEPS)
    count = 0
    try:
        for acknowledged, disk in power.disks(disks):
            count += 1
            folder = disk / "run" / "checkpoints"
            require_valid(folder, acknowledged)
            for step in CheckpointStore(folder).steps():
                verify(folder / f"step_{step:08d}", step)
    except (AssertionError, CheckpointError, OSError):
        return False, power.flushes, count
    return True, power.flushes, count


def test_a_loss_of_power_costs_nothing_acknowledged(tmp_path: Path) -> None:
    fine, flushes, disks = survives(tmp_path / "root", tmp_path / "disks", None)
    assert fine
    assert len(flushes) == 3 * 8 + 3  # two folders made, and one deletion
    assert disks > 10  # after each of three saves: without the step, with it, with the hint; the third deletes a step


NEEDED_BY_NOBODY = "the hint's own name: it may lag behind, and the next flush of the folder takes it along"


def test_without_any_one_flush_a_loss_of_power_costs_something(tmp_path: Path) -> None:
    """The test above can fail, and no fsync is idle."""
    _, flushes, _ = survives(tmp_path / "root", tmp_path / "disks", None)
    idle = []
    for drop, path in enumerate(flushes):
        fine, *_ = survives(tmp_path / f"root{drop}", tmp_path / f"disks{drop}", drop)
        if fine:
            idle.append((drop, path))
    hints = [at + 1 for at, path in enumerate(flushes) if ".tmp-latest.json" in path]
    assert idle == [(at, "run/checkpoints") for at in hints], NEEDED_BY_NOBODY


@pytest.mark.parametrize("drop", [None, 0, 1])
def test_a_small_file_survives_a_loss_of_power(tmp_path: Path, drop: int | None) -> None:
    (tmp_path / "root").mkdir()
    power = PowerLoss(tmp_path / "root", drop if drop is None else drop + 2)
    with power():
        for text in ("first", "second"):
            write_atomic(tmp_path / "root" / "status.json", text)
            power.acknowledge(text)
    assert len(power.flushes) == 4
    allowed = {None: {None, "first", "second"}, "first": {"first", "second"}, "second": {"second"}}
    found = []
    for acknowledged, disk in power.disks(tmp_path / "disks"):
        file = disk / "status.json"
        found.append((file.read_text() if file.exists() else None) in allowed[acknowledged])
    assert all(found) == (drop is None)


# -- SIGKILL


def kill_at_random(seed: int) -> Callable[[int, int], None]:
    def kill(process: int, pipe: int) -> None:
        time.sleep(random.Random(seed).uniform(0.0, 0.25))
        os.kill(process, signal.SIGKILL)

    return kill


def kill_while_saving(folder: Path, seed: int, size: int) -> int:
    """Kill a process that saves back to back; the steps it had acknowledged."""
    start = (CheckpointStore(folder).steps() or [0])[-1]

    def child(acknowledge: Callable[[int], object]) -> None:
        store = CheckpointStore(folder)
        store.sweep()
        save_all(store, acknowledge, iter(range(start + 10, 10**7, 10)), size)

    acknowledged = acknowledged_by(child, kill_at_random(seed))
    last = acknowledged if acknowledged is not None else (start or None)
    require_valid(folder, last, size)
    return ((last or 0) - start) // 10


def test_a_run_that_is_killed_again_and_again_loses_nothing(tmp_path: Path) -> None:
    """Ten kills of one run, each going on where the one before it was killed."""
    saved = [kill_while_saving(tmp_path / "checkpoints", seed, 200_000) for seed in range(10)]
    assert sum(saved) > 10
    require_recovery(tmp_path / "checkpoints", 10 * sum(saved), 200_000)


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing(tmp_path: Path) -> None:
    torn, saved = 0, 0
    for seed in range(100):
        saved += kill_while_saving(tmp_path / "checkpoints", seed, 400_000)
        torn += any(name.startswith((".tmp-", ".trash-")) for name in os.listdir(tmp_path / "checkpoints"))
    assert saved > 100
    assert torn > 20  # most kills came in the middle of a save
    require_recovery(tmp_path / "checkpoints", 10 * saved, 400_000)


# -- a full disk


def test_a_file_that_may_not_grow_is_a_failed_save(tmp_path: Path) -> None:
    """The system itself refuses: RLIMIT_FSIZE, in a process of its own."""
    folder, report = tmp_path / "checkpoints", tmp_path / "report"
    save_all(CheckpointStore(folder), lambda step: None, (10, 20), 200_000)
    before = sorted(os.listdir(folder))

    def child(acknowledge: Callable[[int], object]) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        try:
            save_all(CheckpointStore(folder), acknowledge, (30,), 200_000)
        except SaveError as error:
            report.write_text(f"{error.exit_status} {error}")

    assert acknowledged_by(child, lambda process, pipe: None) is None
    text = report.read_text()
    assert text.startswith(f"4 {folder}/step_00000030: not saved: ")
    assert "File too large" in text
    assert "1600012 bytes are needed" in text  # 2 x 200,000 float32 and {"step": 30}
    assert sorted(os.listdir(folder)) == before
    require_recovery(folder, 20, 200_000)


# -- one run in a folder


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[int]:
    """Another process holds the lock until the end of the block, when it is killed."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        with RunLock(folder):
            os.write(writer, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    try:
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reader)
        os.close(writer)


def test_a_second_run_in_a_folder_is_told_who_holds_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    with held_elsewhere(folder) as process:
        for _ in range(2):
            with (
                pytest.raises(
                    UserError, match=rf"^output: {folder} is in use by pid {process} on host {os.uname().nodename};"
                ),
                RunLock(folder),
            ):
                pass
        with RunLock(tmp_path / "runs" / "two"):
            pass
    with RunLock(folder):  # the holder was killed: its lock is free
        assert json.loads((folder / "run.lock").read_text())["pid"] == os.getpid()
    assert not (folder / "run.lock").exists()


def test_two_locks_in_one_process_exclude_each_other(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        with pytest.raises(UserError, match=f"pid {os.getpid()}"), RunLock(tmp_path / "run"):
            pass
        with pytest.raises(UserError, match=f"pid {os.getpid()}"), RunLock(tmp_path / "run"):
            pass


def test_a_holder_without_a_name_still_holds(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        (tmp_path / "run" / "run.lock").write_text("{")
        with pytest.raises(UserError, match="in use by another run"), RunLock(tmp_path / "run"):
            pass


def test_a_lock_is_released_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path / "run"):
        raise ZeroDivisionError
    with RunLock(tmp_path / "run"):
        pass


def test_a_file_in_place_of_the_folder_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(UserError, match="name a folder that can be made and written"), RunLock(tmp_path / "run"):
        pass
