r"""Gradients from a sample of the vocabulary: unbiased, and below the cost of the exact products.

By the logits, the gradient of :math:`-\log \pi(y)` is :math:`(1 - \pi(y)) (\bar\pi - e_y)`, where :math:`\bar\pi` is
the distribution over the other tokens. The target's part is exact; :math:`\bar\pi` is replaced by `count`
draws from it, by systematic sampling: one uniform number per position, equal steps through the
cumulated probabilities. Log-probabilities, signals and coefficients stay exact. Of the three matrix
products one is left; the other two touch `count + 1` rows of the projection per position.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from rwft.errors import ObjectiveError
from rwft.softmax import equal_slices

PIECE = 8192  # rows of the projection that are summed at once


@dataclass(frozen=True)
class Draws:
    """How many tokens stand for the rest of the vocabulary at each position, and what draws them."""

    generator: torch.Generator
    count: int = 256

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ObjectiveError(f"head: sampled: found {self.count} draws, expected a whole number >= 1")

    def of(self, p: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """`(r v), (r) -> (r m), (r 1)`: draws of tokens other than the target, and their summed probability.

        Overwrites `p`. Sums are float64: a float32 sum would pass over the probabilities of rare tokens.
        """
        sums = p.scatter_(1, targets[:, None], 0.0).cumsum(dim=1, dtype=torch.float64)
        rest = sums[:, -1:].clone()
        start = torch.rand(len(p), 1, generator=self.generator, dtype=torch.float64, device=p.device)
        steps = torch.arange(self.count, dtype=torch.float64, device=p.device)
        tokens = torch.searchsorted(sums, (start + steps) / self.count * rest, right=True)
        return tokens.clamp_(max=p.shape[1] - 1), rest


@dataclass
class Sampled:
    """The gradient by products of one chunk as `m + 1` tokens per position and their values, `(k m+1)` each."""

    draws: Draws
    tokens: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def take(self, block: slice, p: Tensor, targets: Tensor, slope: Tensor | None) -> None:
        """`(r v), (r), (r v)`: the block's probabilities, on their way to minus the gradient of `logp`."""
        drawn, rest = self.draws.of(p, targets)
        share = (rest / self.draws.count).expand(drawn.shape)
        tokens, values = torch.cat([drawn, targets[:, None]], dim=1), torch.cat([share, -rest], dim=1).to(p.dtype)
        self.tokens.append(tokens)
        self.values.append(values if slope is None else values * slope.gather(1, tokens))

    def by_hidden(self, weight: Tensor) -> Tensor:
        """`(v h) -> (k h)`."""
        values = torch.cat(self.values).to(weight.dtype)
        return embedding_bag(torch.cat(self.tokens), weight, mode="sum", per_sample_weights=values)

    def add_by_weight(self, tiles: list[Tensor], fx: Tensor) -> None:
        """`(k h)`: adds to the gradient of the weight, token by token, given hidden states times their factors."""
        tokens, order = torch.cat(self.tokens).flatten().sort()
        values = torch.cat(self.values).flatten()[order].to(fx.dtype)
        positions = order // self.tokens[0].shape[1]
        first = 0  # token of the tile's first row
        for tile in tiles:
            for rows in equal_slices(0, len(tile), PIECE):
                start, stop = torch.searchsorted(
                    tokens, tokens.new_tensor([first + rows.start, first + rows.stop])
                ).tolist()
                found, counts = tokens[start:stop].unique_consecutive(return_counts=True)
                bags = counts.cumsum(0) - counts
                sums = embedding_bag(positions[start:stop], fx, bags, mode="sum", per_sample_weights=values[start:stop])
                tile.index_add_(0, found - first, sums.to(tile.dtype))
            first += len(tile)

    def add_by_bias(self, bias: Tensor, factor: Tensor) -> None:
        """`(v), (k)`: adds to the gradient of the bias."""
        bias.index_add_(0, torch.cat(self.tokens).flatten(), (torch.cat(self.values) * factor[:, None]).flatten())
