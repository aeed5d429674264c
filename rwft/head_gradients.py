"""Where gradients gather while chunks of logits pass, and how autograd gets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwft.errors import RwftError
from rwft.softmax import Vocabulary, accumulate_, accumulate_rows_, store_, subtract_target_

TILE = 4096  # rows of the weight's gradient that are rounded at once


@dataclass(frozen=True)
class Gradients:
    """The gradients of hidden states, weight and bias; None where nobody asks.

    That of the weight lies in tiles of rows if it is summed more exactly than it will be handed over,
    so that each tile can be let go as soon as it is rounded.
    """

    hidden: Tensor | None = None
    weight: list[Tensor] | None = None
    bias: Tensor | None = None

    @classmethod
    def like(cls, hidden: Tensor, vocabulary: Vocabulary, exact: torch.dtype, summed: torch.dtype) -> Gradients:
        """Room for what requires a gradient, if gradients are enabled; only that of the bias begins with zeros.

        That of the weight is kept in precision `summed`, that of the bias in `exact`.
        """

        def room(like: Tensor | None, dtype: torch.dtype, most: int) -> list[Tensor] | None:
            if like is None or not like.requires_grad or not torch.is_grad_enabled():
                return None
            return [torch.empty_like(tile, dtype=dtype) for tile in like.detach().split(most)]

        size, weight = vocabulary.size, vocabulary.weight
        (x,) = room(hidden, hidden.dtype, max(1, hidden.shape[0])) or [None]
        (bias,) = room(vocabulary.bias, exact, size) or [None]
        whole = weight.dtype == summed or weight.is_cuda  # a GPU has to hold the whole result at once anyway
        tiles = room(weight, summed, size if whole else TILE)
        for tensor in (bias, *(tiles or () if hidden.shape[0] == 0 else ())):
            if tensor is not None:
                tensor.zero_()
        return cls(x, tiles, bias)

    @property
    def idle(self) -> Tensor | None:
        """Memory of the weight's gradient in one piece: until it is written, as it is at last if sampled."""
        if self.weight is None or len(self.weight) > 1 or not self.weight[0].is_contiguous():
            return None
        return self.weight[0]

    @property
    def frozen(self) -> bool:
        """Whether the projection gets no gradient."""
        return self.weight is None and self.bias is None


@dataclass(frozen=True)
class Dense:
    """The gradient by products of one chunk, `(k v)`, in the buffer that held the products."""

    products: Tensor

    def take(self, block: slice, p: Tensor, targets: Tensor, slope: Tensor | None) -> None:
        """`(r v), (r), (r v)`: the block's probabilities, on their way to minus the gradient of `logp`."""
        store_(self.products, block, subtract_target_(p, targets), slope)

    def by_hidden(self, weight: Tensor) -> Tensor:
        """`(v h) -> (k h)`."""
        return self.products @ weight

    def add_by_weight(self, tiles: list[Tensor], fx: Tensor, *, first: bool) -> None:
        """`(k h)`: adds to the gradient of the weight, given hidden states times factors; begins it if `first`."""
        for tile, columns in zip(tiles, self.products.split(len(tiles[0]), dim=1), strict=True):
            accumulate_(tile, columns, fx, first=first)

    def add_by_bias(self, bias: Tensor, factor: Tensor) -> None:
        """`(v), (k)`: adds to the gradient of the bias."""
        accumulate_rows_(bias, self.products, factor)


class GivenGradients(torch.autograd.Function):
    """A loss whose gradients are known: backward multiplies them by the upstream scalar and hands them over."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, gradients: Gradients, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        x, b = ([gradient] if gradient is not None else None for gradient in (gradients.hidden, gradients.bias))
        ctx.gradients = [x, gradients.weight, b]
        ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.gradients is None:
            raise RwftError("head: backward ran twice through one loss; its gradients were handed over the first time")
        handed, ctx.gradients = ctx.gradients, None
        pairs = zip(handed, ctx.dtypes, strict=True)
        return None, None, *(None if tiles is None else _hand_over(tiles, upstream[0], dtype) for tiles, dtype in pairs)


def _hand_over(tiles: list[Tensor], upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """The tiles, emptied one by one, times the upstream scalar as one tensor of `dtype`."""
    if len(tiles) == 1:
        tile = tiles.pop()
        if tile.dtype == dtype and upstream.device.type == "cpu" and upstream.item() == 1.0:
            return tile  # a pass over it saved; on a GPU the question itself would cost more
        return torch.mul(tile, upstream, out=tile if tile.dtype == dtype else torch.empty_like(tile, dtype=dtype))
    stop = sum(len(tile) for tile in tiles)
    whole = tiles[0].new_empty(stop, *tiles[0].shape[1:], dtype=dtype)
    while tiles:
        tile = tiles.pop()
        whole[stop - len(tile) : stop] = tile.mul_(upstream)
        stop -= len(tile)
    return whole
