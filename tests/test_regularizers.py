"""Penalties over the distribution: hand-worked numbers, their gradients in closed form, and their specs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rwft import regularizer
from rwft.errors import ConfigError, ObjectiveError
from rwft.regularizers import Penalty, build_regularizers, differentiate

LN2, LN3 = math.log(2.0), math.log(3.0)

# Logits 0 and ln 3: probabilities 1/4 and 3/4; the reference has 1/2 and 1/2; the data hold token 0.
BY_HAND: list[tuple[str, dict[str, float], float]] = [
    ("forward_kl", {}, LN2 - LN3 / 2),  # 1/2 ln 2 + 1/2 ln 2/3
    ("reverse_kl", {}, 0.75 * LN3 - LN2),  # 1/4 ln 1/2 + 3/4 ln 3/2
    ("entropy", {}, 0.75 * LN3 - 2 * LN2),  # 1/4 ln 1/4 + 3/4 ln 3/4
    ("label_smoothing", {}, -LN3 / 2),  # ln 1/4 - (ln 1/4 + ln 3/4) / 2
    ("gem", {"beta": 0.5}, 0.9 * LN3 - 2 * LN2),  # q = softmax(0, 2 ln 3) = (1/10, 9/10)
    ("gem", {"beta": 1.0}, 0.75 * LN3 - 2 * LN2),
]


def penalty(name: str, coef: float = 1.0, **settings: Any) -> Penalty:
    return build_regularizers([{"name": name, "coef": coef, **settings}])[0]


def inputs(logits: Tensor, reference: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
    return {
        "logits": logits,
        "logp_all": logits.log_softmax(-1),
        "ref_logp_all": reference.log_softmax(-1),
        "targets": targets,
    }


@pytest.mark.parametrize(("name", "settings", "expected"), BY_HAND)
def test_hand_worked(name: str, settings: dict[str, float], expected: float) -> None:
    logits = torch.tensor([[0.0, LN3]], dtype=torch.float64)
    value = penalty(name, **settings).function(inputs(logits, torch.zeros(1, 2).double(), torch.tensor([0])))
    assert value.tolist() == pytest.approx([expected], rel=1e-14)


def test_every_regularizer_has_a_hand_worked_row() -> None:
    assert {name for name, _, _ in BY_HAND} == set(regularizer)


def gradient(function: Any, n: int = 5, v: int = 7) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradient by logits of `function(inputs).sum()`, and the distributions that it is made of."""
    generator = torch.Generator().manual_seed(0)
    logits, reference = (2 * torch.randn(n, v, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(0, v, (n,), generator=generator)
    logits.requires_grad_()
    (found,) = torch.autograd.grad(function(inputs(logits, reference, targets)).sum(), logits)
    z = logits.detach()
    onehot = torch.zeros(n, v, dtype=torch.float64)
    onehot[torch.arange(n), targets] = 1.0
    return found, {"z": z, "p": z.softmax(-1), "ref": reference.softmax(-1), "onehot": onehot}


def nll(given: Mapping[str, Tensor]) -> Tensor:
    return -given["logp_all"].gather(-1, given["targets"][:, None])[:, 0]


def test_sft_and_gem_have_the_gradient_of_gem() -> None:
    for beta in (0.7, 0.3, 2.0, 1.0):
        bound = penalty("gem", beta=beta)
        found, of = gradient(lambda given, bound=bound: nll(given) + bound.function(given))
        torch.testing.assert_close(found, (of["z"] / beta).softmax(-1) - of["onehot"], rtol=0, atol=1e-14)


def test_gem_at_beta_one_and_smoothing_by_nothing_are_sft() -> None:
    sft, _ = gradient(nll)
    for bound in (penalty("gem", beta=1.0), penalty("label_smoothing", 0.0)):
        found, _ = gradient(lambda given, bound=bound: nll(given) + bound.coef * bound.function(given))
        torch.testing.assert_close(found, sft, rtol=0, atol=1e-14)


def test_the_two_kls_are_positive_and_not_the_same() -> None:
    z, reference = torch.randn(50, 9, dtype=torch.float64), torch.randn(50, 9, dtype=torch.float64)
    given = inputs(z, reference, torch.zeros(50, dtype=torch.int64))
    forward, reverse = penalty("forward_kl").function(given), penalty("reverse_kl").function(given)
    assert (forward > 0).all()
    assert (reverse > 0).all()
    assert ((forward - reverse).abs() > 1e-3).any()
    exchanged = inputs(reference, z, torch.zeros(50, dtype=torch.int64))
    torch.testing.assert_close(penalty("reverse_kl").function(exchanged), forward, rtol=1e-12, atol=1e-14)


def test_gem_defaults_to_the_papers_beta() -> None:
    assert penalty("gem").spec == {"name": "gem", "beta": 0.7, "coef": 1.0}


def test_sft_and_label_smoothing_are_cross_entropy_with_smoothed_targets() -> None:
    found, of = gradient(lambda given: nll(given) + 0.1 * penalty("label_smoothing").function(given))
    torch.testing.assert_close(found, of["p"] - (0.9 * of["onehot"] + 0.1 / 7), rtol=0, atol=1e-14)


def test_forward_kl_pulls_towards_the_reference() -> None:
    found, of = gradient(penalty("forward_kl").function)
    torch.testing.assert_close(found, of["p"] - of["ref"], rtol=0, atol=1e-14)


def test_reverse_kl_in_closed_form() -> None:
    found, of = gradient(penalty("reverse_kl").function)
    ratio = (of["p"] / of["ref"]).log()
    expected = of["p"] * (ratio - (of["p"] * ratio).sum(-1, keepdim=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_a_step_against_the_entropy_penalty_raises_the_entropy() -> None:
    found, of = gradient(penalty("entropy").function)

    def entropy(z: Tensor) -> Tensor:
        p = z.softmax(-1)
        return -(p * p.log()).sum(-1)

    assert (entropy(of["z"] - 0.01 * found) > entropy(of["z"])).all()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_no_kl_to_oneself(name: str) -> None:
    z = torch.randn(4, 9, dtype=torch.float64)
    value = penalty(name).function(inputs(z, z + 3.0, torch.zeros(4, dtype=torch.int64)))
    torch.testing.assert_close(value, torch.zeros(4).double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", list(regularizer))
def test_finite_where_probabilities_underflow(name: str) -> None:
    z = torch.tensor([[0.0, 1e4, -1e4]]).requires_grad_()
    value = penalty(name).function(inputs(z, -z.detach(), torch.tensor([2])))
    (found,) = torch.autograd.grad(value.sum(), z)
    assert torch.isfinite(value).all()
    assert torch.isfinite(found).all()


def test_differentiate_weighs_each_penalty_by_coefficient_and_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    z, reference = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.rand(4, generator=generator, dtype=torch.float64)
    penalties = [penalty("forward_kl", 0.5), penalty("gem", 2.0, beta=0.5)]
    found, values = differentiate(penalties, z, torch.zeros(4, dtype=torch.int64), reference.log_softmax(-1), scale)
    p, ref, q = z.softmax(-1), reference.softmax(-1), (z / 0.5).softmax(-1)
    torch.testing.assert_close(found, scale[:, None] * (0.5 * (p - ref) + 2.0 * (q - p)), rtol=0, atol=1e-14)
    torch.testing.assert_close(values["forward_kl"], (ref * (ref / p).log()).sum(-1), rtol=0, atol=1e-14)
    assert list(values) == ["forward_kl", "gem"]
    assert not any(value.requires_grad for value in values.values())


# ---------------------------------------------------------------- specs


def test_specs_round_trip_and_say_what_is_read() -> None:
    specs = [{"name": "gem", "beta": 0.5, "coef": 1}, {"name": "reverse_kl", "coef": 0.1}]
    built = build_regularizers(specs)
    assert [p.spec for p in built] == [{"name": "gem", "beta": 0.5, "coef": 1.0}, {"name": "reverse_kl", "coef": 0.1}]
    assert build_regularizers([p.spec for p in built]) == built
    assert [(p.name, p.coef, p.reads) for p in built] == [
        ("gem", 1.0, ("logits", "logp_all")),
        ("reverse_kl", 0.1, ("logp_all", "ref_logp_all")),
    ]
    assert build_regularizers([]) == []


MISTAKES: list[tuple[Any, type[Exception], str]] = [
    ({"name": "entropy", "coef": 1.0}, ConfigError, "expected a list such as"),
    ("entropy", ConfigError, "expected a list such as"),
    (["entropy"], ConfigError, "entropy: coef: found None, expected a finite number"),
    ([{"coef": 1.0}], ConfigError, "expected a name or a mapping"),
    ([{"name": "entropy", "coef": True}], ConfigError, "coef: found True"),
    ([{"name": "entropy", "coef": "0.1"}], ConfigError, "coef: found '0.1'"),
    ([{"name": "entropy", "coef": float("inf")}], ConfigError, "coef: found inf"),
    ([{"name": "gem", "coef": 1.0, "beta": 0.0}], ObjectiveError, "beta: found 0.0, expected a number > 0"),
    ([{"name": "gem", "coef": 1.0, "betta": 1.0}], ObjectiveError, "did you mean 'beta'"),
    ([{"name": "foward_kl", "coef": 1.0}], ObjectiveError, "did you mean 'forward_kl'"),
    ([{"name": "gem", "coef": 1.0}, {"name": "gem", "coef": 2.0}], ConfigError, "'gem' is given twice"),
]


@pytest.mark.parametrize(("specs", "error", "sentence"), MISTAKES)
def test_mistakes_are_named(specs: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        build_regularizers(specs)


OWN = """
def confidence(logits, targets, *, power: float = 2.0):
    return logits.softmax(-1).pow(power).sum(-1)

def summed(logits):
    return logits.sum()

def constant(targets):
    return targets.double()

def blind(logit):
    return logit
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return file


def test_a_regularizer_of_ones_own(own: Path) -> None:
    bound = penalty(f"{own}:confidence", power=3.0)
    value = bound.function(inputs(torch.tensor([[0.0, LN3]]).double(), torch.zeros(1, 2), torch.tensor([0])))
    assert value.tolist() == pytest.approx([(1 + 27) / 64])
    assert bound.reads == ("logits", "targets")


def test_a_regularizer_of_ones_own_that_breaks_the_contract(own: Path) -> None:
    z, y = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ObjectiveError, match=r"'summed': found shape \(\), expected \(3,\)"):
        differentiate([penalty(f"{own}:summed")], z, y, None, torch.ones(3))
    with pytest.raises(ObjectiveError, match="'constant': its penalty does not depend on logits"):
        differentiate([penalty(f"{own}:constant")], z, y, None, torch.ones(3))
    with pytest.raises(ObjectiveError, match="reads 'logit', which nothing provides; did you mean 'logits'"):
        penalty(f"{own}:blind")
