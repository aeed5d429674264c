"""Which kernel makes the softmax of a chunk of logits: our own on a GPU where it passes a trial, else torch's."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from rwft.softmax import Vocabulary

TRIAL_ROWS, TRIAL_SIZE = 3, 5003  # more columns than a block, and not a multiple of anything


class SoftmaxRows(Protocol):
    """`(k v), (k) -> (k)`: `logp` of the targets in float32; with `gradient`, minus its gradient in place of products.

    See `rwft.head_fused.softmax_rows_`.
    """

    def __call__(self, products: Tensor, targets: Tensor, vocabulary: Vocabulary, *, gradient: bool) -> Tensor: ...


def softmax_kernel(device: torch.device, exact: torch.dtype) -> SoftmaxRows | None:
    """The kernel for a device whose log-probabilities are kept in `exact`; None where torch's operators do it.

    On a GPU that cannot run it, or where it is wrong, that is said once as a warning.
    """
    return _tried(device) if device.type == "cuda" and exact == torch.float32 else None


@cache
def _tried(device: torch.device) -> SoftmaxRows | None:
    try:
        from rwft.head_fused import softmax_rows_

        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is at
            fault = _trial(softmax_rows_, device)
    except Exception as error:  # noqa: BLE001 - compilers and drivers fail in ways of their own; torch's operators remain
        fault = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    else:
        if fault is None:
            return softmax_rows_
    warnings.warn(f"head: no fused softmax on {device}, which is slower but as exact: {fault}", stacklevel=2)
    return None


def _trial(kernel: SoftmaxRows, device: torch.device) -> str | None:
    """What is wrong with a kernel on a device, by a small problem whose answer autograd knows; None if nothing is."""
    generator = torch.Generator().manual_seed(0)
    logits, bias = (4 * torch.randn(rows, TRIAL_SIZE, generator=generator) for rows in (TRIAL_ROWS, 1))
    targets = torch.randint(0, TRIAL_SIZE, (TRIAL_ROWS,), generator=generator)
    weight = torch.empty(TRIAL_SIZE, 1, device=device)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        products = logits.to(dtype)
        exact = products.double().requires_grad_()
        z = 5.0 * torch.tanh(0.5 * (exact + bias.double()) / 5.0)
        logp = z.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
        (slope,) = torch.autograd.grad(-logp.sum(), exact)
        found, here = products.to(device, copy=True), targets.to(device)
        vocabulary = Vocabulary(weight, bias[0].to(device), scale=0.5, softcap=5.0)
        read = kernel(found, here, vocabulary, gradient=False).cpu()
        if not torch.equal(found.cpu(), products):
            return f"it changes {dtype} products that it should only read"
        written = kernel(found, here, vocabulary, gradient=True).cpu()
        for name, value in (("read", read), ("written", written)):
            if not (gap := (value - logp.detach()).abs().max().item()) < 1e-4:
                return f"log-probabilities of {dtype} products that are {name} are {gap:.1e} off"
        if not (gap := ((found.cpu().double() * 0.5 - slope).norm() / slope.norm()).item()) < near:
            return f"gradients of {dtype} products are {gap:.1e} off"
    return None
