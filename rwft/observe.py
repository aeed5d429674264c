"""What a step says about its trained tokens: sums over all its micro-batches at once, left on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwft.data.credit import Credit
from rwft.estimator import weight_statistics
from rwft.objectives.logspace import ratio

if TYPE_CHECKING:
    from rwft.step import MicroResult
    from rwft.training import Training

SIGNAL_OF = {"reference": "ref_logp", "behavior": "behavior_logp"}
"""Which signal knows a policy that the policy is compared with."""
ROUNDING = 1e-12  # of the largest reward: rewards that are nearer to their mean than this are at it


def standing(credit: Credit, reward: NDArray[np.float64]) -> NDArray[np.int8]:
    """`(b) -> (b)`: 1 for a reward above the mean of the training rows (a good row), -1 below (a bad one), 0 at it."""
    slack = ROUNDING * max(abs(credit.level[0]), abs(credit.level[-1]))
    return (reward > credit.mean + slack).astype(np.int8) - (reward < credit.mean - slack).astype(np.int8)


@dataclass(frozen=True)
class Tokens:
    """Trained tokens of this rank in one step, flat: `(n)` each, in the order of micro-batches and rows."""

    logp: Tensor  # float64, as all that follow
    weights: Tensor
    entropy: Tensor | None  # nats
    standing: Tensor | None  # of the row that a token belongs to
    others: Mapping[str, Tensor]  # log-probability under another policy, by its name

    def sums(self) -> dict[str, Tensor | float]:
        """`{name: ()}`, names of `rwft.metrics.SUMS`."""
        ones, n = torch.ones_like(self.logp), len(self.logp)
        out: dict[str, Tensor | float] = dict(weight_statistics(self.weights[None], ones[None], self.logp[None]))
        out |= {"tokens": n, "forwarded": n, "nll": -self.logp.sum()}
        out |= self._nll_of("negative", (self.weights < 0).double())
        if self.standing is not None:
            out |= self._nll_of("good", (self.standing > 0).double())
            out |= self._nll_of("bad", (self.standing < 0).double())
        if self.entropy is not None:
            out |= {"entropy": self.entropy.sum(), "entropy_tokens": n}
        for name, other in self.others.items():
            rho = ratio(self.logp, other)
            out |= {f"{name}_tokens": n, f"{name}_gap": (self.logp - other).sum()}
            out |= {f"{name}_ratio": rho.sum(), f"{name}_ratio_square": rho @ rho}
        return out

    def _nll_of(self, name: str, chosen: Tensor) -> dict[str, Tensor]:
        """`(n)` of 0 and 1: the summed NLL of the tokens chosen, and how many these are."""
        return {f"nll_{name}": -(self.logp @ chosen), f"{name}_tokens": chosen.sum()}


def tokens_of(training: Training, results: Sequence[MicroResult]) -> Tokens | None:
    """What the micro-batches of a step say of their tokens; None on a rank that had no row."""
    results = [result for result in results if len(result.head.logp)]
    if not results:
        return None
    credit, reward = training.data.credit, training.data.train.reward
    signs, others = [], {name: [] for name, signal in SIGNAL_OF.items() if signal in results[0].batch.signals}
    for result in results:
        batch, trained = result.batch, result.batch.mask > 0
        for name, parts in others.items():
            parts.append(batch.signals[SIGNAL_OF[name]][trained])
        if credit is not None:
            sign = torch.as_tensor(standing(credit, reward[batch.rows.numpy()])).to(trained.device)
            signs.append(sign.repeat_interleave(trained.sum(dim=1), output_size=len(result.head.logp)))
    measured = results[0].head.signals
    return Tokens(
        logp=torch.cat([r.head.logp for r in results]).double(),
        weights=torch.cat([r.weights for r in results]).double(),
        entropy=torch.cat([r.head.signals["entropy"] for r in results]).double() if "entropy" in measured else None,
        standing=torch.cat(signs).double() if signs else None,
        others={name: torch.cat(parts).double() for name, parts in others.items()},
    )
