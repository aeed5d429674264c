"""Every setting of a run, typed and bounded; each is described in the comment behind it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rwft.errors import ConfigError, did_you_mean


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{key}: found {value!r}, expected {expected}")


def _choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{key}: '{value}' is unknown; {did_you_mean(value, choices)}")


def _positive(key: str, value: float | None, zero: bool = False) -> None:
    if value is not None:
        good = math.isfinite(value) and (value >= 0 if zero else value > 0)
        _require(good, key, value, "a finite number >= 0" if zero else "a finite number > 0")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters through PEFT; everything else stays frozen."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: Any = "all-linear"  # names of modules, or all-linear (every linear layer but the output head)
    merge: bool = False  # export merged weights instead of the adapter

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "model.lora.rank", self.rank, "a whole number >= 1")
        _positive("model.lora.alpha", self.alpha)
        _require(0 <= self.dropout < 1, "model.lora.dropout", self.dropout, "a number in [0, 1)")


@dataclass(frozen=True)
class ModelConfig:
    """The policy: a Hugging Face causal LM from a folder or the Hub, or from a config alone."""

    path: str | None = None  # a folder, or a name on the Hub
    config: Any = None  # architecture alone, for random weights: {model_type: llama, hidden_size: 64, ...}
    tokenizer: str | None = None  # folder, Hub name, or `characters` (one token per character); default: the model's
    revision: str | None = None  # commit on the Hub
    dtype: str = "float32"  # float32 | bfloat16 (trained weights stay float32, products in bfloat16) | float64
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile of every layer; worth trying on a GPU, gains nothing on a CPU
    attention: str = "auto"  # auto: the best that the model supports | sdpa | eager | flash_attention_2

    def __post_init__(self) -> None:
        _choice("model.dtype", self.dtype, ["float32", "bfloat16", "float64"])
        if self.compile and self.gradient_checkpointing:
            raise ConfigError(
                "model.compile: found true beside model.gradient_checkpointing; expected one of them, since torch "
                "was seen to compute other gradients with both (GPT-2, torch 2.13)"
            )
        _choice("model.attention", self.attention, ["auto", "sdpa", "eager", "flash_attention_2"])
        if (self.path is None) == (self.config is None):
            found = "neither" if self.path is None else "both"
            raise ConfigError(
                f"model: found {found}, expected one of `path` (a folder or Hub name) and `config` (an architecture)"
            )
        if self.config is not None:
            _require(
                isinstance(self.config, Mapping),
                "model.config",
                self.config,
                "a mapping such as {model_type: llama, ...}",
            )
            if self.tokenizer is None:
                raise ConfigError("model.tokenizer: needed with model.config; for instance `tokenizer: characters`")


@dataclass(frozen=True)
class FrozenConfig:
    """A frozen model that only gives log-probabilities."""

    path: str | None = None  # a folder or Hub name; null: the policy as it starts (reference only)
    revision: str | None = None


@dataclass(frozen=True)
class CreditConfig:
    """How rewards become advantages; fitted once over the training rows and saved with the run."""

    baseline: str = "none"  # none | mean | group_mean | leave_one_out | length_weighted | value (the row's) | <number>
    scale: str = "none"  # none | std | group_std
    shift: float = 0.0  # added to the advantage, after baseline and scale
    clip: float | None = None  # advantages are kept in [-clip, clip]
    singleton: str = "zero"  # advantage of a row alone in its group, under group baselines: zero | reward
    steps: str = "none"  # per-step rewards: none | reward_to_go | own
    discount: float = 1.0  # per step, for reward_to_go

    def __post_init__(self) -> None:
        baselines = ["none", "mean", "group_mean", "leave_one_out", "length_weighted", "value"]
        if not re.fullmatch(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?", str(self.baseline)):
            _choice("data.credit.baseline", self.baseline, baselines)
        _choice("data.credit.scale", self.scale, ["none", "std", "group_std"])
        _choice("data.credit.singleton", self.singleton, ["zero", "reward"])
        _choice("data.credit.steps", self.steps, ["none", "reward_to_go", "own"])
        _require(math.isfinite(self.shift), "data.credit.shift", self.shift, "a finite number")
        _positive("data.credit.clip", self.clip)
        _require(0 <= self.discount <= 1, "data.credit.discount", self.discount, "a number in [0, 1]")


@dataclass(frozen=True)
class DataConfig:
    """Reward-labelled rows: where they are, what their columns mean, how they become tokens."""

    path: Any = None  # file, folder, glob, Hub name, or a list of those
    task: Any = None  # instead of path: an embedded task, by name or {name: ..., rows: ...}
    adapter: Any = "auto"  # a name or {name: ..., prompt: <column>, ...}; auto: from the columns, if only one fits
    eval_path: Any = None  # held-out rows; else eval_fraction of the prompts is held out
    eval_fraction: float = 0.05
    credit: CreditConfig = field(default_factory=CreditConfig)
    max_length: int = 1024  # tokens of prompt and completion together
    overlong: str = "drop"  # a row longer than max_length: drop (counted) | raise | truncate_prompt (keeps the answer)
    eos: str = "auto"  # auto: where the completion finished | never
    limit: int | None = None  # use the first N rows of each source
    order: str = "rows"  # what is shuffled: rows | groups (all completions of a prompt come in one step)
    share_prompts: str = "auto"  # one copy of a prompt for its completions: auto (where cheaper) | always | never
    pack: str = "auto"  # rows of a pass in one sequence, no padding: auto (under flash attention) | always | never
    workers: Any = (
        "auto"  # processes that tokenise: auto (one a core, up to 8, for large files) | a number; 0: this one
    )

    def __post_init__(self) -> None:
        if (self.path is None) == (self.task is None):
            found = "neither" if self.path is None else "both"
            raise ConfigError(f"data: found {found}, expected one of `path` and `task`")
        _choice("data.overlong", self.overlong, ["drop", "raise", "truncate_prompt"])
        _choice("data.eos", self.eos, ["auto", "never"])
        _choice("data.order", self.order, ["rows", "groups"])
        _choice("data.share_prompts", self.share_prompts, ["auto", "always", "never"])
        _choice("data.pack", self.pack, ["auto", "always", "never"])
        _require(0 <= self.eval_fraction < 1, "data.eval_fraction", self.eval_fraction, "a number in [0, 1)")
        _require(self.max_length >= 2, "data.max_length", self.max_length, "a whole number >= 2")
        count = isinstance(self.workers, int) and not isinstance(self.workers, bool) and self.workers >= 0
        _require(count or self.workers == "auto", "data.workers", self.workers, "auto or a whole number >= 0")
        _require(self.limit is None or self.limit >= 1, "data.limit", self.limit, "a whole number >= 1")


@dataclass(frozen=True)
class TrainConfig:
    """The loop. One step is batch_size x accumulate x ranks sequences."""

    steps: int | None = None  # optimiser steps; else epochs
    epochs: float | None = None
    batch_size: int = 8  # sequences in a micro-batch, per rank
    accumulate: int = 1  # micro-batches in an optimiser step
    normalize: str = "token"  # token | sequence | sequence_sum | weight
    lr: float = 1e-5
    schedule: str = "cosine"  # cosine | linear | constant, after the warm-up
    warmup: float = 0.03  # fraction of the steps
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # largest gradient norm; 0: no clipping
    on_nonfinite: str = "abort"  # a step that is not finite: abort | skip (it stops at 3 in a row, 10 in all)
    seed: int = 0
    snapshot_every: int = 1  # steps between snapshots of the policy that old_logp refers to
    head: str = "auto"  # auto | two_pass | sampled: how the vocabulary projection is differentiated
    log_every: int = 10
    watch: Any = field(
        default_factory=list
    )  # signals computed for the metrics alone: entropy | ref_logp | behavior_logp
    rows_every: int = 0  # steps between files that say what each row had in a step (rows/); 0: none
    eval_every: int = 0  # steps between evaluations on held-out rows; 0: at the end only
    save_every: int = 0  # steps between checkpoints; 0: at the end only
    keep: int = 2  # checkpoints kept

    def __post_init__(self) -> None:
        from rwft.estimator import NORMALIZERS

        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "epochs", 1.0)
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("train: found both `steps` and `epochs`, expected one of them")
        _positive("train.epochs", self.epochs)
        for name in ("batch_size", "accumulate", "log_every", "snapshot_every"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "a whole number >= 1")
        for name in ("rows_every", "eval_every", "save_every", "seed"):
            _require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "a whole number >= 0")
        _require(self.steps is None or self.steps >= 1, "train.steps", self.steps, "a whole number >= 1")
        _require(self.keep >= 2, "train.keep", self.keep, "a whole number >= 2, so that one survives a damaged newest")
        _choice("train.normalize", self.normalize, NORMALIZERS)
        _choice("train.schedule", self.schedule, ["cosine", "linear", "constant"])
        _choice("train.on_nonfinite", self.on_nonfinite, ["abort", "skip"])
        _choice("train.head", self.head, ["auto", "two_pass", "sampled"])
        _require(isinstance(self.watch, (list, tuple)), "train.watch", self.watch, "a list such as [entropy]")
        for name in self.watch:
            _choice("train.watch", str(name), ["entropy", "ref_logp", "behavior_logp"])
        _positive("train.lr", self.lr)
        _positive("train.clip", self.clip, zero=True)
        _positive("train.weight_decay", self.weight_decay, zero=True)
        _require(0 <= self.warmup <= 1, "train.warmup", self.warmup, "a fraction in [0, 1]")
        for beta in self.betas:
            _require(0 <= beta < 1, "train.betas", tuple(self.betas), "two numbers in [0, 1)")


def _temperature(value: object) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    _require(good, "evaluate.temperature", value, "a finite number >= 0")
    return float(value)  # type: ignore[arg-type]


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured on held-out rows."""

    verifier: Any = None  # a name, {name: numeric, tolerance: ...} or path/to/file.py:function; null: no sampling
    samples: int = 1  # completions sampled per held-out prompt
    prompts: int | None = None  # at most this many held-out prompts
    temperature: Any = 1.0  # a number (0: greedy), or a list: each in turn, the first being the one that is compared
    baseline: bool = False  # sample the model that a run started from as well: is its gain more than sharpening?
    max_new_tokens: int = 256
    batch_size: int = 64
    off_policy: bool = False  # estimate the policy's reward from the held-out rows' own, by importance ratios

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "batch_size"):
            _require(getattr(self, name) >= 1, f"evaluate.{name}", getattr(self, name), "a whole number >= 1")
        _require(self.prompts is None or self.prompts >= 1, "evaluate.prompts", self.prompts, "a whole number >= 1")
        if self.baseline and self.verifier is None:
            raise ConfigError("evaluate.baseline: found true, but nothing is sampled without evaluate.verifier")
        if not isinstance(self.temperature, (list, tuple)):
            object.__setattr__(self, "temperature", _temperature(self.temperature))
            return
        given = [_temperature(value) for value in self.temperature]
        _require(0 < len(given) == len(set(given)), "evaluate.temperature", given, "temperatures that differ")
        object.__setattr__(self, "temperature", given)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """All temperatures that are sampled at, in the order given."""
        return tuple(self.temperature) if isinstance(self.temperature, list) else (self.temperature,)


