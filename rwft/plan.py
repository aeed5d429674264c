"""What a run would do and need, before it does: parameters, memory per device by part, rows, steps, tokens, work.

No weights are loaded and nothing is written into the run's folder; rows are tokenised, and kept in the cache.
Memory is an estimate: `docs/many_gpus.md` holds it against what runs took.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from rwft.config import Config, load_config
from rwft.data.batching import Plan
from rwft.data.packing import packing
from rwft.data.prepare import Prepared, prepare
from rwft.data.shared import sharing
from rwft.durable import refuse_unwritable
from rwft.errors import ConfigError, did_you_mean
from rwft.footprint import Footprint, Outline, activations
from rwft.head import Draws
from rwft.idle import idle_rows
from rwft.policy import load_tokenizer
from rwft.progress import Display
from rwft.regularizers import build_regularizers
from rwft.setup import check_room, check_verifier, make_plan
from rwft.temperature import fit_temperatures
from rwft.weighting import Objective, build_objective

ENGINES = ("one", "ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3")
ZERO = ENGINES[3:]
SPREAD = ("fsdp2", "deepspeed_zero3")  # weights over ranks
BUCKETS = "buckets of the reduction"
GATHERED = "gathered weights and gradients"
LOADING = "whole weights, while loading"
ZERO_BUCKET, ZERO_LIVE = 500_000_000, 1_000_000_000  # DeepSpeed's defaults, in numbers: of a bucket, of whole weights
LOOK = 256  # optimiser steps that are cut into passes to find the largest one
FORWARD_BACKWARD, FROZEN = 3, 2  # forward passes that a step costs: weights trained, or only passed through


@dataclass(frozen=True)
class Passes:
    """The passes of the first steps: the one with most positions, the most trained ones in any, and how many a step."""

    rows: int
    positions: int
    trained: int
    steps: int  # that were looked at
    several: bool  # whether a rank takes more than one pass in a step, so that gradients wait for the next


@dataclass(frozen=True)
class Work:
    """What a run comes to."""

    steps: int
    warmup: int
    rows: int  # in a step, over all ranks
    tokens: float  # forwarded in a mean step, over all ranks, padding left out
    trained: float  # of those, under the mask
    operations: float  # floating-point, of the whole run over all ranks


def plan_command(path: str, overrides: Sequence[str], processes: int | None = None, engine: str | None = None) -> None:
    """`rwft train CONFIG --plan`: print it on the first rank, and train nothing."""
    if os.environ.get("RANK", "0") != "0":
        return
    config = load_config(path, overrides)
    processes, engine = choose(processes, engine)
    with Display(Console(), main=True) as display:
        describe(config, processes, engine, display)


def choose(processes: int | None, engine: str | None) -> tuple[int, str]:
    """Processes and engine as asked for, else those of the launcher, else one.

    Raises ConfigError for an engine that does not exist or does not fit the number of processes.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1")) if processes is None else processes
    if processes < 1:
        raise ConfigError(f"--processes: found {processes}, expected a whole number >= 1")
    if engine is None:
        engine = "one" if processes == 1 else launched()
    if engine not in ENGINES:
        raise ConfigError(f"--engine: '{engine}' is unknown; {did_you_mean(engine, ENGINES)}")
    if (engine == "one") != (processes == 1):
        raise ConfigError(f"--engine: found {engine} on {processes} processes; expected one on 1, others on more")
    return processes, engine


