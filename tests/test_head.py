"""The loss head against plain autograd through full logits, hand-worked numbers, and counts of its products."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rwft.errors import ObjectiveError, PolicyError, RwftError
from rwft.head import Draws, Vocabulary, chunk_rows, cut, distribution_signals, token_logprobs, weighted_loss
from rwft.regularizers import build_regularizers

N, H, V = 23, 16, 37
TRANSFORMS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "scale": 1.3, "softcap": 2.5},
}
BUDGETS = (None, 1, 8, 100, 1000, 3000, 7000)
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-6}


@dataclass
class Problem:
    """Leaves of the head, and what they are transformed by."""

    x: Tensor
    w: Tensor
    b: Tensor | None
    y: Tensor
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.w, self.b, self.scale, self.softcap)

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in (self.x, self.w, self.b) if leaf is not None and leaf.requires_grad]

    def exact(self) -> Problem:
        """The same numbers as float64 leaves."""
        x, w, b = (
            None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in (self.x, self.w, self.b)
        )
        assert x is not None
        assert w is not None
        return Problem(x, w, b, self.y, self.scale, self.softcap)

    def logits(self) -> Tensor:
        """Full logits, by autograd."""
        z = torch.einsum("...h,vh->...v", self.x, self.w)
        z = self.scale * (z if self.b is None else z + self.b)
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def logp(self) -> Tensor:
        return torch.log_softmax(self.logits(), -1).gather(-1, self.y[..., None])[..., 0]


def problem(
    dtype: torch.dtype = torch.float64,
    *,
    n: Any = N,
    v: int = V,
    bias: bool = False,
    frozen: bool = False,
    seed: int = 0,
    **options: Any,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    shape = n if isinstance(n, tuple) else (n,)
    x, w, b = (torch.randn(*s, generator=generator).to(dtype) for s in ((*shape, H), (v, H), (v,)))
    y = torch.randint(0, v, shape, generator=generator)
    trained = not frozen
    return Problem(
        x.requires_grad_(), w.requires_grad_(trained), b.requires_grad_(trained) if bias else None, y, **options
    )


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape
        assert relative(f, e) < tolerance


# ---------------------------------------------------------------- token_logprobs


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_logprobs_and_their_gradients_equal_autograds(dtype: torch.dtype, budget: int | None, transform: str) -> None:
    p = problem(dtype, n=(4, 6), **TRANSFORMS[transform])
    upstream = torch.randn(4, 6, dtype=dtype, generator=torch.Generator().manual_seed(1))
    found = token_logprobs(p.x, p.w, p.y, bias=p.b, scale=p.scale, softcap=p.softcap, budget=budget)
    gradients = torch.autograd.grad((found * upstream).sum(), p.leaves)
    exact = p.exact()
    expected = exact.logp()
    assert found.dtype == dtype
    assert_close(
        [found, *gradients], [expected, *torch.autograd.grad((expected * upstream).sum(), exact.leaves)], CLOSE[dtype]
    )


@pytest.mark.parametrize("shape", [(1,), (5,), (1, 1), (3, 1), (2, 2, 2), (0,), (2, 0)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    p = problem(n=shape)
    found = token_logprobs(p.x, p.w, p.y)
    assert found.shape == shape
    found.square().sum().backward()
    exact = p.exact()
    exact.logp().square().sum().backward()
    torch.testing.assert_close(p.x.grad, exact.x.grad, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(p.w.grad, exact.w.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("trained", ["x", "w", "b"])
def test_only_the_wanted_gradient(trained: str) -> None:
    p = problem(bias=True)
    for name in "xwb":
        getattr(p, name).requires_grad_(name == trained)
    token_logprobs(p.x, p.w, p.y, bias=p.b).exp().sum().backward()
    exact = p.exact()
    exact.logp().exp().sum().backward()
    for name in "xwb":
        if name == trained:
            assert relative(getattr(p, name).grad, getattr(exact, name).grad) < 1e-12
        else:
            assert getattr(p, name).grad is None


def _tied(p: Problem, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Gradient of a weight that is embedding and projection at once."""
    (gradient,) = torch.autograd.grad(loss(torch.tanh(p.w[p.y.roll(1)] + p.x.detach())), [p.w])
    return gradient


