"""Sampled gradients: unbiased by quadrature over the one random number, exact where only one other token exists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rwft.errors import ObjectiveError
from rwft.head import Draws, Vocabulary, weighted_loss
from rwft.head_sampled import RUN
from rwft.regularizers import build_regularizers

N, H = 11, 5


def draws(seed: int = 0, count: int = 3) -> Draws:
    return Draws(torch.Generator().manual_seed(seed), count)


def leaves(n: int, v: int, dtype: torch.dtype = torch.float64, frozen: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(n, H), (v, H), (v,)]
    x, w, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    return [x.requires_grad_(), w.requires_grad_(not frozen), b.requires_grad_(not frozen)]


def gradients(leaves: list[Tensor], y: Tensor, sampled: Draws | None, **options: Any) -> tuple[Any, list[Tensor]]:
    """The head's result and gradients with coefficients of random sign, scaled, biased and capped logits."""
    x, w, b = leaves
    factors = torch.randn(len(y), generator=torch.Generator().manual_seed(1)).to(x.dtype)
    vocabulary = Vocabulary(w, b, scale=1.5, softcap=2.0)
    result = weighted_loss(
        x, vocabulary, y, lambda s, rows: factors[rows] * s["logp"].exp(), sampled=sampled, **options
    )
    return result, list(torch.autograd.grad(result.loss, [leaf for leaf in leaves if leaf.requires_grad]))


@pytest.mark.parametrize("segments", [None, [4, 7], [N]])
@pytest.mark.parametrize("budget", [None, 1, 100])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_exact_where_only_one_other_token_exists(
    segments: list[int] | None, budget: int | None, frozen: bool, dtype: torch.dtype, tolerance: float
) -> None:
    y = torch.randint(0, 2, (N,), generator=torch.Generator().manual_seed(2))
    own = leaves(N, 2, dtype, frozen)
    exact, expected = gradients(own, y, None, segments=segments)
    result, found = gradients(own, y, draws(), segments=segments, budget=budget)
    torch.testing.assert_close(result.loss, exact.loss)
    torch.testing.assert_close(result.coefficients, exact.coefficients)
    for f, e in zip(found, expected, strict=True):
        assert ((f - e).double().norm() / e.double().norm()).item() < tolerance


