"""Where a paper gives a loss, its own gradient is the objective's weight, to 1e-12.

Each loss is written here from the paper, live in `logp`, without a weight or a stop-gradient that the
paper does not have; autograd then says what weight it has. Signs: minus the gradient with respect
to a token's log-probability is that token's weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rwft

B, T = 6, 5
MASK = torch.tensor(
    [[0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0], [1, 1, 0, 1, 1], [0, 1, 1, 1, 0.0]]
)
ROWS = ["01111", "11100", "11111", "00100", "11011", "01110"]  # where each sequence is trained
MASK = torch.tensor([[float(c) for c in row] for row in ROWS], dtype=torch.float64)
LENGTH = MASK.sum(1, keepdim=True)
PAIRS = [(0, 1), (3, 2), (4, 5)]  # (chosen, rejected), by the rewards below


def signals(spread: float = 0.6, seed: int = 0) -> dict[str, Tensor]:
    """Random token probabilities, and a reference and behaviour policy some e^spread away."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    logp = -0.05 - draw(B, T).abs()
    near = {name: logp + spread * draw(B, T) for name in ("ref_logp", "behavior_logp", "old_logp")}
    return {
        "logp": logp,
        "mask": MASK,
        **near,
        "reward": torch.tensor([[1.0], [0], [0], [1], [1], [0]], dtype=torch.float64),
        "advantage": draw(B, 1),
        "value": 0.3 * draw(B, T),
        "concentration": draw(B, T).sigmoid(),
        "group": torch.tensor([0, 0, 1, 1, 2, 2]),
        "group_mean": draw(B, 1).sigmoid(),
        "kl_running": torch.tensor(0.4, dtype=torch.float64),
        "aux_logp": logp + spread * draw(B, T),
    }


Loss = Callable[[Tensor, dict[str, Tensor]], Tensor]


def total(x: Tensor) -> Tensor:
    """`(b t) -> (b 1)`: over trained tokens."""
    return (x * MASK).sum(1, keepdim=True)


def log_k(logp: Tensor, s: dict[str, Tensor]) -> Tensor:
    return total(logp - s["ref_logp"])


def rho(logp: Tensor, s: dict[str, Tensor], name: str = "behavior_logp") -> Tensor:
    return (logp - s[name]).exp()


