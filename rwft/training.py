"""A run ready to step: what it consists of, what a step asks of it, and what a checkpoint holds of it."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwft.checkpoint import CheckpointStore, join_optimizer, split_optimizer
from rwft.config import Config
from rwft.data.batching import Batch, Collate, Plan
from rwft.data.logprobs import pack_rows, row_logp, unpack_rows
from rwft.data.prepare import Prepared
from rwft.errors import ConfigError
from rwft.estimator import Counts
from rwft.policy import Policy
from rwft.postmortem import Skipped
from rwft.progress import Display
from rwft.regularizers import Penalty
from rwft.run import RunFolder
from rwft.sharding import place, spread_optimizer, whole, whole_optimizer
from rwft.signals import SIGNALS
from rwft.weighting import Objective
from rwft.zero import Zero

KL_RATE = 0.1  # of the running mean of the policy's log-ratio to the reference


@dataclass
class Training:
    """A run ready to step. `policy` is the bare module, `model` what Accelerate made of it for this many ranks."""

    config: Config
    accelerator: Any
    policy: Policy
    model: Any
    tokenizer: Any
    optimizer: Any
    objective: Objective
    penalties: tuple[Penalty, ...]
    reference: Policy | None
    data: Prepared
    plan: Plan
    collate: Collate
    collate_held_out: Collate | None
    steps: int
    folder: RunFolder
    store: CheckpointStore
    display: Display
    fingerprints: dict[str, str]
    old_logp: dict[int, NDArray[Any]] = field(default_factory=dict)
    kl_running: float = 0.0
    skipped: Skipped = field(default_factory=Skipped)

    @property
    def head_signals(self) -> tuple[str, ...]:
        """Signals by position that only the head can provide, besides logp."""
        known = {name for name, signal in SIGNALS.items() if signal.source == "head" and signal.axes and name != "logp"}
        return tuple(sorted((self.objective.reads | {*self.config.train.watch}) & known))

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's part of an optimiser step."""
        return [self.collate(part) for part in self.plan.micro_batches(step, self.accelerator.process_index)]

    def unforwarded(self, step: int) -> tuple[float, float, float]:
        """Tokens, sequences and summed reward of the step's rows that are not forwarded, since their weight is zero."""
        window = self.plan.window(step)
        out = window[~self.plan.alive[window]]
        return float(self.data.train.trained[out].sum()), float(len(out)), float(self.data.train.reward[out].sum())

    def counts(self, step: int) -> Counts:
        """Trained tokens and sequences of the whole step, over all ranks, known before anything is forwarded."""
        window = self.plan.window(step)
        return Counts(tokens=float(self.data.train.trained[window].sum()), sequences=float(len(window)))

    def scalars(self, step: int) -> dict[str, float]:
        """Signals `()` that come from where the run stands."""
        return {"progress": step / self.steps, "log_vocab": math.log(self.policy.size), "kl_running": self.kl_running}

    def synchronise(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are summed over ranks in the last micro-batch's backward only."""
        if isinstance(self.optimizer, Zero):
            self.optimizer.accumulate(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch."""
        self.optimizer.backward(loss) if isinstance(self.optimizer, Zero) else self.accelerator.backward(loss)

    def any_rank(self, here: bool) -> bool:
        """Whether this holds on any rank."""
        return bool(self.accelerator.reduce(torch.tensor(float(here), device=self.accelerator.device), "sum") > 0)

    def most(self, here: int) -> int:
        """The most that any rank has: of forward passes, say, which ranks make together if weights are spread."""
        mine = torch.tensor([here], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())

    def clip(self, denominator: float) -> float:
        """Divide the finished gradient, clip it, and give back its norm before clipping."""
        limit = self.config.train.clip or float("inf")
        if isinstance(self.optimizer, Zero):
            return self.optimizer.clip(denominator, limit, self.accelerator)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if denominator != 1.0:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(denominator)
        return float(whole(torch.nn.utils.clip_grad_norm_(parameters, limit)))

    def snapshot(self, step: int) -> None:
        """At the start of every `snapshot_every` steps, what `old_logp` will be until the next snapshot."""
        every = self.config.train.snapshot_every
        if "old_logp" not in self.objective.reads or step % every:
            return
        rank = self.accelerator.process_index
        ahead = range(step, min(step + every, self.steps))
        mine = np.concatenate([part for s in ahead for part in self.plan.micro_batches(s, rank)])
        indices, rows, plain = np.unique(mine).astype(np.int64), self.data.train, self.collate.plain()
        group, packed = None if plain.share is None else rows.group, plain.packed
        how: dict[str, Any] = {"device": self.accelerator.device, "tick": lambda _: None, "passes": self.most}
        logp = row_logp(self.policy, plain, rows.length, indices, group=group, packed=packed, **how)
        self.old_logp.clear()
        self.old_logp.update(logp)

    def stored_old_logp(self, indices: NDArray[np.int64], mask: Tensor) -> Tensor:
        """`(b), (b t) -> (b t)`: log-probabilities at the last snapshot."""
        out = torch.zeros_like(mask)
        if float(mask.sum()) > 0:
            out[mask > 0] = torch.as_tensor(np.concatenate([self.old_logp[int(i)] for i in indices]), dtype=mask.dtype)
        return out

    def close_trackers(self) -> None:
        """Let the trackers write what they hold; the process group stays for whoever trains next."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def track_kl(self, parts: list[tuple[Batch, Tensor]], step: int) -> None:
        """Move `kl_running` a tenth of the way to this step's mean log-ratio of a sequence to the reference."""
        if "kl_running" not in self.objective.reads:
            return
        gap = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for batch, logp in parts:
            gap += (logp - batch.signals["ref_logp"][batch.mask > 0]).double().sum() if len(logp) else 0.0
        mean = float(self.accelerator.reduce(gap, "sum")) / self.counts(step).sequences
        self.kl_running += KL_RATE * (mean - self.kl_running)

    def save(self, step: int) -> None:
        """Write a checkpoint that a later run goes on from bit by bit; all ranks wait for it."""
        from accelerate.utils import gather_object

        tensors: dict[str, dict[str, Tensor]] = {}
        parameters = self.policy.trained_parameters()
        if any(p.grad is not None for p in parameters.values()):
            raise RuntimeError(f"step {step}: a gradient is pending, which no checkpoint holds; save between steps")
        tensors["model"] = {name: whole(p) for name, p in parameters.items()}
        tensors["optimizer"], rest = split_optimizer(whole_optimizer(self.optimizer.state_dict()))
        if "old_logp" in self.objective.reads:
            merged = {i: v for part in gather_object([self.old_logp]) for i, v in part.items()}
            tensors["old_logp"] = pack_rows(merged)
        if self.accelerator.is_main_process:
            state = {"step": step, "optimizer": rest, "kl_running": self.kl_running.hex()}
            state["skipped"] = asdict(self.skipped)
            self.store.save(step, tensors, state, self.fingerprints)
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Load the newest valid checkpoint, if there is one; gives back the step to go on from."""
        found = self.store.load(self.fingerprints)
        if found is None:
            return 0
        checkpoint, tensors, state = found
        parameters = self.policy.trained_parameters()
        if parameters.keys() != tensors["model"].keys():
            raise ConfigError(f"{checkpoint.folder}: holds other parameters than this model; start over with --fresh")
        for name, parameter in parameters.items():
            place(tensors["model"][name], parameter)
        moments = join_optimizer(tensors["optimizer"], state["optimizer"])
        self.optimizer.load_state_dict(spread_optimizer(moments, list(parameters.values())))
        self.old_logp.update(unpack_rows(tensors["old_logp"]) if "old_logp" in tensors else {})
        self.kl_running = float.fromhex(state["kl_running"])
        self.skipped = Skipped(**state["skipped"])
        return int(state["step"])
