r"""The one equation.

.. math:: L(\theta) = -\frac{1}{Z} \sum_{i,t} m_{it} \, \mathrm{sg}[w_{it}] \, \log \pi_\theta(y_{it} | x_i, y_{i,<t})

Its gradient is the policy-gradient estimator that every objective here shares; only `w` differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rwft.errors import ConfigError, ObjectiveError
from rwft.weighting import check_weights

Normalizer = Literal["token", "sequence", "sequence_sum", "weight"]
NORMALIZERS: tuple[str, ...] = get_args(Normalizer)


def surrogate_loss(logp: Tensor, weights: Tensor, mask: Tensor, denominator: Tensor | float) -> Tensor:
    """`(b t), () | (b 1) | (b t), (b t), () | (b 1) -> ()`: minus the weighted log-likelihood over `denominator`.

    Differentiable in `logp` only: weights are detached here. What stands under mask 0 is
    ignored, whatever it holds. Raises ObjectiveError for weights of another shape.
    """
    check_weights(weights, logp.shape[0], logp.shape[1], "given")
    trained = mask > 0  # each factor is masked: the gradient of a masked product is 0 times a factor that may be NaN
    terms = weights.detach().where(trained, 0.0) * logp.where(trained, 0.0) * mask
    return -(terms / denominator).sum()


@dataclass(frozen=True)
class Counts:
    """What a normaliser divides by, over all micro-batches and ranks of one optimiser step."""

    tokens: float
    sequences: float

    def denominator(self, normalizer: str, mask: Tensor) -> Tensor:
        """`(b t) -> () | (b 1)`: the `Z` of these rows; for `weight` 1, since its sum scales the finished gradient."""
        if normalizer == "token":
            return mask.new_tensor(self.tokens)
        if normalizer == "sequence":
            return mask.sum(dim=1, keepdim=True).clamp(min=1) * self.sequences
        if normalizer == "sequence_sum":
            return mask.new_tensor(self.sequences)
        if normalizer == "weight":
            return mask.new_tensor(1.0)
        raise ConfigError(f"train.normalize: '{normalizer}' is unknown; known: {', '.join(NORMALIZERS)}")


def count(mask: Tensor) -> Tensor:
    """`(b t) -> (2)` float64: trained tokens and sequences that have any; summed over micro-batches and ranks."""
    return torch.stack([mask.sum(dtype=torch.float64), (mask.sum(dim=1) > 0).sum(dtype=torch.float64)])


def weight_denominator(total: float, smallest: float) -> float:
    """`Z` of the normaliser `weight`: the summed weights of the step; 1 when every weight is 0 (so is the gradient).

    Raises ObjectiveError if a weight is negative: dividing by a sum of mixed signs has no meaning.
    """
    if smallest < 0:
        raise ObjectiveError(
            f"train.normalize: weight needs weights >= 0, but one is {smallest:.4g}: their sum is no measure of size; "
            "use normalize: token, sequence or sequence_sum"
        )
    return total if total > 0 else 1.0


def weight_statistics(weights: Tensor, mask: Tensor, logp: Tensor) -> Mapping[str, Tensor]:
    """`(b t), (b t), (b t) -> {name: ()}` in float64: sums from which a step's weight metrics are made.

    `ess` is (sum w)^2 / sum w^2, in tokens. `negative_improbable` is the share of |w| that
    pushes down tokens with p < 0.01, where an unbounded negative weight runs away.
    """
    w = (weights.expand_as(mask) * mask).where(mask > 0, 0.0).double()
    negative = w.clamp(max=0).abs()
    return {
        "w_sum": w.sum(),
        "w_abs": w.abs().sum(),
        "w_square": w.square().sum(),
        "w_negative": negative.sum(),
        "w_negative_improbable": (negative * (logp < -4.605170186)).sum(),
    }
