"""Everything that an optimiser step needs, made once, in the order that costs least when something is wrong."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwft.checkpoint import CheckpointStore, join_optimizer, split_optimizer
from rwft.config import Config, as_dict
from rwft.data.batching import Batch, Collate, Plan, Stored, pass_tokens
from rwft.data.logprobs import pack_rows, row_logp, unpack_rows
from rwft.data.prepare import Prepared, prepare
from rwft.data.rows import Rows
from rwft.data.shared import Sharing, sharing
from rwft.errors import ConfigError, UserError, did_you_mean
from rwft.estimator import Counts, weight_denominator
from rwft.frozen import FrozenModels
from rwft.policy import Policy, fingerprint, load_policy, load_tokenizer
from rwft.postmortem import Skipped
from rwft.progress import Display
from rwft.regularizers import Penalty, build_regularizers
from rwft.run import RunFolder, beside_the_training, flatten, refuse_environment
from rwft.sharding import spread, spread_optimizer, whole, whole_optimizer
from rwft.signals import SIGNALS
from rwft.temperature import data_weights, fit_temperatures, fitted_sentences
from rwft.weighting import Objective, build_objective

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
        return tuple(sorted(self.objective.reads & known))

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
        vocabulary = self.policy.vocabulary().weight.shape[0]
        return {"progress": step / self.steps, "log_vocab": math.log(vocabulary), "kl_running": self.kl_running}

    def synchronise(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are summed over ranks in the last micro-batch's backward only."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def any_rank(self, here: bool) -> bool:
        """Whether this holds on any rank."""
        return bool(self.accelerator.reduce(torch.tensor(float(here), device=self.accelerator.device), "sum") > 0)

    def clip(self, denominator: float) -> float:
        """Divide the finished gradient, clip it, and give back its norm before clipping."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if denominator != 1.0:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(denominator)
        limit = self.config.train.clip or float("inf")
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
        group, device = None if plain.share is None else rows.group, self.accelerator.device
        logp = row_logp(self.policy, plain, rows.length, indices, device=device, tick=lambda _: None, group=group)
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
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(spread(tensors["model"][name], parameter))
        moments = join_optimizer(tensors["optimizer"], state["optimizer"])
        self.optimizer.load_state_dict(spread_optimizer(moments, list(parameters.values())))
        self.old_logp.update(unpack_rows(tensors["old_logp"]) if "old_logp" in tensors else {})
        self.kl_running = float.fromhex(state["kl_running"])
        self.skipped = Skipped(**state["skipped"])
        return int(state["step"])


def start_accelerator(config: Config) -> Any:
    """Devices, ranks and trackers; nothing else of Accelerate is used."""
    from accelerate import Accelerator

    refuse_environment()
    check_trackers(config.trackers)
    return Accelerator(
        cpu=not torch.cuda.is_available() and not torch.backends.mps.is_available(),
        mixed_precision="no",  # the policy casts for itself, in training and out of it
        log_with=list(config.trackers) or None,
        project_dir=config.output,
    )


def is_spread(accelerator: Any) -> bool:
    """Whether the weights are spread over ranks."""
    return str(accelerator.distributed_type.value) == "FSDP"


def refuse_engine(config: Config, accelerator: Any) -> None:
    """Engines that were tried here and no others: one process, DDP, and FSDP in its second version."""
    kind = str(accelerator.distributed_type.value)
    if is_spread(accelerator) and config.model.lora is not None and config.model.lora.merge:
        raise ConfigError("model.lora.merge: weights that are spread over ranks are not merged; export the adapter")
    if kind in ("DEEPSPEED", "MEGATRON_LM") or (kind == "FSDP" and not accelerator.is_fsdp2):
        raise ConfigError(
            f"the launcher asks for {kind}; use DDP or FSDP2, e.g. --config_file configs/accelerate/fsdp2.yaml"
        )