@dataclass(frozen=True)
class CompareConfig:
    """What `rwft compare` runs; a single run does not read it."""

    objectives: Any = field(default_factory=list)  # each as `objective` takes it; none: only `objective`
    seeds: int = 3  # runs of each objective: train.seed, train.seed + 1, ...
    workers: int = 1  # runs at the same time, each in a process of its own
    prior: TrainConfig | None = None  # a stage of SFT, once a seed, from whose model all runs of that seed start
    baseline: str = "sft"  # the objective that the report compares the others with, by its label

    def __post_init__(self) -> None:
        from rwft.weighting import spelled_out

        _require(
            isinstance(self.objectives, (list, tuple)), "compare.objectives", self.objectives, "a list of objectives"
        )
        object.__setattr__(self, "objectives", [spelled_out(spec) for spec in self.objectives])
        for name in ("seeds", "workers"):
            _require(getattr(self, name) >= 1, f"compare.{name}", getattr(self, name), "a whole number >= 1")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    objective: Any = "sft"  # a name, {name: ..., hyperparameter: ...}, a list of them: their product, or "dft * rwr"
    regularize: Any = field(default_factory=list)  # [{name: forward_kl, coef: 0.05}]
    reference: FrozenConfig = field(default_factory=FrozenConfig)  # what ref_logp refers to
    auxiliary: FrozenConfig = field(default_factory=FrozenConfig)  # what aux_logp refers to: a second frozen model
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    trackers: Any = field(default_factory=list)  # tensorboard, wandb, trackio
    cache: str = "~/.cache/rwft"  # log-probabilities of frozen models and tokenised rows, by content
    output: str = "runs/rwft"  # the run's folder: checkpoints, metrics, exported model

    def __post_init__(self) -> None:
        from rwft.weighting import build_objective, spelled_out

        object.__setattr__(self, "objective", spelled_out(self.objective))
        build_objective(self.objective)
        if self.train.head == "sampled" and self.regularize:
            raise ConfigError(
                "train.head: found 'sampled', but a regularizer's gradient reads the whole vocabulary; "
                "use auto, or leave `regularize` empty"
            )
