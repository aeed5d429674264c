"""Metrics of a step against sums written out here, and the same whatever the layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rwft.config import Config, CreditConfig, to_yaml
from rwft.data.batching import Collate
from rwft.data.credit import fit
from rwft.data.prepare import prepare
from rwft.errors import ConfigError
from rwft.held_out import held_out_likelihood
from rwft.loop import train
from rwft.metrics import Meter
from rwft.observe import standing
from rwft.policy import load_policy, load_tokenizer
from tests.test_distributed import torchrun
from tests.test_loop import distance, parameters
from tests.tiny import tiny

OBJECTIVE = ["tis", "reinforce"]
WATCHED = ("train.watch=[entropy,ref_logp,behavior_logp]", "data.credit.baseline=group_mean")


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def reference_model(folder: Path) -> str:
    """Another model than the policy, so that ratios to it differ from 1."""
    config = tiny(folder)
    load_policy(config.model, seed=7).causal.save_pretrained(folder / "reference")
    load_tokenizer(config.model).save_pretrained(folder / "reference")
    return str(folder / "reference")


def whole_step(folder: Path, *overrides: str) -> Config:
    """One step over every training row."""
    more = (f"reference.path={reference_model(folder)}", "train.steps=1", "train.batch_size=100")
    return tiny(folder, *WATCHED, *more, *overrides, objective=OBJECTIVE)


def by_token(config: Config) -> dict[str, np.ndarray]:
    """Every trained token of every training row, from the models' own logits: one array a quantity."""
    tokenizer = load_tokenizer(config.model)
    rows = prepare(config.data, tokenizer, frozenset({"behavior_logp"}), Path(config.cache)).train
    policy = load_policy(config.model, config.train.seed).causal.eval()
    other = type(policy).from_pretrained(config.reference.path, dtype=torch.float64).eval()
    out: dict[str, list[float]] = {}
    columns = rows.take(np.arange(len(rows)))
    for index in range(len(rows)):
        ids, mask = torch.tensor(columns["ids"][index]), np.array(columns["mask"][index])
        group = rows.reward[rows.group == rows.group[index]]
        advantage = rows.reward[index] - group.mean() if len(group) > 1 else 0.0
        with torch.no_grad():
            mine, theirs = (m(ids[None, :-1]).logits[0].double().log_softmax(-1) for m in (policy, other))
        for t in np.flatnonzero(mask):
            token = {
                "row": index,
                "reward": rows.reward[index],
                "advantage": advantage,
                "logp": float(mine[t, ids[t + 1]]),
                "ref": float(theirs[t, ids[t + 1]]),
                "mu": columns["behavior_logp"][index][t],
                "entropy": float(-(mine[t].exp() * mine[t]).sum()),
            }
            for name, value in token.items():
                out.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in out.items()}


def expected(x: dict[str, np.ndarray]) -> dict[str, float]:
    """What the line must say, from the definitions."""
    w = x["advantage"] * np.minimum(np.exp(x["logp"] - x["mu"]), 2.0)
    seen = x["advantage"] != 0  # the others weigh nothing, whatever the policy, and are not forwarded
    nll, p, size = -x["logp"], np.exp(x["logp"]), np.abs(w)
    good, bad = seen & (x["reward"] > x["reward_mean"]), seen & (x["reward"] < x["reward_mean"])
    out = {
        "tokens/sum": len(w),
        "forwarded_tokens/sum": seen.sum(),
        "sequences/sum": len(np.unique(x["row"])),
        "loss/mean": (w * nll).sum() / len(w),
        "nll/mean": nll[seen].mean(),
        "nll_good/mean": nll[good].mean(),
        "nll_bad/mean": nll[bad].mean(),
        "nll_negative/mean": nll[w < 0].mean(),
        "weight/mean": w.mean(),
        "weight/max": w.max(),
        "weight/min": w.min(),
        "weight/ess": size.sum() ** 2 / (w**2).sum() / len(w),
        "weight/zero_share": (w == 0).mean(),
        "weight/at_max_share": np.isclose(w, w.max(), rtol=1e-4, atol=0).mean(),
        "weight/negative_share": size[w < 0].sum() / size.sum(),
        "weight/negative_improbable_share": size[(w < 0) & (p < 0.01)].sum() / size[w < 0].sum(),
        "entropy/mean": x["entropy"][seen].mean(),
    }
    for name, logp in (("reference", x["ref"]), ("behavior", x["mu"])):
        gap = (x["logp"] - logp)[seen]
        rho = np.exp(gap)
        out |= {
            f"log_ratio_to_{name}/mean": gap.mean(),
            f"ratio_to_{name}/mean": rho.mean(),
            f"ratio_to_{name}/ess": rho.sum() ** 2 / (rho**2).sum() / len(rho),
            f"logged_kl_from_{name}/mean": (rho - 1 - gap).mean(),
        }
    return out