def check_trackers(names: Any) -> None:
    """Refuse trackers that do not exist or are not installed, which Accelerate would leave out without a word."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if not isinstance(names, (list, tuple)):
        raise ConfigError(f"trackers: found {names!r}, expected a list such as [tensorboard]")
    installed = set(map(str, get_available_trackers()))
    for name in map(str, names):
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(f"trackers: '{name}' is unknown; {did_you_mean(name, LOGGER_TYPE_TO_CLASS)}")
        if name not in installed:
            raise ConfigError(f"trackers: '{name}' is not installed; pip install {name}")


def prepare_training(config: Config, accelerator: Any, folder: RunFolder, display: Display) -> Training:
    """The cheap checks first (objective, data), then the model, then what the objective reads from frozen ones."""
    objective = build_objective(config.objective)
    penalties = tuple(build_regularizers(config.regularize))
    cache = Path(config.cache).expanduser()
    tokenizer = load_tokenizer(config.model)
    data = prepare_once(config, tokenizer, objective.reads, cache, accelerator, display)
    wanted, objective = objective, fit_temperatures(objective, data)
    display.say(*data.report.lines(), *unread_settings(config, objective, data), *fitted_sentences(wanted, objective))
    refuse_engine(config, accelerator)
    policy = load_policy(config.model, config.train.seed, accelerator.device)
    identity = fingerprint(policy)
    frozen = FrozenModels(config, policy, accelerator, display)
    stored, known = frozen.signals(objective.reads, data.train)
    reference = frozen.live_reference() if any("ref_logp_all" in penalty.reads for penalty in penalties) else None
    models, spread_out = [m.causal for m in (policy, reference) if m is not None], is_spread(accelerator)
    share = sharing(config.data.share_prompts, models, spread=spread_out)
    plan = make_plan(config, objective, penalties, data, accelerator.num_processes, beside=share is not None)
    steps = config.train.steps or max(1, round((config.train.epochs or 1.0) * plan.steps_per_epoch))
    parameters = list(policy.trained_parameters().values())
    optimizer = torch.optim.AdamW(
        parameters, lr=config.train.lr, betas=config.train.betas, weight_decay=config.train.weight_decay, fused=True
    )
    model, optimizer = accelerator.prepare(policy, optimizer)
    model.train()
    reads = objective.reads | {"reward"} if data.train.has("reward") else objective.reads
    training = Training(
        config=config,
        accelerator=accelerator,
        policy=policy,
        model=model,
        tokenizer=tokenizer,
        optimizer=optimizer,
        objective=objective,
        penalties=penalties,
        reference=reference,
        data=data,
        plan=plan,
        collate=make_collate(data, data.train, reads, tokenizer, policy, stored, known, share),
        collate_held_out=None
        if data.held_out is None
        else make_collate(data, data.held_out, frozenset(), tokenizer, policy),
        steps=steps,
        folder=folder,
        store=CheckpointStore(folder.checkpoints, keep=config.train.keep),
        display=display,
        fingerprints=fingerprints(config, data, identity, accelerator.num_processes),
    )
    if "old_logp" in objective.reads:
        stored["old_logp"] = training.stored_old_logp
    return training


def prepare_once(
    config: Config, tokenizer: Any, reads: frozenset[str], cache: Path, accelerator: Any, display: Display
) -> Prepared:
    """The data, made by the first rank, taken from its cache by the others; all ranks raise what is wrong with them."""
    from accelerate.utils import broadcast_object_list

    tick = display.ticker("reading and tokenising rows")
    problem: list[str | None] = [None]
    data: Prepared | None = None
    if accelerator.is_main_process:
        try:
            data = prepare(config.data, tokenizer, reads, cache, tick)
        except UserError as error:
            if accelerator.num_processes == 1:
                raise
            problem = [str(error)]
    if accelerator.num_processes > 1:
        broadcast_object_list(problem)
        if problem[0] is not None:
            raise UserError(problem[0])
    return prepare(config.data, tokenizer, reads, cache, tick) if data is None else data


def make_collate(
    data: Prepared,
    rows: Rows,
    reads: frozenset[str],
    tokenizer: Any,
    policy: Policy,
    stored: Mapping[str, Stored] | None = None,
    known: Mapping[str, NDArray[Any]] | None = None,
    share: Sharing | None = None,
) -> Collate:
    """How rows of one split become batches: with what the data know, and what else is `known` or `stored`."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    known = {**data.known(rows), **(known or {})}
    dtype, credit = policy.float_dtype, data.credit
    return Collate(rows, reads, pad=pad, dtype=dtype, credit=credit, known=known, stored=stored, share=share)