def test_a_tied_weight_gets_both_gradients() -> None:
    p, exact = problem(), problem().exact()

    def expected(hidden: Tensor) -> Tensor:
        return Problem(hidden, exact.w, None, exact.y).logp().sum()

    reference = _tied(exact, expected)
    assert relative(_tied(p, lambda hidden: token_logprobs(hidden, p.w, p.y).sum()), reference) < 1e-12
    ones = torch.ones(N, dtype=torch.float64)
    found = _tied(p, lambda hidden: -weighted_loss(hidden, p.vocabulary, p.y, lambda _, rows: ones[rows]).loss)
    assert relative(found, reference) < 1e-12


def test_non_contiguous_inputs() -> None:
    p = problem()
    x, w = p.x.detach().T.contiguous().T.requires_grad_(), p.w.detach().T.contiguous().T.requires_grad_()
    found = torch.autograd.grad(token_logprobs(x, w, p.y, budget=1000).sum(), [x, w])
    assert_close(found, torch.autograd.grad(p.logp().sum(), p.leaves), 1e-12)


# ---------------------------------------------------------------- weighted_loss

SEGMENTS: dict[str, list[int] | None] = {
    "tokens": None,
    "sequences": [3, 4, 0, 9, 7],
    "one each": [1] * N,
    "everything": [N],
}


