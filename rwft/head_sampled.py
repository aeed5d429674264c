r"""Gradients from a sample of the vocabulary: unbiased, and below the cost of the exact products.

By the logits, the gradient of :math:`-\log \pi(y)` is :math:`\pi - e_y`. The target's part is exact. Of the other
tokens `count` are drawn by systematic sampling: one uniform number per position, equal steps of
:math:`s = (1 - \pi(y)) / count` through the cumulated probabilities. A token of probability :math:`p \ge s` is
always drawn and keeps :math:`p`; a rarer one is drawn with probability :math:`p / s` and is worth :math:`s`.
Log-probabilities, signals and coefficients stay exact. Of the three matrix products one is left; the other two touch
`count + 1` rows of the projection per position.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from rwft.errors import ObjectiveError
from rwft.softmax import equal_slices

PIECE = 8192  # rows of the projection that are summed at once
RUN = 32  # tokens whose probabilities are summed before a draw looks among them


@dataclass(frozen=True)
class Draws:
    """How many tokens stand for the rest of the vocabulary at each position, and what draws them."""

    generator: torch.Generator
    count: int = 256

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ObjectiveError(f"head: sampled: found {self.count} draws, expected a whole number >= 1")

    def of(self, p: Tensor, targets: Tensor, room: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`(r v), (r) -> (r m), (r m), (r 1)`: tokens other than the target, their values, and what all others sum to.

        Overwrites `p`, and `room`, float64 memory for all of it that is mapped once for many calls. A token that was
        drawn twice counts once. Sums are float64: a float32 sum would pass over the probabilities of rare tokens.
        """
        p.scatter_(1, targets[:, None], 0.0)
        runs = _in_runs(p, room_for(p) if room is None else room)
        sums = runs.sum(dim=2).cumsum_(dim=1)
        rest = sums[:, -1:].clone()
        start = torch.rand(len(p), 1, generator=self.generator, dtype=torch.float64, device=p.device)
        steps = torch.arange(self.count, dtype=torch.float64, device=p.device)
        tokens = _find(runs, sums, (start + steps) / self.count * rest).clamp_(max=p.shape[1] - 1)
        values = torch.maximum(p.gather(1, tokens), (rest / self.count).to(p.dtype))
        values[:, 1:].masked_fill_(tokens[:, 1:] == tokens[:, :-1], 0.0)
        return tokens, values, rest


def room_for(p: Tensor) -> Tensor:
    """`(r v) -> (r k RUN)`: float64 memory for whole runs of the vocabulary."""
    return p.new_empty((p.shape[0], -(-p.shape[1] // RUN), RUN), dtype=torch.float64)


def _in_runs(p: Tensor, room: Tensor) -> Tensor:
    """`(r v) -> (r k RUN)`: a copy in float64, with zeros behind the last token."""
    runs, size = room[: p.shape[0]], p.shape[1]
    flat = runs.flatten(1)
    flat[:, :size] = p
    flat[:, size:] = 0.0
    return runs


def _find(runs: Tensor, sums: Tensor, points: Tensor) -> Tensor:
    """`(r k RUN), (r k), (r m) -> (r m)`: the tokens whose intervals of the cumulated probabilities hold the points."""
    run = torch.searchsorted(sums, points, right=True).clamp_(max=sums.shape[1] - 1)
    before = sums.gather(1, (run - 1).clamp_(min=0)).masked_fill_(run == 0, 0.0)
    ends = runs.gather(1, run[:, :, None].expand(-1, -1, RUN)).cumsum_(dim=2)
    passed = (ends <= (points - before)[:, :, None]).sum(dim=2)
    return run * RUN + passed.clamp_(max=RUN - 1)


@dataclass
class Sampled:
    """The gradient by products of one chunk as `m + 1` tokens per position and their values, `(k m+1)` each."""

    draws: Draws
    tokens: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    room: Tensor | None = None

    def take(self, block: slice, p: Tensor, targets: Tensor, slope: Tensor | None) -> None:
        """`(r v), (r), (r v)`: the block's probabilities, on their way to minus the gradient of `logp`."""
        if self.room is None or len(self.room) < len(p):
            self.room = room_for(p)
        drawn, worth, rest = self.draws.of(p, targets, self.room)
        tokens, values = torch.cat([drawn, targets[:, None]], dim=1), torch.cat([worth, -rest.to(p.dtype)], dim=1)
        self.tokens.append(tokens)
        self.values.append(values if slope is None else values * slope.gather(1, tokens))

    def by_hidden(self, weight: Tensor) -> Tensor:
        """`(v h) -> (k h)`."""
        values = torch.cat(self.values).to(weight.dtype)
        return embedding_bag(torch.cat(self.tokens), weight, mode="sum", per_sample_weights=values)

    def add_by_weight(self, tiles: list[Tensor], fx: Tensor, *, first: bool) -> None:
        """`(k h)`: as `Dense.add_by_weight`, token by token."""
        tokens, order = torch.cat(self.tokens).flatten().sort()
        values = torch.cat(self.values).flatten()[order].to(fx.dtype)
        positions = order // self.tokens[0].shape[1]
        above = 0  # rows of the tiles before this one
        for tile in tiles:
            if first:
                tile.zero_()
            for rows in equal_slices(0, len(tile), PIECE):
                start, stop = torch.searchsorted(
                    tokens, tokens.new_tensor([above + rows.start, above + rows.stop])
                ).tolist()
                found, counts = tokens[start:stop].unique_consecutive(return_counts=True)
                bags = counts.cumsum(0) - counts
                sums = embedding_bag(positions[start:stop], fx, bags, mode="sum", per_sample_weights=values[start:stop])
                tile.index_add_(0, found - above, sums.to(tile.dtype))
            above += len(tile)

    def add_by_bias(self, bias: Tensor, factor: Tensor) -> None:
        """`(v), (k)`: adds to the gradient of the bias."""
        bias.index_add_(0, torch.cat(self.tokens).flatten(), (torch.cat(self.values) * factor[:, None]).flatten())
