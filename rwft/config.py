"""Every setting, typed and bounded: YAML and `key=value` overrides -> a checked `Config`.

The classes below are the schema; OmegaConf merges a file and overrides into them and refuses
what they do not name. Each setting is described in the comment behind it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rwft.errors import ConfigError, did_you_mean

MAX_CONFIG_BYTES = 1_000_000


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
    attention: str = "auto"  # auto: the best that the model supports | sdpa | eager | flash_attention_2

    def __post_init__(self) -> None:
        _choice("model.dtype", self.dtype, ["float32", "bfloat16", "float64"])
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

    baseline: str = "none"  # none | mean | group_mean | leave_one_out | length_weighted | <a number>
    scale: str = "none"  # none | std | group_std
    shift: float = 0.0  # added to the advantage, after baseline and scale
    clip: float | None = None  # advantages are kept in [-clip, clip]
    singleton: str = "zero"  # advantage of a row alone in its group, under group baselines: zero | reward
    steps: str = "none"  # per-step rewards: none | reward_to_go | own
    discount: float = 1.0  # per step, for reward_to_go

    def __post_init__(self) -> None:
        baselines = ["none", "mean", "group_mean", "leave_one_out", "length_weighted"]
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
    share_prompts: str = "auto"  # one copy of a prompt for its completions in a micro-batch: auto (if cheaper) | on | off

    def __post_init__(self) -> None:
        if (self.path is None) == (self.task is None):
            found = "neither" if self.path is None else "both"
            raise ConfigError(f"data: found {found}, expected one of `path` and `task`")
        _choice("data.overlong", self.overlong, ["drop", "raise", "truncate_prompt"])
        _choice("data.eos", self.eos, ["auto", "never"])
        _choice("data.order", self.order, ["rows", "groups"])
        _choice("data.share_prompts", self.share_prompts, ["auto", "on", "off"])
        _require(0 <= self.eval_fraction < 1, "data.eval_fraction", self.eval_fraction, "a number in [0, 1)")
        _require(self.max_length >= 2, "data.max_length", self.max_length, "a whole number >= 2")
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
    seed: int = 0
    snapshot_every: int = 1  # steps between snapshots of the policy that old_logp refers to
    head: str = "auto"  # auto | two_pass: how the vocabulary projection is differentiated
    log_every: int = 10
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
        for name in ("eval_every", "save_every", "seed"):
            _require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "a whole number >= 0")
        _require(self.steps is None or self.steps >= 1, "train.steps", self.steps, "a whole number >= 1")
        _require(self.keep >= 2, "train.keep", self.keep, "a whole number >= 2, so that one survives a damaged newest")
        _choice("train.normalize", self.normalize, NORMALIZERS)
        _choice("train.schedule", self.schedule, ["cosine", "linear", "constant"])
        _choice("train.head", self.head, ["auto", "two_pass"])
        _positive("train.lr", self.lr)
        _positive("train.clip", self.clip, zero=True)
        _positive("train.weight_decay", self.weight_decay, zero=True)
        _require(0 <= self.warmup <= 1, "train.warmup", self.warmup, "a fraction in [0, 1]")
        for beta in self.betas:
            _require(0 <= beta < 1, "train.betas", tuple(self.betas), "two numbers in [0, 1)")


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured on held-out rows."""

    verifier: Any = None  # a name, {name: numeric, tolerance: ...} or path/to/file.py:function; null: no sampling
    samples: int = 1  # completions sampled per held-out prompt
    prompts: int | None = None  # at most this many held-out prompts
    temperature: float = 1.0  # 0: greedy
    max_new_tokens: int = 256
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "batch_size"):
            _require(getattr(self, name) >= 1, f"evaluate.{name}", getattr(self, name), "a whole number >= 1")
        _require(self.prompts is None or self.prompts >= 1, "evaluate.prompts", self.prompts, "a whole number >= 1")
        _positive("evaluate.temperature", self.temperature, zero=True)


@dataclass(frozen=True)
class CompareConfig:
    """What `rwft compare` runs; a single run does not read it."""

    objectives: Any = field(default_factory=list)  # each as `objective` takes it; none: only `objective`
    seeds: int = 3  # runs of each objective: train.seed, train.seed + 1, ...
    workers: int = 1  # runs at the same time, each in a process of its own
    prior: TrainConfig | None = None  # a stage of SFT, once a seed, from whose model all runs of that seed start

    def __post_init__(self) -> None:
        _require(
            isinstance(self.objectives, (list, tuple)), "compare.objectives", self.objectives, "a list of objectives"
        )
        for name in ("seeds", "workers"):
            _require(getattr(self, name) >= 1, f"compare.{name}", getattr(self, name), "a whole number >= 1")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    objective: Any = "sft"  # a name, {name: ..., hyperparameter: ...}, or a list of them: their product
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
        from rwft.weighting import build_objective

        build_objective(self.objective)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """A YAML file and `key=value` overrides as a checked `Config`.

    Raises ConfigError, naming the key, what was found, what was expected and the nearest valid key.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"config '{path}': no such file")
    return resolve(read_yaml(file), overrides, str(path))


def read_yaml(file: Path) -> dict[str, Any]:
    """One YAML mapping, no tags, no resolvers, no more than 1 MB."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"{file}: larger than {MAX_CONFIG_BYTES} bytes; this is no config")
    try:
        content = OmegaConf.load(file)
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{file}: not readable as YAML: {reason}") from None
    plain = OmegaConf.to_container(content, resolve=False)
    if not isinstance(plain, dict):
        raise ConfigError(f"{file}: found a {type(plain).__name__}, expected a mapping of settings")
    return {str(key): value for key, value in plain.items()}


