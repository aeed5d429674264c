"""The softmax of a chunk of logits on a GPU, as one kernel: the products are read twice and written once.

Torch's own operators pass over a chunk some ten times, in float32, which takes a GPU longer than it saves by
multiplying in bfloat16. Imports Triton, which torch brings along where it is built for GPUs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from rwft.errors import PolicyError
from rwft.softmax import Vocabulary, finish_

BLOCK, WARPS = 4096, 8  # columns that a program holds at once, and the groups of 32 threads that share them
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # not -inf, which some logits are


@triton.jit
def _squash(z):
    """tanh and its slope; without cancellation on either side of zero."""
    shrunk = tl.exp(-2.0 * tl.abs(z))
    value = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(z < 0, -value, value), 4.0 * shrunk / ((1.0 + shrunk) * (1.0 + shrunk))


@triton.jit
def _logits(products, bias, start, columns, inside, scale, cap, BIASED: tl.constexpr, CAPPED: tl.constexpr):
    """Logits in float32, -inf outside of the vocabulary, and the slope of their cap."""
    z = tl.load(products + start + columns, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        z += tl.load(bias + columns, mask=inside, other=0.0)
    z *= scale
    slope = tl.full(z.shape, 1.0, tl.float32)
    if CAPPED:
        z, slope = _squash(z / cap)
        z *= cap
    return tl.where(inside, z, float("-inf")), slope


@triton.jit
def _softmax_rows(
    products,  # (k v), overwritten by minus the gradient of logp by them, the scale left out, if GRADIENT
    bias,  # (v) float32, or anything where not BIASED
    targets,  # (k)
    tops,  # (k) float32, out: the largest logit
    totals,  # (k) float32, out: the sum of exp(logit - largest)
    size,
    scale,
    cap,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes one row. Each lane keeps a maximum and a sum of its own until the row has been read once."""
    row = tl.program_id(0).to(tl.int64)
    start = row * size
    target = tl.load(targets + row)
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    others = tl.zeros((BLOCK,), tl.float32)  # the sum without the target: 1 - p that does not cancel
    for first in range(0, size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < size
        z, _ = _logits(products, bias, start, columns, inside, scale, cap, BIASED, CAPPED)
        small = tl.exp(-tl.abs(z - top))  # of the two exponentials that a running sum takes, the other one is 1
        larger = z > top
        here = tl.where(larger, 1.0, small)
        kept = tl.where(larger, small, 1.0)
        total = total * kept + here
        others = others * kept + tl.where(columns == target, 0.0, here)
        top = tl.maximum(top, z)
    peak = tl.max(top, 0)
    share = tl.exp(top - peak)
    whole = tl.sum(total * share, 0)
    rest = tl.sum(others * share, 0)
    tl.store(tops + row, peak)
    tl.store(totals + row, whole)
    if GRADIENT:
        inverse = 1.0 / whole
        for first in range(0, size, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            inside = columns < size
            z, slope = _logits(products, bias, start, columns, inside, scale, cap, BIASED, CAPPED)
            p = tl.exp(z - peak)
            gradient = tl.where(columns == target, -rest, p) * inverse * slope
            tl.store(products + start + columns, gradient.to(products.dtype.element_ty), mask=inside)


def softmax_rows_(products: Tensor, targets: Tensor, vocabulary: Vocabulary, *, gradient: bool) -> Tensor:
    """`(k v), (k) -> (k)`: `logp` of the targets in float32, of products `x @ weight.T`.

    With `gradient` the products become, in place, minus the gradient of `logp` by them with the scale left out.
    Raises PolicyError unless the products are contiguous, float32 or bfloat16.
    """
    if not products.is_contiguous() or products.dtype not in (torch.float32, torch.bfloat16):
        raise PolicyError(f"head: found {products.dtype} products of strides {products.stride()}; expected whole rows")
    k, bias, cap = len(products), vocabulary.bias, vocabulary.softcap
    if k == 0:
        return products.new_empty(0, dtype=torch.float32)
    chosen = products.gather(1, targets[:, None]).float().T
    finish_(chosen, replace(vocabulary, bias=None if bias is None else bias[targets]))
    tops, totals = (torch.empty(k, dtype=torch.float32, device=products.device) for _ in range(2))
    launch = _softmax_rows[(k,)]  # pyright: ignore[reportIndexIssue]
    with torch.cuda.device_of(products):  # kernels start on the current device, wherever their tensors are
        launch(
            products,
            products if bias is None else bias.contiguous(),
            targets,
            tops,
            totals,
            vocabulary.size,
            vocabulary.scale,
            1.0 if cap is None else cap,
            BIASED=bias is not None,
            CAPPED=cap is not None,
            GRADIENT=gradient,
            BLOCK=min(BLOCK, triton.next_power_of_2(vocabulary.size)),
            num_warps=WARPS,
        )
    return chosen[0] - tops - totals.log()
