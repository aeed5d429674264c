"""A run that is asked to stop finishes its step, saves, says so and ends with 128 + the signal; it goes on later."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rwft import loop
from rwft.config import to_yaml
from rwft.errors import Interrupted
from rwft.loop import StopFlag, train
from tests.test_resume import losses, states
from tests.tiny import tiny

SIGNALS = [signal.SIGTERM, signal.SIGINT]
SLOW = """
import time, torch
def slow(logp):
    time.sleep({seconds})
    return torch.ones_like(logp)
"""


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def signal_at(monkeypatch: pytest.MonkeyPatch, at: int, number: int) -> None:
    """This process gets a signal in the middle of step `at`."""
    right = loop.optimiser_step

    def interrupted(training: Any, step: int, meter: Any) -> None:
        if step == at:
            os.kill(os.getpid(), number)
        right(training, step, meter)

    monkeypatch.setattr(loop, "optimiser_step", interrupted)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_signal_ends_the_run_after_its_step(
    at: int, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny(tmp_path, "train.save_every=1", "train.keep=9", name="whole"))
    before = [signal.getsignal(n) for n in SIGNALS]
    with monkeypatch.context() as patch:
        signal_at(patch, at, number)
        config = tiny(tmp_path, "train.save_every=1", "train.keep=9", name="run")
        with pytest.raises(Interrupted, match=f"stopped at step {at + 1} of 4; the same command goes on there") as end:
            train(config)
    assert end.value.exit_status == 128 + number
    assert [signal.getsignal(n) for n in SIGNALS] == before
    name = f"checkpoints/step_{at + 1:08d}"
    assert status(tmp_path / "run") == {"state": "stopped", "step": at + 1, "checkpoint": name}
    assert max(states(tmp_path / "run")) == at + 1
    train(config)
    assert states(tmp_path / "run") == states(tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert status(tmp_path / "run")["state"] == "done"


def test_a_signal_in_the_last_step_lets_the_run_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal_at(monkeypatch, 3, signal.SIGTERM)
    assert train(tiny(tmp_path)).state == "done"


def test_a_signal_that_comes_twice_at_once_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal and a launcher may both deliver it."""
    signal_at(monkeypatch, 1, signal.SIGINT)
    signal_at(monkeypatch, 1, signal.SIGTERM)
    with pytest.raises(Interrupted) as end:
        train(tiny(tmp_path))
    assert end.value.exit_status == 128 + signal.SIGTERM  # the first of the two
    assert status(tmp_path / "run")["step"] == 2


def test_a_second_signal_a_second_later_is_not_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    clock = iter([10.0, 10.5, 11.5])
    with StopFlag() as flag, monkeypatch.context() as patch:
        patch.setattr(loop.time, "monotonic", clock.__next__)
        patch.setattr(loop.signal, "raise_signal", killed.append)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (flag.received, killed) == (signal.SIGTERM, [])
        os.kill(os.getpid(), signal.SIGTERM)
        assert killed == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_save_that_takes_long_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rwft.training import Training

    right, clock = Training.save, [0.0]

    def long(self: Training, step: int) -> None:
        right(self, step)
        clock[0] += 21.0

    monkeypatch.setattr(Training, "save", long)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    train(tiny(tmp_path, "train.save_every=1"))
    assert capsys.readouterr().err.count("warning: saving took 21 s; torchrun kills a run 30 s after") == 1


def test_a_save_that_takes_no_longer_than_it_may_is_not_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny(tmp_path, "train.save_every=1"))
    assert "warning: saving" not in capsys.readouterr().err


# Real processes, real signals, real exit statuses.


def command(folder: Path, name: str, seconds: float, steps: int, ranks: int = 1) -> list[str]:
    """The command line of a run whose micro-batches each take `seconds`."""
    (folder / "slow.py").write_text(SLOW.format(seconds=seconds))
    objective = f"{folder}/slow.py:slow"
    config = tiny(folder, f"train.steps={steps}", "train.batch_size=4", objective=objective, name=name)
    (folder / f"{name}.yaml").write_text(to_yaml(config))
    call = ["-c", "from rwft.cli import main; main()"]
    if ranks > 1:
        (folder / "cli.py").write_text("from rwft.cli import main\nmain()\n")
        call = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d"]
        call += ["--rdzv-endpoint", "localhost:0", str(folder / "cli.py")]
    return [sys.executable, *call, "train", str(folder / f"{name}.yaml")]


def start(words: list[str], root: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


def steps_logged(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_the_command_ends_with_128_and_the_signal(number: int, tmp_path: Path, root: Path) -> None:
    run, words = tmp_path / "run", command(tmp_path, "run", 0.1, 200)
    process = start(words, root)
    wait_for(lambda: steps_logged(run) >= 2, process)
    process.send_signal(number)
    _, error = process.communicate(timeout=25)
    assert process.returncode == 128 + number, error[-3000:]
    assert "Traceback" not in error
    step = status(run)["step"]
    assert status(run) == {"state": "stopped", "step": step, "checkpoint": f"checkpoints/step_{step:08d}"}
    assert steps_logged(run) == step >= 2
    assert re.search(rf"rwft: .*stopped at step {step} of 200; the same command goes on there", error)


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once(tmp_path: Path, root: Path) -> None:
    run, words = tmp_path / "run", command(tmp_path, "run", 30, 3)
    process = start(words, root)
    wait_for((run / "status.json").exists, process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None, "one signal lets the step finish"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM  # 143 in a shell
    assert time.monotonic() - began < 5


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the workers that torchrun started, by rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = {}
    for pid in map(int, children):
        settings = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        rank = next((s.removeprefix("RANK=") for s in settings if s.startswith("RANK=")), None)
        if rank is not None:
            found[int(rank)] = pid
    return [found[rank] for rank in sorted(found)]


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc")
@pytest.mark.parametrize(
    ("whom", "number"),
    [("launcher", signal.SIGTERM), ("launcher", signal.SIGINT), ("rank 1", signal.SIGTERM)],
)
def test_all_ranks_stop_at_the_same_step(whom: str, number: int, tmp_path: Path, root: Path) -> None:
    """The launcher ends with 1 whatever its ranks end with, so status.json is what says how it went."""
    run, words = tmp_path / "run", command(tmp_path, "run", 0.1, 200, ranks=2)
    process = start(words, root)
    wait_for(lambda: steps_logged(run) >= 2, process)
    began = time.monotonic()
    os.kill(process.pid if whom == "launcher" else ranks_of(process.pid)[1], number)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - began < 25
    stopped = [int(step) for step in re.findall(r"stopped at step (\d+) of 200", error)]
    step = status(run)["step"]
    assert status(run) == {"state": "stopped", "step": step, "checkpoint": f"checkpoints/step_{step:08d}"}
    assert stopped, error[-3000:]
    assert set(stopped) == {step}
    assert steps_logged(run) == step
    assert max(states(run)) == step
