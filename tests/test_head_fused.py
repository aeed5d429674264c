"""The fused softmax: right on a GPU or in Triton's interpreter, compiled for GPUs that are not here, put to trial."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rwft import head, head_kernel
from rwft.errors import PolicyError
from rwft.head import Vocabulary, chunk_rows, distribution_signals, precision_of_sums, weighted_loss
from rwft.regularizers import build_regularizers

# The interpreter of older ones fails with newer NumPy; a GPU needs none.
pytest.importorskip("triton", minversion=None if torch.cuda.is_available() else "3.9", reason="no Triton >= 3.9")
from rwft.head_fused import softmax_rows_

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": -0.7},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "scale": 1.3, "softcap": 2.5},
}
CLOSE = {torch.float32: 3e-6, torch.bfloat16: 8e-3}  # the interpreter cuts where a GPU rounds: a unit in the last place


def vocabulary(v: int, *, bias: bool = False, scale: float = 1.0, softcap: float | None = None) -> Vocabulary:
    generator = torch.Generator().manual_seed(1)
    b = torch.randn(v, generator=generator).to(DEVICE) if bias else None
    return Vocabulary(torch.empty(v, 1, device=DEVICE), b, scale, softcap)


def autograd(products: Tensor, targets: Tensor, v: Vocabulary) -> tuple[Tensor, Tensor]:
    """Float64 `logp`, and minus its gradient by the products over the scale."""
    leaf = products.double().requires_grad_()
    z = v.scale * (leaf if v.bias is None else leaf + v.bias.double())
    z = z if v.softcap is None else v.softcap * torch.tanh(z / v.softcap)
    logp = torch.log_softmax(z, -1).gather(1, targets[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(-logp.sum(), leaf)
    return logp.detach(), gradient / v.scale


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("size", [1, 5, 4096, 4097, 9001])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_kernel_equals_autograd(dtype: torch.dtype, size: int, transform: str) -> None:
    generator = torch.Generator().manual_seed(0)
    products = (4 * torch.randn(3, size, generator=generator)).to(DEVICE, dtype)
    targets, v = torch.randint(0, size, (3,), generator=generator).to(DEVICE), vocabulary(size, **TRANSFORMS[transform])
    logp, gradient = autograd(products, targets, v)
    read, written = products.clone(), products.clone()
    assert (softmax_rows_(read, targets, v, gradient=False) - logp).abs().max() < 3e-6
    assert torch.equal(read, products)
    assert (softmax_rows_(written, targets, v, gradient=True) - logp).abs().max() < 3e-6
    assert (written.double() - gradient).norm() <= CLOSE[dtype] * gradient.norm()


def test_what_no_logit_rules_out_and_what_is_sure() -> None:
    """Tokens of probability 0 get no gradient; of a sure token 1 - p is left, which p - 1 in float32 would lose."""
    products = torch.full((2, 6000), -torch.inf, device=DEVICE)
    products[:, [7, 5000]] = torch.tensor([[1.0, 1.0], [20.0, 0.0]], device=DEVICE)
    found = softmax_rows_(products, torch.tensor([5000, 7], device=DEVICE), vocabulary(6000), gradient=True)
    assert found.tolist() == pytest.approx([-0.6931472, 0.0], abs=1e-7)
    assert products[0, [7, 5000]].tolist() == pytest.approx([0.5, -0.5], rel=1e-6)
    assert products[1, [7, 5000]].tolist() == pytest.approx([-2.0611536e-09, 2.0611536e-09], rel=1e-6)
    assert products.count_nonzero() == 4


def test_only_whole_rows_are_taken() -> None:
    with pytest.raises(PolicyError, match="expected whole rows"):
        softmax_rows_(torch.zeros(4, 3).T, torch.tensor([0, 1, 2]), vocabulary(4), gradient=True)
    none = torch.zeros(0, dtype=torch.int64)
    assert softmax_rows_(torch.zeros(0, 3), none, vocabulary(3), gradient=True).shape == (0,)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize("segments", [None, [4, 7], [11]], ids=["tokens", "sequences", "everything"])
@pytest.mark.parametrize("budget", [None, 1, 1000])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_the_head_with_the_kernel_equals_the_head_without(
    dtype: torch.dtype,
    transform: str,
    segments: list[int] | None,
    budget: int | None,
    frozen: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in ((11, 8), (37, 8), (37,)))
    y = torch.randint(0, 37, (11,), generator=generator).to(DEVICE)
    factors = torch.randn(11, generator=generator).to(DEVICE)
    settings = dict(TRANSFORMS[transform])
    biased = settings.pop("bias", False)

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_(not frozen)]
        own = Vocabulary(leaves[1], b if biased else None, **settings)
        weigh = lambda s, rows: factors[rows] * s["logp"].exp()
        result = weighted_loss(leaves[0], own, y, weigh, segments=segments, budget=budget)
        result.loss.backward()
        return [result.loss.detach(), result.logp, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    expected = run()
    calls: list[bool] = []

    def counted(*given: Any, gradient: bool) -> Tensor:
        calls.append(gradient)
        return softmax_rows_(*given, gradient=gradient)

    monkeypatch.setattr(head, "softmax_kernel", lambda *_: counted)
    found = run()
    assert any(calls)
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        assert (f.double() - e.double()).norm() <= 2 * CLOSE[dtype] * e.double().norm()


def test_what_the_kernel_does_not_measure_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("the kernel knows log-probabilities alone")

    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 8, generator=generator, requires_grad=True) for n in (5, 19))
    y, one = torch.randint(0, 19, (5,), generator=generator), lambda s, _: torch.ones_like(s["logp"])
    penalties = build_regularizers([{"name": "entropy", "coef": 1.0}])
    expected = weighted_loss(x, Vocabulary(w), y, one, signals=["entropy"]).signals["entropy"]
    monkeypatch.setattr(head, "softmax_kernel", lambda *_: never)
    assert torch.equal(weighted_loss(x, Vocabulary(w), y, one, signals=["entropy"]).signals["entropy"], expected)
    assert torch.equal(distribution_signals(x, Vocabulary(w), y, ["entropy"])["entropy"], expected)
    draws = head.Draws(torch.Generator().manual_seed(0), 4)
    weighted_loss(x, Vocabulary(w), y, one, sampled=draws).loss.backward()
    with pytest.raises(AssertionError, match="log-probabilities alone"):
        weighted_loss(x, Vocabulary(w), y, one)
    with pytest.raises(AssertionError, match="log-probabilities alone"):
        distribution_signals(x, Vocabulary(w), y, ["logp"])
    monkeypatch.setattr(head, "softmax_kernel", lambda *_: None)
    weighted_loss(x, Vocabulary(w), y, one, penalties=penalties, penalty_scale=torch.ones(5)).loss.backward()


def off(part: str, by: float) -> Callable[..., Tensor]:
    """The kernel with a fault."""

    def faulty(products: Tensor, *given: Any, gradient: bool) -> Tensor:
        logp = softmax_rows_(products, *given, gradient=gradient)
        if part == "products" and not gradient:
            products[0, 0] += by
        if part == "gradient" and gradient:
            products[0] *= 1 + by
        return logp + by if part == "logp" else logp

    return faulty


def test_a_trial_finds_faults() -> None:
    assert head_kernel._trial(softmax_rows_, DEVICE) is None
    found = {part: head_kernel._trial(off(part, 0.05), DEVICE) for part in ("products", "gradient", "logp")}
    assert "changes" in str(found["products"])
    assert "gradients" in str(found["gradient"])
    assert "log-probabilities" in str(found["logp"])
    assert "nan" in str(head_kernel._trial(off("logp", float("nan")), DEVICE))


def test_the_trial_is_held_wherever_the_head_is_called_first(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = head_kernel._trial
    monkeypatch.setattr(head_kernel, "_trial", lambda kernel, _: trial(kernel, DEVICE))
    for mode in (torch.no_grad, torch.inference_mode):
        head_kernel._tried.cache_clear()
        with mode():
            assert head_kernel.softmax_kernel(torch.device("cuda", 0), torch.float32) is softmax_rows_
    head_kernel._tried.cache_clear()


def test_a_kernel_that_fails_is_said_once_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no C compiler")

    monkeypatch.setitem(sys.modules, "rwft.head_fused", SimpleNamespace(softmax_rows_=fails))
    head_kernel._tried.cache_clear()
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(head_kernel, "_trial", lambda kernel, _: kernel())
    with pytest.warns(UserWarning, match=r"no fused softmax on cuda:0.*RuntimeError: no C compiler"):
        assert head_kernel.softmax_kernel(gpu, torch.float32) is None
    assert head_kernel.softmax_kernel(gpu, torch.float32) is None  # another warning would be an error here
    head_kernel._tried.cache_clear()
    monkeypatch.setattr(head_kernel, "_trial", lambda *_: None)
    assert head_kernel.softmax_kernel(gpu, torch.float32) is fails
    assert head_kernel.softmax_kernel(gpu, torch.float64) is None
    assert head_kernel.softmax_kernel(torch.device("cpu"), torch.float32) is None
    head_kernel._tried.cache_clear()


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from rwft import head_fused
names = ["products", "bias", "targets", "tops", "totals", "size", "scale", "cap"]
for product in ("*bf16", "*fp32"):
    for flags in ((0, 0, 0), (0, 0, 1), (1, 1, 1)):
        types = [product, "*fp32", "*i64", "*fp32", "*fp32", "i32", "fp32", "fp32"]
        known = dict(zip(("BIASED", "CAPPED", "GRADIENT"), map(bool, flags)), BLOCK=head_fused.BLOCK)
        signature = dict(zip(names, types)) | dict.fromkeys(known, "constexpr")
        whole = {(i,): [["tt.divisibility", 16]] for i in range(6)}
        source = ASTSource(fn=head_fused._softmax_rows, signature=signature, constexprs=known, attrs=whole)
        for capability in (80, 90):
            built = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": head_fused.WARPS})
            assert len(built.asm["cubin"]) > 1000
            wide = [line for line in built.asm["ptx"].splitlines() if "ld.global" in line and "v4" in line]
            assert wide, "loads of 16 bytes"
print("compiled")
"""