def launched() -> str:
    """The engine that the launcher asks for."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
            raise ConfigError(f"--engine: the launcher leaves the stage to a file; say {' or '.join(ZERO)}")
        return f"deepspeed_zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return "fsdp2" if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" else "ddp"


def describe(config: Config, processes: int, engine: str, display: Display) -> None:
    """Everything, in the order in which a run meets it: data, model, memory, work."""
    objective = build_objective(config.objective)
    tick = display.ticker("reading and tokenising rows")
    cache = Path(config.cache).expanduser()
    refuse_unwritable("cache", cache)
    data = prepare(config.data, load_tokenizer(config.model), objective.reads, cache, tick)
    check_verifier(config, data)
    objective = fit_temperatures(objective, data)
    outline = Outline(config.model)
    check_room(outline.policy, data.train, data.held_out)
    plan = planned(config, objective, data, outline, processes, engine)
    steps = config.train.steps or max(1, round((config.train.epochs or 1.0) * plan.steps_per_epoch))
    passes, size = largest(plan, data, steps, packed=packs(config, outline)), outline.footprint()
    held_out = 0 if data.held_out is None else len(data.held_out)
    display.say(
        *data.report.lines(),
        f"{len(data.train)} rows to train on, {held_out} held out; "
        f"{int(idle_rows(objective, data).sum())} of weight zero by data alone",
        f"rows were tokenised into {cache}; no weights were loaded, and nothing was written into {config.output}",
        f"{size.parameters:,} parameters, {size.trained:,} of them trained ({size.trained / size.parameters:.3g})",
    )
    kept = activations(config.model, passes.rows, passes.positions)
    show_memory(config, memory(config, outline, passes, kept, processes, engine), kept, passes, display)
    show_work(work(config, data, plan, size, steps), plan, display)


def planned(
    config: Config, objective: Objective, data: Prepared, outline: Outline, processes: int, engine: str
) -> Plan:
    """The very plan of steps that the run would follow."""
    share = sharing(config.data.share_prompts, [outline.policy.causal], spread=engine in SPREAD)
    penalties = tuple(build_regularizers(config.regularize))
    packed = packs(config, outline) and share is None
    return make_plan(config, objective, penalties, data, processes, beside=share is not None, packed=packed)


def packs(config: Config, outline: Outline) -> bool:
    """Whether the run would pack rows. Raises PolicyError where it would be refused."""
    kernel = None if config.model.attention == "auto" else config.model.attention  # outlines know no flash attention
    return packing(config.data.pack, [outline.policy.causal], kernel)


def largest(plan: Plan, data: Prepared, steps: int, *, packed: bool = False) -> Passes:
    """The pass with most positions among those of the first steps, on any rank; `packed` rows are one."""
    looked = min(steps, plan.steps_per_epoch, LOOK)
    ranks = [[plan.micro_batches(step, rank) for rank in range(plan.world)] for step in range(looked)]
    parts = [part for step in ranks for rank in step for part in rank if len(part)]
    shapes = [(len(part), int(data.train.length[part].max())) for part in parts]
    if packed:
        shapes = [(1, int(data.train.length[part].sum())) for part in parts]
    rows, positions = max(shapes, key=math.prod)
    return Passes(
        rows=rows,
        positions=positions,
        trained=max(int(data.train.trained[part].sum()) for part in parts),
        steps=looked,
        several=any(len(rank) > 1 for step in ranks for rank in step),
    )


def memory(
    config: Config, outline: Outline, passes: Passes, kept: tuple[int, int], processes: int, engine: str
) -> dict[str, int]:
    """Bytes on each device by part, and the `peak`: what of it is there at the same time.

    Activations fall as gradients grow, so that where a step is one pass, only the greater of the two counts.
    """
    size = outline.footprint()
    share = processes if engine in SPREAD else 1
    divided = processes if engine in (*SPREAD, *ZERO) else 1
    parts = {
        "weights": -(-size.weights // share),
        "gradients": -(-size.gradients // divided),
        "optimizer moments": -(-2 * size.gradients // divided),
        "loss head": outline.head(passes.trained, config.train.head == "sampled"),
        "activations": kept[1] if config.model.gradient_checkpointing else kept[0],
    }
    if engine == "ddp":
        parts[BUCKETS] = size.gradients
    if engine in ZERO:
        parts |= {"weights that are updated, a copy": parts["gradients"], BUCKETS: ZERO_BUCKET * 4}
    if engine in SPREAD:
        parts[GATHERED] = gathered(size) if engine == "fsdp2" else live(size)
    if any("ref_logp_all" in penalty.reads for penalty in build_regularizers(config.regularize)):
        parts["reference model"] = reference_bytes(config, size)
    passing = parts["loss head"] + parts["activations"]
    waiting = parts["gradients"] if passes.several else 0
    always = sum(parts.values()) - passing - parts["gradients"]
    stepping = parts["gradients"] * (2 if engine in ZERO else 1)  # DeepSpeed flattens them first
    peak = always + max(passing + waiting, stepping)
    if engine in SPREAD:  # each rank loads the model whole, and then gives away all but its share
        parts[LOADING] = size.weights
    return {**parts, "peak": max(peak, parts.get(LOADING, 0))}


def gathered(size: Footprint) -> int:
    """Bytes that FSDP makes whole at a time: what belongs to no block, one block and the next, and their gradients."""
    trained = size.gradients / size.weights
    return size.root + 2 * size.block + round(trained * (size.root + size.block))


def live(size: Footprint) -> int:
    """Bytes that ZeRO-3 holds whole at a time: weights up to its limit, and the gradients of a block or of the rest."""
    kept = min(size.parameters, ZERO_LIVE + max(size.root, size.block) * size.parameters // size.weights)
    return kept * size.weights // size.parameters + max(size.root, size.block) * size.gradients // size.weights


def reference_bytes(config: Config, size: Footprint) -> int:
    """Bytes of a reference whose whole distribution is read: it stays beside the policy, whole on each device."""
    if config.reference.path is None:
        return size.weights
    from dataclasses import replace

    other = replace(config.model, path=config.reference.path, revision=config.reference.revision, config=None)
    return Outline(other).footprint().weights


def work(config: Config, data: Prepared, plan: Plan, size: Footprint, steps: int) -> Work:
    """Steps, tokens and operations of the run, from the rows that are forwarded; shared prompts are not subtracted."""
    length, trained = (column[plan.alive] for column in (data.train.length, data.train.trained))
    epochs = steps / plan.steps_per_epoch
    return Work(
        steps=steps,
        warmup=math.ceil(config.train.warmup * steps),
        rows=plan.window_size,
        tokens=float(length.sum()) / plan.steps_per_epoch,
        trained=float(trained.sum()) / plan.steps_per_epoch,
        operations=epochs
        * operations(size, length, trained, config.model.gradient_checkpointing, config.train.head == "sampled"),
    )


def operations(
    size: Footprint, length: NDArray[np.int64], trained: NDArray[np.int64], again: bool, sampled: bool = False
) -> float:
    """Floating-point operations of one epoch: two for each weight and position, two products in causal attention.

    A backward pass costs two forward ones, or one where weights are frozen; `again`: the forward pass is repeated;
    `sampled`: the backward pass of the head touches the tokens that were drawn.
    """
    frozen = size.trained < size.parameters / 2
    positions, pairs = float(length.sum()), float(np.square(length.astype(np.float64)).sum())
    body = 2 * size.products * positions * ((FROZEN if frozen else FORWARD_BACKWARD) + again)
    attention = 2 * size.layers * size.attention * pairs * (FORWARD_BACKWARD + again)
    v, h = size.vocabulary
    backward = (FORWARD_BACKWARD if size.head_trained else FROZEN) - 1
    head = 2 * h * float(trained.sum()) * (v + backward * (Draws.count + 1 if sampled else v))
    return body + attention + head


def show_memory(
    config: Config, parts: Mapping[str, int], kept: tuple[int, int], passes: Passes, display: Display
) -> None:
    """The table of memory, and what checkpointing activations would change."""
    display.table("memory per device (an estimate)", ["part", "bytes"], [(n, amount(b)) for n, b in parts.items()])
    now, other = kept[::-1] if config.model.gradient_checkpointing else kept
    word = "without" if config.model.gradient_checkpointing else "with"
    display.say(
        f"activations are those of {passes.rows} rows of {passes.positions} positions, the largest pass of the first "
        f"{passes.steps} steps; {word} model.gradient_checkpointing {amount(other)} instead of {amount(now)}"
    )


def show_work(work: Work, plan: Plan, display: Display) -> None:
    """Steps, tokens and operations."""
    per_rank = f"{plan.batch_size} x {plan.window_size // (plan.batch_size * plan.world)} x {plan.world}"
    display.say(
        f"{work.steps} optimiser steps, {work.warmup} of them warm-up; {plan.steps_per_epoch} to an epoch",
        f"{work.rows} rows a step ({per_rank} ranks), {work.tokens:.0f} tokens, {work.trained:.0f} of them trained",
        f"{work.operations:.3g} floating-point operations in all",
    )


def amount(size: int) -> str:
    """Bytes for people: `1.25 GiB`."""
    unit, name = (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")
    return f"{size / unit:.2f} {name}"
