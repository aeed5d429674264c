"""A resumed run is the uninterrupted run, bit by bit, from every step; the files of later checkpoints are compared.

A checkpoint holds parameters, optimiser, snapshots (old_logp) and kl_running; two that have the
same sha256 for every file are the same state. Three planted faults show that the comparison bites.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rwft.config import Config, to_yaml
from rwft.errors import CheckpointError, SaveError
from rwft.loop import train
from rwft.metrics import MetricsLog
from tests.test_distributed import SCRIPT, torchrun
from tests.tiny import tiny

STEPS = 6
SHORT = ("train.batch_size=8", f"train.steps={STEPS}", "train.save_every=1", "train.keep=20", "model.dtype=float32")
DROPOUT = ("model.config.attention_dropout=0.2",)
LORA = ("model.lora.rank=4", "model.lora.dropout=0.3")
CASES = {
    "dropout": ("dft", DROPOUT),
    "dropout, accumulation": ("rwr", (*DROPOUT, "train.accumulate=4", "train.batch_size=2", "train.normalize=weight")),
    "lora": ("sft", LORA),
    "lora, accumulation": ("awr", (*LORA, "train.accumulate=4", "train.batch_size=2")),
    "snapshots of two steps": ("gold_s", (*DROPOUT, "train.snapshot_every=2")),
    "snapshots of three steps, accumulation": (
        "psft",
        (*DROPOUT, "train.snapshot_every=3", "train.accumulate=4", "train.batch_size=2"),
    ),
    "running kl, whole groups": ("kto", (*DROPOUT, "train.normalize=sequence")),
    "pairs": ("dpo", DROPOUT),
}


def case(folder: Path, name: str, run: str) -> Config:
    objective, overrides = CASES[name]
    return tiny(folder, *SHORT, *overrides, objective=objective, name=run)


def states(run: Path) -> dict[int, dict[str, str]]:
    """Step -> file -> sha256, as the manifests of the checkpoints have them (they are verified when loaded)."""
    out = {}
    for folder in sorted((run / "checkpoints").glob("step_*")):
        manifest = json.loads((folder / "manifest.json").read_text())
        out[manifest["step"]] = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    return out


def losses(run: Path) -> dict[int, list[str]]:
    """Step -> loss, gradient norm and rate as hexadecimal floats."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("loss/mean", "grad_norm", "lr")
    return {line["step"]: [float(line[n]).hex() for n in names] for line in lines if "loss/mean" in line}


def cut(run: Path, step: int, name: str) -> Path:
    """A copy of a run as it stood right after the checkpoint of `step`."""
    copy = run.with_name(name)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model")
    for folder in (copy / "checkpoints").glob("step_*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    (copy / "checkpoints" / "latest.json").write_text(json.dumps({"step": step, "folder": f"step_{step:08d}"}))
    (copy / "status.json").write_text(json.dumps({"state": "running", "step": step}))
    (copy / "result.json").unlink()
    return copy


def resumed_gaps(folder: Path, name: str) -> list[int]:
    """Steps from which a resumed run came out otherwise than the whole one, in any bit of any later state or loss."""
    train(case(folder, name, "whole"))
    whole = folder / "whole"
    assert sorted(states(whole)) == list(range(1, STEPS + 1))
    wrong = []
    for step in range(1, STEPS):
        copy = cut(whole, step, "resumed")
        train(case(folder, name, "resumed"))
        if states(copy) != states(whole) or losses(copy) != losses(whole):
            wrong.append(step)
    return wrong


@pytest.mark.parametrize("name", CASES)
def test_a_run_resumed_at_any_step_is_the_uninterrupted_run(name: str, tmp_path: Path) -> None:
    assert resumed_gaps(tmp_path, name) == []
    steps = [hexes for _, hexes in sorted(losses(tmp_path / "whole").items())]
    assert len({hexes[0] for hexes in steps}) == STEPS, "losses that are all alike would prove nothing"


def test_dropout_is_at_work_in_these_runs(tmp_path: Path) -> None:
    for name, kind in (("dropout", "model.config.attention_dropout=0"), ("lora", "model.lora.dropout=0")):
        objective, overrides = CASES[name]
        train(case(tmp_path, name, f"{name}-on"))
        train(tiny(tmp_path, *SHORT, *overrides, kind, objective=objective, name=f"{name}-off"))
        assert losses(tmp_path / f"{name}-on") != losses(tmp_path / f"{name}-off"), name


def test_the_end_is_the_same_model(tmp_path: Path) -> None:
    train(case(tmp_path, "lora", "whole"))
    cut(tmp_path / "whole", 2, "resumed")
    train(case(tmp_path, "lora", "resumed"))
    one, two = ((tmp_path / n / "model" / "adapter_model.safetensors").read_bytes() for n in ("whole", "resumed"))
    assert one == two


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_log_on_a_full_disk_ends_in_one_line() -> None:
    with pytest.raises(SaveError, match=r"^/dev/full: not written: .*No space left"):
        MetricsLog(Path("/dev/full"), 0, True).write({"step": 1})


def fill_the_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_when_the_model_is_exported_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(case(tmp_path, "dropout", "whole"))
    with monkeypatch.context() as patch:
        patch.setattr("rwft.loop.export", fill_the_disk)
        with pytest.raises(SaveError, match=r"broken/model: not written: .*No space left .* bytes are free"):
            train(case(tmp_path, "dropout", "broken"))
    train(case(tmp_path, "dropout", "broken"))
    assert states(tmp_path / "broken") == states(tmp_path / "whole")
    results = [json.loads((tmp_path / run / "result.json").read_text()) for run in ("whole", "broken")]
    for result in results:
        del result["output"], result["metrics"]["tokens_per_second"]
    assert results[0] == results[1]


def test_a_run_that_dies_behind_its_last_evaluation_writes_no_line_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = (tiny(tmp_path, *SHORT, "train.eval_every=2", name=name) for name in ("whole", "broken"))
    train(whole)
    with monkeypatch.context() as patch:
        patch.setattr("rwft.loop.export", fill_the_disk)
        with pytest.raises(SaveError):
            train(broken)
    train(broken)
    for config in (whole, broken):
        lines = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "eval/nll/mean" in line] == [2, 4, STEPS]
        assert [line["step"] for line in lines if "loss/mean" in line] == list(range(1, STEPS + 1))


