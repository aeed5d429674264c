"""Weights of a micro-batch as the head asks for them: whatever the chunks, the same, and without waiting in each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rwft.data.batching import Batch
from rwft.step import Weigher
from rwft.weighting import build_objective

LENGTHS = [3, 1, 4, 2]
WHOLE, CHUNKS = [slice(0, 10)], [slice(0, 3), slice(3, 4), slice(4, 8), slice(8, 10)]
SPECS = ["awr", ["dft", "reinforce"], ["iw_sft", "awr"]]


class Waits(TorchDispatchMode):
    """Counts what a device is waited for: the size of a result that depends on values, and values themselves."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.overloadpacket is torch.ops.aten.index and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        names = (torch.ops.aten.nonzero, torch.ops.aten._local_scalar_dense, torch.ops.aten.masked_select)
        self.number += by_mask or func.overloadpacket in names
        return func(*args, **(kwargs or {}))


def batch() -> Batch:
    """Four rows of unequal length, trained in their second half."""
    draw = torch.Generator().manual_seed(0)
    mask = torch.zeros(4, 8, dtype=torch.float64)
    for row, length in enumerate(LENGTHS):
        mask[row, 2 : 2 + length] = 1
    ref = -torch.rand(4, 8, generator=draw, dtype=torch.float64)
    signals = {"mask": mask, "advantage": torch.tensor([[0.5], [-1.0], [2.0], [0.0]]).double(), "ref_logp": ref}
    return Batch(torch.zeros(4, 9, dtype=torch.int64), mask, torch.arange(4), signals)


def weigh(spec: Any, chunks: list[slice]) -> tuple[Tensor, int]:
    """`(n)`: coefficients asked for by these chunks, and how often a device would have been waited for."""
    logp = -torch.rand(10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weigher = Weigher(build_objective(spec), batch(), torch.tensor([[1.0], [2.0], [4.0], [8.0]]).double(), {})
    with Waits() as waits:
        parts = [weigher({"logp": logp[chunk]}, chunk) for chunk in chunks]
    return torch.cat(parts), waits.number


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_chunks_give_the_same_coefficients(spec: Any) -> None:
    assert torch.equal(weigh(spec, CHUNKS)[0], weigh(spec, WHOLE)[0])


def test_coefficients_are_weights_over_their_row_s_denominator() -> None:
    wanted = [math.exp(a) / z for a, z in zip((0.5, -1.0, 2.0, 0.0), (1, 2, 4, 8), strict=True)]
    by_token = [w for w, length in zip(wanted, LENGTHS, strict=True) for _ in range(length)]
    assert weigh("awr", CHUNKS)[0].tolist() == pytest.approx(by_token, rel=1e-12)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_more_chunks_wait_for_the_device_no_more_often(spec: Any) -> None:
    assert weigh(spec, CHUNKS)[1] == weigh(spec, WHOLE)[1] <= 1