def test_every_figure_of_a_step_is_what_it_says(tmp_path: Path) -> None:
    config = whole_step(tmp_path)
    train(config)
    x = by_token(config)
    row_rewards = [x["reward"][x["row"] == row][0] for row in np.unique(x["row"])]
    wanted = expected({**x, "reward_mean": np.asarray(np.mean(row_rewards))})
    (found,) = (line for line in lines(tmp_path / "run") if "nll/mean" in line)
    wanted["reward/mean"] = float(np.mean(row_rewards))
    for name, value in wanted.items():
        assert found[name] == pytest.approx(float(value), rel=1e-6, abs=1e-9), name
    assert 0 < wanted["weight/zero_share"] < 1, "rows that are not forwarded"
    assert 0 < wanted["weight/negative_improbable_share"] < 1
    rest = {"step", "lr", "grad_norm", "grad_clipped/mean", "tokens_per_second"}
    assert found.keys() == wanted.keys() | rest


LAYOUTS = {
    "16x1": ("train.batch_size=16",),
    "1x16": ("train.batch_size=1", "train.accumulate=16"),
    "4x4": ("train.batch_size=4", "train.accumulate=4"),
    "shared": ("train.batch_size=16", "data.share_prompts=always"),
}
LOGGED = ("train.steps=6", "train.log_every=3", "train.eval_every=3")


def assert_same(one: Path, other: Path) -> None:
    a, b = lines(one), lines(other)
    assert len(a) == len(b) == 4  # two of training, each with an evaluation
    for left, right in zip(a, b, strict=True):
        assert left.keys() == right.keys()
        for key in left.keys() - {"tokens_per_second"}:
            # norms inside the model round to float32, so another order of sums shows at 1e-7
            assert left[key] == pytest.approx(right[key], rel=1e-6, abs=1e-7), key


@pytest.mark.parametrize("layout", ["1x16", "4x4", "shared"])
def test_figures_do_not_depend_on_the_layout(layout: str, tmp_path: Path) -> None:
    more = (f"reference.path={reference_model(tmp_path)}", *WATCHED, *LOGGED)
    train(tiny(tmp_path, *more, *LAYOUTS["16x1"], objective=OBJECTIVE, name="one"))
    train(tiny(tmp_path, *more, *LAYOUTS[layout], objective=OBJECTIVE, name="other"))
    assert_same(tmp_path / "one", tmp_path / "other")


@pytest.mark.distributed
def test_figures_of_two_ranks_are_those_of_one(tmp_path: Path, root: Path) -> None:
    more = (f"reference.path={reference_model(tmp_path)}", *WATCHED, *LOGGED, "train.rows_every=2")
    train(tiny(tmp_path, *more, "train.batch_size=16", objective=OBJECTIVE, name="one"))
    config = tiny(tmp_path, *more, "train.batch_size=4", "train.accumulate=2", objective=OBJECTIVE, name="two")
    (tmp_path / "two.yaml").write_text(to_yaml(config))
    torchrun(2, tmp_path, ["two"], root)
    assert_same(tmp_path / "one", tmp_path / "two")
    from rwft.rowlog import read_rows

    one, two = (read_rows(tmp_path / name).to_pylist() for name in ("one", "two"))
    assert len(one) == len(two) > 20
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            exact = value is None or isinstance(value, str)
            assert right[key] == (value if exact else pytest.approx(value, rel=1e-6, abs=1e-9)), key