def ppo(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def dual_clipped(logp: Tensor, s: dict[str, Tensor]) -> Tensor:
    plain = ppo(rho(logp, s), s["advantage"], 0.2, 0.2)
    return torch.where(s["advantage"] < 0, torch.minimum(plain, -1.5 * s["advantage"]), plain)


def gmpo(logp: Tensor, s: dict[str, Tensor]) -> Tensor:
    """|product of min/max-clipped ratios|^(1/|y|) times the advantage, as the paper writes it in log space."""
    sign = s["advantage"].sign()
    signed = sign * (logp - s["behavior_logp"])
    clipped = sign * torch.minimum(signed, signed.clamp(-0.4, 0.4))
    return -s["advantage"] * (total(clipped) / LENGTH).exp()


def nft(logp: Tensor, s: dict[str, Tensor], floor: float) -> Tensor:
    rate = s["group_mean"].clamp(0.02, 0.98)
    implicit = (1 - rate * rho(logp, s)) / (1 - rate)
    passed = implicit + (implicit.clamp(min=floor) - implicit).detach()
    return torch.where(s["reward"] > 0.5, -logp, -passed.log())


def margin(logp: Tensor, s: dict[str, Tensor], beta: float) -> list[Tensor]:
    k = log_k(logp, s)
    return [beta * (k[won] - k[lost]) for won, lost in PAIRS]


def dpo(logp: Tensor, s: dict[str, Tensor]) -> Tensor:
    return -sum(F.logsigmoid(h) for h in margin(logp, s, 0.1))  # type: ignore[return-value]


def ipo(logp: Tensor, s: dict[str, Tensor]) -> Tensor:
    return sum((h - 1 / (2 * 0.1)) ** 2 for h in margin(logp, s, 1.0))  # type: ignore[return-value]


def rpo(logp: Tensor, s: dict[str, Tensor]) -> Tensor:
    return dpo(logp, s) - sum(total(logp)[w] / LENGTH[w] for w, _ in PAIRS)


def treg(logp: Tensor, s: dict[str, Tensor]) -> Tensor:
    added = torch.zeros((), dtype=torch.float64)
    for (won, lost), h in zip(PAIRS, margin(logp, s, 0.1), strict=True):
        tokens = total(0.1 * s["advantage"] * logp)
        added = added + torch.sigmoid(-h).detach() * (tokens[won] + tokens[lost])
    return dpo(logp, s) - 0.25 * added


def kto(logp: Tensor, s: dict[str, Tensor]) -> Tensor:
    u = 0.1 * (log_k(logp, s) - s["kl_running"].clamp(min=0))
    return torch.where(s["reward"] > 0, 1 - u.sigmoid(), 1 - (-u).sigmoid())


def a_star_po(logp: Tensor, s: dict[str, Tensor]) -> Tensor:
    losses = []
    for first in (0, 2, 4):
        r = s["reward"][first : first + 2]
        soft_max = 0.5 * ((r / 0.5).exp().mean()).log()
        losses.append((1e-3 * log_k(logp, s)[first : first + 2] - (r - soft_max)) ** 2)
    return torch.cat(losses)


def oreo(logp: Tensor, s: dict[str, Tensor]) -> Tensor:
    """Squared suffix residuals, with the sums written out."""
    terms = []
    for i in range(B):
        where = [t for t in range(T) if MASK[i, t] > 0]
        for n, t in enumerate(where):
            to_go = torch.stack([logp[i, j] - s["ref_logp"][i, j] for j in where[n:]]).sum()
            terms.append((0.03 * to_go + s["value"][i, t] - s["reward"][i, 0]) ** 2)
    return torch.stack(terms)


def oreo_token(logp: Tensor, s: dict[str, Tensor]) -> Tensor:
    """The same residuals, in each of which only the token's own log ratio is live."""
    terms = []
    for i in range(B):
        where = [t for t in range(T) if MASK[i, t] > 0]
        for n, t in enumerate(where):
            held = sum((float((logp[i, j] - s["ref_logp"][i, j]).detach()) for j in where[n + 1 :]), 0.0)
            own = logp[i, t] - s["ref_logp"][i, t]
            terms.append((0.03 * (own + held) + s["value"][i, t] - s["reward"][i, 0]) ** 2)
    return torch.stack(terms)


def returns(s: dict[str, Tensor], discount: float) -> Tensor:
    """Discounted returns of PRIME's token rewards, from the end, one trained token after the other."""
    out = torch.zeros(B, T, dtype=torch.float64)
    for i in range(B):
        ahead = 0.0
        for t in reversed([t for t in range(T) if MASK[i, t] > 0]):
            ahead = 0.05 * float(s["aux_logp"][i, t] - s["ref_logp"][i, t]) + discount * ahead
            out[i, t] = ahead
    return out


def focal(logp: Tensor, _: dict[str, Tensor]) -> Tensor:
    return -((1 - logp.exp()) ** 2) * logp


def unlikelihood(logp: Tensor, s: dict[str, Tensor]) -> Tensor:
    return torch.where(s["reward"] > 0, -logp, -(1 - logp.exp()).log())


def deft(logp: Tensor, s: dict[str, Tensor]) -> Tensor:
    return (1 - logp.exp() ** s["concentration"]) / s["concentration"]


def sapo(logp: Tensor, s: dict[str, Tensor]) -> Tensor:
    tau = 1.0 * (s["advantage"] > 0).double() + 1.05 * (s["advantage"] <= 0).double()
    return -s["advantage"] * torch.sigmoid(tau * (rho(logp, s) - 1)) * 4 / tau


def gspo(logp: Tensor, s: dict[str, Tensor]) -> Tensor:
    geometric = (total(logp - s["behavior_logp"]) / LENGTH).exp()
    return ppo(geometric, s["advantage"], 0.2, 0.3)


def a_lol_kl(logp: Tensor, s: dict[str, Tensor]) -> Tensor:
    penalised = -s["advantage"] * total(logp) + 0.2 * log_k(logp, s)
    return penalised * (s["advantage"] > 0)


def masked_ppo(logp: Tensor, s: dict[str, Tensor]) -> Tensor:
    gap = (total(s["behavior_logp"] - logp) / LENGTH).detach()
    kept = torch.where((s["advantage"] < 0) & (gap > 0.5), 0.0, 1.0)
    return kept * ppo(rho(logp, s), s["advantage"], 0.2, 0.2)


ONE = torch.ones(1, 1, dtype=torch.float64)
# spec, the paper's loss (summed over its entries), what the weights are multiplied by on the way
NATIVE: list[tuple[Any, Loss, Tensor]] = [
    ("sft", lambda logp, s: -logp, ONE),
    ("dft", lambda logp, s: -logp.exp(), ONE),
    ({"name": "prob_power", "alpha": 0.3}, lambda logp, s: (1 - logp.exp() ** 0.3) / 0.3, ONE),
    ({"name": "prob_power", "alpha": 10}, lambda logp, s: (1 - logp.exp() ** 10) / 10, ONE),
    ("focal_loss", focal, ONE),
    ("unlikelihood", unlikelihood, ONE),
    ("deft", deft, ONE),
    ("luffy", lambda logp, s: -s["advantage"] * logp.exp() / (logp.exp() + 0.1), ONE),
    ("psft", lambda logp, s: ppo(rho(logp, s, "old_logp"), ONE, 0.2, 0.28), ONE),
    ("ppo_clip", lambda logp, s: ppo(rho(logp, s), s["advantage"], 0.2, 0.2), ONE),
    ({"name": "ppo_clip", "high": 0.28}, lambda logp, s: ppo(rho(logp, s), s["advantage"], 0.2, 0.28), ONE),
    ({"name": "ppo_clip", "dual": 1.5}, dual_clipped, ONE),
    ({"name": "gspo", "low": 0.2, "high": 0.3}, gspo, 1 / LENGTH),
    ("gmpo", gmpo, 1 / LENGTH),
    ("sapo", sapo, ONE),
    ("nft", lambda logp, s: nft(logp, s, 1.0), ONE),
    ({"name": "nft", "floor": 1e-3}, lambda logp, s: nft(logp, s, 1e-3), ONE),
    (
        [{"name": "tis", "clip": math.e**9}, "reinforce"],
        lambda logp, s: -s["advantage"] * rho(logp, s),
        ONE,
    ),
    (
        [{"name": "sequence_is", "clip": math.e**9}, "reinforce"],
        lambda logp, s: -s["advantage"] * total(logp - s["behavior_logp"]).exp(),
        ONE,
    ),
    ({"name": "a_lol_kl", "beta": 0.2}, a_lol_kl, ONE),
    ("dro", lambda logp, s: 0.5 * (s["advantage"] - log_k(logp, s)) ** 2, ONE),
    ({"name": "dro", "temperature": 0.3}, lambda logp, s: 0.5 * (s["advantage"] - 0.3 * log_k(logp, s)) ** 2, ONE),
    ("a_star_po", a_star_po, ONE),
    ("oreo", oreo, ONE),
    ("oreo_token", oreo_token, ONE),
    (
        {"name": "dro_token", "beta": 0.3},
        lambda logp, s: 0.15 * (logp - s["behavior_logp"]) ** 2 - s["advantage"] * logp,
        ONE,
    ),
    ({"name": "implicit_reward", "discount": 0.7}, lambda logp, s: -returns(s, 0.7) * logp, ONE),
    (
        ["tis", "implicit_reward"],
        lambda logp, s: -returns(s, 1.0) * rho(logp, s).clamp(max=2).detach() * logp,
        ONE,
    ),
    (["off_policy_mask", "ppo_clip"], masked_ppo, ONE),
    ("dpo", dpo, ONE),
    ("ipo", ipo, ONE),
    ("rpo", rpo, ONE),
    ("treg", treg, ONE),
    ("kto", kto, ONE),
]


def case(spec: Any, seed: int) -> dict[str, Tensor]:
    """The signals; OREO's advantages are of positions, r - V_t."""
    given = signals(seed=seed)
    return {**given, "advantage": given["reward"] - given["value"]} if spec in ("oreo", "oreo_token") else given


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("spec", "loss", "factor"), NATIVE, ids=[f"{i}" for i in range(len(NATIVE))])
def test_the_papers_gradient_is_the_weight(spec: Any, loss: Loss, factor: Tensor, seed: int) -> None:
    given = case(spec, seed)
    logp = given["logp"].clone().requires_grad_()
    per_entry = loss(logp, signals(seed=seed))
    if per_entry.shape == MASK.shape:
        per_entry = per_entry * MASK
    (gradient,) = torch.autograd.grad(per_entry.sum(), logp)
    weights = rwft.build_objective(spec)(given).expand_as(MASK) * MASK * factor
    torch.testing.assert_close(weights, -gradient, rtol=1e-12, atol=1e-12)
    assert weights.abs().max() > 1e-4