class Weigh:
    """Coefficients that mix all signals of a segment; keeps what it was called with."""

    def __init__(self, segments: Sequence[int] | None, dtype: torch.dtype) -> None:
        lengths = [1] * N if segments is None else [length for length in segments if length]
        ends = list(itertools.accumulate(lengths))
        self.spans = [(end - length, end) for length, end in zip(lengths, ends, strict=True)]
        self.factors = torch.randn(N, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
        self.calls: list[slice] = []

    def of(self, logp: Tensor) -> Tensor:
        """`(n) -> (n)`: a random sign and size per token, times the geometric mean of its segment's probabilities."""
        return torch.cat([self.factors[i:j] * logp[i:j].mean().exp() for i, j in self.spans])

    def __call__(self, signals: dict[str, Tensor], rows: slice) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not signals["logp"].requires_grad
        assert signals["logp"].shape == (rows.stop - rows.start,)
        self.calls.append(rows)
        whole = torch.zeros(N, dtype=signals["logp"].dtype)
        whole[rows] = signals["logp"]
        return self.of(whole)[rows]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("transform", ["plain", "all"])
def test_weighted_loss_equals_autograd(
    dtype: torch.dtype, frozen: bool, segments: str, budget: int | None, transform: str
) -> None:
    p = problem(dtype, frozen=frozen, **TRANSFORMS[transform])
    weigh = Weigh(SEGMENTS[segments], dtype)
    result = weighted_loss(p.x, p.vocabulary, p.y, weigh, segments=SEGMENTS[segments], budget=budget)
    exact = p.exact()
    logp = exact.logp()
    c = weigh.of(logp.detach())
    loss = -(c * logp).sum()
    assert_close([result.logp, result.coefficients], [logp, c], CLOSE[dtype])
    assert result.loss.dtype == dtype
    assert abs(result.loss.item() - loss.item()) < CLOSE[dtype] * (c * logp).abs().sum().item()
    found = torch.autograd.grad(-1.5 * result.loss, p.leaves)
    assert_close(found, torch.autograd.grad(-1.5 * loss, exact.leaves), CLOSE[dtype])
    assert [rows.start for rows in weigh.calls] == [0, *(rows.stop for rows in weigh.calls[:-1])]
    assert weigh.calls[-1].stop == N
    assert {rows.start for rows in weigh.calls} <= {start for start, _ in weigh.spans}


def test_hand_worked_numbers() -> None:
    """Logits 0 and ln 3, so probabilities 1/4 and 3/4; the data hold token 0, the coefficient is p = 1/4."""
    x = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([[0.0], [math.log(3.0)]], dtype=torch.float64, requires_grad=True)
    names = ("entropy", "topk_entropy", "concentration", "top1")
    result = weighted_loss(x, Vocabulary(w), torch.tensor([0]), lambda s, _: s["logp"].exp(), signals=names)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(0.25 * math.log(4.0), rel=1e-14)
    assert result.coefficients.item() == pytest.approx(0.25, rel=1e-14)
    found = {name: value.item() for name, value in result.signals.items()}
    entropy = 0.25 * math.log(4.0) + 0.75 * math.log(4.0 / 3.0)
    expected = {
        "logp": -math.log(4.0),
        "entropy": entropy,
        "topk_entropy": entropy,
        "concentration": 0.625,
        "top1": 0.0,
    }
    assert found == pytest.approx(expected, rel=1e-14)
    # d loss / d logits = 1/4 (p - onehot) = (-3/16, 3/16)
    assert w.grad is not None
    assert w.grad[:, 0].tolist() == pytest.approx([-3 / 16, 3 / 16], rel=1e-14)
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(3 / 16 * math.log(3.0), rel=1e-14)


@pytest.mark.parametrize("frozen", [False, True])
def test_no_position_at_all(frozen: bool) -> None:
    p = problem(n=0, bias=True, frozen=frozen)
    result = weighted_loss(p.x, p.vocabulary, p.y, lambda s, _: s["logp"], signals=["entropy"])
    assert result.loss.item() == 0.0
    assert result.signals.keys() == {"logp", "entropy"}
    assert result.logp.shape == result.coefficients.shape == result.signals["entropy"].shape == (0,)
    result.loss.backward()
    for leaf in p.leaves:
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()
    assert distribution_signals(p.x, p.vocabulary, p.y, ["top1"])["top1"].shape == (0,)


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """What `torch.empty` gives holds nan instead of whatever was there."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize("n", [0, N])
@pytest.mark.parametrize("sampled", [False, True], ids=["exact", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("segments", [None, "whole"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_no_gradient_begins_with_what_memory_held(
    n: int, sampled: bool, dtype: torch.dtype, segments: str | None, budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rwft.head_gradients.TILE", 5)
    p = problem(dtype, n=n, bias=True)
    draws = Draws(torch.Generator().manual_seed(0), 10) if sampled else None
    lengths = None if segments is None else [n]
    options = {"segments": lengths, "budget": budget, "sampled": draws}
    weighted_loss(p.x, p.vocabulary, p.y, lambda s, _: s["logp"].exp(), **options).loss.backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in p.leaves)
    token_logprobs(p.x, p.w, p.y, bias=p.b, budget=budget).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in p.leaves)


@pytest.mark.parametrize("trained", ["x", "w", "b"])
@pytest.mark.parametrize("segments", [None, [N]])
def test_weighted_loss_makes_only_the_wanted_gradient(trained: str, segments: list[int] | None) -> None:
    p = problem(bias=True)
    for name in "xwb":
        getattr(p, name).requires_grad_(name == trained)
    weighted_loss(p.x, p.vocabulary, p.y, lambda s, _: s["logp"].exp(), segments=segments, budget=1000).loss.backward()
    exact = p.exact()
    logp = exact.logp()
    (-logp.detach().exp() * logp).sum().backward()
    assert relative(getattr(p, trained).grad, getattr(exact, trained).grad) < 1e-12
    assert all(getattr(p, name).grad is None for name in "xwb" if name != trained)


def test_without_gradients_the_loss_is_the_same() -> None:
    p = problem(bias=True)
    with torch.no_grad(), Products() as products:
        result = weighted_loss(p.x, p.vocabulary, p.y, lambda s, _: s["logp"].exp(), segments=[N], budget=1000)
    logp = p.exact().logp().detach()
    assert result.loss.item() == pytest.approx(-(logp.exp() * logp).sum().item(), rel=1e-12)
    assert not result.loss.requires_grad
    assert products.flops == 2 * N * H * V


def test_coefficients_carry_no_gradient() -> None:
    p, learned = problem(), torch.ones(N, dtype=torch.float64, requires_grad=True)
    result = weighted_loss(p.x, p.vocabulary, p.y, lambda _, rows: learned[rows])
    assert not weighted_loss(p.x, p.vocabulary, p.y, lambda *_: learned).coefficients.requires_grad
    result.loss.backward()
    assert learned.grad is None


def test_a_second_backward_is_refused() -> None:
    p = problem()
    result = weighted_loss(p.x, p.vocabulary, p.y, lambda s, _: s["logp"])
    result.loss.backward(retain_graph=True)
    with pytest.raises(RwftError, match="backward ran twice"):
        result.loss.backward()


def test_segments_may_be_a_tensor() -> None:
    p, weigh = problem(), Weigh(SEGMENTS["sequences"], torch.float64)
    weighted_loss(p.x, p.vocabulary, p.y, weigh, segments=torch.tensor([3, 4, 0, 9, 7]), budget=9 * V * 8)
    assert weigh.calls == [slice(0, 7), slice(7, 16), slice(16, 23)]


# ---------------------------------------------------------------- numbers at the edge


@pytest.mark.parametrize("segments", [None, [2]])
def test_log_probabilities_far_below_underflow(segments: list[int] | None) -> None:
    """A target 10,000 nats down: its probability is 0 in float32, its log-probability and gradient are not lost."""
    x = torch.eye(2).requires_grad_()
    w = torch.tensor([[0.0, 50.0], [1e4, 60.0], [-3.0, 170.0]]).requires_grad_()
    y = torch.tensor([0, 1])
    expected = torch.tensor([-1e4, -110.0])
    for budget in (None, 1, 16):
        torch.testing.assert_close(token_logprobs(x, w, y, budget=budget), expected, rtol=1e-6, atol=0)
        result = weighted_loss(
            x, Vocabulary(w), y, lambda s, _: torch.ones(len(s["logp"])), segments=segments, budget=budget
        )
        torch.testing.assert_close(result.logp, expected, rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(result.loss, [w])
        torch.testing.assert_close(gradient, torch.tensor([[-1.0, 0.0], [1.0, -1.0], [0.0, 1.0]]))


@pytest.mark.parametrize("budget", [None, 64, 8 * 24 * 3])
def test_tokens_that_a_bias_rules_out(budget: int | None) -> None:
    """A padded vocabulary: a bias of -inf at its start and its end, over whole tiles. Nothing is lost, nothing nan."""
    p = problem(v=200, bias=True)
    assert p.b is not None
    with torch.no_grad():
        p.b[:120] = p.b[180:] = -math.inf
    p.y.remainder_(60).add_(120)
    found = token_logprobs(p.x, p.w, p.y, bias=p.b, budget=budget)
    left = [leaf.detach()[120:180].requires_grad_() for leaf in (p.w, p.b)]
    alone = Problem(p.x, *left, p.y - 120)
    assert_close([found], [alone.logp()], 1e-14)
    x, w, b = torch.autograd.grad(found.square().sum(), p.leaves)
    by_x, by_w, by_b = torch.autograd.grad(alone.logp().square().sum(), alone.leaves)
    assert_close([x, w[120:180], b[120:180]], [by_x, by_w, by_b], 1e-12)
    assert not w[:120].any()
    assert not w[180:].any()


def test_a_sure_token_keeps_its_small_gradient_in_bfloat16() -> None:
    """p = 1 - 1/1097.6: rounding p before one is subtracted would leave the gradient to chance."""
    x = torch.ones(1, 1, dtype=torch.bfloat16).requires_grad_()
    w = torch.tensor([[7.0], [0.0]], dtype=torch.bfloat16).requires_grad_()
    token_logprobs(x, w, torch.tensor([0])).sum().backward()
    small = 1 / (1 + math.exp(7.0))
    assert w.grad is not None
    torch.testing.assert_close(w.grad.float(), torch.tensor([[small], [-small]]), rtol=2**-8, atol=0)


def test_large_logits_keep_their_small_differences() -> None:
    """Logits of about 1000 that differ by 0.25: log-probabilities to float32's precision, not to that of 1000."""
    x = torch.ones(1, 1)
    w = torch.tensor([[1000.0], [1000.25], [999.5]])
    expected = 0.25 - math.log(math.exp(0.0) + math.exp(0.25) + math.exp(-0.5))
    for budget in (None, 1):
        logp = token_logprobs(x.requires_grad_(), w, torch.tensor([1]), budget=budget)
        assert logp.item() == pytest.approx(expected, rel=1e-6)
        (gradient,) = torch.autograd.grad(logp, [x])
        p = [math.exp(z + expected - 0.25) for z in (0.0, 0.25, -0.5)]
        assert gradient.item() == pytest.approx(1000.25 - p[0] * 1000 - p[1] * 1000.25 - p[2] * 999.5, abs=2e-4)
        found = distribution_signals(x, Vocabulary(w), torch.tensor([1]), ["logp"], budget=budget)["logp"]
        assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("budget", [None, 100])
def test_bfloat16_is_as_exact_as_its_products(budget: int | None) -> None:
    p = problem(torch.bfloat16, bias=True)
    ones = torch.ones(N)
    exact = p.exact()
    logp = exact.logp()
    expected = torch.autograd.grad(-logp.sum(), exact.leaves)
    result = weighted_loss(p.x, p.vocabulary, p.y, lambda s, rows: ones[rows], budget=budget)
    assert result.logp.dtype == result.loss.dtype == torch.float32
    found = torch.autograd.grad(result.loss, p.leaves)
    assert [g.dtype for g in found] == [torch.bfloat16] * 3
    assert_close(found, expected, 1e-2)
    tiled = token_logprobs(p.x, p.w, p.y, bias=p.b, budget=budget)
    assert tiled.dtype == torch.float32
    assert (tiled - logp).abs().max() < 0.05  # half a unit in the last place of a logit of 16
    assert_close(torch.autograd.grad(-tiled.sum(), p.leaves), expected, 1e-2)


def test_bfloat16_sums_the_gradient_of_the_weight_in_float32() -> None:
    """4096 equal terms, one by one: a bfloat16 sum would stop growing at 256 of them."""
    x = torch.ones(4096, 1, dtype=torch.bfloat16)
    w = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    y, ones = torch.zeros(4096, dtype=torch.int64), torch.ones(4096)
    result = weighted_loss(x, Vocabulary(w), y, lambda _, rows: ones[rows], budget=4)
    assert torch.autograd.grad(result.loss, [w])[0][:, 0].tolist() == [-2048.0, 2048.0]
    tiled = token_logprobs(x, w, y, budget=4)
    assert torch.autograd.grad(-tiled.sum(), [w])[0][:, 0].tolist() == [-2048.0, 2048.0]


def test_bfloat16_hands_over_every_tile_of_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwft.head_gradients.TILE", 5)
    p = problem(torch.bfloat16)
    exact = p.exact()
    expected = torch.autograd.grad(-2 * exact.logp().sum(), exact.leaves)
    for budget in (None, 100):
        loss = weighted_loss(p.x, p.vocabulary, p.y, lambda s, _: torch.ones_like(s["logp"]), budget=budget).loss
        assert_close(torch.autograd.grad(2 * loss, p.leaves), expected, 1e-2)


def test_trained_float32_weights_multiply_in_the_precision_of_the_hidden_states() -> None:
    p = problem(torch.float32)
    x = p.x.detach().bfloat16().requires_grad_()
    as_cast = Problem(x.detach().requires_grad_(), p.w.detach().bfloat16().requires_grad_(), None, p.y)
    found = torch.autograd.grad(token_logprobs(x, p.w, p.y).sum(), [x, p.w])
    expected = torch.autograd.grad(token_logprobs(as_cast.x, as_cast.w, p.y).sum(), as_cast.leaves)
    assert [g.dtype for g in found] == [torch.bfloat16, torch.float32]
    assert_close(found, expected, 4e-3)
    loss = weighted_loss(x, p.vocabulary, p.y, lambda s, _: torch.ones_like(s["logp"])).loss
    assert_close(torch.autograd.grad(-loss, [x, p.w]), expected, 1e-2)


def test_autocast_chooses_the_precision_of_products() -> None:
    p = problem(torch.float32)
    low = Problem(p.x.detach().bfloat16(), p.w.detach().bfloat16(), None, p.y)
    expected = token_logprobs(low.x, low.w, p.y)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_logprobs(p.x, p.w, p.y)
        result = weighted_loss(p.x, p.vocabulary, p.y, lambda s, _: s["logp"])
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=0)
    torch.testing.assert_close(result.logp, expected, rtol=1e-5, atol=1e-6)
    assert [g.dtype for g in torch.autograd.grad(found.sum() + result.loss, p.leaves)] == [torch.float32] * 2