@pytest.mark.parametrize("count", [1, 3, 50])
@pytest.mark.parametrize(("piece", "run"), [(4, 5), (8192, 32), (8192, 1)])
def test_unbiased(monkeypatch: pytest.MonkeyPatch, count: int, piece: int, run: int) -> None:
    """One position, 2000 times, with the midpoints of a grid for the uniform numbers: the mean is the integral.

    Each token owns one interval of the cumulated probabilities, which a grid measures to 2 / 2000 of a step,
    and a step is worth 1 / count of the probability of the other tokens.
    """
    grid, v = 2000, 13
    monkeypatch.setattr("rwft.head_sampled.PIECE", piece)
    monkeypatch.setattr("rwft.head_sampled.RUN", run)
    w = torch.eye(v, dtype=torch.float64).requires_grad_()
    z = 3 * torch.randn(v, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = z.expand(grid, v).clone().requires_grad_()
    midpoints = ((torch.arange(grid) + 0.5) / grid)[:, None].double()
    monkeypatch.setattr("torch.rand", lambda *_, **__: midpoints)
    target = torch.full((grid,), 4)
    result = weighted_loss(
        x, Vocabulary(w), target, lambda s, _: torch.full_like(s["logp"], 1 / grid), sampled=draws(count=count)
    )
    by_x, by_w = torch.autograd.grad(result.loss, [x, w])
    expected = z.softmax(0)
    rest = 1 - expected[4]
    expected[4] -= 1.0
    within = 2 * rest / (grid * count) + 1e-12
    assert ((by_x.sum(0) - expected).abs() <= within).all()
    assert ((by_w - expected[:, None] * z).abs() <= within * z.abs()).all()
    assert (by_x[:, 4] - expected[4] / grid).abs().max() < 1e-15  # the target's part is exact, draw by draw


def test_the_target_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even by the uniform number 0 where the target comes first."""
    monkeypatch.setattr("torch.rand", lambda *_, **__: torch.zeros(1, 1).double())
    tokens, values, rest = draws(count=4).of(torch.tensor([[0.4, 0.0, 0.3, 0.3]]).double(), torch.tensor([0]))
    assert tokens.tolist() == [[2, 2, 3, 3]]
    assert values.tolist() == [[pytest.approx(0.3), 0.0, pytest.approx(0.3), 0.0]]  # a token drawn twice counts once
    assert rest.item() == pytest.approx(0.6)


@pytest.mark.parametrize("run", [1, 2, 3, 5, 32])
def test_heavy_tokens_are_exact_and_rare_ones_worth_a_step(monkeypatch: pytest.MonkeyPatch, run: int) -> None:
    """Of 0.8 beside the target, 4 draws make steps of 0.2: 0.5 and 0.2 always come as they are, the rest as 0.2.

    A rest of 0.06 comes in 3 of 10 steps, one of 0.04 in 2.
    """
    monkeypatch.setattr("rwft.head_sampled.RUN", run)
    p = torch.tensor([[0.06, 0.5, 0.2, 0.04, 0.2]]).double()
    times = {0: 0, 3: 0}
    for point in (torch.arange(50) + 0.5) / 50:
        monkeypatch.setattr("torch.rand", lambda *_, point=point, **__: torch.full((1, 1), point).double())
        tokens, values, rest = draws(count=4).of(p.clone(), torch.tensor([2]))
        found = {t: v for t, v in zip(tokens[0].tolist(), values[0].tolist(), strict=True) if v}
        assert found == pytest.approx({1: 0.5, 4: 0.2} | {token: 0.2 for token in found if token in times})
        assert rest.item() == pytest.approx(0.8)
        for token in times.keys() & found.keys():
            times[token] += 1
    assert times == {0: 15, 3: 10}


def test_rare_tokens_are_not_lost_in_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand of 1e-9 beside one of 0.5: each is less than half of float32's step there, and yet is met.

    The run of the target holds 15 of them and that of the 0.5 as many; the others follow.
    """
    p = torch.cat([torch.tensor([0.5, 0.5]), torch.full((1000,), 1e-9)])
    count, rare = 970, p[2].item()
    before = 0.5 + 15 * rare
    uniform = (before + (torch.arange(count, dtype=torch.float64) + 0.5)[:, None] * rare) / (before + count * rare)
    monkeypatch.setattr("torch.rand", lambda *_, **__: uniform)
    tokens, _, rest = draws(count=1).of(p.repeat(count, 1), torch.zeros(count, dtype=torch.int64))
    assert len(set(tokens[:, 0].tolist()) - {0, 1}) == count
    assert rest[0].item() == pytest.approx(before + count * rare, rel=1e-15)


def test_rare_tokens_are_drawn_behind_a_heavy_one_of_their_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fourteen of 1e-9 behind 0.5 in one run, whose float32 sum is 0.5: each is met in its part of the interval."""
    p = torch.cat([torch.tensor([0.5, 0.5]), torch.full((14,), 1e-9)])
    assert len(p) == RUN
    assert p[1:].sum() == 0.5
    part = 1e-9 / (0.5 + 14e-9)
    uniform = 1 - (torch.arange(14, dtype=torch.float64) + 0.5)[:, None] * part
    monkeypatch.setattr("torch.rand", lambda *_, **__: uniform)
    tokens, *_ = draws(count=1).of(p.repeat(14, 1), torch.zeros(14, dtype=torch.int64))
    assert tokens[:, 0].tolist() == list(range(15, 1, -1))


def test_every_tile_of_a_bfloat16_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwft.head_gradients.TILE", 1)
    y = torch.randint(0, 2, (N,), generator=torch.Generator().manual_seed(2))
    own = leaves(N, 2, torch.bfloat16)
    _, expected = gradients(own, y, None)
    _, found = gradients(own, y, draws(), budget=8)
    for f, e in zip(found, expected, strict=True):
        assert ((f - e).double().norm() / e.double().norm()).item() < 2e-2


def test_the_generator_decides() -> None:
    y = torch.randint(0, 40, (N,), generator=torch.Generator().manual_seed(2))
    own = leaves(N, 40)
    (_, first), (_, again), (_, other) = (gradients(own, y, draws(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_error_of_a_mean_falls_with_the_root_of_its_length() -> None:
    """All positions together, real random numbers: 16 times the seeds give about a quarter of the error."""
    y = torch.randint(0, 40, (N,), generator=torch.Generator().manual_seed(2))
    own = leaves(N, 40)
    _, expected = gradients(own, y, None)
    runs = [gradients(own, y, draws(seed))[1] for seed in range(512)]
    for found, exact in zip(zip(*runs, strict=True), expected, strict=True):
        errors = torch.stack(found) - exact
        single = errors.norm(dim=tuple(range(1, errors.ndim))).mean()
        assert 0.01 < single / exact.norm() < 2
        assert errors.mean(0).norm() < 1.5 * single / 512**0.5


@pytest.mark.parametrize("segments", [None, [N]])
def test_one_dense_product_is_left(segments: list[int] | None) -> None:
    """Also where a segment is longer than a chunk: draws are kept until its coefficients are known."""

    class Products(TorchDispatchMode):
        flops = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
                self.flops += 2 * args[-2].shape[0] * args[-2].shape[1] * args[-1].shape[1]
            if function.overloadpacket.__name__ == "_linear_pointwise":
                self.flops += 2 * args[0].numel() * args[1].shape[0]
            return function(*args, **(kwargs or {}))

    with Products() as products:
        gradients(leaves(N, 40), torch.arange(N), draws(), budget=1000, segments=segments)
    assert products.flops == 2 * N * H * 40


@pytest.mark.parametrize(("weight", "hidden"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_logits_take_no_memory_beside_the_gradient_of_the_weight(weight: torch.dtype, hidden: torch.dtype) -> None:
    n, v, h = 33, 6001, 71  # more columns than a strip, and odd, so that the gradient is no whole number of float32
    kept: dict[int, Any] = {}  # storages stay alive, so that no two lie at one address

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                kept[out.untyped_storage().data_ptr()] = out.untyped_storage()
            return out

    w, x = torch.randn(v, h).to(weight).requires_grad_(), torch.randn(n, h).to(hidden).requires_grad_()
    vocabulary, y = Vocabulary(w), torch.randint(0, v, (n,))
    given = {leaf.untyped_storage().data_ptr() for leaf in (w, x)}
    with Made():
        result = weighted_loss(x, vocabulary, y, lambda s, _: s["logp"].exp(), sampled=draws())
    logits, cast = 4 * n * v, 4 * v * h  # bytes; a weight in another precision is cast for the product
    large = sorted(made.nbytes() for place, made in kept.items() if place not in given and made.nbytes() >= logits)
    assert large == ([w.nbytes] if weight == hidden else [w.nbytes, cast])
    expected = (x.double() @ w.double().T).log_softmax(dim=-1).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(result.logp.double(), expected, rtol=0, atol=1e-5)


def test_a_weight_that_lies_transposed() -> None:
    x, w, b = leaves(N, 40)
    y = torch.randint(0, 40, (N,), generator=torch.Generator().manual_seed(2))
    transposed = w.detach().T.contiguous().T.requires_grad_()
    assert not transposed.is_contiguous()
    for found, expected in zip(
        gradients([x, transposed, b], y, draws(), budget=1)[1],
        gradients([x, w, b], y, draws(), budget=1)[1],
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_mistakes_are_named() -> None:
    with pytest.raises(ObjectiveError, match="found 0 draws"):
        draws(count=0)
    penalties = build_regularizers([{"name": "entropy", "coef": 1.0}])
    with pytest.raises(ObjectiveError, match="sampled gradients know no penalties, but 'entropy' is given"):
        gradients(
            leaves(N, 4), torch.zeros(N, dtype=torch.int64), draws(), penalties=penalties, penalty_scale=torch.ones(N)
        )
