"""One optimiser step: count, then forward; one equation for every objective."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import torch
from einops import rearrange
from torch import Tensor

from rwft.config import TrainConfig
from rwft.data.batching import Batch
from rwft.estimator import Counts, weight_denominator
from rwft.head import Draws, HeadResult
from rwft.metrics import Meter
from rwft.observe import tokens_of
from rwft.postmortem import discard
from rwft.rowlog import write_step
from rwft.training import Training
from rwft.weighting import Objective


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Rate of optimiser step `step` (from 0): linear warm-up, then the schedule down to 0 (or constant)."""
    warm = math.ceil(config.warmup * steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    done = (step - warm) / max(steps - warm, 1)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (1 - done) if config.schedule == "linear" else config.lr


def seed_micro_batch(seed: int, step: int, micro: int, rank: int) -> None:
    """Dropout of a micro-batch is a function of where it stands, so a resumed run repeats it."""
    torch.manual_seed(_number(f"{seed}:{step}:{micro}:{rank}"))


def draws_of(seed: int, step: int, micro: int, rank: int, device: torch.device) -> Draws:
    """What `train.head: sampled` draws in a micro-batch; as dropout, but from numbers of its own."""
    return Draws(torch.Generator(device).manual_seed(_number(f"{seed}:{step}:{micro}:{rank}:draws")))


def _number(place: str) -> int:
    return int.from_bytes(blake2b(place.encode(), digest_size=8).digest(), "little") & (2**63 - 1)


@dataclass(frozen=True)
class Weigher:
    """Weights of a micro-batch over the denominator, for positions as the head asks for them.

    What waits for the device (where the trained positions are) is found once, not for every chunk of the head.
    """

    objective: Objective
    batch: Batch
    denominator: Tensor  # () or (b 1)
    scalars: Mapping[str, float]  # signals () that the loop provides

    @property
    def segments(self) -> list[int] | None:
        """What the head must see together: single positions, whole sequences, or the whole micro-batch."""
        if self.objective.token_local:
            return None
        lengths = self.batch.sequence_lengths
        return [sum(lengths)] if "group" in self.objective.reads else lengths

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """`(n), (n)`: row and column of the trained positions."""
        rows, columns = (self.batch.mask > 0).nonzero(as_tuple=True)
        return rows, columns

    @cached_property
    def flat_denominator(self) -> Tensor:
        """`(n)`: the denominator at each trained position."""
        return self.denominator.expand_as(self.batch.mask)[self.places]

    def __call__(self, head: dict[str, Tensor], where: slice) -> Tensor:
        """`{name: (k)}` for positions `where` of the flat trained positions -> coefficients `(k)`."""
        weights = self._local(head, where) if self.objective.token_local else self._by_sequence(head, where)
        return weights.to(head["logp"].dtype) / self.flat_denominator[where]

    def _local(self, head: dict[str, Tensor], where: slice) -> Tensor:
        """Every position is a sequence of one: nothing else can be seen."""
        row, column = (place[where] for place in self.places)
        signals = {k: rearrange(v, "k -> k 1") for k, v in head.items()}
        for name, value in self.batch.signals.items():
            signals[name] = value.expand_as(self.batch.mask)[row, column, None] if value.ndim else value
        signals |= self._scalars(head["logp"])
        weights = self.objective(signals)
        return weights.expand(len(head["logp"]), 1).squeeze(1)

    def _scalars(self, like: Tensor) -> dict[str, Tensor]:
        return {name: like.new_tensor(value) for name, value in self.scalars.items()}

    def _by_sequence(self, head: dict[str, Tensor], where: slice) -> Tensor:
        ends = list(itertools.accumulate(self.batch.sequence_lengths))
        first, last = bisect_right(ends, where.start), bisect_left(ends, where.stop) + 1
        mask = self.batch.mask[first:last] > 0
        signals = {name: value[first:last] if value.ndim else value for name, value in self.batch.signals.items()}
        for name, value in head.items():
            signals[name] = value.new_zeros(mask.shape).masked_scatter(mask, value)
        signals |= self._scalars(head["logp"])
        row, column = (place[where] for place in self.places)
        return self.objective(signals).expand_as(mask)[row - first, column]


@dataclass(frozen=True)
class MicroResult:
    """What a micro-batch leaves for metrics and for a post-mortem."""

    batch: Batch
    head: HeadResult
    weights: Tensor  # (n)


def micro_batch(
    training: Training, batch: Batch, counts: Counts, step: int, scale: float, sampled: Draws | None = None
) -> MicroResult:
    """Forward and backward of one micro-batch; `scale` undoes the mean over ranks."""
    config = training.config
    denominator = counts.denominator(config.train.normalize, batch.mask)
    weigh = Weigher(training.objective, batch, denominator, training.scalars(step))
    penalty_scale = 1.0 / weigh.flat_denominator if training.penalties else None
    result = training.model(
        batch.ids,
        batch.mask,
        weigh,
        segments=weigh.segments,
        signals=training.head_signals,
        penalties=training.penalties,
        penalty_scale=penalty_scale,
        reference=training.reference,
        two_pass=config.train.head == "two_pass",
        sampled=sampled,
        layout=batch.layout,
    )
    training.backward(result.loss * scale)
    return MicroResult(batch, result, result.coefficients * weigh.flat_denominator)


def gradient(training: Training, step: int) -> tuple[list[MicroResult], float]:
    """The gradient of one step over all micro-batches and ranks, left in the parameters; and what still divides it."""
    accelerator, config = training.accelerator, training.config.train
    counts, batches = training.counts(step), training.micro_batches(step)
    results: list[MicroResult] = []
    for index, batch in enumerate(batches):
        place = (config.seed, step, index, accelerator.process_index)
        seed_micro_batch(*place)
        draws = draws_of(*place, accelerator.device) if config.head == "sampled" else None
        with training.synchronise(index == len(batches) - 1):
            here, ranks = batch.to(accelerator.device), accelerator.num_processes
            results.append(micro_batch(training, here, counts, step, ranks, draws))
    return results, step_denominator(training, results)


def optimiser_step(training: Training, step: int, meter: Meter) -> None:
    """One step of the equation.

    If the loss or a gradient is not finite, on any rank, parameters and optimiser stay as they are:
    NonFiniteError is raised or, under `train.on_nonfinite: skip`, the step left out.
    """
    results, z = gradient(training, step)
    norm = training.clip(z)
    loss = sum(float(r.head.loss.detach()) for r in results) / z
    meter.loss = loss
    if training.any_rank(not (math.isfinite(norm) and math.isfinite(loss))):
        discard(training, step, norm, loss, results)
        return
    training.skipped.in_a_row = 0
    config = training.config.train
    meter.rate, meter.norm = learning_rate(step, training.steps, config), norm
    meter.clipped += 0 < config.clip < norm
    record(training, meter, results, z, step)  # before the update: nothing runs on the device, so no count waits
    if config.rows_every and (step + 1) % config.rows_every == 0:
        write_step(training, step, results)
    for group in training.optimizer.param_groups:
        group["lr"] = meter.rate
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    training.track_kl([(r.batch, r.head.logp) for r in results], step)


def step_denominator(training: Training, results: list[MicroResult]) -> float:
    """1, or under `weight` the summed weights of the step, by which the finished gradient is divided."""
    if training.config.train.normalize != "weight":
        return 1.0
    device = training.accelerator.device
    sums = sum((r.weights.double().sum() for r in results), torch.zeros((), dtype=torch.float64, device=device))
    lows = torch.stack([r.weights.double().min() if r.weights.numel() else sums.new_zeros(()) for r in results])
    total = float(training.accelerator.reduce(sums, "sum"))
    smallest = float(training.accelerator.gather(lows.min().reshape(1)).min())
    return weight_denominator(total, smallest)


def record(training: Training, meter: Meter, results: list[MicroResult], z: float, step: int) -> None:
    """Add a step to the meter. Rows of weight zero that were not forwarded count as what they are."""
    meter.steps += 1
    left_out = training.unforwarded(step)
    if left_out[1] and training.accelerator.is_main_process:
        meter.add_zero_weights(*left_out)
    tokens = tokens_of(training, results)
    if tokens is not None:
        loss = torch.stack([result.head.loss.detach().double() for result in results]).sum() / z
        meter.add({**tokens.sums(), **_row_sums(results), "loss": loss}, tokens.weights)
    for result in results:
        meter.add_penalties({name: mean * len(result.head.logp) for name, mean in result.head.penalties.items()})


def _row_sums(results: list[MicroResult]) -> dict[str, Tensor]:
    """`{name: ()}`: how many rows were forwarded, and their rewards."""
    forwarded = torch.stack([(result.batch.mask.sum(dim=1) > 0).sum() for result in results]).sum()
    rewards = [r.batch.signals["reward"].double().sum() for r in results if "reward" in r.batch.signals]
    return {"sequences": forwarded} | ({"reward": torch.stack(rewards).sum(), "rewarded": forwarded} if rewards else {})