# ---------------------------------------------------------------- distribution_signals


@pytest.mark.parametrize("v", [7, 20, 50])
@pytest.mark.parametrize("budget", [None, 1, 2000])
@pytest.mark.parametrize("dtype", CLOSE)
def test_signals_of_the_distribution(v: int, budget: int | None, dtype: torch.dtype) -> None:
    p = problem(dtype, v=v, softcap=4.0)
    names = ("logp", "entropy", "topk_entropy", "concentration", "top1")
    found = distribution_signals(p.x, p.vocabulary, p.y, names, budget=budget)
    logits = p.exact().logits().detach()
    prob = logits.exp() / logits.exp().sum(-1, keepdim=True)
    top = prob.sort(descending=True).values[:, :20]
    top = top / top.sum(-1, keepdim=True)
    expected = {
        "logp": prob[torch.arange(N), p.y].log(),
        "entropy": -(prob * prob.log()).sum(-1),
        "topk_entropy": -(top * top.log()).sum(-1),
        "concentration": prob.square().sum(-1),
        "top1": (logits.argmax(-1) == p.y).double(),
    }
    assert list(found) == list(names)
    for name in names:
        assert found[name].dtype == dtype
        assert not found[name].requires_grad
        torch.testing.assert_close(found[name].double(), expected[name], rtol=CLOSE[dtype], atol=CLOSE[dtype])


