"""The loop: one step after another, with a journal, checkpoints, and an end that signals may bring forward."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rwft.alarms import AlarmLog
from rwft.config import Config
from rwft.durable import refuse_unwritable, writing
from rwft.errors import Interrupted
from rwft.held_out import held_out_likelihood
from rwft.manifest import EVERY, Manifest, open_manifest
from rwft.metrics import Meter, MetricsLog
from rwft.policy import export
from rwft.progress import Display
from rwft.rowlog import forget_rows
from rwft.run import RunFolder, RunResult, open_run, replace_folder, start_run, trackable
from rwft.setup import prepare_training, start_accelerator
from rwft.step import optimiser_step
from rwft.training import Training
from rwft.verifiers import build_verifier

TWICE = 1.0  # seconds in which a terminal and a launcher may deliver the same signal again
LONG_SAVE, GRACE = 20, 30  # seconds: a save that is warned about; what torchrun waits before it kills


class StopFlag:
    """SIGTERM and SIGINT ask the loop to finish its step; a second one, a second later, ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.since = 0.0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: whoever runs it there handles signals
                break
        return self

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > TWICE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def run_steps(training: Training, start: int, on_step: Callable[[int, Meter], None]) -> tuple[int, int | None]:
    """Steps from `start` to the end, or to a signal; gives back the steps done and the signal, if any."""
    meter = Meter(training.accelerator.device)
    with StopFlag() as flag:
        for step in range(start, training.steps):
            training.snapshot(step)
            optimiser_step(training, step, meter)
            done, stop = step + 1, training.any_rank(flag.received is not None)
            on_step(done, meter)
            if stop and done < training.steps:
                return done, flag.received or signal.SIGTERM
    return training.steps, None


def evaluate_held_out(training: Training) -> dict[str, float]:
    """Likelihood figures of the held-out rows; empty if there are none."""
    if training.data.held_out is None or training.collate_held_out is None:
        return {}
    return held_out_likelihood(
        training.model, training.collate_held_out, training.data.held_out, training.accelerator, training.data.credit
    )


