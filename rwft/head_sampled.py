r"""Gradients from a sample of the vocabulary: unbiased, and below the cost of the exact products.

By the logits, the gradient of :math:`-\log \pi(y)` is :math:`\pi - e_y`. The target's part is exact. Of the other
tokens `count` are drawn by systematic sampling: one uniform number per position, equal steps of
:math:`s = (1 - \pi(y)) / count` through the cumulated probabilities. A token of probability :math:`p \ge s` is
always drawn and keeps :math:`p`; a rarer one is drawn with probability :math:`p / s` and is worth :math:`s`.
Log-probabilities, signals and coefficients stay exact. Of the three matrix products one is left; the other two touch
`count + 1` rows of the projection per position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from rwft.errors import ObjectiveError
from rwft.softmax import equal_slices

PIECE = 2048  # rows of the projection that are summed at once, while they are in the cache
RUN = 16  # tokens whose probabilities are summed before a draw looks among them


@dataclass(frozen=True)
class Draws:
    """How many tokens stand for the rest of the vocabulary at each position, and what draws them."""

    generator: torch.Generator
    count: int = 256

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ObjectiveError(f"head: sampled: found {self.count} draws, expected a whole number >= 1")

    def of(self, p: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(r v), (r) -> (r m), (r m), (r 1)`: tokens other than the target, their values, and what all others sum to.

        Overwrites `p`. A token that was drawn twice counts once.
        """
        p.scatter_(1, targets[:, None], 0.0)
        sums = _sum_runs(p)
        ends = sums.cumsum(dim=1, dtype=torch.float64)  # a float32 sum would pass over rare tokens
        rest = ends[:, -1:]
        start = torch.rand(len(p), 1, generator=self.generator, dtype=torch.float64, device=p.device)
        steps = torch.arange(self.count, dtype=torch.float64, device=p.device)
        tokens = _find(p, sums, ends, (start + steps) / self.count * rest)
        values = torch.maximum(p.gather(1, tokens), (rest / self.count).to(p.dtype))
        values[:, 1:].masked_fill_(tokens[:, 1:] == tokens[:, :-1], 0.0)
        return tokens, values, rest


def _sum_runs(p: Tensor) -> Tensor:
    """`(r v) -> (r k)`: sums of at most RUN tokens each, every k-th: neighbours in memory go to neighbouring sums."""
    k = -(-p.shape[1] // RUN)
    whole = p.shape[1] // k * k
    sums = p[:, :whole].unflatten(1, (-1, k)).sum(dim=1)
    sums[:, : p.shape[1] - whole] += p[:, whole:]
    return sums


def _find(p: Tensor, sums: Tensor, ends: Tensor, points: Tensor) -> Tensor:
    """`(r v), (r k), (r k), (r m) -> (r m)`: the tokens whose intervals hold the points, run after run.

    `ends` cumulates `sums`. A run's interval is shared out among its tokens in float64, so that its sum loses none.
    """
    size, k = p.shape[1], sums.shape[1]
    run = torch.searchsorted(ends, points, right=True).clamp_(max=k - 1)
    before = ends.gather(1, (run - 1).clamp_(min=0)).masked_fill_(run == 0, 0.0)
    tokens = run[:, :, None] + torch.arange(0, size, k, device=p.device)
    heights = p.gather(1, tokens.clamp(max=size - 1).flatten(1)).view(tokens.shape).double()
    if size % k:
        heights.masked_fill_(tokens >= size, 0.0)
    heights.cumsum_(dim=2)
    shares = (points - before) / sums.gather(1, run) * heights[:, :, -1]
    passed = torch.searchsorted(heights, shares[:, :, None], right=True).clamp_(max=tokens.shape[2] - 1)
    return tokens.gather(2, passed)[:, :, 0].clamp_(max=size - 1)


@dataclass(frozen=True)
class Sampled:
    """The gradient by products as `m + 1` tokens per position and their values, `(n m+1)` each.

    It is small enough to be kept for all positions until their coefficients are known, whatever the chunks of logits.
    """

    draws: Draws
    tokens: Tensor
    values: Tensor

    @classmethod
    def room(cls, draws: Draws, targets: Tensor, exact: torch.dtype) -> Sampled:
        """For the positions of `targets`, `(n)`."""
        tokens = targets.new_empty(len(targets), draws.count + 1)
        return cls(draws, tokens, torch.empty_like(tokens, dtype=exact))

    def part(self, rows: slice) -> Sampled:
        return Sampled(self.draws, self.tokens[rows], self.values[rows])

    def take(self, block: slice, p: Tensor, targets: Tensor, slope: Tensor | None) -> None:
        """`(r v), (r), (r v)`: the block's probabilities, on their way to minus the gradient of `logp`."""
        drawn, worth, rest = self.draws.of(p, targets)
        tokens, values = self.tokens[block], self.values[block]
        torch.cat([drawn, targets[:, None]], dim=1, out=tokens)
        torch.cat([worth, -rest.to(p.dtype)], dim=1, out=values)
        if slope is not None:
            values *= slope.gather(1, tokens)

    def by_hidden(self, weight: Tensor) -> Tensor:
        """`(v h) -> (n h)`."""
        return embedding_bag(self.tokens, weight, mode="sum", per_sample_weights=self.values.to(weight.dtype))

    def write_by_weight(self, tiles: list[Tensor], fx: Tensor) -> None:
        """`(n h)`: the gradient of the weight, given hidden states times factors, over what its tiles held."""
        tokens, order = self.tokens.flatten().sort()
        values = self.values.flatten()[order].to(fx.dtype)
        positions = order // self.tokens.shape[1]
        above = 0  # rows of the tiles before this one
        for tile in tiles:
            for rows in equal_slices(0, len(tile), PIECE):
                edges = torch.arange(above + rows.start, above + rows.stop + 1, device=tokens.device)
                bags = torch.searchsorted(tokens, edges)
                start, stop = int(bags[0]), int(bags[-1])
                here = slice(start, stop)
                tile[rows] = embedding_bag(
                    positions[here], fx, bags[:-1] - start, mode="sum", per_sample_weights=values[here]
                )
            above += len(tile)

    def add_by_bias(self, bias: Tensor, factor: Tensor) -> None:
        """`(v), (n)`: adds to the gradient of the bias."""
        bias.index_add_(0, self.tokens.flatten(), (self.values * factor[:, None]).flatten())


def bytes_of_draws(positions: int, count: int, exact: torch.dtype) -> int:
    """The most that `Sampled` holds: tokens and values, and both again with order and positions while it sorts them."""
    return positions * (count + 1) * (4 * torch.int64.itemsize + 2 * exact.itemsize)
