"""Runs that are killed, stopped, damaged and starved: python benchmarks/soak.py [--kills 60 ...].

One run with dropout and snapshots is trained undisturbed. Then the same run is disturbed at random
moments, and goes on until it is done: SIGKILL, SIGTERM, a bit flipped in the newest checkpoint, a disk
that is full. Every disturbed run must end with the bits of the undisturbed one, and none may lose a
checkpoint that was acknowledged. Ends with 1 if anything did. Runs are forked, so that a kill costs
the run and not the import.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rwft.checkpoint import CheckpointStore
from rwft.config import Config, resolve
from rwft.errors import CheckpointError, RwftError
from rwft.loop import train

STEPS = 12
ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT  # ask whether a child has ended, and leave its status for later
MODEL = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
}


def config(folder: Path, name: str) -> Config:
    """A run of a few seconds that saves after every step."""
    data = folder / "rows.jsonl"
    if not data.exists():
        draw = random.Random(0)
        rows = [{"prompt": f"{i}>", "completion": "abcdefgh"[: draw.randint(1, 8)], "reward": i % 2} for i in range(60)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": {"config": MODEL, "tokenizer": "characters"},
        "objective": ["psft", "rwr"],
        "data": {"path": str(data), "max_length": 32},
        "train": {"steps": STEPS, "batch_size": 4, "accumulate": 2, "save_every": 1, "snapshot_every": 3, "lr": 1e-2},
        "cache": str(folder / "cache"),
        "output": str(folder / name),
    }
    return resolve(settings)


def spawn(settings: Config, prepare: Callable[[], None] = lambda: None) -> int:
    """Train in a forked process, whose exit status is the command line's; gives back its id."""
    process = os.fork()
    if process:
        return process
    status = 0
    try:
        with open(f"{settings.output}.log", "a") as log:
            os.dup2(log.fileno(), 2)
            prepare()
            train(settings)
    except RwftError as error:
        status = error.exit_status
    except BaseException:  # noqa: BLE001  # a forked process must never go on as its parent
        import traceback

        traceback.print_exc()
        status = 99
    os._exit(status)