@dataclass
class Journal:
    """After every step: metrics, evaluation and checkpoints when they are due."""

    training: Training
    folder: RunFolder
    log: MetricsLog
    alarms: AlarmLog
    manifest: Manifest
    update: Callable[[int, Mapping[str, float]], None]
    started: float
    last: dict[str, float] = field(default_factory=dict)
    saved: int = -1
    warned: bool = False

    def __call__(self, done: int, meter: Meter) -> None:
        config, final = self.training.config.train, done == self.training.steps
        if done == 1 or done % EVERY == 0 or final:
            self.keep_loss(done, meter)
        if done % config.log_every == 0 or final:
            self.write(done, meter)
        if config.eval_every and done % config.eval_every == 0 and not final:
            self.evaluate(done)
        if config.save_every and done % config.save_every == 0 and not final:
            self.save(done, "running")
        self.update(done, self.last)

    def write(self, done: int, meter: Meter) -> None:
        """Reduce the meter over ranks and record it."""
        metrics: dict[str, float] = {}
        elapsed, self.started = time.perf_counter() - self.started, time.perf_counter()
        if meter.steps:  # not all of them were skipped
            metrics = meter.read(self.training.accelerator.gather)
            metrics |= {"lr": meter.rate, "grad_norm": meter.norm, "grad_clipped/mean": meter.clipped / meter.steps}
            metrics["tokens_per_second"] = metrics["tokens/sum"] / max(elapsed, 1e-9)
        if self.training.config.train.on_nonfinite == "skip":
            metrics["skipped/sum"] = float(self.training.skipped.total)
        meter.reset()
        self.last = metrics
        self.record(done, metrics)

    def keep_loss(self, done: int, meter: Meter) -> None:
        """The step's loss over all ranks, bit by bit, into the manifest."""
        mine = torch.tensor(meter.loss, dtype=torch.float64, device=self.training.accelerator.device)
        self.manifest.loss(done, float(self.training.accelerator.reduce(mine, "sum")))

    def evaluate(self, done: int) -> dict[str, float]:
        """Held-out figures, recorded under `eval/`, unless a run that died behind this line has done so."""
        figures = evaluate_held_out(self.training)
        if figures and done != self.log.evaluated:
            self.record(done, {f"eval/{name}": value for name, value in figures.items()})
        return figures

    def record(self, done: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, what it gives warning of, and the trackers."""
        if self.training.accelerator.is_main_process:
            line = {"step": done, **metrics}
            self.log.write(line)
            self.training.display.say(*self.alarms.hear(line))
        self.training.accelerator.log(dict(metrics), step=done)

    def save(self, done: int, state: str) -> None:
        """A checkpoint, unless this step has one already."""
        started = time.perf_counter()
        if done != self.saved:
            self.training.save(done)
            self.saved = done
        self.folder.status(state, done, f"checkpoints/{self.folder.checkpoint(done).name}")
        seconds = time.perf_counter() - started
        if seconds > LONG_SAVE and not self.warned:
            self.warned = True
            self.training.display.say(
                f"warning: saving took {seconds:.0f} s; torchrun kills a run {GRACE} s after asking it to stop"
            )


def train(config: Config, *, fresh: bool = False, console: Any = None) -> RunResult:
    """Train a policy as the config says.

    The same config in the same output folder goes on where it stopped. Raises UserError (and
    writes nothing into the output) for a mistake in config or data, NonFiniteError before a
    parameter could become non-finite, Interrupted after a signal, once a checkpoint is saved.
    """
    accelerator = start_accelerator(config)
    folder = open_run(config, accelerator.is_main_process, fresh)
    with Display(console, accelerator.is_main_process) as display:
        finished = None if fresh else folder.finished()
        if finished is not None:
            display.say(
                f"{folder.path}: this run is finished ({finished.steps} steps); nothing to do (--fresh starts over)"
            )
            return finished
        for key, path in (("output", config.output), ("cache", config.cache)):
            refuse_unwritable(key, Path(path).expanduser())
        if config.evaluate.verifier is not None:
            build_verifier(config.evaluate.verifier)  # read behind the training, where a mistake would come too late
        training = prepare_training(config, accelerator, folder, display)
        with start_run(config, folder, fresh):
            if accelerator.is_main_process:
                training.store.sweep()
            accelerator.wait_for_everyone()
            start = training.resume()
            if start:
                display.say(f"{folder.path}: going on at step {start} of {training.steps}")
            with failures_noted(folder):
                return finish(training, folder, *run(training, folder, start))


@contextmanager
def failures_noted(folder: RunFolder) -> Iterator[None]:
    """status.json says so when a run ends by an error."""
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        folder.fail(error)
        raise


def run(training: Training, folder: RunFolder, start: int) -> tuple[int, int | None, Journal]:
    """The steps, with their journal."""
    what = f"{training.objective}"
    update = training.display.steps(what, training.steps, start)
    log = MetricsLog(folder.metrics, start, folder.main)
    alarms = AlarmLog(folder.path, folder.metrics, folder.main)
    if folder.main:
        forget_rows(folder.path, start)
    saved = start if folder.checkpoint(start).is_dir() else -1
    manifest, started = open_manifest(training, start), time.perf_counter()
    journal = Journal(training, folder, log, alarms, manifest, update, started, log.last, saved)
    training.accelerator.init_trackers("rwft", config=trackable(training.config), init_kwargs=tracker_settings(folder))
    if training.data.credit is not None:
        folder.write_parts("credit.json", training.data.credit.json_parts())
    folder.status("running", start, f"checkpoints/{folder.checkpoint(start).name}" if saved == start else None)
    return *run_steps(training, start, journal), journal


def tracker_settings(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """Runs are named as their folders; W&B keeps its files there, and no command line, path or host in them."""
    name = folder.path.name
    wandb = {"name": name, "dir": str(folder.path), "settings": {"x_disable_meta": True, "host": ""}}
    return {"wandb": wandb, "trackio": {"name": name}}


def finish(training: Training, folder: RunFolder, done: int, stopped: int | None, journal: Journal) -> RunResult:
    """Save, and either say how to go on (after a signal) or evaluate, export and sum up."""
    journal.save(done, "stopped" if stopped else "running")
    training.accelerator.wait_for_everyone()  # a rank that ends makes the launcher end the others: all is written first
    if stopped:
        training.close_trackers()
        raise Interrupted(
            f"{folder.path}: stopped at step {done} of {training.steps}; the same command goes on there", stopped
        )
    journal.manifest.finish(done)
    held_out = journal.evaluate(done)
    lora = training.config.model.lora
    main, partial = training.accelerator.is_main_process, folder.path / ".model.tmp"
    merge = lora is not None and lora.merge
    with writing(folder.path / "model"):
        export(training.policy, training.tokenizer, partial, training.config.model.dtype, merge=merge, main=main)
        if main:
            replace_folder(partial, folder.path / "model")
    result = RunResult(
        output=str(folder.path),
        objective=str(training.objective),
        seed=training.config.train.seed,
        steps=done,
        state="done",
        metrics=journal.last,
        held_out=held_out,
    )
    folder.finish(result)
    training.close_trackers()
    summary = [(name, value) for name, value in journal.last.items()] + [
        (f"held out: {k}", v) for k, v in held_out.items()
    ]
    training.display.table(f"{result.objective}: {done} steps", ["metric", "value"], summary)
    training.display.say(f"model: {result.model}")
    return result