def test_a_damaged_newest_costs_one_step_and_changes_no_bit(tmp_path: Path) -> None:
    train(case(tmp_path, "dropout", "whole"))
    copy = cut(tmp_path / "whole", 4, "resumed")
    file = copy / "checkpoints" / "step_00000004" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    train(case(tmp_path, "dropout", "resumed"))
    assert states(copy) == states(tmp_path / "whole")
    assert losses(copy) == losses(tmp_path / "whole")


# Planted faults: the comparison above must see each of them.


def test_an_order_that_counts_calls_instead_of_epochs_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rwft.data import batching

    right, calls = batching.permutation, iter(range(10**6))
    monkeypatch.setattr(
        batching, "permutation", lambda items, seed, epoch, folder: right(items, seed, next(calls), folder)
    )
    assert resumed_gaps(tmp_path, "dropout") != []


def test_dropout_that_is_not_seeded_by_its_place_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rwft import step

    monkeypatch.setattr(step, "seed_micro_batch", lambda *place: None)
    assert resumed_gaps(tmp_path, "lora") == list(range(1, STEPS))


@pytest.mark.parametrize("key", ["optimizer", "old_logp", "kl_running"])
def test_a_part_of_the_state_that_is_lost_is_caught(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rwft.training import Training

    def forgetful(self: Training) -> int:
        step = resume(self)
        if key == "optimizer":
            self.optimizer.state.clear()
        elif key == "old_logp":
            self.old_logp.update({row: logp * 1.5 for row, logp in self.old_logp.items()})
        else:
            self.kl_running = 0.0
        return step

    resume = Training.resume
    monkeypatch.setattr(Training, "resume", forgetful)
    name = {"optimizer": "dropout", "old_logp": "snapshots of two steps", "kl_running": "running kl, whole groups"}[key]
    assert resumed_gaps(tmp_path, name) != []


def test_no_checkpoint_is_written_with_a_gradient_pending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rwft import loop

    def saves_within(training: Any, step: int, meter: Any) -> None:
        gradient(training, step)
        training.save(step)

    from rwft.step import gradient

    monkeypatch.setattr(loop, "optimiser_step", saves_within)
    with pytest.raises(RuntimeError, match="a gradient is pending"):
        train(case(tmp_path, "dropout", "run"))
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("change", ["weights", "data", "ranks"])
def test_another_model_other_data_or_more_ranks_are_refused(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rwft import setup

    train(case(tmp_path, "lora", "whole"))
    cut(tmp_path / "whole", 3, "resumed")
    if change == "data":
        rows = tmp_path / "rollouts.jsonl"
        rows.write_text(rows.read_text().replace('"rewards": [0.0', '"rewards": [1.0', 1))
    elif change == "weights":
        monkeypatch.setattr(setup, "fingerprint", lambda policy: "of another model")
    else:
        right = setup.fingerprints
        monkeypatch.setattr(setup, "fingerprints", lambda config, data, model, ranks: right(config, data, model, 2))
    named = {"weights": "model"}.get(change, change)
    with pytest.raises(CheckpointError, match=f"'{named}' has changed since it was saved"):
        train(case(tmp_path, "lora", "resumed"))


@pytest.mark.distributed
def test_two_ranks_resume_bit_by_bit(tmp_path: Path, root: Path) -> None:
    """Dropout, snapshots and accumulation on two ranks, from the first, a middle and the last but one step."""
    names = {"snapshots of two steps": "one", "dropout, accumulation": "two"}
    for name, run in names.items():
        (tmp_path / f"{run}.yaml").write_text(to_yaml(case(tmp_path, name, run)))
    torchrun(2, tmp_path, list(names.values()), root)
    resumed = []
    for name, run in names.items():
        for step in (1, 3, STEPS - 1):
            again = f"{run}-{step}"
            cut(tmp_path / run, step, again)
            (tmp_path / f"{again}.yaml").write_text(to_yaml(case(tmp_path, name, again)))
            resumed.append(again)
    torchrun(2, tmp_path, resumed, root, script=SCRIPT)
    for again in resumed:
        run = again.partition("-")[0]
        assert states(tmp_path / again) == states(tmp_path / run), again
        assert losses(tmp_path / again) == losses(tmp_path / run), again


def test_float32_runs_are_repeated_bit_by_bit(tmp_path: Path) -> None:
    """Without this, none of the above could hold for long."""
    for run in ("one", "two"):
        train(case(tmp_path, "dropout, accumulation", run))
        torch.manual_seed(17)
    assert states(tmp_path / "one") == states(tmp_path / "two")


@pytest.mark.slow
def test_a_short_soak_has_no_faults(root: Path) -> None:
    """Kills, signals, flipped bits and full disks at random moments; `make soak` is the long form."""
    numbers = {"kills": 4, "signals": 2, "flips": 3, "full": 2}
    words = [word for name, number in numbers.items() for word in (f"--{name}", str(number))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(root / "benchmarks" / "soak.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("SIGKILLs: 4", "bits flipped: 3", "saves without room: 2", "faults: 0,"):
        assert line in done.stdout
