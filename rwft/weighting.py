"""Objectives by name, and their products.

An objective is a pure function from named signals to weights. A list of objectives is the
product of their weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor

from rwft.errors import ConfigError, ObjectiveError
from rwft.registry import Entry, Registry
from rwft.signals import SIGNALS

objective = Registry("objective", SIGNALS, builtin="rwft.objectives", group="rwft.objectives")
"""Decorator and registry: `@objective` on a function, `objective["rwr"]`, iteration, `in`."""

FACTOR = r"[^()*]+(\([^()*]*\)\s*)?"
PRODUCT = re.compile(rf"{FACTOR}(\*{FACTOR})*")
WORDS = {"true": True, "false": False, "null": None, "none": None}


@dataclass(frozen=True)
class Factor:
    """One weighting function with its hyperparameters bound."""

    entry: Entry
    settings: Mapping[str, Any]

    def __str__(self) -> str:
        changed = [f"{k}={_word(v)}" for k, v in self.settings.items() if v != self.entry.settings[k].default]
        return f"{self.entry.name}({', '.join(changed)})" if changed else self.entry.name

    @property
    def wanted_share(self) -> float | None:
        """The share of the rows that the temperature is to keep effective, until it is fitted (`rwft.temperature`)."""
        wish = self.settings.get("temperature")
        return float(cast("Mapping[str, float]", wish)["ess"]) if isinstance(wish, Mapping) else None

    @property
    def spec(self) -> dict[str, Any]:
        return {"name": self.entry.name, **self.settings}


def _word(value: Any) -> str:
    """A setting's value in a label: `0.5`, or `ess 0.5` for a wish that is not yet fitted."""
    if not isinstance(value, Mapping):
        return str(value)
    return " ".join(f"{key} {item}" for key, item in cast("Mapping[str, Any]", value).items())


@dataclass(frozen=True)
class Objective:
    """A product of weighting functions; call it with signals to get the weights."""

    factors: tuple[Factor, ...]

    @property
    def reads(self) -> frozenset[str]:
        """Names of all signals that any factor reads."""
        return frozenset(name for factor in self.factors for name in factor.entry.reads)

    @property
    def token_local(self) -> bool:
        """Whether the weight at a position depends on the signals at that position alone."""
        return self.reads.isdisjoint({"mask", "group"})

    def __call__(self, signals: Mapping[str, Tensor]) -> Tensor:
        """Weights `()`, `(b 1)` or `(b t)` from signals (detached here; see `rwft.signals`).

        Raises ObjectiveError if a signal is missing or a factor returns another shape.
        """
        missing = sorted(self.reads - signals.keys())
        if missing:
            raise ObjectiveError(f"objective '{self}' reads '{missing[0]}', which was not given")
        rows, columns = _axes(signals)
        product: Tensor | None = None
        for factor in self.factors:
            if factor.wanted_share is not None:
                raise ObjectiveError(f"objective '{factor}': its temperature must be fitted to the training rows first")
            inputs = [signals[name].detach() for name in factor.entry.reads]
            with torch.no_grad():
                weights = factor.entry.function(*inputs, **factor.settings)
            check_weights(weights, rows, columns, factor.entry.name)
            product = weights if product is None else product * weights
        assert product is not None
        return product

    def __mul__(self, other: Objective) -> Objective:
        return Objective(self.factors + other.factors)

    def __str__(self) -> str:
        return " * ".join(map(str, self.factors))

    @property
    def spec(self) -> list[dict[str, Any]]:
        """What `build_objective` would rebuild this from, every hyperparameter written out."""
        return [factor.spec for factor in self.factors]