@pytest.mark.parametrize("seed", [0, 1])
def test_a_lol_inside_its_clip_is_the_gradient_of_the_advantage_times_the_ratio(seed: int) -> None:
    given = signals(spread=0.05, seed=seed)
    positive = given["advantage"].clamp(min=0)
    logp = given["logp"].clone().requires_grad_()
    k, k_t = log_k(logp, given).exp(), rho(logp, given, "ref_logp")
    assert ((k > 0.1) & (k < 1.9)).all()
    assert ((k_t > 0.1) & (k_t < 1.9)).all()
    for spec, ratio in (("a_lol", k), ("a_lol_token", k_t * MASK)):
        (gradient,) = torch.autograd.grad((-positive * ratio).sum(), logp, retain_graph=True)
        weights = rwft.build_objective(spec)(given).expand_as(MASK) * MASK
        torch.testing.assert_close(weights, -gradient, rtol=1e-12, atol=1e-12)
        assert weights.abs().max() > 1e-4


def test_clips_are_hit_by_these_cases() -> None:
    """Otherwise the clipped surrogates would be tested where they are plain."""
    given = signals()
    ratio = rho(given["logp"], given)[MASK > 0]
    positive = (given["advantage"] > 0).expand_as(MASK)[MASK > 0]
    for hit in (ratio > 1.28, ratio < 0.8, ratio.log().abs() > 0.4):
        assert (hit & positive).any()
        assert (hit & ~positive).any()
    assert ((ratio > 1.5) & ~positive).any()