def make_plan(
    config: Config, objective: Objective, penalties: tuple[Penalty, ...], data: Prepared, world: int, *, beside: bool
) -> Plan:
    """The order of rows, with those left out of the forward pass whose weight is zero by data alone.

    With `beside`, rows of a step that may share a prompt stand beside each other.
    """
    alive, coupled = None, "group" in objective.reads
    if not penalties and not coupled:
        zero = zero_weight_rows(objective, data)
        if zero.all():
            raise ConfigError(
                f"objective '{objective}': every one of the {len(zero)} rows has weight zero; nothing to learn"
            )
        alive = ~zero if zero.any() else None
    if config.train.normalize == "weight":
        weights = data_weights(objective, data)
        weight_denominator(1.0, 0.0 if weights is None else float(weights.min()))
    return Plan(
        data.train.length,
        batch_size=config.train.batch_size,
        accumulate=config.train.accumulate,
        world=world,
        seed=config.train.seed,
        group=data.train.group if coupled or config.data.order == "groups" else None,
        prompt=data.train.group if beside else None,
        alive=alive,
        pass_tokens=pass_tokens(),
    )


def zero_weight_rows(objective: Objective, data: Prepared) -> NDArray[np.bool_]:
    """`(n)`: rows whose weight is zero whatever the policy, because a factor that reads only row-level data says so."""
    zero = np.zeros(len(data.train), dtype=bool)
    if data.credit is None or data.credit.config.steps != "none":
        return zero
    known = data.known(data.train)
    signals = {
        name: torch.as_tensor(value)[:, None] if value.ndim else torch.as_tensor(value) for name, value in known.items()
    }
    for factor in objective.factors:
        if factor.entry.reads and set(factor.entry.reads) <= signals.keys():
            weights = Objective((factor,))(signals).expand(len(zero), 1)
            zero |= (weights.squeeze(1) == 0).numpy()
    return zero


def unread_settings(config: Config, objective: Objective, data: Prepared) -> list[str]:
    """Settings and columns that this objective does not read: allowed, because comparisons share a config, but said."""
    notes: list[str] = []
    credit = config.data.credit
    if (credit.baseline, credit.scale, credit.steps) != ("none", "none", "none") and "advantage" not in objective.reads:
        notes.append(f"note: data.credit is set, but '{objective}' does not read the advantage")
    if "token_weight" not in objective.reads and not data.train.missing("weight").all():
        notes.append(f"note: the data give weights to messages, but '{objective}' does not read token_weight")
    if credit.baseline != "value" and data.train.has("value"):
        notes.append("note: the data give values, which only data.credit.baseline: value reads")
    if data.train.has("reward") and not objective.reads & {"reward", "advantage"}:
        notes.append(f"note: the data give rewards, but '{objective}' does not read them")
    return notes


def fingerprints(config: Config, data: Prepared, model: str, ranks: int) -> dict[str, str]:
    """What a checkpoint must agree with to be resumed."""
    settings = {key: value for key, value in flatten(as_dict(config)).items() if not beside_the_training(key)}
    return {
        "config": hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest(),
        "data": data.train.fingerprint,
        "model": model,
        "ranks": str(ranks),
    }
