"""The softmax over a vocabulary: how logits come about, are normalised and measured, a few rows at a time.

Products run in the precision of the hidden states; whatever is exponentiated, summed or logged is
float32 (float64 where an input is), on blocks of rows that stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rwft.errors import ObjectiveError, PolicyError, did_you_mean

BLOCK_BYTES = {"cpu": 4 << 20}  # a block of rows in float32: cache-sized on a CPU,
ACCELERATOR_BLOCK_BYTES = 64 << 20  # and enough to fill an accelerator elsewhere
ALIGNED = 64  # rows and columns of longer parts come in multiples: odd ones cost up to half as much again in a product
ROWS, STRIP = 512, 2048  # rows and columns that oneDNN multiplies at once, so that little is held beside the result
ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.mkl.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # a private operator
)
TOP = 20  # tokens of `topk_entropy`


@dataclass(frozen=True)
class Vocabulary:
    """The output projection as the model defines it: `logits = cap(scale * (x @ weight.T + bias))`."""

    weight: Tensor  # (v h)
    bias: Tensor | None = None  # (v)
    scale: float = 1.0  # multiplies the logits before the cap
    softcap: float | None = None  # cap(z) = c tanh(z / c)

    @property
    def size(self) -> int:
        return self.weight.shape[0]

    def tile(self, columns: slice) -> Vocabulary:
        """The part of the projection that makes these columns of the logits."""
        return replace(self, weight=self.weight[columns], bias=None if self.bias is None else self.bias[columns])

    def cast(self, product: torch.dtype, exact: torch.dtype) -> Vocabulary:
        """Detached; the weight in the precision of products, the bias in that of logits."""
        bias = None if self.bias is None else self.bias.detach().to(exact)
        return replace(self, weight=self.weight.detach().to(product), bias=bias)


@dataclass(frozen=True)
class Precision:
    """`product`: what matrices are multiplied in; `exact`: what log-probabilities and sums are kept in."""

    product: torch.dtype
    exact: torch.dtype


def precision(hidden: Tensor, weight: Tensor) -> Precision:
    """Float64 if either is; else float32, with products in autocast's or the hidden states' precision.

    Raises PolicyError for float16, whose range cannot hold the gradient of a log-probability.
    """
    if torch.float64 in (hidden.dtype, weight.dtype):
        return Precision(torch.float64, torch.float64)
    device = hidden.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if product not in (torch.float32, torch.bfloat16):
        raise PolicyError(f"head: found products in {product}; expected bfloat16, float32 or float64")
    return Precision(product, torch.float32)


def check_shapes(hidden: Tensor, vocabulary: Vocabulary, targets: Tensor) -> None:
    """Refuse what does not fit `(n h), (v h), (v), (n)`, and targets outside the vocabulary (PolicyError)."""
    weight, bias = vocabulary.weight, vocabulary.bias
    if weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise PolicyError(f"head: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}; expected (n h), (v h)")
    if targets.shape != hidden.shape[:-1]:
        raise PolicyError(f"head: targets {tuple(targets.shape)}, hidden {tuple(hidden.shape)}; expected (n), (n h)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise PolicyError(f"head: bias {tuple(bias.shape)}, weight {tuple(weight.shape)}; expected (v), (v h)")
    if targets.numel():
        low, high = map(int, torch.aminmax(targets))
        if low < 0 or high >= vocabulary.size:
            expected = f"0 to {vocabulary.size - 1} (leave untrained positions out)"
            raise PolicyError(f"head: found targets {low} to {high}; expected {expected}")


@dataclass(frozen=True)
class Projection:
    """Hidden states `(n h)` and a vocabulary in the precision of products, with a buffer for a chunk of logits."""

    x: Tensor
    vocabulary: Vocabulary
    exact: torch.dtype
    buffer: Tensor

    @classmethod
    def of(cls, hidden: Tensor, vocabulary: Vocabulary, most: int, lent: Tensor | None = None) -> Projection:
        """Detached, for chunks of at most `most` rows; the buffer lies where `lent` does if that is large enough."""
        kinds = precision(hidden, vocabulary.weight)
        x = hidden.detach().to(kinds.product)
        shape = min(most, x.shape[0]), vocabulary.size
        if lent is not None and (size := math.prod(shape) * x.itemsize) <= lent.nbytes:
            buffer = lent.view(-1).view(torch.uint8)[:size].view(x.dtype).view(shape)
        else:
            buffer = x.new_empty(shape)
        return cls(x, vocabulary.cast(kinds.product, kinds.exact), kinds.exact, buffer)

    def products(self, rows: slice) -> Tensor:
        """`(k v)`: `x @ weight.T` of these rows, in the buffer."""
        return multiply_(self.x[rows], self.vocabulary.weight, self.buffer[: rows.stop - rows.start])


def multiply_(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """`(k h), (v h) -> (k v)`: `x @ weight.T` in `out`.

    In float32, `torch.mm` calls MKL, which transposes the weight anew for every chunk; oneDNN's
    kernel, as exact, takes it as it lies and is 1.1 to 1.3 times as fast with 64 to 256 rows.
    """
    if not ONEDNN or out.device.type != "cpu" or out.dtype != torch.float32:
        return torch.mm(x, weight.T, out=out)
    for rows in equal_slices(0, x.shape[0], ROWS):
        for start in range(0, weight.shape[0], STRIP):
            columns = slice(start, start + STRIP)
            out[rows, columns] = torch.ops.mkldnn._linear_pointwise(x[rows], weight[columns], None, "none", [], "")
    return out


def equal_slices(start: int, stop: int, most: int) -> Iterator[slice]:
    """`start:stop` as the fewest slices of at most `most`, as equal as they and multiples of `ALIGNED` can be."""
    total, count = stop - start, -(-(stop - start) // most)
    grain = ALIGNED if most % ALIGNED == 0 and total > count * ALIGNED else 1
    ends = [start + min(total, -(-(total * i // count) // grain) * grain) for i in range(1, count + 1)]
    return map(slice, [start, *ends], ends)


def blocks(logits: Tensor) -> Iterator[slice]:
    """Blocks of rows of `(k v)` that are worked on at once."""
    most = BLOCK_BYTES.get(logits.device.type, ACCELERATOR_BLOCK_BYTES)
    return equal_slices(0, logits.shape[0], max(1, most // (4 * logits.shape[1])))


def exact_blocks(products: Tensor, exact: torch.dtype, *, keep: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Block by block of `(k v)`, its rows in precision `exact`: where they lie if they may be changed there.

    Else (`keep`, or another precision) each is copied over the last: memory mapped anew costs more than the copy.
    """
    parts, copied = list(blocks(products)), keep or products.dtype != exact
    most = max((part.stop - part.start for part in parts), default=0)
    scratch = products.new_empty((most, products.shape[1]), dtype=exact) if copied else None
    for block in parts:
        z = products[block]
        yield block, z if scratch is None else scratch[: len(z)].copy_(z)


