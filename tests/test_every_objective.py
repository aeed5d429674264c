"""Every objective, from a file of rollouts to moved parameters: two steps of a tiny policy, and what was logged."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import rwft
from rwft.loop import train
from rwft.policy import load_policy
from tests.tiny import tiny

CREDIT = ("data.credit.baseline=group_mean", "train.steps=2", "train.seed=3")
LOGGED = ("loss/mean", "nll/mean", "weight/mean", "weight/max", "weight/min", "weight/ess", "grad_norm", "lr")
Parameters = Mapping[str, Tensor]


def moved(folder: Path, one: str, other: Parameters) -> float:
    """Largest change of a parameter of the run `one` from `other`."""
    final = load_file(folder / one / "model" / "model.safetensors")
    assert final.keys() == other.keys()
    return max(float((final[name].double() - other[name].double()).abs().max()) for name in final)


def logged(folder: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts, and `other/model`: the same policy after some SFT, for what reads a second frozen model."""
    path = tmp_path_factory.mktemp("objectives")
    train(tiny(path, "train.steps=5", "train.lr=3e-2", name="other"))
    return path


@pytest.fixture(scope="module")
def start(folder: Path) -> Parameters:
    """The parameters that every run starts from."""
    config = tiny(folder, *CREDIT)
    policy = load_policy(config.model, config.train.seed, torch.device("cpu"))
    return {name: value.detach().clone() for name, value in policy.causal.state_dict().items()}


@pytest.fixture(scope="module")
def plain(folder: Path) -> Parameters:
    """Where DFT alone ends."""
    run(folder, "dft", "plain")
    return load_file(folder / "plain" / "model" / "model.safetensors")


def run(folder: Path, objective: Any, name: str, *overrides: str) -> list[dict[str, Any]]:
    """Train and give back what was logged."""
    reads = rwft.build_objective(objective).reads
    second = [f"auxiliary.path={folder / 'other' / 'model'}"] if "aux_logp" in reads else []
    train(tiny(folder, *CREDIT, *second, *overrides, objective=objective, name=name))
    return logged(folder, name)


@pytest.mark.parametrize("name", list(rwft.objective))
def test_an_objective_trains(name: str, folder: Path, start: Parameters) -> None:
    lines = run(folder, name, name)
    steps = [line for line in lines if "loss/mean" in line]
    assert len(steps) == 2
    for line in steps:
        for key in LOGGED:  # a figure that is not finite is left out of the log
            assert math.isfinite(line[key]), key
        assert line["grad_norm"] > 0
        assert max(line["weight/max"], -line["weight/min"]) > 0
    assert moved(folder, name, start) > 1e-4


def test_an_objective_that_weighs_nothing_moves_nothing(folder: Path, start: Parameters) -> None:
    """Otherwise the check above could not fail."""
    (folder / "nothing.py").write_text('def nothing(logp):\n    """Nothing: $w = 0$."""\n    return 0 * logp\n')
    run(folder, f"{folder}/nothing.py:nothing", "nothing")
    assert moved(folder, "nothing", start) == 0


@pytest.mark.parametrize("name", list(rwft.regularizer))
def test_a_regularizer_trains_beside_dft(name: str, folder: Path, start: Parameters, plain: Parameters) -> None:
    reference = f"reference.path={folder / 'other' / 'model'}"
    lines = run(folder, "dft", f"with_{name}", f"regularize=[{{name: {name}, coef: 0.5}}]", reference)
    steps = [line for line in lines if "loss/mean" in line]
    assert len(steps) == 2
    assert all(math.isfinite(line[f"penalty/{name}/mean"]) for line in steps)
    assert moved(folder, f"with_{name}", start) > 1e-4
    assert moved(folder, f"with_{name}", plain) > 1e-6


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["iw_sft", "psft"])
def test_a_policy_at_its_start_has_ratio_one(name: str, dtype: str, folder: Path) -> None:
    """The frozen log-probabilities and those of the step come from other batches, and yet agree."""
    line = run(folder, name, f"ratio_{name}_{dtype}", f"model.dtype={dtype}", "train.log_every=1")[0]
    assert line["weight/min"] == pytest.approx(1, abs=1e-5)
    assert line["weight/max"] == pytest.approx(1, abs=1e-5)


SCALED = '''
def plain(logp, reward):
    """Some weights: $w = p e^r$."""
    return logp.exp() * reward.exp()


def scaled(logp, reward):
    """The same, larger: $w = 64 p e^r$."""
    return 64 * logp.exp() * reward.exp()
'''


def test_self_normalised_weights_have_no_scale(folder: Path) -> None:
    """And under equal weights the loss is the mean NLL: they sum to 1."""
    (folder / "scaled.py").write_text(SCALED)
    for name in ("plain", "scaled"):
        run(folder, f"{folder}/scaled.py:{name}", f"w_{name}", "train.normalize=weight", "train.clip=0")
    final = load_file(folder / "w_plain" / "model" / "model.safetensors")
    assert moved(folder, "w_scaled", final) < 1e-12
    line = run(folder, "sft", "w_sft", "train.normalize=weight")[0]
    assert line["loss/mean"] == pytest.approx(line["nll/mean"], rel=1e-12)


PRODUCT = '''
def product(logp, ref_logp, advantage, mask):
    """All three at once: $w = A 0.1 p / (p + 0.1)^2 e^A 1[gain <= 1/2]$."""
    p = logp.exp()
    length = mask.sum(1, keepdim=True).clamp(min=1)
    gain = (logp - ref_logp).where(mask > 0, 0.0).sum(1, keepdim=True) / length
    return advantage * 0.1 * p / (p + 0.1) ** 2 * advantage.exp().clamp(max=20.0) * (gain <= 0.5)
'''


def test_luffy_awr_and_tail_sft_compose(folder: Path, start: Parameters) -> None:
    """Their product by hand: p = gamma has A/4, times e^A, times whether the row has gained at most 1/2 nat a token."""
    signals = {
        "logp": torch.tensor([[0.1, 0.4], [0.1, 0.4]], dtype=torch.float64).log(),
        "ref_logp": torch.tensor([[0.1, 0.4], [0.01, 0.4]], dtype=torch.float64).log(),  # gains 0 and ln(10) / 2
        "advantage": torch.tensor([[math.log(2)], [math.log(2)]], dtype=torch.float64),
        "mask": torch.ones(2, 2, dtype=torch.float64),
    }
    ln2 = math.log(2)
    weights = rwft.build_objective(["luffy", "awr", "tail_sft"])(signals)
    expected = torch.tensor([[2 * ln2 / 4, 2 * ln2 * 0.16], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)
    run(folder, ["luffy", "awr", "tail_sft"], "composed")
    (folder / "product.py").write_text(PRODUCT)
    run(folder, f"{folder}/product.py:product", "by_hand")
    assert moved(folder, "composed", start) > 1e-4
    assert moved(folder, "composed", load_file(folder / "by_hand" / "model" / "model.safetensors")) < 1e-12
