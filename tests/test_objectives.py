"""The hand-worked table: every weight below was worked out on paper, none was computed by the code under test."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import rwft
from rwft.signals import SIGNALS

E, LN2 = math.e, math.log(2)
Row = tuple[Any, dict[str, Any], Any]


def ln(*rows: list[float]) -> Tensor:
    """Log of the given probabilities or ratios, one list per sequence."""
    return torch.tensor(rows, dtype=torch.float64).log()


def seq(*values: float) -> Tensor:
    """One number per sequence, `(b 1)`."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


def tok(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def one(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


ALL = tok([1, 1])  # both tokens trained
FLAT = ln([1.0, 1.0])  # log-probability 0: then a ratio is the policy's own number
P = {"logp": ln([0.5, 0.25])}
RHO = {"logp": ln([2.0, 0.5, 1.0]), "behavior_logp": ln([1.0, 1.0, 1.0])}  # token ratios 2, 1/2, 1; product 1
PAIR = {  # log ratios to the reference: row 0 has ln 4 + ln 2 = ln 8, row 1 has ln 2: they differ by ln 4
    "logp": ln([0.4, 0.2], [0.2, 0.5]),
    "ref_logp": ln([0.1, 0.1], [0.1, 0.5]),
    "mask": tok([1, 1], [1, 1]),
    "reward": seq(1, 0),
    "group": torch.tensor([7, 7]),
}

TABLE: list[Row] = [
    # --- imitation
    ("sft", {}, 1.0),
    ("dft", P, [[0.5, 0.25]]),
    ("prob_power", P, [[0.5, 0.25]]),
    ({"name": "prob_power", "alpha": 0.5}, P, [[math.sqrt(0.5), 0.5]]),
    ({"name": "prob_power", "alpha": 0}, P, [[1.0, 1.0]]),
    ({"name": "prob_power", "alpha": 2, "low": 0.3}, P, [[0.25, 0.0]]),
    ({"name": "prob_power", "alpha": 0, "high": 0.3}, P, [[0.0, 1.0]]),
    # p^(1/tau) at tau = 1/2: squares 1/4, 1/16; the floor of 0.1 lifts the second
    ({"name": "talr", "floor": 0.1}, {**P, "ref_nll_median": one(0.5)}, [[0.25, 0.1]]),
    ("talr", {"logp": ln([0.5, 0.001]), "ref_nll_median": one(1.0)}, [[0.5, 0.01]]),
    # e^(-ln 2) = 1/2 halves the row at z = ln 2; a row easier than the average is DFT
    ("cadft", {"logp": ln([0.5, 0.25], [0.5, 0.25]), "ref_nll_z": seq(LN2, -3)}, [[0.25, 0.125], [0.5, 0.25]]),
    ({"name": "cadft", "strength": 2}, {**P, "ref_nll_z": seq(LN2)}, [[0.125, 0.0625]]),
    ("chord_phi", P, [[0.25, 0.1875]]),  # 1/2 * 1/2, 1/4 * 3/4
    ("focal", P, [[0.25, 0.5625]]),  # (1/2)^2, (3/4)^2
    ({"name": "focal", "gamma": 1}, P, [[0.5, 0.75]]),
    # (1-p)^2 - 2 p (1-p) ln p: 1/4 + (1/2) ln 2; 9/16 + (3/8) ln 4
    ("focal_loss", P, [[0.25 + 0.5 * LN2, 0.5625 + 0.375 * math.log(4)]]),
    # good row: 1; bad row: -p / (1 - p) = -1, -1/3
    (
        "unlikelihood",
        {"logp": ln([0.5, 0.25], [0.5, 0.25]), "reward": seq(1, -1)},
        [[1.0, 1.0], [-1.0, -1 / 3]],
    ),
    ({"name": "unlikelihood", "alpha": 0.5, "threshold": 1}, {**P, "reward": seq(1)}, [[-0.5, -1 / 6]]),
    # --- confidence
    ("deft", {"logp": ln([0.25, 0.25]), "concentration": tok([0.5, 1.0])}, [[0.5, 0.25]]),
    # typical token (H = -log p): p. At log p + H = ln 4: g = 1/4, p^(1/4). At -ln 4: g = 4 -> 2, p^2.
    (
        "idft",
        {"logp": ln([0.25, 0.25, 0.25]), "entropy": tok([math.log(4), 2 * math.log(4), 0.0])},
        [[0.25, 0.25**0.25, 0.0625]],
    ),
    # far above its entropy: g = e^-5 -> 0.1; strength 1/2: exponent 1 + (0.1 - 1)/2 = 0.55
    ({"name": "idft", "strength": 0.5}, {"logp": tok([-1.0]), "entropy": tok([6.0])}, [[math.exp(-0.55)]]),
    # temperature 2: g = e^(-ln 4 / 2) = 1/2, p^(1/2)
    ({"name": "idft", "temperature": 2}, {"logp": ln([0.25]), "entropy": tok([2 * math.log(4)])}, [[0.5]]),
    ("eaft", {"topk_entropy": tok([1.5, 0.0, math.log(20)])}, [[0.5, 0.0, 0.998577424517997]]),
    ({"name": "eaft", "alpha": 2}, {"topk_entropy": tok([1.5])}, [[0.25]]),
    ("eaft_full", {"entropy": tok([LN2, 0.0]), "log_vocab": one(math.log(16))}, [[0.25, 0.0]]),
    # mean entropy over trained tokens (ln 4 + 0) / 2 = ln 2: half of 1/2
    ("srft", {"entropy": tok([2 * LN2, 0.0, 99.0]), "mask": tok([1, 1, 0])}, [[0.25]]),
    # --- selection
    # scores ref - logp: 1, 3, 2, 0 (the last is not trained); 0.6 * 3 = 1.8 -> 2 tokens: scores 3 and 2
    (
        "rho1",
        {"logp": tok([-1.0, -3, -2, -9]), "ref_logp": tok([0.0, 0, 0, -9]), "mask": tok([1, 1, 1, 0])},
        [[0.0, 1, 1, 0]],
    ),
    # equal scores: the earliest; 0.5 * 4 = 2
    (
        {"name": "rho1", "keep": 0.5},
        {"logp": tok([-1.0] * 4), "ref_logp": tok([-1.0] * 4), "mask": tok([1, 1, 1, 1])},
        [[1.0, 1, 0, 0]],
    ),
    # scores aux - ref: -1, 2, 0.5; 1/3 * 3 = 1
    (
        {"name": "token_cleaning", "keep": 1 / 3},
        {"ref_logp": tok([-1.0, -4, -1.5]), "aux_logp": tok([-2.0, -2, -1]), "mask": tok([1, 1, 1])},
        [[0.0, 1, 0]],
    ),
    ("critical_token", {"token_weight": tok([0.0, 1.0, -0.5])}, [[0.0, 1.0, -0.5]]),
    # gains per token: (0.8 + 0.2) / 2 = 0.5 stays, 0.6 goes
    (
        "tail_sft",
        {
            "logp": tok([-0.25, -1.75], [-1, -1]),
            "ref_logp": tok([-1.0, -2], [-1.625, -1.625]),
            "mask": tok([1, 1], [1, 1]),
        },
        [[1.0], [0.0]],
    ),
    # --- ratios
    # log ratios ln 8 and ln 2: mean ln 4; the padded third token does not count
    (
        "iw_sft",
        {"logp": ln([0.8, 0.2, 0.9]), "ref_logp": ln([0.1, 0.1, 0.1]), "mask": tok([1, 1, 0])},
        [[4.0]],
    ),
    (
        {"name": "iw_sft", "temperature": 0.5},
        {"logp": ln([0.8, 0.2]), "ref_logp": ln([0.1, 0.1]), "mask": ALL},
        [[2.0]],
    ),
    ("iw_sft", {"logp": ln([0.8, 0.8]), "ref_logp": ln([0.01, 0.01]), "mask": ALL}, [[16.0]]),  # 80 -> 16
    ("iw_sft_token", {"logp": ln([0.4, 0.1, 0.12]), "ref_logp": ln([0.1, 0.8, 0.1])}, [[1.8, 0.2, 1.2]]),
    ("tis", {"logp": ln([3.0, 0.5, 1.5]), "behavior_logp": ln([1.0, 1, 1])}, [[2.0, 0.5, 1.5]]),
    ("mis", {"logp": ln([3.0, 0.5, 1.5]), "behavior_logp": ln([1.0, 1, 1])}, [[0.0, 0.5, 1.5]]),
    # product over trained tokens 1.5 * 0.5 = 0.75; row 1: 3 * 2 = 6 -> 2
    (
        "sequence_is",
        {"logp": ln([1.5, 0.5], [3.0, 2.0]), "behavior_logp": ln([1.0, 1], [1, 1]), "mask": tok([1, 1], [1, 1])},
        [[0.75], [2.0]],
    ),
    # deltas .2, 1 -> .3, -1 -> -.08, .1: after each: .3 - .08 + .1 = .32, .02, .1, 0; no discount
    (
        {"name": "pear", "discount": 1},
        {"logp": tok([0.2, 1, -1, 0.1]), "behavior_logp": tok([0.0, 0, 0, 0]), "mask": tok([1, 1, 1, 1])},
        [[math.exp(0.32), math.exp(0.02), math.exp(0.1), 1.0]],
    ),
    # discount 1/2 with ratio 1: 1/2 per trained token that follows: 2, then 1, then none; floor 0.3
    (
        {"name": "pear", "discount": 0.5, "low": 0.3},
        {"logp": tok([0.0, 0, 0, 0]), "behavior_logp": tok([0.0, 0, 0, 0]), "mask": tok([0, 1, 1, 1])},
        [[0.3, 0.3, 0.5, 1.0]],
    ),
    ("psft", {"logp": ln([1.25, 1.3, 0.1]), "old_logp": ln([1.0, 1, 1])}, [[1.25, 0.0, 0.1]]),
    # --- reward
    ("filtered_bc", {"reward": seq(1, 0.5, 0.4, -1)}, [[1.0], [1.0], [0.0], [0.0]]),
    ({"name": "filtered_bc", "threshold": -1}, {"reward": seq(1, -1)}, [[1.0], [1.0]]),
    ("top_fraction", {"reward_above": seq(0, 0.09, 0.1)}, [[1.0], [1.0], [0.0]]),
    ("top_of_group", {"group_above": seq(0, 0.25, 0.5)}, [[1.0], [0.0], [0.0]]),
    ("raft", {"reward": seq(0.7, -2, 0)}, [[0.7], [0.0], [0.0]]),
    ("rwr", {"reward": seq(LN2, 0, -LN2, 9)}, [[2.0], [1.0], [0.5], [20.0]]),
    ({"name": "rwr", "temperature": 0.5, "clip": 3}, {"reward": seq(LN2, -LN2)}, [[3.0], [0.25]]),
    ("rwr_max", {"reward": seq(3, 3 - LN2), "reward_max": one(3.0)}, [[1.0], [0.5]]),
    ({"name": "rwr_max", "temperature": 2}, {"reward": seq(3 - 2 * LN2), "reward_max": one(3.0)}, [[0.5]]),
    # group 1: e^r = 3, 1: shares 3/4, 1/4 times 2; group 2 has one row: 1
    ("rwr_group", {"reward": seq(math.log(3), 5, 0), "group": torch.tensor([1, 2, 1])}, [[1.5], [1.0], [0.5]]),
    # temperature 1/2: e^(2 r) = 9, 1: shares 0.9, 0.1 times 2
    (
        {"name": "rwr_group", "temperature": 0.5},
        {"reward": seq(math.log(3), 0), "group": torch.tensor([1, 1])},
        [[1.8], [0.2]],
    ),
    ("awr", {"advantage": seq(0, -LN2, 99)}, [[1.0], [0.5], [20.0]]),
    ({"name": "awr", "temperature": 0.5}, {"advantage": tok([LN2, 0.0])}, [[4.0, 1.0]]),
    ("crr_binary", {"advantage": seq(0.1, 0, -0.1)}, [[1.0], [0.0], [0.0]]),
    ({"name": "crr_exp", "temperature": 0.5, "clip": 3}, {"advantage": seq(LN2, -LN2)}, [[3.0], [0.25]]),
    # --- policy gradient
    ("reinforce", {"advantage": seq(0.3, -2)}, [[0.3], [-2.0]]),
    ("reinforce_rej", {"reward": seq(1, -1, 1), "group_std": seq(0.5, 0.5, 0)}, [[1.0], [-1.0], [0.0]]),
    ("asymre", {"reward": seq(1, -1), "group_mean": seq(0.5, 0.5)}, [[0.6], [-1.4]]),
    ({"name": "asymre", "shift": -1}, {"reward": seq(1), "group_mean": seq(0.5)}, [[1.5]]),
    ("gft", {"logp": ln([0.25, 0.75], [0.25, 0.75]), "advantage": seq(2, -1)}, [[0.5, 2.0], [-0.25, -1.0]]),
    # gamma p / (p + gamma)^2: at p = gamma 1/4; at p = 0.4: 0.04 / 0.25 = 0.16
    ("luffy", {"logp": ln([0.1, 0.4]), "advantage": seq(-2)}, [[-0.5, -0.32]]),
    # returns over 2 tokens: .5 + .25 = .75; .25 + 1 (end) = 1.25; pi_old .05 -> .1, .8
    (
        {"name": "gold_s", "horizon": 1},
        {"old_logp": ln([0.05, 0.8]), "ref_logp": ln([0.5, 0.25]), "mask": ALL},
        [[0.075, 1.0]],
    ),
    # horizon 5, one token trained of two: the rest counts as 1: .5 + 5; discount 1/2: .5 + 31/32
    ("gold_s", {"old_logp": ln([0.5, 0.1]), "ref_logp": ln([0.5, 0.1]), "mask": tok([1, 0])}, [[2.75, 0.0]]),
    (
        {"name": "gold_s", "discount": 0.5, "floor": 0},
        {"old_logp": ln([0.5]), "ref_logp": ln([0.5]), "mask": tok([1])},
        [[0.5 * (0.5 + 31 / 32)]],
    ),
    # log p + 10: 9, then -1 -> 1, end 10: 9 + 1 = 10 and 1 + 10 = 11; pi_old 1/2
    (
        {"name": "gold_p", "horizon": 1},
        {"old_logp": ln([0.5, 0.5]), "ref_logp": tok([-1.0, -11.0]), "mask": ALL},
        [[5.0, 5.5]],
    ),
    ("r_gold", {"logp": ln([0.5, 0.05], [0.5, 0.05]), "reward": seq(2, -1)}, [[1.0, 0.2], [-0.5, -0.1]]),
    # log ratios 2, -1, (untrained), 4 at beta 1/2: rewards 1, -1/2, -, 2; from the end 2, -1/2 + 2/2, 1 + 1/4
    (
        {"name": "implicit_reward", "beta": 0.5, "discount": 0.5},
        {"aux_logp": tok([-1.0, -2, -9, -1]), "ref_logp": tok([-3.0, -1, -1, -5]), "mask": tok([1, 1, 0, 1])},
        [[1.25, 0.5, 0.0, 2.0]],
    ),
    # at 0.05, undiscounted: 0.1, -0.05, -, 0.2
    (
        "implicit_reward",
        {"aux_logp": tok([-1.0, -2, -9, -1]), "ref_logp": tok([-3.0, -1, -1, -5]), "mask": tok([1, 1, 0, 1])},
        [[0.25, 0.15, 0.0, 0.2]],
    ),
    # six rewards of 1 at discount 1/2: 2 - 2^-5, ..., 1
    (
        {"name": "implicit_reward", "beta": 1, "discount": 0.5},
        {"aux_logp": tok([-1.0] * 6), "ref_logp": tok([-2.0] * 6), "mask": tok([1] * 6)},
        [[1.96875, 1.9375, 1.875, 1.75, 1.5, 1.0]],
    ),
    # K = 4/5 * 2 = 1.6; second row K = 4 -> 1.9; third has A < 0
    (
        "a_lol",
        {
            "logp": ln([0.4, 0.2], [0.2, 0.2], [0.2, 0.2]),
            "ref_logp": ln([0.5, 0.1], [0.1, 0.1], [0.1, 0.1]),
            "advantage": seq(0.5, 1, -1),
            "mask": tok([1, 1], [1, 1], [1, 1]),
        },
        [[0.8], [1.9], [0.0]],
    ),
    (
        "a_lol_token",
        {"logp": ln([0.4, 0.1, 0.5]), "ref_logp": ln([0.5, 0.05, 10.0]), "advantage": seq(0.5)},
        [[0.4, 0.95, 0.05]],
    ),
    ("a_lol_ref_free", {"advantage": seq(0.5, -0.5)}, [[0.5], [0.0]]),
    ({"name": "a_lol_kl", "beta": 0.2}, {"advantage": seq(0.5, 0.1, -0.5)}, [[0.3], [-0.1], [0.0]]),
    # --- surrogates
    # A = 2: rho 2 is clipped; 1/2 and 1 are not. A = -1: 1/2 is clipped.
    ("ppo_clip", {**RHO, "advantage": seq(2)}, [[0.0, 1.0, 2.0]]),
    ("ppo_clip", {**RHO, "advantage": seq(-1)}, [[-2.0, 0.0, -1.0]]),
    ({"name": "ppo_clip", "high": 1}, {**RHO, "advantage": seq(2)}, [[4.0, 1.0, 2.0]]),
    ({"name": "ppo_clip", "dual": 1.5, "low": 0.5}, {**RHO, "advantage": seq(-1)}, [[0.0, -0.5, -1.0]]),
    ({"name": "ppo_clip", "dual": 1.5, "high": 1}, {**RHO, "advantage": seq(1)}, [[2.0, 0.5, 1.0]]),
    ("cispo", {"logp": ln([9.0, 0.5]), "behavior_logp": FLAT, "advantage": seq(-2)}, [[-10.0, -1.0]]),
    ("cispo_clip", {**RHO, "advantage": seq(-2)}, [[-2.4, -1.6, -2.0]]),
    # s = (2 * 1/2 * 1)^(1/3) = 1
    ("gspo", {**RHO, "advantage": seq(-2), "mask": tok([1, 1, 1])}, [[-2.0]]),
    # first two tokens trained with ratios 4, 1/4^... : s = (4 * 1)^(1/2) = 2: too far to gain, not to lose
    (
        "gspo",
        {
            "logp": ln([4.0, 1.0, 9.0], [4.0, 1.0, 9.0]),
            "behavior_logp": ln([1.0, 1, 1], [1, 1, 1]),
            "advantage": seq(1, -1),
            "mask": tok([1, 1, 0], [1, 1, 0]),
        },
        [[0.0], [-2.0]],
    ),
    # log ratios 1 and -1: to gain 1 -> 0.4 and rests: g = e^((0.4 - 1)/2); to lose -1 -> -0.4 and rests
    (
        "gmpo",
        {
            "logp": tok([1.0, -1.0], [1.0, -1.0]),
            "behavior_logp": tok([0.0, 0.0], [0.0, 0.0]),
            "advantage": seq(2, -2),
            "mask": tok([1, 1], [1, 1]),
        },
        [[0.0, 2 * math.exp(-0.3)], [-2 * math.exp(0.3), 0.0]],
    ),
    # x = ln 3: sigma = 3/4 and 1/4, 4 * 3/16 = 3/4. rho = 1 + ln 3 (gain 1); 1 - ln 3 / 2 at loss 2
    (
        {"name": "sapo", "loss": 2},
        {
            "logp": ln([1 + math.log(3)], [1 - math.log(3) / 2]),
            "behavior_logp": ln([1.0], [1.0]),
            "advantage": seq(2, -1),
        },
        [[1.5 * (1 + math.log(3))], [-0.75 * (1 - math.log(3) / 2)]],
    ),
    # W = 2 * 1 = 2: A > 0: 4 e^-3; A < 0: 8 e^-2
    (
        "vespo",
        {
            "logp": ln([2.0, 1.0], [2.0, 1.0]),
            "behavior_logp": ln([1.0, 1], [1, 1]),
            "advantage": seq(3, -1),
            "mask": tok([1, 1], [1, 1]),
        },
        [[12 * math.exp(-3)], [-8 * math.exp(-2)]],
    ),
    # mean gap to the behaviour policy: 1, 1/2 (no more than delta), 1 to gain, 1 with A = 0; untrained tokens apart
    (
        "off_policy_mask",
        {
            "logp": tok([-3.0, -1, -9], [-2, -1, -9], [-3, -1, -9], [-3, -1, -9]),
            "behavior_logp": tok([-1.0, -1, -1], [-1, -1, -1], [-1, -1, -1], [-1, -1, -1]),
            "advantage": seq(-1, -1, 1, 0),
            "mask": tok([1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0]),
        },
        [[0.0], [1.0], [1.0], [1.0]],
    ),
    (
        {"name": "off_policy_mask", "delta": 1},
        {
            "logp": tok([-3.0, -1], [-5, -1]),
            "behavior_logp": tok([-1.0, -1], [-1, -1]),
            "advantage": seq(-0.5, -0.5),
            "mask": tok([1, 1], [1, 1]),
        },
        [[1.0], [0.0]],
    ),
    # product 1/2 * 1/2 = 1/4 tapers the negative; 2 * 2 = 4 is cut to 1; positives are not touched
    (
        "topr",
        {
            "logp": ln([0.5, 0.5], [2.0, 2.0], [0.5, 0.5]),
            "behavior_logp": ln([1.0, 1], [1, 1], [1, 1]),
            "reward": seq(-2, -2, 2),
            "mask": tok([1, 1], [1, 1], [1, 1]),
        },
        [[-0.5], [-2.0], [2.0]],
    ),
    (
        "topr_geometric",
        {
            "logp": ln([0.5, 0.5], [2.0, 2.0], [0.5, 0.5]),
            "behavior_logp": ln([1.0, 1], [1, 1], [1, 1]),
            "advantage": seq(-2, -2, 2),
            "mask": tok([1, 1], [1, 1], [1, 1]),
        },
        [[-1.0], [-2.0], [2.0]],
    ),
    # right: 1. Wrong at r = 1/5, rho 1/2: n = .9/.8 = 1.125: -.1/.9; rho 2: n = .6/.8 -> 1: -.4/.8
    (
        "nft",
        {
            "logp": ln([0.5, 2.0], [0.5, 2.0]),
            "behavior_logp": ln([1.0, 1], [1, 1]),
            "reward": seq(1, 0),
            "group_mean": seq(0.2, 0.2),
        },
        [[1.0, 1.0], [-1 / 9, -0.5]],
    ),
    # a lower floor lets n = 0.75 through: -.4/.6; linear: times 0.8; negative 3
    (
        {"name": "nft", "floor": 0.1, "prompts": "linear", "negative": 3},
        {"logp": ln([2.0]), "behavior_logp": ln([1.0]), "reward": seq(0), "group_mean": seq(0.2)},
        [[-1.6]],
    ),
    # sqrt((1 - r) / r) = 2 at r = 1/5: 2 * 1 and 2 * -(1/4)
    (
        {"name": "nft", "prompts": "sqrt"},
        {"logp": ln([1.0], [1.0]), "behavior_logp": ln([1.0], [1.0]), "reward": seq(1, 0), "group_mean": seq(0.2, 0.2)},
        [[2.0], [-0.5]],
    ),
    # --- preference: the lead is ln 4, so at beta = 1 sigma(-h) = 1/5; at 1/2 it is 1/3
    ({"name": "dpo", "beta": 1}, PAIR, [[0.2], [-0.2]]),
    ({"name": "dpo", "beta": 0.5}, {**PAIR, "reward": seq(0, 1)}, [[-1 / 3], [1 / 3]]),  # sigma(+ln 2) = 2/3, times 1/2
    ({"name": "dpo", "beta": 1}, {**PAIR, "reward": seq(1, 1)}, [[0.0], [0.0]]),
    ({"name": "dpo", "beta": 1}, {**PAIR, "group": torch.tensor([1, 2])}, [[0.0], [0.0]]),
    # three rows, all at the reference: every pair has sigma = 1/2; pairs (0,1), (0,2), (1,2)
    (
        {"name": "dpo", "beta": 1},
        {
            "logp": ln([0.5], [0.5], [0.5]),
            "ref_logp": ln([0.5], [0.5], [0.5]),
            "mask": tok([1], [1], [1]),
            "reward": seq(2, 1, 0),
            "group": torch.tensor([0, 0, 0]),
        },
        [[1 / 3], [0.0], [-1 / 3]],
    ),
    # 2 (1/(2 * 0.25) - ln 4)
    ({"name": "ipo", "beta": 0.25}, PAIR, [[4 - 4 * LN2], [-4 + 4 * LN2]]),
    # dpo plus 3 / 2 tokens on the chosen
    ({"name": "rpo", "beta": 1, "alpha": 3}, PAIR, [[1.7], [-0.2]]),
    # 0.5 * 1 * (1/5) = 0.1 times the token's reward, on both
    (
        {"name": "treg", "beta": 1, "alpha": 0.5},
        {**PAIR, "advantage": tok([1.0, -1.0], [0.0, 2.0])},
        [[0.3, 0.1], [-0.2, 0.0]],
    ),
    # log ratios ln 8 and ln 2 less z0 = ln 2: u = ln 4 and 0: 1/5 * 4/5 = 0.16, 1/4
    ({"name": "kto", "beta": 1}, {**PAIR, "kl_running": one(LN2)}, [[0.16], [-0.25]]),
    # a negative estimate counts as 0: u = ln 2 for row 1: 2/9
    (
        {"name": "kto", "beta": 1, "desirable": 2, "undesirable": 3, "threshold": 1},
        {**PAIR, "reward": seq(2, 1), "kl_running": one(-5)},
        [[2 * 8 / 81], [-3 * 2 / 9]],
    ),
    # --- value: tau = 2: 2 (A - 2 log K), log K = ln 8, ln 2
    (
        {"name": "dro", "temperature": 2},
        {**PAIR, "advantage": seq(0.5, -0.5)},
        [[1 - 12 * LN2], [-1 - 4 * LN2]],
    ),
    # A - log rho / 2: ratios 2 and 1/2 of a behaviour policy at 1/2
    (
        {"name": "dro_token", "beta": 0.5},
        {"logp": ln([1.0, 0.25]), "behavior_logp": ln([0.5, 0.5]), "advantage": seq(0.5)},
        [[0.5 - 0.5 * LN2, 0.5 + 0.5 * LN2]],
    ),
    ("dro_token", {"logp": tok([-1.0]), "behavior_logp": tok([-3.0]), "advantage": seq(-0.5)}, [[-0.7]]),
    # oreo's residuals below (2, 2), each for itself; at the default 0.06 (0.5 - 0.03 * 2)
    (
        {"name": "oreo_token", "beta": 0.5},
        {
            "logp": tok([-1.0, -1, 0]),
            "ref_logp": tok([-2.0, -3, -99]),
            "advantage": tok([3.5, 3.0, 7.0]),
            "mask": tok([1, 1, 0]),
        },
        [[2.0, 2.0, 0.0]],
    ),
    (
        "oreo_token",
        {"logp": tok([-1.0]), "ref_logp": tok([-3.0]), "advantage": seq(0.5), "mask": tok([1])},
        [[0.06 * 0.44]],
    ),
    # V* = ln mean(e^ln3, e^0) = ln 2; residuals ln 3 - ln 2 - ln 8 / 2 and -ln 2 - ln 2 / 2; times 2 * 1/2
    (
        {"name": "a_star_po", "value_temperature": 1, "temperature": 0.5},
        {**PAIR, "reward": seq(math.log(3), 0)},
        [[math.log(3) - 2.5 * LN2], [-1.5 * LN2]],
    ),
    # b = 1/2, log k = 1, 2, (99 untrained): to go 3, 2; delta = 3.5 - 1.5 = 2, 3 - 1 = 2; sums 2, 4
    (
        {"name": "oreo", "beta": 0.5},
        {
            "logp": tok([-1.0, -1, 0]),
            "ref_logp": tok([-2.0, -3, -99]),
            "advantage": tok([3.5, 3.0, 7.0]),
            "mask": tok([1, 1, 0]),
        },
        [[2.0, 4.0, 0.0]],
    ),
]


MOVED: list[Row] = [  # settings away from their defaults
    # K = 4 and 1/4, clip 1/2: 3/2 and 1/2, times 2
    (
        {"name": "a_lol", "clip": 0.5},
        {
            "logp": ln([0.2, 0.2], [0.1, 0.1]),
            "ref_logp": ln([0.1, 0.1], [0.2, 0.2]),
            "advantage": seq(2, 2),
            "mask": tok([1, 1], [1, 1]),
        },
        [[3.0], [1.0]],
    ),
    (
        {"name": "a_lol_token", "clip": 0.5},
        {"logp": ln([4.0, 0.25]), "ref_logp": FLAT, "advantage": seq(2)},
        [[3.0, 1.0]],
    ),
    ({"name": "awr", "clip": 3}, {"advantage": seq(99, 0)}, [[3.0], [1.0]]),
    (
        {"name": "cispo", "cap": 2},
        {"logp": ln([9.0, 0.5]), "behavior_logp": FLAT, "advantage": seq(-2)},
        [[-4.0, -1.0]],
    ),
    ({"name": "cispo_clip", "low": 0.1, "high": 0.5}, {**RHO, "advantage": seq(-2)}, [[-3.0, -1.8, -2.0]]),
    ({"name": "eaft_full", "alpha": 2}, {"entropy": tok([LN2]), "log_vocab": one(math.log(16))}, [[0.0625]]),
    ({"name": "focal_loss", "gamma": 1}, P, [[0.5 + 0.5 * LN2, 0.75 + 0.25 * math.log(4)]]),  # 1 - p - p ln p
    ({"name": "gft", "threshold": 0.8}, {"logp": ln([0.25, 0.75, 0.9]), "advantage": seq(2)}, [[0.5, 1.5, 2.0]]),
    (
        {"name": "gmpo", "width": 2},
        {"logp": tok([1.0, -1.0]), "behavior_logp": tok([0.0, 0.0]), "advantage": seq(2), "mask": ALL},
        [[2.0, 2.0]],
    ),
    # log p + 3: 2, then -6 -> 1/2, end 3: 2 + 1/4 and 1/2 + 3/2; pi_old 1/2 -> 0.6, 0.8
    (
        {"name": "gold_p", "horizon": 1, "baseline": -3, "low": 0.5, "discount": 0.5, "floor": 0.6},
        {"old_logp": ln([0.5, 0.8]), "ref_logp": tok([-1.0, -9.0]), "mask": ALL},
        [[1.35, 1.6]],
    ),
    (
        {"name": "gspo", "low": 0.5, "high": 0.5},
        {
            "logp": ln([1.4, 1.4], [0.6, 0.6], [1.6, 1.6], [0.4, 0.4]),
            "behavior_logp": ln([1.0, 1], [1, 1], [1, 1], [1, 1]),
            "advantage": seq(1, -1, 1, -1),
            "mask": tok([1, 1], [1, 1], [1, 1], [1, 1]),
        },
        [[1.4], [-0.6], [0.0], [0.0]],
    ),
    # g = 1/4 -> 1/2 and 4: p^(1/2), p^4
    (
        {"name": "idft", "low": 0.5, "high": 4},
        {"logp": ln([0.25, 0.25]), "entropy": tok([2 * math.log(4), 0.0])},
        [[0.5, 1 / 256]],
    ),
    ({"name": "iw_sft", "clip": 3}, {"logp": ln([0.8, 0.2]), "ref_logp": ln([0.1, 0.1]), "mask": ALL}, [[3.0]]),
    ({"name": "iw_sft_token", "low": 0.5, "high": 3}, {"logp": ln([4.0, 0.25]), "ref_logp": FLAT}, [[3.0, 0.5]]),
    ({"name": "iw_sft_token", "low": 0}, {"logp": ln([0.001, 1.0]), "ref_logp": FLAT}, [[0.001, 1.0]]),
    ({"name": "luffy", "gamma": 0.4}, {"logp": ln([0.1, 0.4]), "advantage": seq(-2)}, [[-0.32, -0.5]]),
    ({"name": "tis", "clip": 1.2}, {"logp": ln([3.0, 0.5]), "behavior_logp": FLAT}, [[1.2, 0.5]]),
    ({"name": "mis", "clip": 1.2}, {"logp": ln([1.5, 0.5]), "behavior_logp": FLAT}, [[0.0, 0.5]]),
    # deltas .2, 1 -> .5, -2 -> -1, .9 -> .5: after each 0, -.5, .5 (e^.5 = 1.65 -> 1.2), none
    (
        {"name": "pear", "discount": 1, "delta_low": -1, "delta_high": 0.5, "high": 1.2},
        {"logp": tok([0.2, 1, -2, 0.9]), "behavior_logp": tok([0.0, 0, 0, 0]), "mask": tok([1, 1, 1, 1])},
        [[1.0, math.exp(-0.5), 1.2, 1.0]],
    ),
    ({"name": "psft", "high": 0.5}, {"logp": ln([1.3, 1.6]), "old_logp": FLAT}, [[1.3, 0.0]]),
    ({"name": "r_gold", "floor": 0.5}, {"logp": ln([0.05, 0.75]), "reward": seq(2)}, [[1.0, 1.5]]),
    # x = 2 (rho - 1) = ln 3 at rho = 1 + ln 3 / 2
    (
        {"name": "sapo", "gain": 2},
        {"logp": ln([1 + math.log(3) / 2]), "behavior_logp": ln([1.0]), "advantage": seq(4)},
        [[3 * (1 + math.log(3) / 2)]],
    ),
    ({"name": "sequence_is", "clip": 5}, {"logp": ln([3.0, 2.0]), "behavior_logp": FLAT, "mask": ALL}, [[5.0]]),
    ({"name": "srft", "scale": 2}, {"entropy": tok([2 * LN2, 0.0]), "mask": ALL}, [[1.0]]),
    (
        {"name": "tail_sft", "max_gain": 0.7},
        {"logp": tok([-1.0, -1.0]), "ref_logp": tok([-1.625, -1.625]), "mask": ALL},
        [[1.0]],
    ),
    ({"name": "top_fraction", "keep": 0.5}, {"reward_above": seq(0.49, 0.5)}, [[1.0], [0.0]]),
    ({"name": "top_of_group", "keep": 0.6}, {"group_above": seq(0.5, 0.6)}, [[1.0], [0.0]]),
    # W = 2: 2 e^0 and 2 e^-1
    (
        {"name": "vespo", "gain_power": 1, "gain_decay": 0, "loss_power": 1, "loss_decay": 1},
        {
            "logp": ln([2.0, 1.0], [2.0, 1.0]),
            "behavior_logp": ln([1.0, 1], [1, 1]),
            "advantage": seq(3, -1),
            "mask": tok([1, 1], [1, 1]),
        },
        [[6.0], [-2 / E]],
    ),
]

HALF = ln([0.5, 0.5])  # a behaviour policy that is not 1: an inverted or added ratio shows
THREE = {  # three ranked rows of one token at the reference, and a lone row: every pair has sigma = 1/2
    "logp": ln([0.5], [0.5], [0.5], [0.5]),
    "ref_logp": ln([0.5], [0.5], [0.5], [0.5]),
    "mask": tok([1], [1], [1], [1]),
    "reward": seq(2, 1, 0, 5),
    "group": torch.tensor([3, 3, 3, 4]),
}
Q = 1 / (1 + 4**0.1)  # sigma(-0.1 ln 4)

EDGES: list[Row] = [  # defaults, boundaries, signs and second groups: what a small change to a formula would move
    ({"name": "prob_power", "alpha": 0, "low": 0.5, "high": 0.5}, P, [[1.0, 0.0]]),
    ("unlikelihood", {**P, "reward": seq(0)}, [[-1.0, -1 / 3]]),
    # the untrained token has the highest score, and is not counted
    (
        "rho1",
        {"logp": tok([-1.0, -3, -2, -99]), "ref_logp": tok([0.0, 0, 0, 0]), "mask": tok([1, 1, 1, 0])},
        [[0.0, 1, 1, 0]],
    ),
    (
        "token_cleaning",
        {"ref_logp": tok([-1.0, -4, -1.5]), "aux_logp": tok([-2.0, -2, -1]), "mask": tok([1, 1, 1])},
        [[0.0, 1, 1]],
    ),
    ("tis", {"logp": ln([1.5, 0.25]), "behavior_logp": HALF}, [[2.0, 0.5]]),
    ("mis", {"logp": ln([1.5, 0.25]), "behavior_logp": HALF}, [[0.0, 0.5]]),
    ("mis", {"logp": tok([LN2]), "behavior_logp": tok([0.0])}, [[2.0]]),
    ("sequence_is", {"logp": ln([0.75, 0.25]), "behavior_logp": HALF, "mask": ALL}, [[0.75]]),
    # deltas (-1) - (-1.2) = 0.2 and -0.05; the untrained token between them is passed over
    (
        "pear",
        {"logp": tok([-1.0, -9, -1]), "behavior_logp": tok([-1.2, -1, -0.95]), "mask": tok([1, 0, 1])},
        [[0.999 * math.exp(-0.05), 0.0, 1.0]],
    ),
    # ten tokens with delta 0.3: n after each, 0.999^n e^(0.3 n), at most 10
    (
        "pear",
        {"logp": tok([1.0] * 10), "behavior_logp": tok([0.0] * 10), "mask": tok([1] * 10)},
        [[10.0, 10.0, *[0.999**n * math.exp(0.3 * n) for n in (7, 6, 5, 4, 3, 2, 1, 0)]]],
    ),
    ({"name": "psft", "high": 1}, {"logp": ln([1.0, 1.5]), "old_logp": HALF}, [[2.0, 0.0]]),
    ("rwr_max", {"reward": seq(4), "reward_max": one(3.0)}, [[1.0]]),
    ("crr_exp", {"advantage": seq(LN2, 99)}, [[2.0], [20.0]]),
    ("gft", {"logp": ln([0.5]), "advantage": seq(2)}, [[2.0]]),
    # f = 9, then five times 10: the untrained token counts as p = 1
    ("gold_p", {"old_logp": HALF, "ref_logp": tok([-1.0, -1.0]), "mask": tok([1, 0])}, [[29.5, 0.0]]),
    ("a_lol_kl", {"advantage": seq(0.5)}, [[0.5]]),
    ({"name": "a_lol_kl", "beta": 0.2}, {"advantage": seq(0)}, [[0.0]]),
    # advantages between 0 and 1, both ways, with ratios 2 and 1/2
    (
        "ppo_clip",
        {
            "logp": ln([1.0, 0.25], [1.0, 0.25]),
            "behavior_logp": ln([0.5, 0.5], [0.5, 0.5]),
            "advantage": seq(0.5, -0.5),
        },
        [[0.0, 0.25], [-1.0, 0.0]],
    ),
    ({"name": "ppo_clip", "dual": 2}, {"logp": ln([1.0]), "behavior_logp": ln([0.5]), "advantage": seq(-1)}, [[-2.0]]),
    ("cispo", {"logp": ln([4.5, 0.25]), "behavior_logp": HALF, "advantage": seq(-2)}, [[-10.0, -1.0]]),
    ("cispo_clip", {"logp": ln([0.55, 0.25]), "behavior_logp": HALF, "advantage": seq(-2)}, [[-2.2, -1.6]]),
    # s = 0.9 and 1.0002: too far to lose; near enough to gain
    (
        "gspo",
        {
            "logp": ln([0.45, 0.45], [0.5001, 0.5001]),
            "behavior_logp": ln([0.5, 0.5], [0.5, 0.5]),
            "advantage": seq(-1, 1),
            "mask": tok([1, 1], [1, 1]),
        },
        [[0.0], [1.0002]],
    ),
    (
        "gmpo",
        {
            "logp": tok([-0.8, -1.2], [-0.8, -1.2]),
            "behavior_logp": tok([-1.0, -1.0], [-1.0, -1.0]),
            "advantage": seq(0.5, -0.5),
            "mask": tok([1, 1], [1, 1]),
        },
        [[0.5, 0.5], [-0.5, -0.5]],
    ),
    # on the clips: +-1 at width 1
    (
        {"name": "gmpo", "width": 1},
        {
            "logp": tok([1.0, -1.0], [1.0, -1.0]),
            "behavior_logp": tok([0.0, 0.0], [0.0, 0.0]),
            "advantage": seq(0.5, -0.5),
            "mask": tok([1, 1], [1, 1]),
        },
        [[0.5, 0.5], [-0.5, -0.5]],
    ),
    # beyond them: 2 -> 1 to gain, -3 -> -1 to lose
    (
        {"name": "gmpo", "width": 1},
        {
            "logp": tok([2.0, -3.0], [2.0, -3.0]),
            "behavior_logp": tok([0.0, 0.0], [0.0, 0.0]),
            "advantage": seq(0.5, -0.5),
            "mask": tok([1, 1], [1, 1]),
        },
        [[0.0, 0.5 / E], [-0.5 * math.exp(0.5), 0.0]],
    ),
    # rho = 1/2: x = -1/2 and -0.525; sigma(x) sigma(-x) = e^x / (1 + e^x)^2
    (
        "sapo",
        {"logp": ln([0.25], [0.25]), "behavior_logp": ln([0.5], [0.5]), "advantage": seq(0.5, -1)},
        [[math.exp(-0.5) / (1 + math.exp(-0.5)) ** 2], [-2 * math.exp(-0.525) / (1 + math.exp(-0.525)) ** 2]],
    ),
    # W = 1.5 * 2 = 3: 9 e^-6 / 2
    (
        "vespo",
        {"logp": ln([0.75, 1.0]), "behavior_logp": HALF, "advantage": seq(0.5), "mask": ALL},
        [[4.5 * math.exp(-6)]],
    ),
    # W = e^-100 counts as 1e-8: its fourth root is 1/100
    (
        {"name": "vespo", "gain_power": 0.25, "gain_decay": 0},
        {"logp": tok([-100.0]), "behavior_logp": tok([0.0]), "advantage": seq(0.5), "mask": tok([1])},
        [[0.005]],
    ),
    ("topr", {"logp": ln([0.25]), "behavior_logp": ln([0.5]), "reward": seq(0.5), "mask": tok([1])}, [[0.5]]),
    (
        "topr_geometric",
        {"logp": ln([0.25]), "behavior_logp": ln([0.5]), "advantage": seq(0.5), "mask": tok([1])},
        [[0.5]],
    ),
    # rates 1 and 0 count as 0.98 and 0.02; a reward of 1/2 is wrong
    (
        "nft",
        {
            "logp": ln([0.5], [0.5]),
            "behavior_logp": ln([0.5], [0.5]),
            "reward": seq(0.5, 0),
            "group_mean": seq(1, 0),
        },
        [[-49.0], [-1 / 49]],
    ),
    ("dpo", PAIR, [[0.1 * Q], [-0.1 * Q]]),
    ("ipo", PAIR, [[2 * (5 - 2 * LN2)], [-2 * (5 - 2 * LN2)]]),
    ("rpo", PAIR, [[0.1 * Q + 0.5], [-0.1 * Q]]),
    # pairs won 2, 1, 0 of 3; one token each
    ({"name": "rpo", "beta": 2}, THREE, [[2 / 3 + 2 / 3], [1 / 3], [-2 / 3], [0.0]]),
    ("treg", {**PAIR, "advantage": seq(1, 2)}, [[0.1 * Q + 0.025 * Q], [-0.1 * Q + 0.05 * Q]]),
    # each row is in two of three pairs, with 1/2 each: 1/3; times 1/2 * 2 times its token reward
    (
        {"name": "treg", "beta": 2, "alpha": 0.5},
        {**THREE, "advantage": seq(1, -1, 3, 9)},
        [[1.0], [-1 / 3], [1 / 3], [0.0]],
    ),
    ("kto", {**PAIR, "kl_running": one(LN2)}, [[0.1 * Q * (1 - Q)], [-0.025]]),
    ({"name": "kto", "beta": 1}, {**PAIR, "reward": seq(0, 0), "kl_running": one(LN2)}, [[-0.16], [-0.25]]),
    ("dro", {**PAIR, "advantage": seq(0.5, -0.5)}, [[0.5 - 3 * LN2], [-0.5 - LN2]]),
    # V* = ln((9 + 1) / 2) / 2 = ln(5) / 2
    (
        "a_star_po",
        {**PAIR, "reward": seq(math.log(3), 0)},
        [[2e-3 * (math.log(3) - math.log(5) / 2 - 3e-3 * LN2)], [2e-3 * (-math.log(5) / 2 - 1e-3 * LN2)]],
    ),
    # two groups of one: each is its own value
    (
        {"name": "a_star_po", "temperature": 1},
        {**PAIR, "group": torch.tensor([1, 2])},
        [[-6 * LN2], [-2 * LN2]],
    ),
    # one token: 0.06 (0.5 - 0.03 * 2)
    (
        "oreo",
        {"logp": tok([-1.0]), "ref_logp": tok([-3.0]), "advantage": seq(0.5), "mask": tok([1])},
        [[0.06 * 0.44]],
    ),
    # the untrained middle counts nowhere: to go 3, -, 2; delta 3 - 1.5, -, 3 - 1; sums 1.5, -, 3.5
    (
        {"name": "oreo", "beta": 0.5},
        {
            "logp": tok([-1.0, 0, -1]),
            "ref_logp": tok([-2.0, -99, -3]),
            "advantage": seq(3),
            "mask": tok([1, 0, 1]),
        },
        [[1.5, 0.0, 3.5]],
    ),
]
TABLE += MOVED + EDGES


def name_of(spec: Any) -> str:
    return spec if isinstance(spec, str) else spec["name"]


@pytest.mark.parametrize(
    ("spec", "given", "expected"), TABLE, ids=[f"{i}-{name_of(r[0])}" for i, r in enumerate(TABLE)]
)
def test_weight(spec: Any, given: dict[str, Tensor], expected: Any) -> None:
    objective = rwft.build_objective(spec)
    wanted = torch.tensor(expected, dtype=torch.float64)
    weights = objective(given).double()
    if "mask" in objective.reads and weights.shape == given["mask"].shape:
        weights = weights.where(given["mask"] > 0, wanted)  # anything may stand where nothing is trained
    torch.testing.assert_close(weights, wanted, rtol=1e-12, atol=1e-12)


def test_every_objective_has_a_row() -> None:
    assert {name_of(spec) for spec, _, _ in TABLE} == set(rwft.objective)


def test_every_setting_is_moved_from_its_default_somewhere() -> None:
    """A setting that no row changes could be ignored without notice."""
    moved = {(s["name"], key) for s, _, _ in TABLE if isinstance(s, dict) for key in s if key != "name"}
    settings = {(name, key) for name in rwft.objective for key in rwft.objective.entry(name).settings}
    assert settings - moved == set()


def test_every_signal_is_read_by_some_objective() -> None:
    read = {name for objective in rwft.objective for name in rwft.objective.entry(objective).reads}
    assert set(SIGNALS) - read == {"progress"}


def test_a_product_is_a_product() -> None:
    """[dft, rwr]: 1/2 * 2 and 1/4 * 2."""
    weights = rwft.build_objective(["dft", "rwr"])({**P, "reward": seq(LN2)})
    torch.testing.assert_close(weights, tok([1.0, 0.5]))


def test_tis_does_not_count_the_advantage_twice() -> None:
    """[tis, reinforce] is min(rho, 2) A; ppo_clip holds its own A."""
    given = {**RHO, "advantage": seq(-3)}
    torch.testing.assert_close(rwft.build_objective(["tis", "reinforce"])(given), tok([-6.0, -1.5, -3.0]))
    assert "advantage" not in rwft.build_objective("tis").reads
    assert "advantage" in rwft.build_objective("ppo_clip").reads


DOCUMENTED = ("Why: ", "Limits: ", "Negative rewards: ", "Reference: ")


@pytest.mark.parametrize("name", list(rwft.objective))
def test_docstrings_say_what_they_must(name: str) -> None:
    """One line with the formula; why; limits; what negative rewards do; the source."""
    doc = rwft.objective[name].__doc__ or ""
    first, _, rest = doc.partition("\n")
    assert first.endswith(("$.", "."))
    assert first.count("$") >= 2
    assert first.count("$") % 2 == 0
    for part in DOCUMENTED:
        assert f"\n    {part}" in rest, part


def test_at_a_log_probability_of_minus_ten_thousand_the_bounded_ones_are_exact() -> None:
    low = tok([-1e4])
    weigh = lambda spec, **s: rwft.build_objective(spec)(s)
    assert weigh("dft", logp=low).item() == 0
    assert weigh("tis", logp=tok([0.0]), behavior_logp=low).item() == pytest.approx(2, rel=1e-12)
    assert weigh("mis", logp=tok([0.0]), behavior_logp=low).item() == 0
    assert weigh("iw_sft_token", logp=low, ref_logp=tok([0.0])).item() == pytest.approx(0.2, rel=1e-12)
    assert weigh("topr", logp=low, behavior_logp=tok([0.0]), reward=seq(-1), mask=tok([1])).item() == 0
    assert weigh("unlikelihood", logp=tok([0.0]), reward=seq(-1)).item() == pytest.approx(-1e5, rel=1e-9)
    assert weigh("ppo_clip", logp=tok([0.0]), behavior_logp=low, advantage=seq(-1)).item() == pytest.approx(
        -math.exp(20)
    )
