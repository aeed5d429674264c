"""Each objective's limits: where it becomes one of its neighbours, exactly or in the limit."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rwft
from rwft.estimator import surrogate_loss
from rwft.signals import seq_sum
from rwft.testing import trial

B, T = 6, 5
Signals = dict[str, Tensor]


def base(seed: int = 0) -> Signals:
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    logp = -0.05 - 1.5 * draw(B, T).abs()
    mask = torch.ones(B, T, dtype=torch.float64)
    mask[0, 0] = mask[1, 3:] = mask[3, 1:] = 0
    return {
        "logp": logp,
        "mask": mask,
        "ref_logp": logp + 0.9 * draw(B, T),
        "behavior_logp": logp + 0.5 * draw(B, T),
        "old_logp": logp + 0.5 * draw(B, T),
        "aux_logp": logp + 0.5 * draw(B, T),
        "entropy": draw(B, T).abs(),
        "topk_entropy": draw(B, T).abs(),
        "concentration": draw(B, T).sigmoid(),
        "log_vocab": torch.tensor(math.log(1000.0), dtype=torch.float64),
        "reward": draw(B, 1),
        "advantage": draw(B, 1),
        "token_weight": torch.ones(B, T, dtype=torch.float64),
        "group": torch.tensor([0, 0, 0, 1, 1, 2]),
        "group_mean": draw(B, 1),
        "group_std": draw(B, 1).abs() + 0.1,
        "group_above": draw(B, 1).sigmoid(),
        "reward_above": draw(B, 1).sigmoid(),
        "reward_max": torch.tensor(5.0, dtype=torch.float64),
        "ref_nll_median": torch.tensor(0.8, dtype=torch.float64),
        "ref_nll_z": draw(B, 1),
        "kl_running": torch.tensor(0.3, dtype=torch.float64),
    }


def weigh(spec: Any, given: Signals | None = None, /, **changed: Tensor) -> Tensor:
    """`(b t)` weights on trained positions, 0 elsewhere."""
    signals = {**(given or base()), **changed}
    return (rwft.build_objective(spec)(signals).double().expand(B, T)).where(signals["mask"] > 0, 0.0)


def of(name: str, **settings: Any) -> dict[str, Any]:
    return {"name": name, **settings}


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert expected.abs().max() > 0


def full(value: float, *shape: int) -> Tensor:
    return torch.full(shape, value, dtype=torch.float64)


ON_POLICY = {name: base()["logp"] for name in ("ref_logp", "behavior_logp", "old_logp")}
SFT, DFT, REINFORCE = weigh("sft"), weigh("dft"), weigh("reinforce")

# (spec, changed signals, the neighbour's weights)
EXACT: list[tuple[str, Any, Signals, Tensor]] = [
    ("prob_power at 0 is SFT", of("prob_power", alpha=0), {}, SFT),
    ("prob_power at 1 is DFT", of("prob_power", alpha=1), {}, DFT),
    ("TALR at tau 1 without a floor is DFT", of("talr", floor=0), {"ref_nll_median": full(1)}, DFT),
    ("CADFT at strength 0 is DFT", of("cadft", strength=0), {}, DFT),
    ("CADFT of easy rows is DFT", "cadft", {"ref_nll_z": -base()["ref_nll_z"].abs()}, DFT),
    ("DEFT of a certain policy is DFT", "deft", {"concentration": full(1, B, T)}, DFT),
    (
        "DEFT of a flat policy is p^(1/V)",
        "deft",
        {"concentration": full(0.001, B, T)},
        weigh(of("prob_power", alpha=0.001)),
    ),
    ("IDFT at strength 0 is DFT", of("idft", strength=0), {}, DFT),
    ("IDFT of a typical token is DFT", "idft", {"entropy": -base()["logp"]}, DFT),
    ("EAFT at alpha 0 is SFT", of("eaft", alpha=0), {}, SFT),
    ("full EAFT of a uniform policy is SFT", of("eaft_full"), {"entropy": full(math.log(1000.0), B, T)}, SFT),
    ("focal at gamma 0 is SFT", of("focal", gamma=0), {}, SFT),
    (
        "the focal loss at gamma 1 is focal less DFT's p times log p",
        of("focal_loss", gamma=1),
        {},
        weigh(of("focal", gamma=1)) - DFT * base()["logp"],
    ),
    ("CHORD is DFT times focal", "chord_phi", {}, weigh(["dft", of("focal", gamma=1)])),
    (
        "unlikelihood at alpha 0 is filtered BC",
        of("unlikelihood", alpha=0),
        {},
        weigh(of("filtered_bc", threshold=1e-300)),
    ),
    ("SRFT without entropy is half of SFT", "srft", {"entropy": full(0, B, T)}, 0.5 * SFT),
    ("Rho-1 keeping all is SFT", of("rho1", keep=1), {}, SFT),
    ("token cleaning keeping all is SFT", of("token_cleaning", keep=1), {}, SFT),
    (
        "Rho-1 with the policy frozen at its start is token cleaning",
        "rho1",
        {"logp": base()["ref_logp"], "ref_logp": base()["aux_logp"]},
        weigh("token_cleaning"),
    ),
    ("data without weights is SFT", "critical_token", {}, SFT),
    ("TailSFT at its start is SFT", "tail_sft", ON_POLICY, SFT),
    ("iw-SFT at its start is SFT", "iw_sft", ON_POLICY, SFT),
    ("iw-SFT at temperature 0 is SFT", of("iw_sft", temperature=0), {}, SFT),
    ("token iw-SFT at its start is SFT", "iw_sft_token", ON_POLICY, SFT),
    ("TIS on policy is 1", "tis", ON_POLICY, SFT),
    ("MIS on policy is 1", "mis", ON_POLICY, SFT),
    ("sequence IS on policy is 1", "sequence_is", ON_POLICY, SFT),
    ("PEAR without discount on policy is SFT", of("pear", discount=1), ON_POLICY, SFT),
    ("PSFT at its snapshot is SFT", "psft", ON_POLICY, SFT),
    (
        "PSFT is PPO at advantage 1",
        "psft",
        {},
        weigh(of("ppo_clip", high=0.28), behavior_logp=base()["old_logp"], advantage=full(1, B, 1)),
    ),
    ("filtered BC below every reward is SFT", of("filtered_bc", threshold=-99), {}, SFT),
    ("the best 100 % are SFT", of("top_fraction", keep=1), {}, SFT),
    ("the best 100 % of a group are SFT", of("top_of_group", keep=1), {}, SFT),
    (
        "RAFT of 0/1 rewards is filtered BC",
        "raft",
        {"reward": (base()["reward"] > 0).double()},
        weigh(of("filtered_bc", threshold=1e-300)),
    ),
    ("AWR without credit is RWR", "awr", {"advantage": base()["reward"]}, weigh("rwr")),
    ("CRR-exp is AWR", of("crr_exp", temperature=0.7), {}, weigh(of("awr", temperature=0.7))),
    ("AWR at advantage 0 is SFT", "awr", {"advantage": full(0, B, 1)}, SFT),
    ("shifted RWR is RWR over its largest weight", "rwr_max", {}, weigh(of("rwr", clip=1e9)) / math.exp(5)),
    ("group RWR of equal rewards is SFT", "rwr_group", {"reward": full(3.0, B, 1)}, SFT),
    ("group RWR of lone rows is SFT", "rwr_group", {"group": torch.arange(B)}, SFT),
    ("GFT at threshold 0 is REINFORCE", of("gft", threshold=0), {}, REINFORCE),
    ("GFT at threshold 1 is DFT times the advantage", of("gft", threshold=1), {}, DFT * REINFORCE),
    (
        "AsymRE at 0 is REINFORCE with the group's mean",
        of("asymre", shift=0),
        {},
        weigh("reinforce", advantage=base()["reward"] - base()["group_mean"]),
    ),
    (
        "AsymRE without a baseline on 0/1 rewards is filtered BC",
        of("asymre", shift=0),
        {"reward": (base()["reward"] > 0).double(), "group_mean": full(0, B, 1)},
        weigh(of("filtered_bc", threshold=1e-300)),
    ),
    (
        "Reinforce-Rej of mixed groups is the raw reward",
        "reinforce_rej",
        {},
        weigh("reinforce", advantage=base()["reward"]),
    ),
    (
        "R-GOLD without a floor is DFT times the reward",
        of("r_gold", floor=0),
        {},
        DFT * weigh("reinforce", advantage=base()["reward"]),
    ),
    ("R-GOLD at floor 1 is the raw reward", of("r_gold", floor=1), {}, weigh("reinforce", advantage=base()["reward"])),
    # a return of 1: horizon 1 without the future, and a certain MLE model
    (
        "GOLD with return 1 at its snapshot is DFT",
        of("gold_s", floor=0, discount=0),
        {"old_logp": base()["logp"], "ref_logp": full(0, B, T)},
        DFT,
    ),
    (
        "GOLD without discounting the present is f(p)",
        of("gold_s", floor=1, discount=0),
        {},
        weigh("dft", logp=base()["ref_logp"]),
    ),
    (
        "GOLD-p with return 1 at its snapshot is DFT",
        of("gold_p", baseline=-1, low=0, discount=0),
        {"old_logp": base()["logp"], "ref_logp": full(0, B, T)},
        DFT,
    ),
    ("A-LoL at its start needs no reference", "a_lol", ON_POLICY, weigh("a_lol_ref_free")),
    ("A-LoL at clip 0 needs no reference", of("a_lol", clip=0), {}, weigh("a_lol_ref_free")),
    ("token A-LoL at its start needs no reference", "a_lol_token", ON_POLICY, weigh("a_lol_ref_free")),
    ("A-LoL's KL at 0 is nothing", "a_lol_kl", {}, weigh("a_lol_ref_free")),
    ("PPO on policy is REINFORCE", "ppo_clip", ON_POLICY, REINFORCE),
    ("CISPO on policy is REINFORCE", "cispo", ON_POLICY, REINFORCE),
    ("CISPO is truncated importance sampling", "cispo", {}, weigh([of("tis", clip=5), "reinforce"])),
    ("clipped CISPO on policy is REINFORCE", "cispo_clip", ON_POLICY, REINFORCE),
    ("clipped CISPO without room is REINFORCE", of("cispo_clip", low=0, high=0), {}, REINFORCE),
    ("GSPO on policy is REINFORCE", "gspo", ON_POLICY, REINFORCE),
    ("GMPO on policy is REINFORCE", "gmpo", ON_POLICY, REINFORCE),
    ("SAPO on policy is REINFORCE at any temperature", of("sapo", gain=7, loss=0.3), ON_POLICY, REINFORCE),
    ("VESPO on policy is REINFORCE", of("vespo", gain_power=5, loss_decay=4), ON_POLICY, REINFORCE),
    (
        "VESPO with power 1 and no decay is sequence IS",
        of("vespo", gain_power=1, gain_decay=0, loss_power=1, loss_decay=0),
        {},
        weigh([of("sequence_is", clip=1e8), "reinforce"]),
    ),
    ("TOPR on policy is the raw reward", "topr", ON_POLICY, weigh("reinforce", advantage=base()["reward"])),
    (
        "TOPR of good rewards is RAFT",
        "topr",
        {"reward": base()["reward"].abs()},
        weigh("raft", reward=base()["reward"].abs()),
    ),
    ("geometric TOPR on policy is REINFORCE", "topr_geometric", ON_POLICY, REINFORCE),
    ("NFT without negatives is filtered BC", of("nft", negative=0), {}, weigh("filtered_bc")),
    ("T-REG without token rewards is DPO", "treg", {"advantage": full(0, B, 1)}, weigh("dpo")),
    ("T-REG at alpha 0 is DPO", of("treg", alpha=0), {}, weigh("dpo")),
    ("RPO at alpha 0 is DPO", of("rpo", alpha=0), {}, weigh("dpo")),
    (
        "without discount to come, the implicit reward is the token's own",
        of("implicit_reward", discount=0, beta=0.2),
        {},
        (0.2 * (base()["aux_logp"] - base()["ref_logp"])).where(base()["mask"] > 0, 0.0),
    ),
    ("token DRO on policy is REINFORCE", "dro_token", ON_POLICY, REINFORCE),
    ("token DRO at beta 0 is REINFORCE", of("dro_token", beta=0), {}, REINFORCE),
    ("OREO's DRO variant at the reference is REINFORCE", of("oreo_token", beta=0.5), ON_POLICY, REINFORCE),
    (
        "DRO at the reference is REINFORCE",
        of("dro", temperature=0.4),
        ON_POLICY,
        0.4 * REINFORCE,
    ),
]


@pytest.mark.parametrize(("spec", "changed", "expected"), [row[1:] for row in EXACT], ids=[row[0] for row in EXACT])
def test_exactly(spec: Any, changed: Signals, expected: Tensor) -> None:
    same(
        weigh(
            spec, **{name: value.double() if value.is_floating_point() else value for name, value in changed.items()}
        ),
        expected,
    )


ALWAYS = {"prob_power at 1 is DFT", "A-LoL's KL at 0 is nothing"}  # the default is the limit
CONDITIONAL = [row for row in EXACT if row[0] not in ALWAYS and (row[2] or not isinstance(row[1], str))]


@pytest.mark.parametrize(("spec", "expected"), [(r[1], r[3]) for r in CONDITIONAL], ids=[r[0] for r in CONDITIONAL])
def test_the_condition_matters(spec: Any, expected: Tensor) -> None:
    """Without the settings and signals of its row, an objective is not its neighbour."""
    assert not torch.allclose(weigh(spec if isinstance(spec, str) else of(spec["name"])), expected, rtol=1e-6)


# --- limits


def test_uniform_dft_is_sft_over_v() -> None:
    same(weigh("dft", logp=full(-math.log(50.0), B, T)), SFT / 50)


@pytest.mark.parametrize(
    "spec", [of("rwr", temperature=1e9), of("awr", temperature=1e9), of("rwr_group", temperature=1e9)]
)
def test_an_infinite_temperature_is_sft(spec: Any) -> None:
    same(weigh(spec), SFT, 1e-8)


def test_a_small_power_is_nearly_sft() -> None:
    same(weigh(of("prob_power", alpha=1e-8)), SFT, 1e-7)


def test_awr_over_its_clip_at_temperature_zero_is_binary_crr() -> None:
    same(weigh(of("awr", temperature=1e-9)) / 20, weigh("crr_binary"))


def test_group_rwr_at_temperature_zero_is_best_of_n() -> None:
    reward = base()["reward"]
    best = torch.cat(
        [reward[:3] == reward[:3].max(), reward[3:5] == reward[3:5].max(), reward[5:] == reward[5:]]
    ).double()
    number = torch.tensor([[3.0], [3], [3], [2], [2], [1]], dtype=torch.float64)
    same(weigh(of("rwr_group", temperature=1e-6)), (best * number).expand(B, T) * base()["mask"])


def test_shifting_all_rewards() -> None:
    """Raw exponentials scale by e^(c / temperature); group softmax and a shift with the maximum do not move."""
    shifted = {"reward": base()["reward"] + 0.7}
    same(
        weigh(of("rwr", temperature=0.5, clip=1e9), **shifted),
        weigh(of("rwr", temperature=0.5, clip=1e9)) * math.exp(1.4),
    )
    same(weigh("rwr_group", **shifted), weigh("rwr_group"))
    same(weigh("rwr_max", **shifted, reward_max=base()["reward_max"] + 0.7), weigh("rwr_max"))


def test_group_rwr_ignores_a_shift_of_one_prompt() -> None:
    per_prompt = torch.tensor([[5.0], [5], [5], [-2], [-2], [9]], dtype=torch.float64)
    same(weigh("rwr_group", reward=base()["reward"] + per_prompt), weigh("rwr_group"))


def test_scaling_rewards_is_scaling_the_temperature() -> None:
    same(weigh(of("rwr", temperature=0.5), reward=3 * base()["reward"]), weigh(of("rwr", temperature=0.5 / 3)))


def test_asymre_far_below_is_sft() -> None:
    same(weigh(of("asymre", shift=-1e9)) / 1e9, SFT, 1e-8)


def test_eaft_does_not_see_the_target() -> None:
    same(weigh("eaft", logp=base()["logp"] - 3), weigh("eaft"))
    assert "logp" not in rwft.build_objective("eaft").reads


def test_eaft_of_twenty_equal_candidates() -> None:
    flat = full(math.log(20), B, T)
    same(weigh(of("eaft", alpha=2), topk_entropy=flat), SFT * (math.log(20) / 3) ** 2)


def test_cadft_never_exceeds_dft() -> None:
    w, hard = weigh("cadft"), base()["ref_nll_z"].expand(B, T) > 0
    trained = base()["mask"] > 0
    assert (w[hard & trained] < DFT[hard & trained]).all()
    assert torch.equal(w[~hard], DFT[~hard])


def test_chord_is_symmetric_and_peaks_at_a_half() -> None:
    p = base()["logp"].exp()
    same(weigh("chord_phi"), weigh("chord_phi", logp=torch.log1p(-p)))
    peak = weigh("chord_phi", logp=full(-math.log(2.0), B, T))
    same(peak, SFT / 4)
    assert (weigh("chord_phi") <= peak).all()


def test_luffy_far_and_near() -> None:
    ones = full(1, B, 1)
    same(1e9 * weigh(of("luffy", gamma=1e9), advantage=ones), DFT, 1e-8)
    tiny = weigh(of("luffy", gamma=1e-12), advantage=ones) * 1e12
    same(tiny, (1 / base()["logp"].exp()).where(base()["mask"] > 0, 0.0), 1e-8)
    grid = torch.linspace(0.01, 0.99, B * T, dtype=torch.float64).reshape(B, T)
    peak = weigh("luffy", logp=full(math.log(0.1), B, T), advantage=ones)
    same(peak, SFT / 4)
    assert (weigh("luffy", logp=grid.log(), advantage=ones) <= peak + 1e-15).all()


def test_iw_sft_is_loglinear_in_temperature_and_blind_to_repetition() -> None:
    given = base()
    slope = weigh(of("iw_sft", temperature=0.6), given).log() / weigh(of("iw_sft", temperature=0.2), given).log()
    trained = given["mask"] > 0
    same(slope[trained], torch.full_like(slope[trained], 3.0), 1e-9)
    twice = {name: value.repeat_interleave(2, dim=1) for name, value in given.items() if value.shape == (B, T)}
    same(rwft.build_objective("iw_sft")(twice), rwft.build_objective("iw_sft")(given))
    product = of("sequence_is", clip=1e9)
    same(rwft.build_objective(product)(twice), rwft.build_objective(product)(given) ** 2)


def test_psft_rests_beyond_its_clip_and_never_below() -> None:
    given = base()
    ratio = (given["logp"] - given["old_logp"]).exp()
    w = weigh("psft")
    assert (ratio < 0.7).any()
    assert (ratio > 1.28).any()
    assert ((w == 0) == ((ratio > 1.28) | (given["mask"] == 0))).all()


def test_pear_ends_with_weight_one() -> None:
    given = base()
    last = given["mask"].cumsum(1).argmax(1, keepdim=True)
    same(weigh("pear").gather(1, last), full(1, B, 1))


def test_clipping_regions_of_ppo() -> None:
    given = base()
    ratio = (given["logp"] - given["behavior_logp"]).exp()
    silent = ((given["advantage"] > 0) & (ratio > 1.2)) | ((given["advantage"] < 0) & (ratio < 0.8))
    trained = given["mask"] > 0
    assert ((weigh("ppo_clip") == 0)[trained] == silent[trained]).all()
    assert silent[trained].any()
    for always in ("cispo", "cispo_clip", "sapo"):
        assert (weigh(always)[trained] != 0).all()


def test_one_token_gspo_and_gmpo_are_ppo() -> None:
    given = base()
    single = full(0, B, T)
    single[:, 2] = 1
    given["mask"] = single
    wide = of("ppo_clip", low=0.3, high=0.3)
    same(weigh(of("gspo", low=0.3, high=0.3), given), weigh(wide, given))
    width = 0.4
    matched = of("ppo_clip", low=1 - math.exp(-width), high=math.exp(width) - 1)
    same(weigh(of("gmpo", width=width), given), weigh(matched, given))


def test_the_off_policy_mask_drops_bad_rows_that_the_policy_has_left() -> None:
    given = base()
    gap = seq_sum(given["behavior_logp"] - given["logp"], given["mask"]) / given["mask"].sum(1, keepdim=True)
    dropped = (given["advantage"] < 0) & (gap > 0)
    assert dropped.any()
    assert ((given["advantage"] < 0) & ~dropped).any()
    strict = of("off_policy_mask", delta=0)
    same(weigh(strict, given), SFT * ~dropped)
    same(weigh(strict, given, **ON_POLICY), SFT)
    same(weigh(of("off_policy_mask", delta=99), given), SFT)


def test_sapo_is_even_around_one() -> None:
    ones = full(1, B, 1)
    step = torch.linspace(0.01, 0.9, B * T, dtype=torch.float64).reshape(B, T)
    zero = full(0, B, T)
    up = weigh("sapo", logp=(1 + step).log(), behavior_logp=zero, advantage=ones) / (1 + step)
    down = weigh("sapo", logp=(1 - step).log(), behavior_logp=zero, advantage=ones) / (1 - step)
    same(up, down, 1e-9)


def test_vespo_peaks_at_power_over_decay() -> None:
    """k = 2, lambda = 3: at W = 2/3, with value (2/3)^2 e."""
    ones, zero = full(1, B, 1), full(0, B, T)
    single = full(0, B, T)
    single[:, 0] = 1

    def at(w: float) -> Tensor:
        return weigh("vespo", logp=full(math.log(w), B, T), behavior_logp=zero, advantage=ones, mask=single)

    same(at(2 / 3), single * (4 / 9) * math.e)
    assert (at(2 / 3) >= at(0.6)).all()
    assert (at(2 / 3) >= at(0.74)).all()


def test_topr_lets_go_of_improbable_negatives() -> None:
    given = base()
    given["reward"] = -full(1, B, 1)
    sizes = [weigh("topr", given, logp=given["behavior_logp"] - gap).abs() for gap in (-1.0, 0.0, 0.5, 1.0, 20.0)]
    same(sizes[0], SFT)
    same(sizes[1], SFT)
    trained = given["mask"] > 0
    assert all((a > b)[trained].all() for a, b in itertools.pairwise(sizes[1:]))
    assert sizes[-1].max() < 1e-8


def test_nft_on_policy_is_grpo() -> None:
    """With the factor sqrt((1 - r) / r): the reward standardised by the population deviation sqrt(r (1 - r))."""
    right = torch.tensor([[1.0], [0], [0], [1], [1], [0]], dtype=torch.float64)
    rate = torch.tensor([[1 / 3]] * 3 + [[0.8]] * 3, dtype=torch.float64)
    grpo = (right - rate) / (rate * (1 - rate)).sqrt()
    same(
        weigh(of("nft", prompts="sqrt"), reward=right, group_mean=rate, **ON_POLICY), grpo.expand(B, T) * base()["mask"]
    )


def test_nft_negatives_vanish_with_the_success_rate_down_to_its_floor() -> None:
    wrong = full(0, B, 1)
    hopeless = weigh("nft", reward=wrong, group_mean=full(0, B, 1), **ON_POLICY)
    same(hopeless, -SFT * 0.02 / 0.98)


def test_dpo_weights_cancel_swap_and_fade() -> None:
    given = base()
    given["group"] = torch.tensor([0, 0, 1, 1, 2, 2])
    w = rwft.build_objective("dpo")(given)
    same(w[0::2] + w[1::2] + 1, torch.ones(3, 1, dtype=torch.float64))
    swapped = rwft.build_objective("dpo")({**given, "reward": -given["reward"]})
    assert torch.equal(w.sign(), -swapped.sign())
    tiny = rwft.build_objective(of("dpo", beta=1e-9))(given) / 1e-9
    same(tiny.abs(), full(0.5, B, 1), 1e-8)
    chosen = (given["reward"] == given["reward"].reshape(3, 2).amax(1).repeat_interleave(2)[:, None]).double()
    far = rwft.build_objective("dpo")({**given, "logp": given["logp"] + 1e4 * chosen})
    assert far.abs().max() < 1e-12


def test_ipo_is_satisfied_at_its_margin() -> None:
    given = base()
    given["group"] = torch.tensor([0, 0, 1, 1, 2, 2])
    given["mask"] = full(1, B, T)
    chosen = (given["reward"] == given["reward"].reshape(3, 2).amax(1).repeat_interleave(2)[:, None]).double()
    at_margin = given["ref_logp"] + chosen * (1 / (2 * 0.1)) / T
    assert rwft.build_objective("ipo")({**given, "logp": at_margin}).abs().max() < 1e-9


def test_kto_peaks_at_its_reference_point_and_is_even() -> None:
    given = base()
    k = seq_sum(given["logp"] - given["ref_logp"], given["mask"])
    length = given["mask"].sum(1, keepdim=True)
    good = {"reward": full(1, B, 1)}

    def at(u: float) -> Tensor:
        moved = given["logp"] + (0.3 + u - k) / length
        return rwft.build_objective(of("kto", desirable=2))({**given, **good, "logp": moved})

    same(at(0.0), full(2 * 0.1 / 4, B, 1))
    same(at(4.0), at(-4.0))
    assert (at(4.0) < at(0.0)).all()


def test_dro_is_silent_exactly_at_the_optimum() -> None:
    """pi = pi_ref e^((r - V) / tau): no completion has a weight, whoever wrote the data."""
    given, tau = base(), 0.4
    length = given["mask"].sum(1, keepdim=True)
    optimal = given["ref_logp"] + given["advantage"] / tau / length
    assert weigh(of("dro", temperature=tau), given, logp=optimal).abs().max() < 1e-12
    assert weigh(of("dro", temperature=tau), given).abs().max() > 0.1


def test_dro_optimum_is_normalised_by_the_soft_value() -> None:
    """V = tau log E_ref[e^(r / tau)] makes that optimum a distribution: four arms, by hand in numpy."""
    reference, r, tau = np.array([0.1, 0.2, 0.3, 0.4]), np.array([1.0, 0.0, -1.0, 2.0]), 0.7
    value = tau * np.log((reference * np.exp(r / tau)).sum())
    policy = reference * np.exp((r - value) / tau)
    assert policy.sum() == pytest.approx(1, abs=1e-12)
    column = lambda x: torch.tensor(x, dtype=torch.float64)[:, None]
    given = {"logp": column(np.log(policy)), "ref_logp": column(np.log(reference)), "advantage": column(r - value)}
    w = rwft.build_objective(of("dro", temperature=tau))({**given, "mask": column([1.0] * 4)})
    assert w.abs().max() < 1e-12


def test_one_token_oreo_is_twice_dro() -> None:
    given = base()
    single = full(0, B, T)
    single[:, 2] = 1
    given["mask"] = single
    same(weigh(of("oreo", beta=0.3), given), 2 * weigh(of("dro", temperature=0.3), given))
    same(weigh(of("oreo_token", beta=0.3), given), 2 * weigh(of("dro", temperature=0.3), given))
    by_token = weigh(of("dro_token", beta=0.3), given, behavior_logp=given["ref_logp"])
    same(0.3 * by_token, weigh(of("dro", temperature=0.3), given))


def test_the_implicit_reward_of_the_first_token_is_dpos_of_the_completion() -> None:
    """beta log pi_phi(y) / pi_ref(y): at discount 1 the return of all token rewards; of no model that is its own."""
    given = base()
    first = given["mask"].argmax(1, keepdim=True)
    whole = 0.05 * seq_sum(given["aux_logp"] - given["ref_logp"], given["mask"])
    same(weigh("implicit_reward", given).gather(1, first), whole)
    assert weigh("implicit_reward", given, aux_logp=given["ref_logp"]).abs().max() == 0


def test_a_star_po_values_between_mean_and_best() -> None:
    given = {**base(), **ON_POLICY}
    groups = [slice(0, 3), slice(3, 5), slice(5, 6)]
    for temperature, value in ((1e6, torch.mean), (1e-6, torch.max)):
        expected = torch.cat([given["reward"][g] - value(given["reward"][g]) for g in groups])
        w = rwft.build_objective(of("a_star_po", value_temperature=temperature, temperature=0.5))(given)
        torch.testing.assert_close(w, expected, rtol=0, atol=1e-4)


def test_every_objective_is_reduced_to_a_neighbour() -> None:
    source = Path(__file__).read_text()
    assert [name for name in rwft.objective if f'"{name}"' not in source] == []


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.6, 0.99, 1.0])
@pytest.mark.parametrize("name", ["rho1", "token_cleaning"])
def test_token_selectors_keep_their_share_of_each_sequence(name: str, keep: float) -> None:
    """round(keep n) of n trained tokens, at least one; between equal scores the earlier ones."""
    given = base()
    lengths = given["mask"].sum(1).long().tolist()
    expected = [max(1, round(keep * n)) for n in lengths]
    assert weigh(of(name, keep=keep), given).sum(1).long().tolist() == expected
    ties = weigh(of(name, keep=keep), given, **ON_POLICY, aux_logp=given["logp"])
    for row, mask, number in zip(ties, given["mask"], expected, strict=True):
        assert row[mask > 0].tolist() == [1.0] * number + [0.0] * (int(mask.sum()) - number)


VISIBLE = {"top_fraction": {"keep": 0.8}, "gspo": {"low": 0.5, "high": 0.5}}  # the default weighs no row of the trial


@pytest.mark.parametrize("name", list(rwft.objective))
def test_the_gradient_is_the_slope_of_the_loss_with_frozen_weights(name: str) -> None:
    """By finite differences along a random direction of the logits, with the weights of the starting point."""
    case = trial()
    weights = rwft.build_objective(of(name, **VISIBLE.get(name, {})))(case.signals)
    z = case.logits.clone().requires_grad_()
    surrogate_loss(case.logp(z), weights, case.mask, 3.0).backward()
    assert z.grad is not None
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = 1e-5
    ends = [surrogate_loss(case.logp(case.logits + s * step * direction), weights, case.mask, 3.0) for s in (1, -1)]
    slope = float(ends[0] - ends[1]) / (2 * step)
    assert slope == pytest.approx(float((z.grad * direction).sum()), rel=1e-6, abs=1e-9)
    assert abs(slope) > 1e-7


def test_all_wrong_or_all_equal_is_zero_and_finite() -> None:
    equal = {"reward": full(0, B, 1)}
    for spec in ("filtered_bc", "raft", "dpo", "ipo", "rpo", "reinforce_rej"):
        given = {**base(), **equal, "group_std": full(0, B, 1)}
        assert torch.equal(weigh(spec, given), full(0, B, T)), spec