def _axes(signals: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
    for name, value in signals.items():
        if name in SIGNALS and SIGNALS[name].axes == "b t":
            return value.shape[0], value.shape[1]
    rows = next(
        (v.shape[0] for k, v in signals.items() if k in SIGNALS and SIGNALS[k].axes.startswith("b") and v.ndim), None
    )
    return rows, None


def check_weights(weights: Any, rows: int | None, columns: int | None, name: str) -> None:
    """Refuse weights of any shape but `()`, `(b 1)` or `(b t)`; a mistaken `(b,)` would broadcast over time."""
    if not isinstance(weights, Tensor):
        raise ObjectiveError(f"objective '{name}' returned {type(weights).__name__}; a tensor of weights is expected")
    shape = tuple(weights.shape)
    known = rows is not None
    good = shape == () or (
        len(shape) == 2 and (not known or shape[0] == rows) and (columns is None or shape[1] in (1, columns))
    )
    if not good:
        hint = "; keep the axis: use keepdim=True, or seq_sum / seq_mean" if len(shape) == 1 else ""
        expected = f"(), ({rows or 'b'}, 1) or ({rows or 'b'}, {columns or 't'})"
        raise ObjectiveError(f"objective '{name}' returned weights of shape {shape}; expected {expected}{hint}")


def build_objective(spec: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | Objective) -> Objective:
    """A name, a mapping `{name: ..., **hyperparameters}`, a list of them (their product), or text as it is printed.

    `"dft * rwr(temperature=0.5)"` is `["dft", {"name": "rwr", "temperature": 0.5}]`. Raises ObjectiveError for an
    unknown name or hyperparameter, or a value out of bounds.
    """
    if isinstance(spec, Objective):
        return spec
    given = spelled_out(spec)
    parts = cast("list[Any]", given) if isinstance(given, list) else [given]
    if not parts:
        raise ConfigError("objective: an empty list; name at least one, for instance 'sft'")
    return Objective(tuple(bind_factor(objective, part) for part in parts))


def spelled_out(spec: Any) -> Any:
    """What `build_objective` takes, with text such as `dft * rwr(temperature=0.5)` as the list that it stands for."""
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        return [factor for part in cast("Sequence[Any]", spec) for factor in _factors(part)]
    factors = _factors(spec)
    return factors[0] if len(factors) == 1 else factors


def _factors(spec: Any) -> list[Any]:
    """Those that text names; anything else is one."""
    if not isinstance(spec, str) or not PRODUCT.fullmatch(spec):
        return [spec]
    return [_read_factor(text) for text in spec.split("*")]


def _read_factor(text: str) -> str | dict[str, Any]:
    """`rwr(temperature=0.5)` -> `{name: rwr, temperature: 0.5}`; a name alone stays one."""
    name, _, inside = (part.strip() for part in text.partition("("))
    inside = inside.removesuffix(")").strip()
    settings: dict[str, Any] = {"name": name}
    for pair in inside.split(",") if inside else []:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (key.isidentifier() and equals and value) or key in settings:
            expected = "settings by name, each once, such as rwr(temperature=0.5)"
            raise ObjectiveError(f"objective '{text.strip()}': found '{pair.strip()}', expected {expected}")
        settings[key] = _read_value(value)
    return settings if inside else name


def _read_value(word: str) -> Any:
    """A number, true, false or null, else the word itself."""
    if word.lower() in WORDS:
        return WORDS[word.lower()]
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            continue
    return word


def bind_factor(registry: Registry, spec: Any) -> Factor:
    """One `name` or `{name: ..., **settings}` against a registry."""
    name, settings = split_spec(registry.kind, spec)
    entry = registry.entry(name)
    return Factor(entry, MappingProxyType(_fittable(entry).bind(settings, f"{registry.kind} '{entry.name}'")))


def fittable(entry: Entry) -> bool:
    """Whether it has a temperature, and gives each row one weight that follows from the row's rewards alone."""
    row_level = all(
        name in SIGNALS and SIGNALS[name].source in ("data", "credit") and SIGNALS[name].axes not in ("b t", "b")
        for name in entry.reads
    )
    return row_level and "temperature" in entry.settings


def _fittable(entry: Entry) -> Entry:
    """The entry whose temperature takes `{ess: share}`, where that can be fitted."""
    if not fittable(entry):
        return entry
    temperature = replace(entry.settings["temperature"], fitted=True)
    return replace(entry, settings=MappingProxyType({**entry.settings, "temperature": temperature}))


def split_spec(kind: str, spec: Any) -> tuple[str, dict[str, Any]]:
    """`name` or `{name: ..., **settings}` -> name and settings."""
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping):
        given = cast("Mapping[Any, Any]", spec)
        if isinstance(given.get("name"), str):
            return str(given["name"]), {str(k): v for k, v in given.items() if k != "name"}
    raise ConfigError(f"{kind}: found {spec!r}; expected a name or a mapping such as {{name: rwr, temperature: 0.5}}")