@pytest.mark.slow
def test_it_compiles_for_gpus() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]


def test_room_on_a_gpu_decides_chunks_and_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: beside both gradients 1 GiB; float32 sums of bfloat16 take 2 bytes more of each weight, then chunks."""

    def chosen(h: int, dtype: torch.dtype, trained: bool = True) -> tuple[int, torch.dtype]:
        x, w = (torch.empty(1, 1, dtype=dtype).expand(n, h) for n in (16384, 151936))
        own = Vocabulary(w.detach().requires_grad_(trained))
        return chunk_rows(x, own, None, None), precision_of_sums(x, own)

    monkeypatch.setattr(head, "gpu_room", lambda _: 1 << 30)
    row = 151936 * 2
    assert chosen(896, torch.bfloat16) == (((1 << 30) - row * 896) // row // 64 * 64, torch.float32)
    assert chosen(1536, torch.bfloat16) == (((1 << 30) - row * 1536) // row // 64 * 64, torch.float32)
    assert chosen(4096, torch.bfloat16) == ((1 << 30) // row // 64 * 64, torch.bfloat16)
    assert chosen(4096, torch.float32) == ((1 << 30) // (2 * row) // 64 * 64, torch.float32)
    monkeypatch.setattr(head, "gpu_room", lambda _: None)
    assert chosen(4096, torch.bfloat16)[1] == torch.float32


def test_sums_in_bfloat16_round_once_for_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six chunks, each of which rounds the sum: relative errors of at most 2^-9 each."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 16, generator=generator).bfloat16().requires_grad_() for n in (384, 50))
    y, one = torch.randint(0, 50, (384,), generator=generator), lambda s, _: torch.ones_like(s["logp"])
    row = 50 * 2
    exact = weighted_loss(x, Vocabulary(w), y, one, budget=64 * row)
    (expected,) = torch.autograd.grad(exact.loss, [w])
    monkeypatch.setattr(head, "gpu_room", lambda _: 64 * row)
    assert precision_of_sums(x, Vocabulary(w)) == torch.float32
    monkeypatch.setattr(head, "gpu_room", lambda _: w.numel() * 4 - 1)
    assert precision_of_sums(x, Vocabulary(w)) == torch.bfloat16
    assert chunk_rows(x, Vocabulary(w), None, None) < 64
    (found,) = torch.autograd.grad(weighted_loss(x, Vocabulary(w), y, one).loss, [w])
    assert found.dtype == torch.bfloat16
    gap = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
    assert 0 < gap < 13 * 2**-9
