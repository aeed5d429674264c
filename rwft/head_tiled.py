"""Token log-probabilities in two passes over tiles of the vocabulary, for any loss.

Forward keeps one log-probability and one log-normaliser per token. Backward makes the logits anew,
tile by tile, so that each tile of the projection's gradient is written once: beside the gradients
themselves, the workspace is one tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwft.softmax import (
    ALIGNED,
    Precision,
    Vocabulary,
    accumulate_,
    accumulate_rows_,
    check_shapes,
    equal_slices,
    exact_blocks,
    finish_,
    multiply_,
    precision,
    store_,
    within,
)

MIN_BUDGET, MAX_BUDGET = 8 << 20, 64 << 20  # bytes of a tile; in between, a sixteenth of the gradients
WIDE = 4096  # columns of a tile before rows are divided too
BITS = 1 / math.log(2)  # of a nat: torch makes exp2 in less than half the time of exp (float32, CPU)


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    budget: int | None = None,
) -> Tensor:
    """`(b t h), (v h), (b t) -> (b t)`: log-probability of each target, in nats, without full logits.

    Any leading shape. Logits are `cap(scale * (hidden @ head_weight.T + bias))`, the cap `c tanh(z / c)`.
    Differentiable in `hidden`, `head_weight` and `bias`, with any upstream gradient per token; costs
    four matrix products instead of three. The result is float32, float64 if an input is. `budget` is
    the workspace in bytes. Raises PolicyError for shapes or targets that do not fit.
    """
    vocabulary = Vocabulary(head_weight, bias, scale, softcap)
    check_shapes(hidden, vocabulary, targets)
    x, y = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    return _TokenLogprobs.apply(x, head_weight, bias, y, scale, softcap, budget).reshape(targets.shape)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        budget: int | None,
    ) -> Tensor:
        kinds = precision(hidden, weight)
        vocabulary = Vocabulary(weight, bias, scale, softcap)
        with torch.autocast(hidden.device.type, enabled=False):
            known = _Tiles.of(hidden, vocabulary, targets, kinds, budget).normalise()
        ctx.save_for_backward(hidden, weight, bias, targets, *known)
        ctx.settings = scale, softcap, budget, kinds
        return known.logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, targets, *known = ctx.saved_tensors
        scale, softcap, budget, kinds = ctx.settings
        vocabulary = Vocabulary(weight, bias, scale, softcap)
        with torch.autocast(hidden.device.type, enabled=False):
            tiles = _Tiles.of(hidden, vocabulary, targets, kinds, budget)
            inputs = zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
            wanted = [like if need else None for like, need in inputs]
            return *tiles.gradients(Normalised(*known), upstream[0], wanted), None, None, None, None


class Normalised(NamedTuple):
    """`(n)` each. The sum of the last two, the log-normaliser, would lose the small differences of large logits."""

    logp: Tensor  # of the targets
    top: Tensor  # the largest logit
    log_sum: Tensor  # the log of the sum of exp(logit - largest)


@dataclass(frozen=True)
class _Tiles:
    """Hidden states `(n h)` and a vocabulary in the precision of products; logits in tiles of `rows` by `columns`."""

    x: Tensor
    vocabulary: Vocabulary
    targets: Tensor
    exact: torch.dtype
    rows: int
    columns: int
    area: Tensor  # where each tile is made

    @classmethod
    def of(
        cls, hidden: Tensor, vocabulary: Vocabulary, targets: Tensor, kinds: Precision, budget: int | None
    ) -> _Tiles:
        """Tiles of at most `budget` bytes: all rows by many columns, but rows are divided before columns get few."""
        (n, h), v, size = hidden.shape, vocabulary.size, kinds.product.itemsize
        budget = budget if budget is not None else min(max((n + v) * h * size // 16, MIN_BUDGET), MAX_BUDGET)
        area = max(1, budget // size)
        rows = max(1, min(n, area // WIDE))
        columns = min(v, area // rows)
        columns -= columns % ALIGNED if columns > ALIGNED else 0
        x = hidden.detach().to(kinds.product)
        vocabulary = vocabulary.cast(kinds.product, kinds.exact)
        return cls(x, vocabulary, targets, kinds.exact, rows, columns, x.new_empty(rows * columns))

    def across(self) -> Iterator[slice]:
        """Columns of the tiles."""
        starts = range(0, self.vocabulary.size, self.columns)  # not equalised: an even width is what matters
        return (slice(start, min(start + self.columns, self.vocabulary.size)) for start in starts)

    def down(self, columns: slice) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the tiles of these columns, with their products `(v k)`, tokens last.

        Lying so, they are multiplied faster than as `(k v)`, in bfloat16 by 6 to 8 %.
        """
        weight = self.vocabulary.weight[columns]
        for rows in equal_slices(0, self.x.shape[0], self.rows):
            shape = weight.shape[0], rows.stop - rows.start
            yield rows, multiply_(weight, self.x[rows], self.area[: shape[0] * shape[1]].view(shape))

    def logits(self, products: Tensor, columns: slice) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """`(v k)`: block by block where it lies, the logits `(r k)` and the slope of their cap."""
        for block, z in exact_blocks(products, self.exact):
            slope = finish_(z.T, self.vocabulary.tile(within(columns, block)))
            yield block, z, None if slope is None else slope.T

    def local(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Where the targets of these rows stand in these columns, `(1 k)`, and whether they do."""
        place = self.targets[None, rows] - columns.start
        inside = (place >= 0) & (place < columns.stop - columns.start)
        return place.where(inside, 0), inside

    def normalise(self) -> Normalised:
        """Of every row, by one pass over the tiles."""
        lowest = torch.finfo(self.exact).min  # not -inf, which some logits are
        top = self.x.new_full((self.x.shape[0],), lowest, dtype=self.exact)
        total, chosen = torch.zeros_like(top), torch.zeros_like(top)
        for columns in self.across():
            for rows, products in self.down(columns):
                place, inside = self.local(rows, columns)
                chosen[rows] += products.gather(0, place).where(inside, 0.0)[0]
                for _, z, _ in self.logits(products, columns):
                    largest = torch.maximum(top[rows], z.amax(dim=0))
                    total[rows] *= (top[rows] - largest).exp_()
                    total[rows] += z.sub_(largest).mul_(BITS).exp2_().sum(dim=0)
                    top[rows] = largest
        bias = self.vocabulary.bias
        finish_(chosen, replace(self.vocabulary, bias=None if bias is None else bias[self.targets]))
        return Normalised(chosen - top - total.log(), top, total.log())

    def gradients(self, known: Normalised, upstream: Tensor, wanted: Sequence[Tensor | None]) -> list[Tensor | None]:
        """`(n) -> (n h), (v h), (v)`: gradients of `(upstream * logp).sum()`, None if unwanted."""
        hidden, weight, bias = wanted
        factor = (upstream * -self.vocabulary.scale).to(self.exact)
        fx = (self.x * factor[:, None]).to(self.x.dtype)
        dx = None if hidden is None else torch.zeros_like(hidden, dtype=self.exact)
        dw, db = (None if like is None else torch.empty_like(like) for like in (weight, bias))
        at_once = weight is not None and 0 < self.x.shape[0] <= self.rows and weight.dtype == fx.dtype  # nothing to sum
        for columns in self.across():
            dw_tile = None if at_once else _begin(dw, columns, self.exact)
            db_tile = _begin(db, columns, self.exact)
            for rows, products in self.down(columns):
                self.unit_(products, rows, columns, known)
                if dx is not None:
                    accumulate_(dx[rows], products, self.vocabulary.weight[columns])
                if dw is not None and at_once:
                    torch.mm(products, fx, out=dw[columns])
                if dw_tile is not None:
                    accumulate_(dw_tile, products.T, fx[rows])
                if db_tile is not None:
                    accumulate_rows_(db_tile, products.T, factor[rows])
            _finish(dw, dw_tile, columns)
            _finish(db, db_tile, columns)
        return [None if dx is None or hidden is None else dx.mul_(factor[:, None]).to(hidden.dtype), dw, db]

    def unit_(self, products: Tensor, rows: slice, columns: slice, known: Normalised) -> None:
        """`(v k)`: in place, from products to minus the gradient of `logp` by them, the scale left out."""
        top, log_sum = known.top[rows], known.log_sum[rows]
        place, inside = self.local(rows, columns)
        for block, z, slope in self.logits(products, columns):
            torch.add(log_sum * -BITS, z.sub_(top), alpha=BITS, out=z).exp2_()
            store_(products, block, z, slope)
        at_target = known.logp[rows].expm1()  # p - 1, exact where p is close to one
        if (cap := self.vocabulary.softcap) is not None:
            at_target *= 1 - ((known.logp[rows] + top + log_sum) / cap).square()
        value = at_target.to(products.dtype).where(inside, products.gather(0, place))[0]
        every = torch.arange(products.shape[1], device=products.device)
        products.index_put_((place[0], every), value)  # on a CPU, scatter_ copies bfloat16 tensors as a whole


def _begin(total: Tensor | None, columns: slice, exact: torch.dtype) -> Tensor | None:
    """Zeros that gather the gradient of these columns: in place where `total` is exact."""
    if total is None or total.dtype == exact:
        return None if total is None else total[columns].zero_()
    return torch.zeros_like(total[columns], dtype=exact)


def _finish(total: Tensor | None, part: Tensor | None, columns: slice) -> None:
    """Stores what was gathered elsewhere."""
    if total is not None and part is not None and total.dtype != part.dtype:
        total[columns] = part