def test_what_is_watched_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    more = ("model.dtype=float32", "data.credit.baseline=group_mean")
    train(tiny(tmp_path, *more, objective=OBJECTIVE, name="plain"))
    train(tiny(tmp_path, *more, *WATCHED, "train.rows_every=1", objective=OBJECTIVE, name="watched"))
    assert distance(parameters(tmp_path / "plain"), parameters(tmp_path / "watched")) == 0.0
    plain, watched = lines(tmp_path / "plain"), lines(tmp_path / "watched")
    assert "entropy/mean" not in plain[0]
    assert {"entropy/mean", "logged_kl_from_reference/mean"} <= watched[0].keys()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [("[entropie]", "did you mean 'entropy'"), ("entropy", r"train\.watch: found 'entropy', expected a list")],
)
def test_what_cannot_be_watched_is_refused(given: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        tiny(tmp_path, f"train.watch={given}")


@pytest.mark.parametrize(("clip", "share"), [("0", 0.0), ("1.0e-6", 1.0), ("1.0e6", 0.0)])
def test_the_share_of_clipped_steps(clip: str, share: float, tmp_path: Path) -> None:
    train(tiny(tmp_path, f"train.clip={clip}", "train.log_every=2"))
    assert [line["grad_clipped/mean"] for line in lines(tmp_path / "run") if "loss/mean" in line] == [share, share]


def test_good_rows_are_above_the_mean_and_bad_ones_below() -> None:
    def of(*rewards: float) -> list[int]:
        n = np.arange(len(rewards))
        given = np.array(rewards)
        return standing(fit(CreditConfig(), given, n, n + 1), given).tolist()

    assert of(0, 1, 1, 0, 1) == [-1, 1, 1, -1, 1]
    assert of(0.1, 0.2, 0.3) == [-1, 0, 1]  # their mean is 0.20000000000000004
    assert of(*[0.1] * 7) == [0] * 7  # their mean is 0.09999999999999999
    assert of(-3, -1, -2, 6) == [-1, -1, -1, 1]


def read(*meters: Meter) -> dict[str, float]:
    """What the first of some ranks reads."""
    sent: list[torch.Tensor] = []
    for meter in meters[1:]:
        meter.read(lambda tensor: sent.append(tensor) or tensor)
    return meters[0].read(lambda tensor: torch.cat([tensor, *sent]))


def metered(*parts: list[float]) -> Meter:
    meter = Meter(torch.device("cpu"))
    for part in parts:
        meter.add({"tokens": torch.tensor(float(len(part)))}, torch.tensor(part))
    return meter


def test_the_share_at_the_greatest_weight_by_hand() -> None:
    assert read(metered([1.0, 2.0, 2.0]))["weight/at_max_share"] == pytest.approx(2 / 3)
    assert read(metered([1.0, 2.0], [2.0, 0.5], [2.00001]))["weight/at_max_share"] == pytest.approx(3 / 5)
    assert read(metered([2.0, 2.0], [3.0, 1.0]))["weight/at_max_share"] == pytest.approx(1 / 4)
    assert read(metered([-2.0, -1.0, -1.0]))["weight/at_max_share"] == pytest.approx(2 / 3)
    assert read(metered([3.0, 1.0], [2.0]), metered([3.0, 3.0]))["weight/at_max_share"] == pytest.approx(3 / 5)
    assert read(metered([3.0, 1.0]), metered([5.0, 3.0]))["weight/at_max_share"] == pytest.approx(1 / 4)
    assert read(metered([1.0, 1.0]), metered())["weight/at_max_share"] == 1.0


def test_zero_weights_that_were_not_forwarded_count() -> None:
    meter = metered([-1.0, 0.0])
    meter.add_zero_weights(6.0, 2.0, 1.0)
    figures = read(meter)
    assert figures["weight/zero_share"] == pytest.approx(7 / 8)
    assert figures["weight/at_max_share"] == pytest.approx(7 / 8)
    assert (figures["weight/max"], figures["weight/min"], figures["tokens/sum"]) == (0.0, -1.0, 8.0)
    assert figures["reward/mean"] == 0.5


def test_ranks_are_read_by_one_collective() -> None:
    calls: list[tuple[int, ...]] = []
    meter = metered([1.0])
    meter.add_penalties({"entropy": torch.tensor(3.0), "gem": torch.tensor(5.0)})
    figures = meter.read(lambda tensor: calls.append(tuple(tensor.shape)) or torch.cat([tensor, tensor]))
    assert len(calls) == 1
    assert (figures["tokens/sum"], figures["penalty/entropy/mean"], figures["penalty/gem/mean"]) == (2.0, 3.0, 5.0)


def test_a_sum_that_nobody_knows_is_refused() -> None:
    with pytest.raises(KeyError, match="tokes"):
        Meter(torch.device("cpu")).add({"tokes": torch.ones(())})


# --- held-out rows


class Ruler(torch.nn.Module):
    """A policy for which a token's NLL is a hundredth of its id."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        return {"logp": -(ids[:, 1:] / 100.0)[mask > 0]}


def held_out(folder: Path, rewards: list[float], training: list[float]) -> tuple[dict[str, float], np.ndarray, Any]:
    """Figures of rows with these rewards, after credit was fitted on others; the rows' NLL and tokens."""
    data = folder / "graded.jsonl"
    texts = ("a", "zd", "ccc", "b", "Qx")
    rows = [{"prompt": "q", "completion": text, "reward": r} for text, r in zip(texts, rewards, strict=True)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny(folder, f"data.path={data}", "data.eval_fraction=0")
    found = prepare(config.data, load_tokenizer(config.model), frozenset(), folder / "cache").train
    n = np.arange(len(training))
    credit = fit(CreditConfig(), np.array(training), n, n + 1)
    collate = Collate(found, frozenset(), dtype=torch.float64)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, process_index=0, reduce=lambda tensor, how: tensor
    )
    figures = held_out_likelihood(Ruler(), collate, found, accelerator, credit)
    columns = found.take(np.arange(len(found)))
    each = zip(columns["ids"], columns["mask"], strict=True)
    nll = np.array([sum(i for i, m in zip(ids[1:], mask, strict=True) if m) / 100 for ids, mask in each])
    return figures, nll, found.trained


def test_held_out_figures_by_hand(tmp_path: Path) -> None:
    rewards = [0.0, 1.0, 0.5, 1.0, 0.25]
    figures, nll, tokens = held_out(tmp_path, rewards, training=[0.0, 1.0, 0.5])
    assert figures["nll/mean"] == pytest.approx(nll.sum() / tokens.sum())
    assert figures["nll_good/mean"] == pytest.approx((nll[1] + nll[3]) / (tokens[1] + tokens[3]))
    assert figures["nll_bad/mean"] == pytest.approx((nll[0] + nll[4]) / (tokens[0] + tokens[4]))
    r = np.array(rewards)
    assert figures["nll_reward_weighted/mean"] == pytest.approx((r * nll).sum() / (r * tokens).sum())
    assert len({round(value, 6) for value in figures.values()}) == 4


def test_rows_that_are_all_alike_are_neither_good_nor_bad(tmp_path: Path) -> None:
    figures, _, _ = held_out(tmp_path, [0.1] * 5, training=[0.1] * 7)
    assert figures.keys() == {"nll/mean", "nll_reward_weighted/mean"}
    assert math.isfinite(figures["nll/mean"])


# --- the page


def test_the_page_names_everything_that_a_run_writes(tmp_path: Path, root: Path) -> None:
    more = (*WATCHED, "train.eval_every=2", "train.on_nonfinite=skip", "regularize=[{name: entropy, coef: 0.01}]")
    train(tiny(tmp_path, *more, objective=OBJECTIVE))
    page = (root / "docs" / "metrics.md").read_text()
    names = {name for line in lines(tmp_path / "run") for name in line} - {"step"}
    assert len(names) > 30
    for name in names:
        known = "penalty/NAME/mean" if name.startswith("penalty/") else name.removeprefix("eval/")
        assert f"`{known}`" in page, name