def within(rows: slice, part: slice) -> slice:
    """The slice `part` of `rows`, counted as `rows` is."""
    return slice(rows.start + part.start, rows.start + part.stop)


def finish_(products: Tensor, vocabulary: Vocabulary) -> Tensor | None:
    """`(k v) -> (k v)`: in place, from `x @ weight.T` to logits; returns the slope of the cap, if there is one."""
    if vocabulary.bias is not None:
        products.add_(vocabulary.bias)
    if vocabulary.scale != 1.0:
        products.mul_(vocabulary.scale)
    if vocabulary.softcap is None:
        return None
    products.div_(vocabulary.softcap).tanh_()
    slope = 1 - products.square()
    products.mul_(vocabulary.softcap)
    return slope


def entropy(p: Tensor) -> Tensor:
    """`(k v) -> (k)`, in nats."""
    return torch.special.entr(p).sum(dim=-1)


def topk_entropy(p: Tensor) -> Tensor:
    """`(k v) -> (k)`: entropy of the 20 likeliest tokens, renormalised, in nats."""
    top = p.topk(min(TOP, p.shape[-1]), dim=-1).values
    return entropy(top / top.sum(dim=-1, keepdim=True))


def concentration(p: Tensor) -> Tensor:
    """`(k v) -> (k)`: the sum of squared probabilities."""
    return p.square().sum(dim=-1)


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "entropy": entropy,
    "topk_entropy": topk_entropy,
    "concentration": concentration,
}
SIGNALS = ("logp", *SHAPES, "top1")
"""What can be measured of a distribution; `top1` is 1 where no logit exceeds the target's."""


def check_signals(names: Sequence[str]) -> None:
    """Refuse what the head cannot measure (ObjectiveError)."""
    for name in names:
        if name not in SIGNALS:
            raise ObjectiveError(f"head: signal '{name}' is unknown; {did_you_mean(name, SIGNALS)}")


def normalise_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`(k v) -> (k 1), (k 1)`: in place, logits to probabilities; returns the largest logit and its log-probability.

    `logit - largest + log-probability of the largest` is exact where a probability underflows.
    """
    top = logits.amax(dim=-1, keepdim=True)
    torch.softmax(logits, dim=-1, out=logits)
    return top, logits.amax(dim=-1, keepdim=True).log()


def measure_(logits: Tensor, targets: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """`(k v), (k) -> {name: (k)}`: in place, logits to probabilities; `logp` and what else is asked for."""
    chosen = logits.gather(1, targets[:, None])
    top, log_peak = normalise_(logits)
    out = {"logp": (chosen - top + log_peak)[:, 0]}
    if "top1" in names:
        out["top1"] = (chosen == top)[:, 0].to(logits.dtype)
    return out | {name: SHAPES[name](logits) for name in names if name in SHAPES}


def subtract_target_(p: Tensor, targets: Tensor) -> Tensor:
    """`(k v), (k) -> (k v)`: in place, `p - onehot`, minus the gradient of `logp` by the logits."""
    return p.scatter_add_(1, targets[:, None], p.new_full((1, 1), -1.0).expand(p.shape[0], 1))


def store_(products: Tensor, block: slice, z: Tensor, slope: Tensor | None) -> None:
    """`(k v), (r v), (r v)`: the gradient by logits, times the slope of the cap, where the products were."""
    if slope is not None:
        z.mul_(slope)
    if z.dtype != products.dtype:  # else it is there already
        products[block] = z


def accumulate_(total: Tensor, left: Tensor, right: Tensor, *, first: bool = False) -> None:
    """`(m n), (k m), (k n) -> (m n)`: `total += left.T @ right`, summed as exactly as `total` can, tile by tile.

    The `first` product overwrites what was there.
    """
    beta = 0 if first else 1
    if total.dtype == left.dtype:
        total.addmm_(left.T, right, beta=beta)
        return
    if total.is_cuda and torch.version.hip is None:
        torch.addmm(total, left.T, right, out_dtype=total.dtype, beta=beta, out=total)
        return
    for rows in equal_slices(0, total.shape[0], 4096):
        product = left[:, rows].T @ right
        if first:
            total[rows] = product
        else:
            total[rows] += product


def accumulate_rows_(total: Tensor, rows: Tensor, factor: Tensor) -> None:
    """`(v), (k v), (k) -> (v)`: `total += factor @ rows` in the precision of `factor`, block by block."""
    for block in blocks(rows):
        total += factor[block] @ rows[block].to(factor.dtype)


def merge(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Signals of consecutive rows as one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
