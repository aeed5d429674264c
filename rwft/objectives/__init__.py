"""The objectives that ship with rwft, one page per family."""

from rwft.objectives import (
    confidence,
    imitation,
    policy_gradient,
    preference,
    ratio,
    reward,
    selection,
    surrogate,
    value,
)

FAMILIES = (imitation, confidence, selection, ratio, reward, policy_gradient, surrogate, preference, value)
"""The pages, in the order of the documentation."""

__all__ = [
    "FAMILIES",
    "confidence",
    "imitation",
    "policy_gradient",
    "preference",
    "ratio",
    "reward",
    "selection",
    "surrogate",
    "value",
]
