r"""The temperature that keeps a given share of the rows effective, for weights that follow from the rows alone.

The effective sample size of weights, :math:`(\sum w)^2 / \sum w^2`, is how many equally weighted rows would
give as noisy an average. It grows with the temperature, except where a clip binds at low ones; of several
temperatures with the wanted share the greatest is taken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwft.data.prepare import Prepared
from rwft.errors import ConfigError
from rwft.weighting import Factor, Objective, fittable

LOWEST, HIGHEST = 1e-6, 1e6
GRID = np.geomspace(HIGHEST, LOWEST, 97)  # eight a decade: two crossings nearer than that are taken for none
HALVINGS = 50
AROUND = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # what a preview multiplies the temperature with


def effective_sample_size(weights: NDArray[np.float64]) -> float:
    """(sum w)^2 / sum w^2: how many equally weighted rows would give as noisy an average."""
    square = float(np.square(weights).sum())
    return float(weights.sum()) ** 2 / square if square > 0 else 0.0


def row_signals(data: Prepared) -> dict[str, Tensor]:
    """Signals with one value a training row, `(n 1)`, or one for all, `()`; none where each step has its own."""
    if data.credit is not None and data.credit.config.steps != "none":
        return {}
    known = data.known(data.train)
    return {n: torch.as_tensor(v)[:, None] if v.ndim else torch.as_tensor(v) for n, v in known.items()}


def data_weights(objective: Objective, data: Prepared) -> NDArray[np.float64] | None:
    """`(n)`: the weight of each training row, or None if it depends on more than the row's rewards."""
    signals = row_signals(data)
    if not objective.reads <= signals.keys():
        return None
    return _weights(objective, signals, len(data.train))


def _weights(objective: Objective, signals: Mapping[str, Tensor], rows: int) -> NDArray[np.float64]:
    return objective(signals).double().expand(rows, 1).squeeze(1).numpy()


def at(factor: Factor, temperature: float) -> Factor:
    """The same factor at another temperature, which is checked."""
    checked = factor.entry.settings["temperature"].check(temperature, f"objective '{factor.entry.name}'")
    return replace(factor, settings=MappingProxyType({**factor.settings, "temperature": checked}))


def effective_share(factor: Factor, data: Prepared) -> Callable[[float], float]:
    """Temperature -> share of the training rows that is effective under this factor alone.

    Raises ConfigError where no row has a single weight.
    """
    signals, rows = row_signals(data), len(data.train)
    if not set(factor.entry.reads) <= signals.keys():
        raise ConfigError(
            f"objective '{factor.entry.name}': temperature: ess needs one weight a row, but data.credit.steps gives "
            "each step its own; expected a number"
        )

    def share(temperature: float) -> float:
        return effective_sample_size(_weights(Objective((at(factor, temperature),)), signals, rows)) / rows

    return share


def find_temperature(share: Callable[[float], float], wanted: float) -> float | None:
    """The greatest temperature at which `share` is `wanted`, to six digits; None if there is none in 1e-6..1e6."""
    bracket = next(((high, low) for high, low in itertools.pairwise(GRID) if share(high) >= wanted > share(low)), None)
    if bracket is None:
        return None
    high, low = map(float, bracket)
    for _ in range(HALVINGS):
        middle = math.sqrt(high * low)
        high, low = (middle, low) if share(middle) >= wanted else (high, middle)
    return float(f"{high:.6g}")


def fit_temperatures(objective: Objective, data: Prepared) -> Objective:
    """The objective with the number that these training rows give for each `temperature: {ess: share}`."""
    return Objective(
        tuple(f if f.wanted_share is None else _fitted(f, f.wanted_share, data) for f in objective.factors)
    )


def _fitted(factor: Factor, wanted: float, data: Prepared) -> Factor:
    share = effective_share(factor, data)
    found = find_temperature(share, wanted)
    if found is None:
        raise ConfigError(
            f"objective '{factor.entry.name}': temperature: found {{ess: {wanted:g}}}, but the share of rows that is "
            f"effective goes from {share(LOWEST):.4g} to {share(HIGHEST):.4g} as the temperature grows from "
            f"{LOWEST:g} to {HIGHEST:g} and never falls below it; expected a share between, or a number (where it "
            "stays at 1, a bound such as clip holds all weights; where it stays high, few rewards differ)"
        )
    return at(factor, found)


def fitted_sentences(wanted: Objective, fitted: Objective) -> list[str]:
    """What is said of temperatures that were fitted: one line each."""
    return [
        f"{new.entry.name}: temperature {new.settings['temperature']:g} keeps {old.wanted_share:.4g} of the training "
        "rows effective"
        for old, new in zip(wanted.factors, fitted.factors, strict=True)
        if old.wanted_share is not None
    ]


def sweeps(objective: Objective, data: Prepared) -> list[tuple[Factor, list[tuple[float, float]], float | None]]:
    """For each factor whose temperature could be fitted: (temperature, effective share) pairs, and where it is half."""
    out: list[tuple[Factor, list[tuple[float, float]], float | None]] = []
    for factor in objective.factors:
        if fittable(factor.entry) and set(factor.entry.reads) <= row_signals(data).keys():
            share = effective_share(factor, data)
            around = [factor.settings["temperature"] * times for times in AROUND]
            out.append((factor, [(t, share(t)) for t in around], find_temperature(share, 0.5)))
    return out