def resolve(content: Mapping[str, Any], overrides: Iterable[str] = (), where: str = "config") -> Config:
    """A plain mapping and overrides as a checked `Config`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    overrides = list(overrides)
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override '{override}': expected key=value, such as train.lr=1e-5")
    try:
        given = OmegaConf.merge(OmegaConf.create(dict(content)), OmegaConf.from_dotlist(overrides))
        plain = OmegaConf.to_container(given, resolve=False)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from None
    assert isinstance(plain, dict)
    _refuse_interpolation(plain, where)
    return _build(Config, plain, "", where)


def _refuse_interpolation(node: Any, where: str, key: str = "") -> None:
    if isinstance(node, dict):
        for name, value in node.items():
            _refuse_interpolation(value, where, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            _refuse_interpolation(value, where, f"{key}[{index}]")
    elif isinstance(node, str) and "${" in node:
        raise ConfigError(f"{where}: {key}: interpolations are not read here; write the value itself")


def _build(cls: Any, node: Any, prefix: str, where: str) -> Any:
    """One level of the schema: unknown keys refused with the nearest one, values typed by OmegaConf."""
    import typing

    if not isinstance(node, Mapping):
        raise ConfigError(f"{where}: {prefix.rstrip('.')}: found {node!r}, expected a mapping of settings")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for name, value in node.items():
        if name not in fields:
            raise ConfigError(f"{where}: '{prefix}{name}' is no setting; {_suggest(str(name), prefix, fields)}")
        values[str(name)] = _typed(hints[name], value, f"{prefix}{name}", where)
    for name, spec in fields.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{where}: '{prefix}{name}' is missing; a config needs at least `model` and `data`")
    return cls(**values)


def _suggest(name: str, prefix: str, fields: Mapping[str, Any]) -> str:
    elsewhere = [path for path in _paths(Config) if path.rpartition(".")[2] == name]
    if elsewhere:
        return f"did you mean '{elsewhere[0]}'?"
    return did_you_mean(f"{prefix}{name}", [f"{prefix}{key}" for key in fields])


def _paths(cls: Any, prefix: str = "") -> list[str]:
    import typing

    out: list[str] = []
    for name, hint in typing.get_type_hints(cls).items():
        nested = _nested(hint)
        out += _paths(nested, f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
    return out


def _nested(hint: Any) -> Any:
    import typing

    members = [hint, *typing.get_args(hint)]
    return next((m for m in members if dataclasses.is_dataclass(m)), None)


def _typed(hint: Any, value: Any, key: str, where: str) -> Any:
    """`value` as the type that the schema gives; nothing is coerced but whole numbers to floats."""
    import typing

    nested, optional = _nested(hint), type(None) in typing.get_args(hint)
    if hint is Any or (value is None and optional):
        return value
    if nested is not None:
        return _build(nested, value, f"{key}.", where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(typing.get_args(hint)):
            raise ConfigError(
                f"{where}: {key}: found {value!r}, expected a list of {len(typing.get_args(hint))} numbers"
            )
        return tuple(_typed(kind, item, key, where) for kind, item in zip(typing.get_args(hint), value, strict=True))
    kind = next((m for m in (hint, *typing.get_args(hint)) if m in (bool, int, float, str)), str)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)  # YAML reads `revision: 123` as a number
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        hint_text = (
            " (write 1.0e-5, not 1e-5: YAML reads the latter as text)" if kind is float and _is_number(value) else ""
        )
        raise ConfigError(
            f"{where}: {key}: found {value!r}, expected {words}{' or null' if optional else ''}{hint_text}"
        )
    return value


def _is_number(value: object) -> bool:
    try:
        float(str(value))
    except ValueError:
        return False
    return True


def plain(value: Any) -> Any:
    """Dataclasses, mappings and sequences as dicts and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def as_dict(config: Config) -> dict[str, Any]:
    """The whole config as plain values, every default written out; `resolve(as_dict(c)) == c`."""
    out = plain(config)
    if out["train"]["steps"] is not None:
        out["train"]["epochs"] = None
    return out


def to_yaml(config: Config) -> str:
    """The resolved config as YAML."""
    import yaml

    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)