def test_the_likeliest_target_is_top1_and_nothing_else_is() -> None:
    p = problem()
    best = p.exact().logits().argmax(-1)
    for targets, expected in ((best, 1.0), ((best + 1) % V, 0.0)):
        assert (distribution_signals(p.x, p.vocabulary, targets, ["top1"])["top1"] == expected).all()


def test_weigh_gets_the_signals_asked_for_and_the_result_keeps_them() -> None:
    p = problem()
    seen: list[set[str]] = []

    def weigh(signals: dict[str, Tensor], rows: slice) -> Tensor:
        seen.append(set(signals))
        return signals["entropy"]

    for segments in (None, [N]):
        result = weighted_loss(p.x, p.vocabulary, p.y, weigh, signals=("entropy",), segments=segments, budget=3000)
        expected = distribution_signals(p.x, p.vocabulary, p.y, ["entropy"])["entropy"]
        torch.testing.assert_close(result.signals["entropy"], expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(result.coefficients, expected, rtol=1e-12, atol=0)
    assert all(names == {"logp", "entropy"} for names in seen)


# ---------------------------------------------------------------- penalties

COEFS = {"forward_kl": 0.3, "reverse_kl": 0.7, "entropy": 0.2, "gem": 1.1, "label_smoothing": 0.4}


def penalties_by_hand(logits: Tensor, reference: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Each penalty from its definition, on full logits."""
    prob, ref = logits.softmax(-1), reference.softmax(-1)
    q = (logits / 0.7).softmax(-1).detach()
    nll = -prob.log()
    return {
        "forward_kl": (ref * (ref / prob).log()).sum(-1),
        "reverse_kl": (prob * (prob / ref).log()).sum(-1),
        "entropy": -(prob * nll).sum(-1),
        "gem": -(q * nll).sum(-1),
        "label_smoothing": nll.mean(-1) - nll.gather(-1, y[:, None])[:, 0],
    }


@pytest.mark.parametrize("names", [*([name] for name in COEFS), list(COEFS)], ids="+".join)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("segments", ["tokens", "sequences", "everything"])
@pytest.mark.parametrize("budget", [None, 1, 3000, 12000])
def test_penalties_equal_autograd(names: list[str], frozen: bool, segments: str, budget: int | None) -> None:
    p = problem(frozen=frozen, **TRANSFORMS["all"])
    other = Problem(torch.randn(N, 5).double(), torch.randn(V, 5).double(), torch.randn(V).double(), p.y, 0.9, 4.0)
    scale, weigh = torch.rand(N, dtype=torch.float64), Weigh(SEGMENTS[segments], torch.float64)
    result = weighted_loss(
        p.x,
        p.vocabulary,
        p.y,
        weigh,
        segments=SEGMENTS[segments],
        penalties=build_regularizers([{"name": name, "coef": COEFS[name]} for name in names]),
        penalty_scale=scale,
        reference=(other.x, other.vocabulary) if {"forward_kl", "reverse_kl"} & set(names) else None,
        budget=budget,
    )
    exact = p.exact()
    logp, values = exact.logp(), penalties_by_hand(exact.logits(), other.logits(), p.y)
    loss = -(weigh.of(logp.detach()) * logp).sum() + sum((COEFS[name] * scale * values[name]).sum() for name in names)
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-11)
    assert_close(torch.autograd.grad(result.loss, p.leaves), torch.autograd.grad(loss, exact.leaves), 1e-12)
    means = {name: values[name].mean().item() for name in names}
    assert {name: value.item() for name, value in result.penalties.items()} == pytest.approx(means, rel=1e-12)
    assert not any(value.requires_grad for value in result.penalties.values())


def test_penalties_without_gradients_and_without_positions() -> None:
    p, penalties = problem(), build_regularizers([{"name": "entropy", "coef": 2.0}])
    with torch.no_grad():
        result = weighted_loss(
            p.x, p.vocabulary, p.y, lambda s, _: 0 * s["logp"], penalties=penalties, penalty_scale=torch.ones(N)
        )
    prob = p.exact().logits().softmax(-1).detach()
    assert result.loss.item() == pytest.approx(2 * (prob * prob.log()).sum().item(), rel=1e-12)
    none = problem(n=0)
    result = weighted_loss(
        none.x, none.vocabulary, none.y, lambda s, _: s["logp"], penalties=penalties, penalty_scale=torch.ones(0)
    )
    assert (result.loss.item(), result.penalties["entropy"].item()) == (0.0, 0.0)
    result.loss.backward()


def test_penalties_in_bfloat16() -> None:
    p, exact = problem(torch.bfloat16), problem(torch.bfloat16).exact()
    penalties = build_regularizers([{"name": "entropy", "coef": 1.0}])
    result = weighted_loss(
        p.x,
        p.vocabulary,
        p.y,
        lambda s, _: torch.ones_like(s["logp"]),
        penalties=penalties,
        penalty_scale=torch.ones(N),
    )
    prob = exact.logits().softmax(-1)
    expected = torch.autograd.grad(-exact.logp().sum() + (prob * prob.log()).sum(), exact.leaves)
    assert_close(torch.autograd.grad(result.loss, p.leaves), expected, 1e-2)


# ---------------------------------------------------------------- workspace and work


class Products(TorchDispatchMode):
    """Counts what matrix products cost and how large the largest new tensor is."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        if name == "_linear_pointwise":
            self.flops += 2 * args[0].numel() * args[1].shape[0]
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


WORK = {
    "token-local": (None, False, 3),
    "sequences in chunks": ([3, 4, 0, 9, 7], False, 3),
    "longer than a chunk": ([N], False, 4),
    "frozen, token-local": (None, True, 2),
    "frozen, longer than a chunk": ([N], True, 2),
}


@pytest.mark.parametrize("case", WORK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_many_products_it_takes_and_how_large_the_largest_tensor_is(case: str, dtype: torch.dtype) -> None:
    """Each product is 2 N H V operations; nothing of N x V is ever made."""
    segments, frozen, expected = WORK[case]
    p, v = problem(dtype, frozen=frozen, v=64), 64
    budget = 9 * v * dtype.itemsize
    weigh = Weigh(segments, torch.float32)
    with Products() as products:
        weighted_loss(p.x, p.vocabulary, p.y, weigh, segments=segments, budget=budget).loss.backward()
    assert products.flops == expected * 2 * N * H * v
    assert products.largest <= max(9 * v, v * H)
    assert products.largest < N * v


def test_penalties_reuse_the_chunk_at_hand() -> None:
    p = problem()
    penalties = build_regularizers([{"name": "entropy", "coef": 1.0}])
    with Products() as products:
        weighted_loss(
            p.x,
            p.vocabulary,
            p.y,
            lambda s, _: s["logp"],
            penalties=penalties,
            penalty_scale=torch.ones(N),
            budget=2000,
        ).loss.backward()
    assert products.flops == 3 * 2 * N * H * V


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_passes_take_four_products_and_one_tile(dtype: torch.dtype) -> None:
    p = problem(dtype, v=64)
    with Products() as products:
        token_logprobs(p.x, p.w, p.y, budget=8 * 64 * dtype.itemsize).sum().backward()
    assert products.flops == 4 * 2 * N * H * 64
    assert products.largest <= 64 * H


def test_rows_of_a_chunk_follow_the_budget() -> None:
    def rows(
        n: int, h: int, v: int, dtype: torch.dtype, budget: int | None = None, *, weight: torch.dtype | None = None
    ) -> int:
        x, w = torch.empty(1, 1, dtype=dtype).expand(n, h), torch.empty(1, 1, dtype=weight or dtype).expand(v, h)
        return chunk_rows(x, Vocabulary(w.detach().requires_grad_(trained)), None, budget)

    trained = True
    mib = 1 << 20
    assert rows(10, 8, 100, torch.float32, 4000) == 10
    assert rows(10, 8, 100, torch.float64, 4000) == 5
    assert rows(10, 8, 100, torch.float32, 1) == 1
    assert rows(100, 8, 100, torch.float32, 4000 * 9) == 64  # 90 would fit
    assert rows(9999, 8, 32768, torch.float32) == 80 * mib // (4 * 32768)  # the least
    assert rows(2048, 896, 151936, torch.float32) == 192  # a quarter of the gradients holds 226
    assert rows(2048, 896, 151936, torch.bfloat16) == 448  # a quarter of float32 sums holds 454
    assert rows(9999, 4096, 262144, torch.float32) == 256 * mib // (4 * 262144)  # the most
    assert rows(896, 896, 151936, torch.bfloat16) == 896  # one chunk is no larger than the float32 sum it spares
    assert rows(897, 896, 151936, torch.bfloat16) == 448
    assert rows(896, 896, 151936, torch.bfloat16, weight=torch.float32) == 448  # summed in float32 as it is
    trained = False
    assert rows(896, 896, 151936, torch.bfloat16) == 448


@pytest.mark.parametrize(
    ("n", "most", "expected"),
    [(512, 128, [128] * 4), (2048, 192, [192] * 10 + [128]), (200, 192, [128, 72]), (200, 150, [100, 100])],
)
def test_long_chunks_are_multiples_of_64(n: int, most: int, expected: list[int]) -> None:
    assert [rows.stop - rows.start for rows in cut(None, n, most)] == expected


CUTS = [
    (None, 10, 4, [(0, 3), (3, 6), (6, 10)]),
    (None, 0, 4, []),
    ([], 0, 4, []),
    ([0, 0], 0, 4, []),
    ([2, 2, 2, 2], 8, 4, [(0, 4), (4, 8)]),
    ([2, 2, 2, 2, 2], 10, 8, [(0, 6), (6, 10)]),  # equal rather than 8 and 2
    ([5, 1, 1], 7, 4, [(0, 5), (5, 7)]),
    ([1, 5, 1], 7, 4, [(0, 1), (1, 6), (6, 7)]),
    ([0, 3, 0, 3, 0], 6, 3, [(0, 3), (3, 6)]),
]


@pytest.mark.parametrize(("segments", "n", "most", "expected"), CUTS)
def test_groups_hold_whole_segments(
    segments: list[int] | None, n: int, most: int, expected: list[tuple[int, int]]
) -> None:
    assert [(rows.start, rows.stop) for rows in cut(segments, n, most)] == expected


# ---------------------------------------------------------------- mistakes


def call(p: Problem, **options: Any) -> Any:
    return weighted_loss(p.x, p.vocabulary, p.y, options.pop("weigh", lambda s, _: s["logp"]), **options)


def kl(**options: Any) -> dict[str, Any]:
    return {
        "penalties": build_regularizers([{"name": "forward_kl", "coef": 1.0}]),
        "penalty_scale": torch.ones(N),
        **options,
    }


MISTAKES: dict[str, tuple[Callable[[Problem], Any], type[Exception], str]] = {
    "ignored target": (
        lambda p: token_logprobs(p.x, p.w, p.y.index_fill(0, torch.tensor([3]), -100)),
        PolicyError,
        r"found targets -100 to \d+; expected 0 to 36 \(leave untrained positions out\)",
    ),
    "target beyond": (lambda p: token_logprobs(p.x, p.w, p.y + V), PolicyError, "expected 0 to 36"),
    "hidden size": (
        lambda p: token_logprobs(p.x[:, 1:], p.w, p.y),
        PolicyError,
        r"hidden \(23, 15\), weight \(37, 16\)",
    ),
    "targets' shape": (lambda p: token_logprobs(p.x, p.w, p.y[1:]), PolicyError, r"targets \(22,\), hidden \(23, 16\)"),
    "bias' shape": (
        lambda p: token_logprobs(p.x, p.w, p.y, bias=p.w[0]),
        PolicyError,
        r"bias \(16,\), weight \(37, 16\)",
    ),
    "float16": (lambda p: token_logprobs(p.x.half(), p.w.half(), p.y), PolicyError, "found products in torch.float16"),
    "segments": (lambda p: call(p, segments=[3, 4]), PolicyError, "segments sum to 7; .* sum to 23"),
    "negative segment": (lambda p: call(p, segments=[24, -1]), PolicyError, "lengths >= 0"),
    "signal": (lambda p: call(p, signals=["entropi"]), ObjectiveError, "'entropi' is unknown; did you mean 'entropy'"),
    "signal alone": (
        lambda p: distribution_signals(p.x, p.vocabulary, p.y, ["top2"]),
        ObjectiveError,
        "did you mean 'top1'",
    ),
    "coefficients": (
        lambda p: call(p, weigh=lambda s, _: s["logp"].sum()),
        ObjectiveError,
        r"found coefficients \(\), expected \(23,\)",
    ),
    "no scale": (
        lambda p: call(p, **kl(penalty_scale=None)),
        ObjectiveError,
        r"penalty_scale: found None, expected \(23,\)",
    ),
    "no reference": (
        lambda p: call(p, **kl()),
        ObjectiveError,
        "'forward_kl' reads ref_logp_all, but no reference policy",
    ),
    "another vocabulary": (
        lambda p: call(p, **kl(reference=(p.x, Vocabulary(p.w[1:])))),
        PolicyError,
        "gives 23 positions and 36 tokens; expected 23 and 37",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake: str) -> None:
    run, error, sentence = MISTAKES[mistake]
    with pytest.raises(error, match=sentence):
        run(problem(torch.float32))
