"""The laws that every objective obeys, as one function: `check_objective(my_objective)`.

Import it in the tests of a plugin. The laws are checked on small random policies in float64,
against formulas written here, never against the objective itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from rwft.errors import ObjectiveError
from rwft.estimator import surrogate_loss
from rwft.registry import parse
from rwft.signals import SIGNALS
from rwft.weighting import Factor, Objective, build_objective

VOCABULARY = 24  # above 20, so that topk_entropy is not the entropy
GARBAGE = (math.nan, math.inf, -math.inf, 1e30)
FROZEN = ("ref_logp", "behavior_logp", "old_logp", "aux_logp")
Signals = dict[str, Tensor]


@dataclass(frozen=True)
class Report:
    """What was found: the objective, the laws that hold, and `law: finding` for those that do not."""

    objective: str
    passed: tuple[str, ...]
    failed: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.failed

    def __str__(self) -> str:
        lines = [f"ok    {law}" for law in self.passed] + [f"FAIL  {finding}" for finding in self.failed]
        return "\n".join([f"objective '{self.objective}'", *lines])


def check_objective(fn: Callable[..., Tensor] | str | Mapping[str, Any] | Objective) -> Report:
    """Check a function, a registered name, a spec such as `{name: rwr, temperature: 0.5}` or an `Objective`.

    Raises ObjectiveError, one line for each law that is broken.
    """
    report = examine(fn)
    if not report.ok:
        raise ObjectiveError("\n".join(f"objective '{report.objective}': {finding}" for finding in report.failed))
    return report


def examine(fn: Callable[..., Tensor] | str | Mapping[str, Any] | Objective) -> Report:
    """The same, as a report that does not raise for a broken law (a signature that is none still does)."""
    objective = _as_objective(fn)
    passed: list[str] = []
    failed: list[str] = []
    for law, check in LAWS.items():
        try:
            finding = next(iter(check(objective)), None)
        except Exception as error:  # noqa: BLE001 - an objective that raises has broken the law under test
            finding = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if finding is None:
            passed.append(law)
        else:
            failed.append(f"{law}: {finding}")
            if law == SHAPES:  # every later law would only say so again
                break
    return Report(str(objective), tuple(passed), tuple(failed))


def _as_objective(fn: Callable[..., Tensor] | str | Mapping[str, Any] | Objective) -> Objective:
    if isinstance(fn, (str, Mapping, Objective)):
        return build_objective(fn)
    entry = parse(fn, "objective", SIGNALS)
    settings = entry.bind({}, f"objective '{entry.name}'")
    return Objective((Factor(entry, MappingProxyType(settings)),))


# --- policies and signals to try it on


@dataclass(frozen=True)
class Trial:
    """A random policy with targets, and every signal there is; `b` sequences of `t` positions."""

    logits: Tensor
    targets: Tensor
    signals: Signals

    @property
    def mask(self) -> Tensor:
        return self.signals["mask"]

    def logp(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(-1, self.targets[..., None]).squeeze(-1)


def trial(b: int = 4, t: int = 7, seed: int = 0, *, per_token: bool = False) -> Trial:
    """Random logits `(b t v)` in float64, ragged masks with an untrained prefix, groups of two.

    `per_token` gives signals that may have an axis of time (the advantage) that axis.
    """
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    logits = draw(b, t, VOCABULARY)
    targets = torch.randint(VOCABULARY, (b, t), generator=random)
    out = Trial(logits, targets, {})
    signals: Signals = {name: draw(*_shape(signal.axes, b, t)) for name, signal in SIGNALS.items()}
    noise = {name: draw(b, t) for name, signal in SIGNALS.items() if signal.axes.endswith("| b t")}
    logp = out.logp(logits)
    signals |= {"logp": logp, "mask": _ragged(b, t), "group": torch.arange(b) // 2}
    signals |= {name: logp + 0.3 * draw(b, t) for name in FROZEN}
    signals |= _distribution(logits) | _rewards(draw(b, 1))
    signals |= {name: signals[name].abs() + 0.1 for name in ("ref_nll_median", "token_weight", "progress")}
    signals |= {name: signals[name] + value for name, value in noise.items() if per_token}
    return Trial(logits, targets, signals)


def trials(b: int = 4, t: int = 7) -> tuple[Trial, Trial]:
    """With advantages of sequences, and of tokens."""
    return trial(b, t), trial(b, t, per_token=True)


def _shape(axes: str, b: int, t: int) -> tuple[int, ...]:
    sizes = {"b": b, "t": t, "1": 1}
    return tuple(sizes[axis] for axis in axes.partition("|")[0].split())


def _ragged(b: int, t: int) -> Tensor:
    """Row i trains positions [i mod 2, t - i mod 3), and always one at least."""
    rows, columns = torch.arange(b)[:, None], torch.arange(t)[None, :]
    last = (t - rows % 3).clamp(min=1)
    first = torch.minimum(rows % 2, last - 1)
    return ((columns >= first) & (columns < last)).double()


def _distribution(logits: Tensor) -> Signals:
    pi = logits.softmax(-1)
    top = logits.topk(min(20, logits.shape[-1])).values.softmax(-1)
    return {
        "entropy": -(pi * pi.log()).sum(-1),
        "topk_entropy": -(top * top.log()).sum(-1),
        "concentration": pi.square().sum(-1),
        "log_vocab": torch.tensor(math.log(logits.shape[-1]), dtype=torch.float64),
    }


def _rewards(reward: Tensor) -> Signals:
    """Statistics of some larger dataset: no function of the rows at hand."""
    share = torch.sigmoid(reward)
    return {
        "reward": reward,
        "advantage": reward - 0.1,
        "group_mean": 0.5 * share + 0.1,
        "group_std": share + 0.2,
        "group_above": 0.5 - 0.5 * share,
        "reward_above": 1 - share,
        "reward_max": torch.tensor(4.0, dtype=torch.float64),
    }


def _rows(signals: Signals, rows: Sequence[int] | Tensor) -> Signals:
    return {name: value[rows] if SIGNALS[name].axes.startswith("b") else value for name, value in signals.items()}


def _columns(signals: Signals, columns: slice) -> Signals:
    return {name: value[:, columns] if _by_token(name, value) else value for name, value in signals.items()}


def _by_token(name: str, value: Tensor) -> bool:
    return SIGNALS[name].axes.endswith("b t") and value.shape[-1] > 1


def _weigh(objective: Objective, signals: Signals) -> Tensor:
    """Weights at every position, `(b t)`; positions that are not trained hold 0."""
    copies = {name: value.clone() for name, value in signals.items()}
    weights = objective(copies).double().expand_as(signals["mask"])
    return weights.where(signals["mask"] > 0, 0.0)


def _differ(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> float | None:
    """Largest difference relative to the larger of 1 and the expected size, if it is above `tolerance`."""
    gap = ((found - expected).abs() / expected.abs().clamp(min=1)).max().item()
    return None if gap <= tolerance else gap


# --- the laws: generators of findings; none found, the law holds


def _documented(objective: Objective) -> Iterator[str]:
    for factor in objective.factors:
        if not (factor.entry.function.__doc__ or "").strip():
            yield f"'{factor.entry.name}' has no docstring; say its formula in one line, then why"


def _shapes(objective: Objective) -> Iterator[str]:
    t = 5
    for case in (case for b in (1, 2, t - 1, t) for case in trials(b, t)):
        weights = objective(case.signals)
        if not weights.is_floating_point():
            yield f"weights are {weights.dtype}; floating point is expected (a comparison: .to(logp.dtype))"


def _pure(objective: Objective) -> Iterator[str]:
    signals = trial().signals
    before = {name: value.clone() for name, value in signals.items()}
    objective(signals)
    for name in sorted(objective.reads):
        if not torch.equal(signals[name], before[name]):
            yield f"it changes '{name}' in place, which the loss still needs; use the form without the underscore"


def _deterministic(objective: Objective) -> Iterator[str]:
    signals = trial().signals
    if not torch.equal(_weigh(objective, signals), _weigh(objective, signals)):
        yield "two calls on the same signals gave different weights"


def _constant(objective: Objective) -> Iterator[str]:
    case = trial()
    live = case.logp(case.logits.clone().requires_grad_())
    if objective({**case.signals, "logp": live}).requires_grad:
        yield "its weights carry a gradient; a weight is a constant of the step"


def _gradient(objective: Objective) -> Iterator[str]:
    case, z = trial(), 3.0
    logits = case.logits.clone().requires_grad_()
    logp = case.logp(logits)
    weights = objective({**case.signals, "logp": logp})
    surrogate_loss(logp, weights, case.mask, z).backward()
    onehot = torch.nn.functional.one_hot(case.targets, VOCABULARY).double()
    scale = (weights.double() * case.mask / z).expand_as(case.mask)[..., None]
    assert logits.grad is not None
    if gap := _differ(logits.grad, -scale * (onehot - case.logits.softmax(-1)), 1e-9):
        yield f"the gradient is not -w m (onehot - pi) / Z; they differ by {gap:.2g}"


def _independent_rows(objective: Objective) -> Iterator[str]:
    unit = 2 if "group" in objective.reads else 1
    for case in trials(b=6):
        yield from _alone_or_among_others(objective, case.signals, unit)


def _alone_or_among_others(objective: Objective, signals: Signals, unit: int) -> Iterator[str]:
    weights, what = _weigh(objective, signals), "groups" if unit == 2 else "rows"
    for first in range(0, 6, unit):
        rows = list(range(first, first + unit))
        if gap := _differ(_weigh(objective, _rows(signals, rows)), weights[rows]):
            yield f"the weights of rows {rows} alone differ by {gap:.2g} from those among other {what}"
    order = torch.tensor([3, 0, 5, 1, 4, 2])  # rows of a group need not be neighbours
    if gap := _differ(_weigh(objective, _rows(signals, order)), weights[order]):
        yield f"the weights change by {gap:.2g} with the order of the rows"


def _invisible_padding(objective: Objective) -> Iterator[str]:
    for case in trials():
        expected = _weigh(objective, case.signals)
        for garbage in GARBAGE:
            if gap := _differ(_weigh(objective, _spoiled(case.signals, garbage)), expected):
                yield f"{garbage} where mask is 0 changes weights where it is 1 by {gap:.2g}; use seq_sum or seq_mean"
        wider = _weigh(objective, _padded(case.signals, 3))
        if gap := _differ(wider[:, : expected.shape[1]], expected):
            yield f"three columns of padding change the weights by {gap:.2g}; use seq_sum or seq_mean"


def _spoiled(signals: Signals, garbage: float) -> Signals:
    """Garbage under mask 0 in every signal of tokens, the mask excepted."""
    hidden = signals["mask"] == 0
    spoil = {n: v.masked_fill(hidden, garbage) for n, v in signals.items() if _by_token(n, v) and n != "mask"}
    return {**signals, **spoil}


def _padded(signals: Signals, columns: int) -> Signals:
    pad = torch.nn.functional.pad
    return {n: pad(v, (0, columns)) if _by_token(n, v) else v for n, v in signals.items()}


def _silent_mask(objective: Objective) -> Iterator[str]:
    case = trial()
    logits = case.logits.clone().requires_grad_()
    logp = case.logp(logits)
    weights = objective({**_spoiled(case.signals, math.nan), "logp": logp})
    surrogate_loss(logp, weights, case.mask, 1.0).backward()
    assert logits.grad is not None
    if not bool((logits.grad[case.mask == 0] == 0).all()):
        yield "a gradient reaches positions that are not trained"


def _finite(objective: Objective) -> Iterator[str]:
    base = trial().signals
    low = torch.full_like(base["logp"], -1e4)
    logps = ("logp", *FROZEN)
    cases: dict[str, Signals] = {f"{name} = -1e4": {name: low} for name in logps}
    cases["every log-probability = -1e4"] = dict.fromkeys(logps, low)
    cases["every log-probability = 0"] = dict.fromkeys(logps, torch.zeros_like(low))
    for size in (-1e4, 0.0, 1e4):
        scores = {name: torch.full_like(base[name], size) for name in ("reward", "advantage")}
        cases[f"reward = {size:g}"] = scores
        cases[f"reward = {size:g}, logp = -1e4"] = {**scores, "logp": low}
    cases["no trained token"] = {"mask": torch.zeros_like(base["mask"])}
    for what, change in cases.items():
        for dtype in (torch.float32, torch.float64):
            signals = {n: v.to(dtype) if v.is_floating_point() else v for n, v in {**base, **change}.items()}
            if not bool(objective(signals).isfinite().all()):
                yield f"not finite at {what} ({dtype}); bound it in log space, before the exponential"


def _finite_gradient(objective: Objective) -> Iterator[str]:
    case = trial()
    logits = case.logits.scatter(-1, case.targets[..., None], -1e4).float().requires_grad_()
    logp = case.logp(logits)
    signals = {n: v.float() if v.is_floating_point() else v for n, v in case.signals.items()}
    surrogate_loss(logp, objective({**signals, "logp": logp}), signals["mask"], 1.0).backward()
    assert logits.grad is not None
    if not bool(logits.grad.isfinite().all()):
        yield "the gradient is not finite where the target's logit is 1e4 below the others"


def _token_local(objective: Objective) -> Iterator[str]:
    if not objective.token_local:
        return
    for case in trials():
        whole = _weigh(objective, case.signals)
        for column in range(whole.shape[1]):
            alone = _weigh(objective, _columns(case.signals, slice(column, column + 1)))
            if not (gap := _differ(alone, whole[:, column : column + 1])):
                continue
            yield (
                f"position {column} alone has weights that differ by {gap:.2g} from those in its sequence; "
                "an objective that looks along time must read 'mask'"
            )


SHAPES = "shapes (), (b 1) or (b t)"
LAWS: Mapping[str, Callable[[Objective], Iterator[str]]] = MappingProxyType(
    {
        "documented": _documented,
        SHAPES: _shapes,
        "signals unchanged": _pure,
        "deterministic": _deterministic,
        "weights are constants": _constant,
        "gradient -w m (onehot - pi) / Z": _gradient,
        "rows do not see each other": _independent_rows,
        "padding is invisible": _invisible_padding,
        "no gradient where mask is 0": _silent_mask,
        "finite": _finite,
        "finite gradient": _finite_gradient,
        "token-local unless it reads mask": _token_local,
    }
)
"""Name -> generator of findings. The order is the order of the report."""


def check_command(name: str) -> None:
    """`rwft check`: show the report. Raises ObjectiveError, in one line, if a law is broken."""
    from rich.console import Console

    from rwft.progress import Display

    report = examine(name)
    with Display(Console(), main=True) as display:
        display.say(*str(report).splitlines())
    if not report.ok:
        broken = ", ".join(finding.partition(":")[0] for finding in report.failed)
        raise ObjectiveError(f"objective '{report.objective}' breaks: {broken}")
