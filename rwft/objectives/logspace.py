"""Exponentials and importance ratios that cannot overflow: bounded in log space, before the exponential."""

from __future__ import annotations

import math

from torch import Tensor

from rwft.signals import seq_mean, seq_sum

MAX_LOG_RATIO = 20.0
"""Cap, in nats, on log ratios that their paper leaves unbounded: e^20 = 4.9e8."""


def bounded_exp(x: Tensor, high: float, low: float = 0.0) -> Tensor:
    """`x -> x`: $e^x$ held in [low, high]; `x` may be anything but NaN."""
    return x.clamp(min=math.log(low) if low > 0 else -math.inf, max=math.log(high)).exp()


def ratio(logp: Tensor, other: Tensor) -> Tensor:
    r"""`(b t), (b t) -> (b t)`: token ratio $\rho_t = \pi(y_t) / \mu(y_t)$, at most $e^{20}$."""
    return (logp - other).clamp(max=MAX_LOG_RATIO).exp()


def sequence_log_ratio(logp: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    r"""`(b t), (b t), (b t) -> (b 1)`: $\log \pi(y) - \log \mu(y)$, summed over trained tokens."""
    return seq_sum(logp - other, mask)


def mean_log_ratio(logp: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """`(b t), (b t), (b t) -> (b 1)`: the same per trained token, the log of the geometric-mean ratio."""
    return seq_mean(logp - other, mask)


def by_sign(positive: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """`x -> x`: one of two settings per row, in the precision of `like` (two plain numbers would make float32)."""
    return like.new_tensor(yes).where(positive, like.new_tensor(no))