def end_of(process: int) -> int:
    """Exit status of a child; minus the signal's number if one killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def bits(run: Path) -> dict[str, Any]:
    """What a finished run came to: losses and digests of parameters and optimiser, from its manifest."""
    manifest = json.loads((run / "manifest.json").read_text())
    return {"losses": manifest["losses"], "final": manifest["final"]}


@dataclass
class Soak:
    """The counts, and what went wrong."""

    folder: Path
    draw: random.Random
    seconds: float = 0.0
    expected: dict[str, Any] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def check(self, good: bool, fault: str) -> None:
        if not good:
            self.faults.append(fault)
            print(f"FAULT {fault}", flush=True)

    def undisturbed(self) -> None:
        started = time.monotonic()
        self.check(end_of(spawn(config(self.folder, "whole"))) == 0, "the undisturbed run did not end")
        self.seconds = time.monotonic() - started
        self.expected = bits(self.folder / "whole")

    def acknowledged(self, run: Path) -> int:
        try:
            return int(json.loads((run / "status.json").read_text())["step"])
        except FileNotFoundError:
            return 0

    def wait_for_step(self, run: Path, process: int, last: int) -> None:
        """Until a random moment after one of the steps still to come, the last at `last`."""
        step = self.draw.randint(min(self.acknowledged(run) + 1, last), last)
        while self.acknowledged(run) < step and os.waitid(os.P_PID, process, ENDED) is None:
            time.sleep(0.001)
        time.sleep(self.draw.uniform(0, 0.03))

    def newest(self, run: Path) -> int:
        """Step of the newest valid checkpoint; 0 if none was ever saved."""
        found = CheckpointStore(run / "checkpoints").load()
        return 0 if found is None else found[0].step

    def settle(self, name: str, disturbance: str) -> None:
        """Let the run end, and compare it with the undisturbed one."""
        settings = config(self.folder, name)
        status = end_of(spawn(settings))
        same = status == 0 and bits(Path(settings.output)) == self.expected
        self.check(same, f"{name}: ends with {status} or other bits after {disturbance}")
        self.counts["runs that ended with other bits"] += not same
        self.counts["runs compared"] += 1
        self.drop(name)

    def drop(self, name: str) -> None:
        shutil.rmtree(self.folder / name)
        (self.folder / f"{name}.log").unlink(missing_ok=True)

    def kills(self, number: int) -> None:
        """SIGKILL at random moments; a run is killed again and again until it gets through."""
        name, serial = "killed-0", 0
        while self.counts["SIGKILLs"] < number:
            settings = config(self.folder, name)
            run = Path(settings.output)
            process = spawn(settings)
            if self.draw.random() < 0.25:  # anywhere, before the first step and in the export too
                time.sleep(self.draw.uniform(0, 1.1 * self.seconds))
            else:
                self.wait_for_step(run, process, STEPS)
            os.kill(process, signal.SIGKILL)
            if end_of(process) == 0:
                self.settle(name, "kills")
                serial += 1
                name = f"killed-{serial}"
                continue
            self.counts["SIGKILLs"] += 1
            lost = self.newest(run) < self.acknowledged(run)
            self.counts["acknowledged checkpoints lost"] += lost
            self.check(not lost, f"{name}: lost a checkpoint that was acknowledged")
        if (self.folder / name).exists():
            self.settle(name, "kills")

    def signals(self, number: int) -> None:
        """SIGTERM or SIGINT while it steps; it must stop with 128 + the signal, at a checkpoint, and go on."""
        for serial in range(number):
            name, sent = f"stopped-{serial}", self.draw.choice([signal.SIGTERM, signal.SIGINT])
            settings = config(self.folder, name)
            run, process = Path(settings.output), spawn(settings)
            self.wait_for_step(run, process, STEPS - 2)
            asked = time.monotonic()
            os.kill(process, sent)
            status = end_of(process)
            self.slowest = max(self.slowest, time.monotonic() - asked)
            if status == 128 + sent:
                self.counts["stops"] += 1
                state = json.loads((run / "status.json").read_text())
                good = state["state"] == "stopped" and self.newest(run) == state["step"]
                self.check(good, f"{name}: status.json says {state}, the newest checkpoint is {self.newest(run)}")
            else:  # the signal came after the last step: nothing was left to stop
                self.counts["signals after the last step"] += 1
                late = status in (0, -sent, 99) and self.newest(run) == STEPS
                self.check(late, f"{name}: ended with {status} after signal {sent}")
            self.settle(name, f"signal {sent}")

    def flips(self, number: int) -> None:
        """One bit of one file of the newest checkpoint; the one before it must be found, and the rest trained again."""
        for serial in range(number):
            name = f"flipped-{serial}"
            shutil.copytree(self.folder / "whole", self.folder / name)
            run = self.folder / name
            (run / "status.json").write_text('{"state": "running", "step": 12, "checkpoint": null}')
            file = self.draw.choice(sorted((run / "checkpoints" / f"step_{STEPS:08d}").iterdir()))
            content = bytearray(file.read_bytes())
            content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
            file.write_bytes(content)
            self.counts["bits flipped"] += 1
            try:
                found = self.newest(run) == STEPS - 1
            except CheckpointError:
                found = False
            self.counts["flipped bits not found"] += not found
            self.check(found, f"{name}: a flipped bit in {file.name} was not found")
            self.settle(name, f"a flipped bit in {file.name}")

    def full_disk(self, number: int) -> None:
        """No file may grow past a random size: the save must fail with 4, with everything before it intact."""
        sizes = [file.stat().st_size for file in (self.folder / "whole" / "checkpoints").rglob("*.safetensors")]
        for serial in range(number):
            name, limit = f"full-{serial}", self.draw.randrange(4096, max(sizes))
            settings = config(self.folder, name)

            def starve(limit: int = limit) -> None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

            status = end_of(spawn(settings, starve))
            self.counts["saves without room"] += 1
            self.check(status == 4, f"{name}: ended with {status}, expected 4 (limit {limit} bytes)")
            self.check(not list(Path(settings.output).glob("checkpoints/.tmp-*")), f"{name}: left a partial checkpoint")
            self.settle(name, "a full disk")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, number in (("kills", 60), ("signals", 30), ("flips", 30), ("full", 10), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=number)
    asked = parser.parse_args()
    logging.getLogger("rwft").setLevel(logging.ERROR)  # every flipped bit is a warning
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), random.Random(asked.seed))
        soak.undisturbed()
        soak.kills(asked.kills)
        soak.signals(asked.signals)
        soak.flips(asked.flips)
        soak.full_disk(asked.full)
    for what, count in soak.counts.items():
        print(f"{what}: {count}")
    print(f"slowest stop after a signal: {soak.slowest:.2f} s")
    print(f"faults: {len(soak.faults)}, in {time.monotonic() - started:.0f} s")
    sys.exit(bool(soak.faults))


if __name__ == "__main__":
    main()
